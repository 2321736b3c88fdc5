"""The tokenizer.json of a vocabulary: nothing is lost, words stand for themselves, and other libraries agree."""
import json
import os
import subprocess
import sys
import unicodedata
from functools import partial

import numpy as np
import pytest

import prepare
import sample
import tokenizer as T
import train
from tests.commands import ROOT
from tests.commands import refused as refused_command
from tests.test_train import TINY as TINY_RUN
from tests.tokenizer.vocabularies import ENGLISH, QUICKSTART, SHARED, TINY, refused, stream, vocab_file
from tokenizer import portable
from tokenizer.tokenmonster import NONE, TokenMonster

tokenizers = pytest.importorskip("tokenizers")

WHITE = " \t\n\r\v\f"
END = portable.END_OF_DOCUMENT
# What meets the rules head on: words, ends of words, spaces, controls, marks, other scripts, and ways to write a text
# that have the same score.
FRAGMENTS = ["the", " of a", "return self", "don't", "l\u2019eau", "(x, y)", "://", "?", "??", "????", "111", "99999",
             "ddd", "0000 ", "-" * 40, " ", "  ", " " * 30, "\t", "\n", "\n\n", " \n", "\r\n", "\r", "\x7f", "\x7f a",
             "\x00\x01", "\x14", "\x1f", "\x85", "\xa0", "\u2028", "\ufeff", "\ufffd", "\u00e9", "e\u0301", "\u0301",
             "\u0323\u0307", "\u1e69", "\u212b", "\uac00", "\u1112\u1161\u11ab", "\u4e00\u4e8c", "\u0414\u0430",
             "\U0001f600", "\U0001f468\u200d\U0001f469", "\U0010ffff", END]


def any_text(rng):
    """Some fragments and some characters of any kind, but no lone surrogates."""
    def character():  # one of one byte, of two, of three, of four
        return chr(rng.randrange(rng.choice([0x80, 0x800, 0x10000, 0x110000])))

    parts = [rng.choice(FRAGMENTS) if rng.random() < 0.7 else character() for _ in range(rng.randint(1, 14))]
    return "".join(parts).encode("utf-8", "ignore").decode()


def old(text):
    """The text without characters that are younger than Unicode 3.2: on how to decompose those, libraries differ."""
    return "".join(character for character in text if unicodedata.ucd_3_2_0.category(character) != "Cn")


def without(text, characters):
    return "".join(character for character in text if character not in characters)


@pytest.fixture(scope="module", params=["quickstart-2048", *ENGLISH])
def path(request):
    file = QUICKSTART if request.param == "quickstart-2048" else SHARED / f"{request.param}.vocab"
    if not file.is_file():
        pytest.skip(f"{file.name} is not here")
    return file


@pytest.fixture(scope="module")
def exact(path):
    return T.load(path)


@pytest.fixture(scope="module")
def lossless(path):
    return T.load(path, "portable")


@pytest.fixture(scope="module")
def reading(exact):
    """The form for models of the exact segmentation."""
    return T.TokenizerJson(portable.tokenizer_json(exact, lossless=False), "reading")


@pytest.fixture(scope="module")
def forms(lossless, reading):
    """By whether they are lossless."""
    return {True: lossless, False: reading}


both_forms = pytest.mark.parametrize("form", [True, False], ids=["lossless", "reading"])


def live(exact, lossless):
    """id -> (bytes, score) of the pieces that text is written with."""
    texts, scores = portable.pieces(exact, lossless)
    return {token: (texts[token], scores[token]) for token in range(len(texts)) if scores[token] != portable.DEAD}


def writable(exact):
    """Tells which characters the reading form has all bytes of."""
    bytes_ = {text[0] for text, _ in live(exact, False).values() if len(text) == 1}
    return lambda character: bytes_.issuperset(unicodedata.normalize("NFD", character).encode())


# -----------------------------------------------------------------------------
# the lossless form

