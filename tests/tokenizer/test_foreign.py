"""Tokenizers that others made: what of a text they lose is counted, what ends a document can be named, a text goes on
after a prompt as it stands in the whole, and a damaged file is refused in one line."""
import json
import random

import pytest

import tokenizer as T
from cli import BadInput
from tests.tokenizer.vocabularies import refused
from tokenizer.delimiters import Beside
from tokenizer.tokenmonster import byte_characters

tokenizers = pytest.importorskip("tokenizers")
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "and", "rain", "falls", "softly"]
METASPACE = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def added(token, content, special=True):
    return {"id": token, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": special}


def spec(model, specials=(), **parts):
    """A tokenizer.json as a dictionary. specials: (id, content)"""
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [added(*each) for each in specials],
            "normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None, "model": model} | parts


def bpe(pieces, unk=None, **more):
    """A BPE of single characters and of words that its merges build letter by letter."""
    vocab, merges = {}, []
    for piece in pieces:
        for end in range(1, len(piece) + 1):
            if end > 1 and piece[:end] not in vocab:
                merges.append([piece[:end - 1], piece[end - 1]])
            vocab.setdefault(piece[:end], len(vocab))
            vocab.setdefault(piece[end - 1], len(vocab))
    return {"type": "BPE", "dropout": None, "unk_token": unk, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": vocab, "merges": merges} | more


def metaspace_bpe(specials=("</s>",), **parts):
    """Words with their spaces, and specials before them."""
    model = bpe([*(f"\u2581{word}" for word in WORDS), "."])
    model["vocab"] = {piece: place for place, piece in enumerate([*specials, *model["vocab"]])}
    return spec(model, list(enumerate(specials)), **({"pre_tokenizer": METASPACE, "decoder": METASPACE} | parts))


def byte_bpe(specials=("</s>",), **parts):
    """All bytes, and some words."""
    model = bpe([*byte_characters(), *(f"\u0120{word}" for word in WORDS)])
    model["vocab"] = {piece: place for place, piece in enumerate([*specials, *model["vocab"]])}
    return spec(model, list(enumerate(specials)), **({"pre_tokenizer": BYTES, "decoder": BYTES} | parts))


def unigram(specials=("<unk>", "</s>"), unk_id=0, **parts):
    pieces = [*specials, "\u2581", *sorted(set("".join(WORDS))), *(f"\u2581{word}" for word in WORDS), "<", "/", ">"]
    model = {"type": "Unigram", "unk_id": unk_id, "byte_fallback": False,
             "vocab": [[piece, 0.0 if piece in specials else -5.0 - place] for place, piece in enumerate(pieces)]}
    return spec(model, list(enumerate(specials)), **({"pre_tokenizer": METASPACE, "decoder": METASPACE} | parts))


def words(kind="WordLevel", specials=("[UNK]", "</s>"), **parts):
    model = {"type": kind, "unk_token": "[UNK]",
             "vocab": {word: place for place, word in enumerate([*specials, *WORDS, "[", "]", "."])}}
    if kind == "WordPiece":
        model |= {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    return spec(model, list(enumerate(specials)), **({"pre_tokenizer": {"type": "WhitespaceSplit"}} | parts))


def load(made, *arguments, **options):
    return T.TokenizerJson(json.dumps(made).encode(), "theirs", *arguments, **options)


def sentence(rng, count=12):
    return " ".join(rng.choice(WORDS) for _ in range(count))


# -----------------------------------------------------------------------------
# what comes back, and what is lost

@pytest.mark.parametrize("made", [metaspace_bpe, byte_bpe, unigram], ids=lambda made: made.__name__)
def test_a_decoder_that_the_file_lacks(rng, made):
    """A text comes back; and for another program the file gets that decoder."""
    text = sentence(rng)
    vocabulary = load(made(decoder=None))
    assert vocabulary.decode(vocabulary.encode(text)) == text
    assert vocabulary.count_bytes(vocabulary.encode(text)) == len(text)
    again = tokenizers.Tokenizer.from_str(vocabulary.whole().decode())
    assert again.decode(vocabulary.encode(text).tolist()) == text
    assert load(made()).whole() == load(made()).data


def test_decoders_of_other_kinds(rng):
    """Words in pieces, ends of words, and a Metaspace that is a normalizer (Llama 2's) with bytes for the rest."""
    text = "thequick fox"
    pieces = {"[UNK]": 0, "</s>": 1, "the": 2, "##quick": 3, "fox": 4}
    wordpiece = spec({"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                      "max_input_chars_per_word": 100, "vocab": pieces}, [(0, "[UNK]"), (1, "</s>")],
                     pre_tokenizer={"type": "Whitespace"})
    ends = bpe([*"thequickfox", "x</w>", "k</w>"], end_of_word_suffix="</w>")
    ends["vocab"]["</s>"] = len(ends["vocab"])
    ends["merges"] = []
    of_ends = spec(ends, [(ends["vocab"]["</s>"], "</s>")], pre_tokenizer={"type": "WhitespaceSplit"})
    for made in (wordpiece, of_ends):
        vocabulary = load(made)
        assert vocabulary.decode(vocabulary.encode(text)) == text
    model = metaspace_bpe()["model"]
    for byte in range(256):
        model["vocab"][f"<0x{byte:02X}>"] = len(model["vocab"])
    steps = [{"type": "Prepend", "prepend": "\u2581"},
             {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]
    vocabulary = load(spec(model | {"byte_fallback": True}, [(0, "</s>")],
                           normalizer={"type": "Sequence", "normalizers": steps}))
    text = f"{sentence(rng)} \u65e5\u672c"
    ids, dropped = vocabulary.encode_counted(text)
    assert vocabulary.decode(ids) == text and dropped == 0


@pytest.mark.parametrize("made, spaces", [
    (metaspace_bpe(), True), (unigram(), True), (unigram(specials=("</s>",), unk_id=None), True), (words(), False),
    (words("WordPiece"), False), (words(pre_tokenizer={"type": "Whitespace"}), False),
    (spec(bpe(["[UNK]", *WORDS], "[UNK]"), pre_tokenizer={"type": "Whitespace"}), False),
], ids=["BPE", "Unigram", "Unigram without unk_id", "WordLevel", "WordPiece", "punctuation", "BPE with [UNK]"])
def test_what_no_token_covers(rng, made, spaces):
    """Characters without a token are counted by their bytes, wherever they stand; the rest is covered."""
    vocabulary = load(made, None if "</s>" in json.dumps(made) else "the")
    for _ in range(30):
        parts, lost = [rng.choice(WORDS) for _ in range(8)], 0
        for place in sorted(rng.sample(range(8), 3)):
            strange = "".join(rng.choice("\u65e5\u00e9\U0001f600#") for _ in range(rng.randint(1, 3)))
            if spaces and rng.random() < 0.5:  # in the middle of a word
                parts[place] = parts[place][:1] + strange + parts[place][1:]
            else:
                parts[place] = strange
            lost += len(strange.encode())
        assert vocabulary.encode_counted(" ".join(parts))[1] == lost == vocabulary.count_dropped(" ".join(parts))
    assert vocabulary.count_dropped(sentence(rng)) == 0


def test_bytes_that_are_missing(rng):
    """A byte-level BPE learnt from English has no token for many a byte."""
    model = bpe([*(character for byte, character in enumerate(byte_characters()) if byte < 0xC3 or byte == 0xE6)])
    model["vocab"]["</s>"] = len(model["vocab"])
    vocabulary = load(spec(model, [(model["vocab"]["</s>"], "</s>")], pre_tokenizer=BYTES))
    text = "the \u00e9 and \u65e5"  # C3 A9, E6 97 A5
    assert vocabulary.encode_counted(text)[1] == 1
    assert len(vocabulary.encode(text)) == len(text.encode()) - 1


def test_a_question_mark_is_one(rng):
    """The portable form writes "?" for what it lacks; a "?" of the text is not lost."""
    exact = T.load("quickstart-2048")
    vocabulary = T.TokenizerJson(T.portable.tokenizer_json(exact, lossless=False), "quick")
    assert vocabulary.count_dropped("what? and ??") == 0
    assert vocabulary.count_dropped("what? \u4e00") in (3, vocabulary.count_dropped("\u4e00"))


def test_text_that_a_normalizer_takes_out():
    """Control characters that a BertNormalizer removes are no longer there for any token."""
    vocabulary = load(words(normalizer={"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": False,
                                        "strip_accents": None, "lowercase": True}))
    assert vocabulary.count_dropped("the\x01\x02 quick") == 2
    assert "capital letters may change" not in " ".join(load(words()).notes)


def test_notes(rng):
    """What does not come back is said, and nothing of a tokenizer that loses nothing."""
    assert load(byte_bpe()).notes == () == T.load("quickstart-2048").notes
    assert "a text gets a space before it" in " ".join(load(byte_bpe(pre_tokenizer=BYTES | {
        "add_prefix_space": True})).notes)
    lower = load(byte_bpe(normalizer={"type": "Lowercase"}))
    assert "capital letters may change" in " ".join(lower.notes) and all("\n" not in note for note in lower.notes)


@pytest.mark.parametrize("made", [unigram(), words(), metaspace_bpe(), byte_bpe(),
                                  byte_bpe(("<s>", "</s>", "<|im_start|>"))], ids=["Unigram", "WordLevel", "BPE",
                                                                                   "bytes", "markers"])
def test_text_that_spells_out_a_special_token(rng, made):
    """No text becomes the token that ends documents, or another special one; what it stands for is there or counted."""
    vocabulary = load(made)
    special = {token["id"] for token in made["added_tokens"] if token["content"] not in ("<unk>", "[UNK]")}
    for _ in range(20):
        name = rng.choice(vocabulary.special_tokens)
        text = f"{sentence(rng, 3)} {name} {sentence(rng, 3)}{rng.choice(['', name])}"
        ids, dropped = vocabulary.encode_counted(text)
        assert special.isdisjoint(ids.tolist())
        assert dropped or vocabulary.decode(ids) == text
        plain = sentence(rng)
        assert vocabulary.encode(plain).tolist() == tokenizers.Tokenizer.from_str(json.dumps(made)).encode(
            plain, add_special_tokens=False).ids


# -----------------------------------------------------------------------------
# a text that goes on

@pytest.mark.parametrize("made", [metaspace_bpe(), byte_bpe(), unigram(), words(),
                                  words("WordPiece", pre_tokenizer={"type": "BertPreTokenizer"})],
                         ids=["Metaspace", "bytes", "Unigram", "words", "pieces"])
def test_a_continuation_keeps_its_first_space(rng, made):
    """What is printed after a prompt, id by id, is the rest of the whole text."""
    vocabulary = load(made)
    for _ in range(10):
        whole = vocabulary.encode(sentence(rng)).tolist()
        cut = rng.randrange(len(whole) + 1)
        stream = vocabulary.stream([vocabulary.eos_id, *whole[:cut]])
        said = [stream.push(token) for token in whole[cut:]]
        assert vocabulary.decode(whole[:cut]) + "".join(said) + stream.finish() == vocabulary.decode(whole)
        assert cut == len(whole) or any(said)  # it comes while it is written


def test_a_stream_holds_back_incomplete_characters(rng):
    """Bytes come out as characters, those of no character as U+FFFD; special tokens in between take no space."""
    vocabulary = load(byte_bpe(("</s>", "<x>")))
    text = "".join(rng.choice("a \u00e9\u65e5\U0001f600") for _ in range(40))
    stream = vocabulary.stream()
    said = [stream.push(token) for token in vocabulary.encode(text).tolist()]
    assert "".join(said) + stream.finish() == text and "\ufffd" not in "".join(said)
    stream = vocabulary.stream()
    half = vocabulary.encode("\u65e5").tolist()[:2]
    assert [stream.push(token) for token in half] == ["", ""] and stream.finish() == "\ufffd"
    vocabulary = load(metaspace_bpe(("</s>", "<x>")))
    ids = [*vocabulary.encode("the quick").tolist(), 1, 1, *vocabulary.encode("fox").tolist()]
    stream = vocabulary.stream(ids[:1])
    assert "the" + "".join(stream.push(token) for token in ids[1:]) + stream.finish() == vocabulary.decode(ids)


def test_a_stream_takes_linear_time(rng, monkeypatch):
    """However long the text is, each id costs the decoding of a few."""
    vocabulary, decoded = load(metaspace_bpe()), []
    ids = vocabulary.encode(sentence(rng, 3000)).tolist()
    right = vocabulary.decode
    monkeypatch.setattr(vocabulary, "decode", lambda ids: decoded.append(len(ids)) or right(ids))
    stream = vocabulary.stream(ids[:5])
    said = "".join([stream.push(token) for token in ids[5:]]) + stream.finish()
    assert right(ids[:5]) + said == right(ids)
    assert sum(decoded) < 10 * len(ids)


# -----------------------------------------------------------------------------
# what ends a document

def files(folder, **contents):
    """JSON files in a folder, named without .json."""
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_which_token_ends_a_document(tmp_path):
    """Somebody's word, then config.json, special_tokens_map.json, tokenizer_config.json, and a usual name."""
    made = byte_bpe(("<s>", "</s>", "[EOS]", "<|end|>", "<|im_end|>"))
    folder = files(tmp_path / "theirs", tokenizer=made)
    expected = [({}, "</s>"), ({"tokenizer_config": {"eos_token": {"content": "<|end|>"}}}, "<|end|>"),
                ({"special_tokens_map": {"eos_token": "[EOS]"}}, "[EOS]"), ({"config": {"eos_token_id": [4, 1]}},
                                                                           "<|im_end|>")]
    for contents, token in expected:
        files(folder, **contents)
        vocabulary = T.load(folder)
        assert (vocabulary.eos_token, vocabulary.bos_id) == (token, vocabulary.eos_id)
        assert bool(vocabulary.notes) == (token != "</s>") and (token == "</s>" or token in vocabulary.notes[0])
        assert vocabulary.sha256 == T.load(folder, beside=False).sha256
    assert T.load(folder, eos_token="<s>").eos_id == 0 == T.load(folder, eos_token=0).eos_id
    assert T.load(folder, eos_token="12").eos_id == 12
    assert T.load(folder, beside=False).eos_token == "</s>" == T.load(folder, eos_token=1).eos_token
    files(folder, config={"eos_token_id": 200}, special_tokens_map={"eos_token": "gone"}, tokenizer_config=[])
    assert T.load(folder).eos_token == "</s>"  # an id of a piece of text ends nothing
    for broken in ("", "{", "[" * 100_000, '{"eos_token_id": null}', '{"eos_token_id": "2"}', '{"eos_token_id": 1e99}'):
        (folder / "config.json").write_text(broken)
        assert T.load(folder).eos_token == "</s>"


def test_a_tokenizer_without_a_usual_end(tmp_path):
    """`[EOS]` and `<|end|>` are known; another one can be named; and one that is not there is added, after all ids."""
    assert load(byte_bpe(("[EOS]",))).eos_id == 0 == load(byte_bpe(("<|end|>",))).eos_id
    made = byte_bpe(("<fin>",))
    refused(lambda: load(made), "no end-of-text token", "--eos_token", "<fin>")
    refused(lambda: load(made, "99999"), "99999")
    assert load(made, "<fin>").eos_id == 0
    none = byte_bpe(())
    refused(lambda: load(none), "no end-of-text token", "--eos_token")
    vocabulary = load(none, "<|done|>")
    size = len(none["model"]["vocab"])
    assert (vocabulary.eos_id, vocabulary.vocab_size) == (size, size + 1)
    assert vocabulary.decode([*vocabulary.encode("the quick"), size]) == "the quick"
    assert size not in vocabulary.encode("a <|done|> in a text")
    assert T.TokenizerJson(vocabulary.whole(), "again", "<|done|>").eos_id == size
    assert load(none, "\u010a").eos_token == "\u010a"  # a line break, say
    refused(lambda: T.load("quickstart-2048", eos_token="</s>"), "tokenizer.json", "quickstart-2048")


def test_which_token_begins_a_document():
    """config.json's bos, if it is a special token and the tokenizer does not leave it out."""
    vocabulary = load(byte_bpe(("<s>", "</s>")))

    def bos(template=None, **config):
        tokenizer_config = {"add_bos_token": config.pop("add")} if "add" in config else {}
        processor = {"type": "TemplateProcessing", "single": template} if template is not None else None
        return Beside(config, {}, tokenizer_config).bos(vocabulary.special, processor)

    text = {"Sequence": {"id": "A", "type_id": 0}}
    assert bos() is None is bos(bos_token_id=None) is bos(bos_token_id=7) and bos(bos_token_id=0) == "<s>"
    assert bos(bos_token_id=0, add=False) is None and bos(bos_token_id=0, add=True) == "<s>"
    assert bos([{"SpecialToken": {"id": "<s>", "type_id": 0}}, text], bos_token_id=0) == "<s>"
    assert bos([text], bos_token_id=0) is None is bos([text, {"SpecialToken": {"id": "</s>"}}], bos_token_id=0)
    vocabulary = load(byte_bpe(("<s>", "</s>")), bos_token="<s>")
    assert (vocabulary.bos_id, vocabulary.eos_id, set(vocabulary.ends)) == (0, 1, {0, 1})
    assert vocabulary.delimiters == {"eos_token": "</s>", "bos_token": "<s>"} and "<s>" in vocabulary.notes[0]


def test_special_tokens_beyond_the_rows_of_a_model():
    """Padding without a row is let go of; what a text or its end needs is not."""
    made = byte_bpe(("</s>",))
    size = len(made["model"]["vocab"])
    made["added_tokens"].append(added(size, "<pad>"))
    vocabulary = load(made)
    assert vocabulary.vocab_size == size + 1
    vocabulary.within(size)
    assert vocabulary.vocab_size == size
    refused(lambda: load(made).within(size - 1), "another model's")
    refused(lambda: load(made, "<pad>").within(size), "another model's")


# -----------------------------------------------------------------------------
# damaged files

def mutated(rng: random.Random, data: bytes) -> bytes:
    """Other bytes, less of them, another value of a key, or one key the less."""
    if rng.random() < 0.4:
        data = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            start = rng.randrange(len(data))
            data[start:start + rng.choice([0, 1, 1, 8])] = rng.choice(
                [b"", b"\xff", b"\0", b'"', b"[", b"}", b"9" * 20, b"null", b"-1", b"1e999", b"\\ud800"])
        return bytes(data)
    value = json.loads(data)
    places = [(value, key) for key in value]
    for container, key in places:
        inner = container[key]
        if isinstance(inner, (dict, list)) and len(places) < 3000:
            places += [(inner, each) for each in (list(inner) if isinstance(inner, dict) else range(len(inner)))][:60]
    container, key = rng.choice(places[:80] if rng.random() < 0.7 else places)
    if rng.random() < 0.3:
        del container[key]
    else:
        container[key] = rng.choice([None, True, -1, 0, 1.5, 10**18, "", "x", "\u2581", [], {}, [[]], {"type": "x"},
                                     [None], {"": ""}])
    return json.dumps(value).encode()


def test_a_thousand_damaged_files(rng, capfd):
    """Each is refused in one line, or does what a tokenizer does; and nothing is lost without being counted."""
    makers = [metaspace_bpe, byte_bpe, unigram, words, lambda: words("WordPiece")]
    originals = [json.dumps(make()).encode() for make in makers]
    opened = 0
    for _ in range(1000):
        data, text = mutated(rng, rng.choice(originals)), f"{sentence(rng, 4)} \u65e5 </s>"
        try:
            vocabulary = T.TokenizerJson(data, "damaged")
            ids, dropped = vocabulary.encode_counted(text)
            assert 0 <= dropped <= len(text.encode())
            assert vocabulary.notes is not None and isinstance(vocabulary.decode(ids), str)
            stream = vocabulary.stream(ids[:2])
            assert isinstance("".join([stream.push(token) for token in ids[2:]]) + stream.finish(), str)
            opened += 1
        except BadInput as error:
            assert "\n" not in str(error) and len(str(error)) < 800
    assert opened > 100
    for deep in (b'{"model":' * 100_000, b"[" * 100_000):
        refused(lambda data=deep: T.TokenizerJson(data, "deep"), "not a tokenizer.json")