def test_any_text_comes_back(lossless, rng):
    """Any text at all decodes to itself, takes a token at least, and never the end-of-document id."""
    texts = [any_text(rng) for _ in range(600)] + FRAGMENTS + [chr(code) for code in range(128)]
    for text, (ids, dropped) in zip(texts, lossless.encode_batch_counted(texts)):
        assert lossless.decode(ids) == text
        assert dropped == 0 < len(ids) or not text
        assert ids.dtype == np.uint16 and lossless.eos_id not in ids and max(ids, default=0) < lossless.vocab_size
    assert lossless.encode("").tolist() == [] and lossless.decode([*lossless.encode("a"), lossless.eos_id]) == "a"


def test_every_byte_of_utf8_has_a_piece(exact):
    """Each under one id of its own; and no two ids stand for the same, in either form."""
    pieces = [text for text, _ in live(exact, True).values()]
    bytes_of_utf8 = {byte for code in (*range(0xD800), *range(0xE000, 0x110000, 63)) for byte in chr(code).encode()}
    assert {text[0] for text in pieces if len(text) == 1} >= bytes_of_utf8 == portable.UTF8
    assert len(pieces) == len(set(pieces))
    for form in (True, False):
        names = [name for name, _ in json.loads(portable.tokenizer_json(exact, form))["model"]["vocab"]]
        assert len(names) == len(set(names)) == exact.vocab_size and names[exact.eos_id] == END


def test_the_ids_of_a_lossless_form_are_mostly_the_exact_ones(exact):
    """Every piece that the reading form writes with has its id in the lossless one; the others are single bytes."""
    ours, theirs = live(exact, True), live(exact, False)
    assert theirs.items() <= ours.items()
    assert all(len(text) == 1 for token, (text, _) in ours.items() if token not in theirs)


def test_portable_and_exact(path, exact, lossless, rng):
    """Two segmentations of one vocabulary: as many ids and the same end of a document, but nobody mistakes one for
    the other."""
    assert lossless.sha256 != exact.sha256 == T.load(path, "exact").sha256
    assert lossless.sha256 == T.load(path, "portable").sha256
    assert (lossless.vocab_size, lossless.eos_id) == (exact.vocab_size, exact.eos_id)
    assert lossless.name == f"{exact.name} (portable)"
    for text in [any_text(rng) for _ in range(60)]:
        ids, dropped = lossless.encode_counted(text)
        assert dropped == 0 == lossless.count_dropped(text)
        assert lossless.count_bytes(ids) == len(text.encode()) and lossless.decode_bytes(ids) == text.encode()
        assert stream(lossless, ids) == text


def test_lone_surrogates(lossless):
    """They have no UTF-8, and become U+FFFD as in the exact segmentation."""
    assert lossless.decode(lossless.encode("a\ud800b\udc00")) == "a\ufffdb\ufffd"


# -----------------------------------------------------------------------------
# the search

@both_forms
def test_words_do_not_depend_on_their_neighbours(forms, form, rng):
    """A single space parts a text: what is before it and what begins with it have the ids that they have alone."""
    tokenizer = forms[form]
    pairs = []
    while len(pairs) < 500:
        before, after = any_text(rng) + any_text(rng), any_text(rng)
        if not form:
            before, after = without(before, "\r\x7f"), without(after, "\r\x7f")
        before, after = before.rstrip(WHITE), after.lstrip(WHITE)
        if before and after:
            pairs.append((before, after))
    for repeated in ("1" * 3, "9" * 3, "d" * 3, "-" * 40):  # more than one best way to write it
        pairs += [(f"{before} {rng.choice('abcxyz')}", repeated) for before, _ in pairs[:50]]
    encode = tokenizer.encode_batch
    for (before, after), ids, first, second in zip(pairs, encode([" ".join(pair) for pair in pairs]),
                                                   encode([before for before, _ in pairs]),
                                                   encode([f" {after}" for _, after in pairs])):
        assert len(second) and ids.tolist() == [*first.tolist(), *second.tolist()], (before, after)


def fewest_and_best(data, pieces):
    """How few pieces data can be written with, and the largest sum of scores; pieces: {bytes: score}."""
    fewest, best = [0], [0.0]
    for end in range(1, len(data) + 1):
        last = [start for start in range(max(0, end - 255), end) if data[start:end] in pieces]
        fewest.append(min(fewest[start] + 1 for start in last))
        best.append(max(best[start] + pieces[data[start:end]] for start in last))
    return fewest[-1], best[-1]


@both_forms
def test_the_best_of_all_ways_to_write_it(forms, form, exact, rng):
    """The scores add up to the most that is possible; up to eight tokens, where the frequencies cannot outweigh a whole
    token, they are the fewest that are possible too."""
    tokenizer = forms[form]
    pieces = live(exact, form)
    scores = dict(pieces.values())
    assert len(scores) == len(pieces) and max(scores.values()) - min(scores.values()) < 100 / 8
    alphabet = [text.decode() for text in scores if text.isascii() and 0x20 <= min(text) and text != b"\x7f"]
    texts = [old(any_text(rng)) for _ in range(100)]
    texts += ["".join(rng.choices(alphabet, k=rng.randint(1, 4))) for _ in range(200)]
    if not form:
        can_write = writable(exact)
        texts = [unicodedata.normalize("NFD", without("".join(filter(can_write, text)), "\r")) for text in texts]
    few = 0
    for text in texts:
        ids = tokenizer.encode(text).tolist()
        assert b"".join(pieces[token][0] for token in ids) == text.encode()
        fewest, best = fewest_and_best(text.encode(), scores)
        assert sum(pieces[token][1] for token in ids) == pytest.approx(best, rel=1e-9), text
        if fewest <= 8:
            assert len(ids) == fewest, text
            few += 1
    assert few > 100


def test_pieces_that_are_left_out(exact, forms, rng):
    """No text is written with a mark or across words, not even that of such a piece, as often as one likes."""
    texts = [any_text(rng) for _ in range(200)] + [END * 3]
    for form, tokenizer in forms.items():
        pieces = live(exact, form)
        assert not any(b"\x7f" in text for text, _ in pieces.values() if text != b"\x7f" or not form)
        words = [text.split(b" ") for text, _ in pieces.values()]
        assert not any(first and second for parts in words for first, second in zip(parts, parts[1:]) if first.strip())
        left_out = [text for token, text in enumerate(exact.pieces) if token not in pieces]
        more = [text.decode("utf-8", "ignore") * rng.randint(1, 3) for text in left_out]
        emitted = {token for ids in tokenizer.encode_batch(texts + more) for token in ids.tolist()}
        assert emitted <= pieces.keys()


def test_however_long_a_piece_is(rng):
    """A piece of many words is left out even where there are only single bytes to take its place."""
    keys = [bytes([byte]) for byte in portable.UTF8] + [b"b " * 2, b"a " * 127]  # the former's id is to mean "\r"
    entries = [(key, 0, 0, (), token) for token, key in enumerate(keys)]
    vocabulary = TokenMonster(vocab_file(entries, capcode=0, delete=NONE), "bytes")
    tokenizer = T.TokenizerJson(portable.tokenizer_json(vocabulary, lossless=True), "bytes")
    text = "a " * rng.randint(127, 300)
    assert len(tokenizer.encode(text)) == len(text) and tokenizer.decode(tokenizer.encode(text)) == text


# -----------------------------------------------------------------------------
# the reading form

def test_ids_keep_their_meaning(exact, reading, rng):
    """Every id reads as the exact tokenizer reads it; so do the ids that it writes, marks and all."""
    for token, (text, _) in live(exact, False).items():
        assert text == exact.decode_bytes([token])
    for token in range(exact.vocab_size):
        assert reading.decode([token]) == exact.decode([token]), exact.pieces[token]
    can_write = writable(exact)
    for text in [any_text(rng) for _ in range(300)]:
        ids = exact.encode("".join(character for character in text if character < "\x80" or can_write(character)))
        assert reading.decode(ids) == exact.decode(ids), text


def test_what_can_be_written_comes_back(exact, reading, rng):
    """As it does from the exact tokenizer; a character that this leaves out comes back as a question mark."""
    can_write = writable(exact)
    missing = [character for character in map(chr, range(128)) if not can_write(character) and character != "\r"]
    assert "\0" in missing and "\x7f" in missing
    for _ in range(300):
        parts = [without("".join(filter(can_write, old(any_text(rng)))), "\r") for _ in range(rng.randint(1, 3))]
        text = "".join(parts)
        assert reading.decode(reading.encode(text)) == exact.decode(exact.encode(text)), text
        gaps = [f"a{rng.choice(missing)}b" for _ in parts]
        text = "".join(part + gap for part, gap in zip(parts, gaps))
        shown = "".join(f"{part}a?b" for part in parts)
        assert reading.decode(reading.encode(text)) == exact.decode(exact.encode(shown)), text


def test_question_marks_are_counted(exact, reading, rng):
    """Real ones stand for themselves, one by one, though they also stand for what cannot be written."""
    for text in ("??", "what???", "a ?? b", "?" * rng.randint(3, 50)):
        assert reading.decode(reading.encode(text)) == text == exact.decode(exact.encode(text))


def test_ends_of_lines(reading):
    """The vocabulary's is the line feed."""
    assert reading.decode(reading.encode("a\r\nb\rc\n\r\n")) == "a\nb\nc\n\n"


# -----------------------------------------------------------------------------
# the file

FINGERPRINTS = """
import hashlib, sys, tokenizer
from tokenizer import portable
for path in sys.argv[1:]:
    for lossless in (True, False):
        print(hashlib.sha256(portable.tokenizer_json(tokenizer.load(path), lossless)).hexdigest())
"""


def test_the_same_bytes_again(rng):
    """On every call, and in another process, in which sets have another order."""
    paths = [path for path in (QUICKSTART, *(SHARED / f"{name}.vocab" for name in ENGLISH)) if path.is_file()]
    lines = []
    for path in paths:
        for form in (True, False):
            data = portable.tokenizer_json(T.load(path), form)
            assert data == portable.tokenizer_json(T.load(path), form)
            lines.append(T.TokenizerJson(data, "again").sha256)
    environment = {**os.environ, "PYTHONHASHSEED": str(rng.randrange(1, 2**32))}
    result = subprocess.run([sys.executable, "-c", FINGERPRINTS, *map(str, paths)], cwd=ROOT, env=environment,
                            capture_output=True, text=True)
    assert result.stdout.split() == lines, result


@both_forms
def test_transformers_read_it(forms, form, exact, tmp_path, rng):
    """With the same ids, and the same text from them; the end of a document is a token that text can name there."""
    transformers = pytest.importorskip("transformers")
    ours = forms[form]
    file = tmp_path / "tokenizer.json"
    file.write_bytes(portable.tokenizer_json(exact, form))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token=END)
    assert len(theirs) == ours.vocab_size and theirs.eos_token_id == ours.eos_id
    for text in [any_text(rng).replace(END, "") for _ in range(150)]:
        ids = ours.encode(text).tolist()
        assert theirs(text, add_special_tokens=False)["input_ids"] == theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == ours.decode(ids)
        assert theirs(text + END)["input_ids"] == [*ids, ours.eos_id]
        assert theirs.decode([*ids, ours.eos_id], skip_special_tokens=True) == ours.decode(ids)


@both_forms
def test_text_that_streams(forms, form, exact, rng):
    """The library's stream of text, token by token, is the decoded text."""
    ours = forms[form]
    library = tokenizers.Tokenizer.from_str(portable.tokenizer_json(exact, form).decode())
    for text in [any_text(rng) + "." for _ in range(150)]:  # it waits for ever for what follows a U+FFFD at the end
        ids, decoder = ours.encode(text).tolist(), tokenizers.decoders.DecodeStream(skip_special_tokens=True)
        assert "".join(decoder.step(library, token) or "" for token in ids) == ours.decode(ids)
        assert stream(ours, ids) == ours.decode(ids)


# -----------------------------------------------------------------------------
# refusals

def test_too_few_ids_are_free(tmp_path):
    """A small vocabulary has no ids to spare for the bytes that it lacks, and the message says what to do."""
    file = tmp_path / "tiny.vocab"
    file.write_bytes(vocab_file(TINY))
    refused(lambda: T.load(file, "portable"), "tiny", "tokenizer_segmentation exact")
    assert T.load(file, "exact").name == "tiny"


def test_as_many_free_ids_as_are_needed():
    """One piece across words for each byte but " " and "a" is just enough."""
    bytes_without = len(portable.UTF8) - 2
    keys = [b" ", b"a", *(b"a " + b"a" * n for n in range(1, bytes_without + 1))]
    entries = [(key, 0, 0, (), token) for token, key in enumerate(keys)]
    vocabulary = TokenMonster(vocab_file(entries, capcode=0, delete=NONE, normalization=0), "spare")
    tokenizer = T.TokenizerJson(portable.tokenizer_json(vocabulary, lossless=True), "spare")
    text = "".join(map(chr, range(256)))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    vocabulary = TokenMonster(vocab_file(entries[:-1], capcode=0, delete=NONE, normalization=0), "spare")
    refused(lambda: portable.tokenizer_json(vocabulary, lossless=True), "spare", f"{bytes_without} bytes")


def test_nothing_to_put_for_what_cannot_be_written():
    """The reading form puts "?", or a space where there is none; with neither it is refused."""
    tiny = TokenMonster(vocab_file(TINY), "tiny")
    tokenizer = T.TokenizerJson(portable.tokenizer_json(tiny, lossless=False), "tiny")
    assert tokenizer.decode(tokenizer.encode("a(b")) == "a b"
    entries = [entry for entry in TINY if b" " not in entry[0] and entry[0] != b"\x7f"]
    entries = [(key, 0, 0, (), token) for token, (key, *_) in enumerate(entries)]
    neither = TokenMonster(vocab_file(entries, capcode=0, delete=NONE), "neither")
    refused(lambda: portable.tokenizer_json(neither, lossless=False), "neither", "?", "space")


# -----------------------------------------------------------------------------
# from text to text

def test_a_run_from_end_to_end(in_process, tmp_path, monkeypatch, rng):
    """Data of one's own are prepared, learnt and sampled with the portable segmentation, every character of them; the
    exact one is refused on them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("from config import Config, Source\nconfig = Config(name='mine', data_dir='mine',"
                                      " tokenizer_segmentation='portable', sources={'text': Source('text', "
                                      "data_files='my.txt', preserve_linebreaks=True, held_out=20)})\n")
    odd = ["\x01", "\x7f", "\u00e9", "\ufffd", "\U0001f600", "??", "x  y", "(a\tb)"]
    texts = [f"Paragraph {rng.random()} is\nnot like {rng.choice(odd)} the others." for _ in range(300)]
    (tmp_path / "my.txt").write_text("\n\n".join(texts), encoding="utf-8")

    code, out, err = in_process(prepare.main, "mine.py")
    assert code == 0 and " 280 documents" in out and " 0 bytes dropped" in out, (out, err)
    vocabulary = T.load("quickstart-2048", "portable")
    documents = []
    for file in ("text_val.bin", "text.bin"):
        ids = np.fromfile(tmp_path / "mine" / file, np.uint16)
        documents += np.split(ids, np.flatnonzero(ids == vocabulary.eos_id) + 1)[:-1]
    assert [vocabulary.decode(ids) for ids in documents] == texts
    assert all(ids.tolist() == [*vocabulary.encode(text), vocabulary.eos_id] for ids, text in zip(documents, texts))

    learn = partial(in_process, train.main, "mine.py", *TINY_RUN, "--max_steps=2")
    refused_command(learn("--tokenizer_segmentation=exact"), "another vocabulary", "--tokenizer_segmentation")
    code, out, err = learn()
    assert code == 0 and "trained 2 steps" in out, (out, err)
    code, out, err = in_process(sample.main, "--checkpoint=out/mine", "--prompt=Paragraph \u00e9", "--max_new_tokens=9")
    assert code == 0 and out.startswith("Paragraph \u00e9"), (out, err)
