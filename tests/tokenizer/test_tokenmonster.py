"""The ids are the reference's, nothing is lost on the way back, and no file can break the search."""
import importlib.util
import json
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenizer as T
from bench.tokenizer import tokenmonster_without_numba
from tests.commands import ROOT
from tests.tokenizer.vocabularies import ENGLISH, QUICKSTART, SHARED, TINY, english, refused, stream, vocab_file
from tokenizer.tokenmonster import NONE, VocabularyError, parse

drawn_afresh = settings(max_examples=600, deadline=None, database=None)
COMPILED = sys.modules["tokenizer.tokenmonster"]
PLAIN = tokenmonster_without_numba()


def plain(tokenizer):
    """The same vocabulary in the copy without numba."""
    return PLAIN.TokenMonster(tokenizer.data, tokenizer.name, tokenizer.eos_id)


QUICK = T.load("quickstart-2048")
QUICK_PLAIN = plain(QUICK)


def golden(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# -----------------------------------------------------------------------------
# the same ids as the reference

@pytest.mark.parametrize("tokenizer", [QUICK, QUICK_PLAIN], ids=["compiled", "plain"])
def test_golden_quickstart(tokenizer):
    for case in golden(ROOT / "tests" / "golden_quickstart.jsonl"):
        assert tokenizer.encode(case["text"]).tolist() == case["ids"], case["text"]


@pytest.mark.parametrize("copy", [lambda tokenizer: tokenizer, plain], ids=["compiled", "plain"])
@pytest.mark.parametrize("name", ENGLISH)
def test_golden_english(name, copy):
    tokenizer = copy(english(name))
    cases = [case for case in golden(SHARED / "golden_english.jsonl") if case["vocab"] == name]
    assert cases
    for case in cases:
        assert tokenizer.encode(case["text"]).tolist() == case["ids"], case["text"]


def test_which_copy_is_compiled():
    assert not PLAIN.TokenMonster.encode_counted.__globals__["COMPILED"]
    assert COMPILED.COMPILED == (importlib.util.find_spec("numba") is not None
                                 and not COMPILED.numba.config.DISABLE_JIT)


# Text that meets the rules head on: few characters, so that words, marks and apostrophes collide.
colliding = st.text("abT '\u20191\u00bd\u0301\u00e9\u4e00_.(\n\t", max_size=60)
words = st.lists(st.sampled_from(
    ["the", "return", "self", "don't", "l\u2019eau", "x", "42", "\u00c5ngstr\u00f6m", "\u0414\u0430",
     "\U0001f600", " ", "  ", "\n", ".", "(", "()", "_", "://"])).map("".join)
controls = [chr(code) for code in range(32) if chr(code) not in "\t\n"] + ["\x7f"]  # no token covers these
unicode = st.text(st.characters(exclude_characters=controls, exclude_categories=["Cs"]))
writable = st.one_of(colliding, words, unicode)
anything = st.one_of(writable, st.text(st.characters(exclude_categories=[])),
                     st.text("a \x7f\x14\r\n\x00\ud800\udc00"))


@drawn_afresh
@given(anything)
def test_plain_python_gives_the_same_ids(text):
    ids, dropped = QUICK.encode_counted(text)
    plain_ids, plain_dropped = QUICK_PLAIN.encode_counted(text)
    assert ids.dtype == plain_ids.dtype == np.uint16
    assert ids.tolist() == plain_ids.tolist() and dropped == plain_dropped


# -----------------------------------------------------------------------------
# there and back

@drawn_afresh
@given(writable)
def test_round_trip(text):
    ids, dropped = QUICK.encode_counted(text)
    assert QUICK.decode(ids) == unicodedata.normalize("NFD", text)
    assert dropped == 0 == QUICK.count_dropped(text)
    assert QUICK.eos_id not in ids


@drawn_afresh
@given(anything)
def test_every_byte_is_written_or_counted(text):
    ids, dropped = QUICK.encode_counted(text)
    size = len(unicodedata.normalize("NFD", text).encode("utf-8", "surrogatepass"))
    returns = text.count("\r")  # "\r" is the end of a document here, which decodes to nothing
    assert len(QUICK.decode_bytes(ids)) + dropped + returns == size
    assert QUICK.count_bytes(ids) == len(QUICK.decode_bytes(ids))
    assert (ids == QUICK.eos_id).sum() == returns


@pytest.mark.parametrize("name", ENGLISH)
def test_every_byte_is_written_or_counted_in_english(name):
    tokenizer = english(name)

    @drawn_afresh
    @given(anything.map(lambda text: text.replace("\r", "")))
    def holds(text):
        ids, dropped = tokenizer.encode_counted(text)
        size = len(unicodedata.normalize("NFD", text).encode("utf-8", "surrogatepass"))
        assert tokenizer.count_bytes(ids) + dropped == size
        assert tokenizer.eos_id not in ids

    holds()


def test_what_no_token_covers_is_counted():
    ids, dropped = QUICK.encode_counted("a\x00b\x7f\x01c")
    assert dropped == 3 and QUICK.decode(ids) == "abc"
    assert QUICK.encode("\ud800").tolist() == QUICK.encode("\ufffd").tolist()


hard_ids = [token for token, data in enumerate(QUICK.pieces) if b"\x7f" in data or not data.isascii()]


@drawn_afresh
@given(st.lists(st.one_of(st.integers(0, QUICK.vocab_size - 1), st.sampled_from(hard_ids))))
def test_stream_of_any_ids(ids):
    assert stream(QUICK, ids) == QUICK.decode(ids)


@drawn_afresh
@given(st.lists(st.one_of(st.integers(0, QUICK.vocab_size - 1), st.sampled_from(hard_ids))))
def test_counting_is_decoding(ids):
    """Bytes are counted without making them, also where marks delete marks, the next token's byte, or nothing."""
    for tokenizer in (QUICK, QUICK_PLAIN):
        size = len(QUICK.decode_bytes(ids))
        assert tokenizer.count_bytes(ids) == tokenizer.count_bytes(np.array(ids, np.uint16)) == size


@drawn_afresh
@given(writable)
def test_stream_of_text(text):
    assert stream(QUICK, QUICK.encode(text)) == unicodedata.normalize("NFD", text)


def test_stream_holds_back_only_what_may_change():
    decoder = QUICK.stream()
    pushed = [decoder.push(token) for token in QUICK.encode("a\U0001f600b")]
    assert "".join(pushed) == "a\U0001f600b" and "\ufffd" not in pushed
    assert decoder.push(QUICK.pieces.index(b"\x7f")) == "" and decoder.finish() == ""


def test_ids_out_of_range():
    for ids in ([2048], [-1], np.array([5, 65535], np.uint16)):
        with pytest.raises(ValueError, match="is not in quickstart-2048"):
            QUICK.decode(ids)
        for tokenizer in (QUICK, QUICK_PLAIN):
            with pytest.raises(ValueError, match="is not in quickstart-2048"):
                tokenizer.count_bytes(ids)
    with pytest.raises(ValueError):
        QUICK.stream().push(2048)
    assert QUICK.decode([]) == "" and QUICK.encode("").dtype == np.uint16


def test_batch():
    texts = [case["text"] for case in golden(ROOT / "tests" / "golden_quickstart.jsonl")]
    expected = [(QUICK.encode(text).tolist(), QUICK.count_dropped(text)) for text in texts]
    for texts_, expected_ in ((texts, expected), (texts[:1], expected[:1]), ([], [])):
        counted, batch = QUICK.encode_batch_counted(texts_), QUICK.encode_batch(texts_)
        assert [(ids.tolist(), dropped) for ids, dropped in counted] == expected_
        assert [ids.tolist() for ids in batch] == [ids for ids, _ in expected_]
    with pytest.raises(AttributeError):  # an error in a thread is not lost
        QUICK.encode_batch(["fine", None])


def test_numbers():
    assert (QUICK.name, QUICK.eos_id, QUICK.vocab_size) == ("quickstart-2048", 2, 2048)
    assert QUICK.sha256 == T.VOCABULARIES["quickstart-2048"][0]
    assert QUICK.decode(QUICK.encode("a").tolist() + [2]) == "a" and QUICK.count_bytes([2]) == 0


@pytest.mark.parametrize("name, eos_id, rows", [(ENGLISH[0], 2, 4096), (ENGLISH[1], 8000, 8001)])
def test_numbers_english(name, eos_id, rows):
    tokenizer = english(name)
    assert (tokenizer.name, tokenizer.eos_id, tokenizer.vocab_size) == (name, eos_id, rows)
    assert tokenizer.decode([*tokenizer.encode("It's"), eos_id]) == "It's"


# -----------------------------------------------------------------------------
# files that are wrong

SAMPLE = "abab xab(ab1ab) ba'ab\n aab1 axabababx\u00e9\u4e00 \x7f\rab"


def survives(module, data):
    """Refused, or a tokenizer that works: the property of every corrupt file. -> was it refused?"""
    try:
        tokenizer = module.TokenMonster(data, "corrupt")
    except module.VocabularyError as error:
        assert "\n" not in str(error)
        return True
    ids = tokenizer.encode(SAMPLE)
    assert tokenizer.count_bytes(ids) <= 4 * len(SAMPLE)
    assert isinstance(stream(tokenizer, ids), str)
    return False


def test_tiny_vocabulary_works():
    for module in (COMPILED, PLAIN):
        tokenizer = module.TokenMonster(vocab_file(TINY, deleted=[b"gone"]), "tiny")
        assert (tokenizer.name, tokenizer.eos_id, tokenizer.vocab_size) == ("tiny", 2, 13)
        ids, dropped = tokenizer.encode_counted(" xabab (ab 1")
        assert ids.tolist() == [0, 5, 11, 0, 1, 10, 0, 6] and dropped == 1  # there is no "("
        assert tokenizer.decode(ids) == " xabab ab 1"


def test_eos_without_a_return():
    entries = [entry if entry[0] != b"\r" else (b"\n", 0x80, 0, (), 2) for entry in TINY]
    tokenizer = T.TokenMonster(vocab_file(entries), "tiny")
    assert (tokenizer.eos_id, tokenizer.vocab_size, tokenizer.decode([3, 13])) == (13, 14, "a")


def test_without_delete_marks():
    tokenizer = T.TokenMonster(vocab_file(TINY, capcode=0, delete=NONE, normalization=0), "tiny")
    ids, dropped = tokenizer.encode_counted("abxab\x7f1\u00e9")
    assert dropped == 1 and tokenizer.decode_bytes(ids) == b"abxab\x7f1\xc3"  # C3 A9, and no A9
    assert stream(tokenizer, ids) == "abxab\x7f1\ufffd"


@pytest.mark.skipif(not COMPILED.COMPILED, reason="only matters where the loops are compiled")
def test_more_nodes_than_uint16_holds(rng):
    keys = sorted({bytes(rng.choices(range(97, 123), k=5)) for _ in range(30000)})
    entries = TINY + [(key, 0x83, 0, (), 13 + i) for i, key in enumerate(keys) if len(key) > 4]
    tokenizer = T.TokenMonster(vocab_file(entries), "large")
    assert tokenizer._search[0].dtype == np.int32
    ids = tokenizer.encode(f" {keys[-1].decode()} {keys[0].decode()}")
    assert tokenizer.decode(ids) == f" {keys[-1].decode()} {keys[0].decode()}"
    assert {13, len(entries) - 2} <= set(ids.tolist())


def test_search_always_moves_on():
    # " ab" is said to hold 255 words, so that a delete token and " ab" would look best again and again.
    entries = TINY[:6] + [(b" ab", 0xA5, 255, (0,), 6)]
    tokenizer = PLAIN.TokenMonster(vocab_file(entries), "loop")
    assert tokenizer.encode(" xab").tolist() == [0, 5, 1, 6]
    ids, dropped = tokenizer.encode_counted(" xab\u4e00")  # nothing matches after " ab": its " " is tried
    assert dropped == 3 and tokenizer.decode(ids) == " xab"


def test_refusals():
    good = vocab_file(TINY)
    T.TokenMonster(good, "tiny")
    for bad, word in [
        (b"", "truncated"), (good + b"\0", "follow"), (b"\x89PNG\r\n\x1a\n" + good, "not a TokenMonster"),
        (vocab_file(TINY, capcode=2), "capcode"), (vocab_file(TINY, charset=2), "UTF-16"),
        (vocab_file(TINY, charset=0), "charset 0"), (vocab_file(TINY, normalization=3), "normalization"),
        (vocab_file(TINY, unk=3), "UNK"), (vocab_file(TINY, delete=NONE), "delete"),
        (vocab_file(TINY, delete=3), "delete"), (vocab_file(TINY + [(b"a", 0, 0, (), 3)]), "repeats"),
        (vocab_file(TINY + [(b"", 0, 0, (), 3)]), "bytes long"),
        (vocab_file(TINY + [(b"zz", 0, 0, (), 99)]), "id 99"),
        (vocab_file(TINY + [(b"zz", 0, 0, (3,), 3)]), "prefix"),         # another key
        (vocab_file(TINY + [(b"aa", 0, 0, (14,), 3)]), "prefix"),        # the entry itself
        (vocab_file(TINY + [(b"zz", 0x40, 0, (), 3)]), "special"),
        (good[:-259] + b"\xff" * 256 + bytes(3), "class"),
        (good[:17] + b"\xff\xff\xfe" + good[20:], "corrupt"),            # 16 million entries, it says
        (good[:11] + b"\xff\xff\xfe" * 3 + good[20:], "corrupt"),        # and as many ids
    ]:
        refused(lambda: T.TokenMonster(bad, "bad"), word, error=VocabularyError)


def test_every_truncation():
    data = vocab_file(TINY, deleted=[b"gone"])
    for size in range(len(data)):
        refused(lambda: T.TokenMonster(data[:size], "cut"), error=VocabularyError)
    data = QUICKSTART.read_bytes()
    for size in [*range(0, 60), *range(60, len(data), 1009), *range(len(data) - 262, len(data), 26)]:
        refused(lambda: T.TokenMonster(data[:size], "cut"), error=VocabularyError)


def corrupted(data, rng):
    """A few bytes changed, most of them to telling values; at times a piece is put in another's place."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        data[rng.randrange(len(data))] = rng.choice([0, 1, 2, 0x20, 0x7F, 255, rng.randrange(256)])
    if rng.random() < 0.1:
        start = rng.randrange(len(data))
        data[start:start + rng.randrange(1, 30)] = data[:rng.choice([0, 3, 16])]
    return bytes(data)


def test_corruptions(rng):
    refusals = 0
    tiny = vocab_file(TINY, deleted=[b"gone"])
    for _ in range(4000):  # as plain Python, where an index out of range would raise
        refusals += survives(PLAIN, corrupted(tiny, rng))
    assert 500 < refusals < 3500  # both outcomes were met
    real = QUICKSTART.read_bytes()
    for _ in range(200):
        survives(COMPILED, corrupted(real, rng))


# -----------------------------------------------------------------------------
# the algorithm once more, as literally and slowly as it can be said

def slow_bytes(text):
    """Delete marks by looking at each character and the two before it."""
    kinds = ["."] + [unicodedata.category(character)[0] for character in text]
    out = ""
    for k, character in enumerate(text):
        before, kind_before, kind = text[:k][-1:], kinds[k], kinds[k + 1]
        contraction = before in ("'", "\u2019") and k >= 2 and kinds[k - 1] == "L"
        if kind == "L" and not (before == " " or kind_before in "LM" or contraction):
            out += "\x7f "
        if kind == "N" and not (before == " " or kind_before == "N"):
            out += "\x7f "
        out += "\x14" if character == "\x7f" else character
    return out.encode()


def slow_ids(vocabulary, data):
    """The ungreedy search with no trie: all the candidates in a list, sorted."""
    rows, begin = vocabulary["entries"].tolist(), vocabulary["begin"].tolist() + [0]
    index_of = {key: index for index, key in enumerate(vocabulary["keys"])}

    def longest(rest):
        return next((index_of[rest[:n]] for n in range(len(rest), 0, -1) if rest[:n] in index_of), None)

    def score(first, second, step, reach, deletes, branch, length, fd):
        f, w, g, v = rows[first][1], rows[first][2] - fd, rows[second][1], rows[second][2]
        b = begin[(data[i:] + bytes(reach + 1))[reach]]
        total = reach + (f >> 7) + (g >> 7) + max(0, w - 1) + max(0, v - 1) + ((b >> 2) & 1)
        total += 100 * (w + v + (b >> 3)) - 100 * ((f >> 3) & 1 & (g >> 4)) - 3 * (g & 1 & b)
        if branch:
            total -= {True: 10000, False: 100 * (reach < length)}[reach == length]
        if deletes:
            return total - 103 * (f & 1) - 1, b
        return total + ((g >> 2) & 1) - 103 * (f & 1 & (g >> 1)), b

    ids, dropped, i, entry, fd = [], 0, 0, None, 0
    while i < len(data):
        entry = longest(data[i:]) if entry is None else entry
        if entry is None:
            i, dropped = i + 1, dropped + 1
            continue
        length, flag = rows[entry][0] - fd, rows[entry][1]
        if i + length == len(data) or (flag & 0x20 and begin[data[i + length]] == 12):
            ids, i, entry, fd = ids + [rows[entry][3]], i + length, None, 0
            continue
        candidates = []
        for branch, first in enumerate(rows[entry][4:]):
            if first == -1:
                break
            step = rows[first][0] - fd
            second = longest(data[i + step:])
            if second is None:
                continue
            size = rows[second][0]
            points, b = score(first, second, step, step + size, 0, branch, length, fd)
            candidates.append((-points, 0, branch, first, second, step))
            spaced = longest(b" " + data[i + step:])
            if rows[second][1] & 2 and b == 1 and rows[second][2] == 0 and rows[spaced][0] > size + 1:
                points, _ = score(first, spaced, step, step + rows[spaced][0] - 1, 1, branch, length, fd)
                candidates.append((-points, 1, branch, first, spaced, step))
        _, fd, _, first, entry, step = min(candidates, default=(0, 0, 0, entry, None, length))
        ids += [rows[first][3]] + [vocabulary["delete_id"]] * fd
        i += step
    return ids, dropped


def test_search_against_the_slow_one(rng):
    for _ in range(150):  # vocabularies whose facts are random: so every term of the score decides somewhere
        keys = [bytes(rng.choices(b"  aaabb1.\x7f", k=rng.randint(1, 6))) for _ in range(90)]
        keys = sorted({b" ", b"\x7f", b"a", *keys}, key=lambda key: (len(key), key))
        entries = []
        for index, key in enumerate(keys):
            shorter = [k for k in range(index) if key.startswith(keys[k])]
            flag = rng.randrange(256) & rng.choice([0x9F, 0x87]) | 2 * (key[0] in b"ab")
            alternatives = rng.sample(shorter, min(2, len(shorter)))
            entries.append((key, flag, rng.choice([0, 0, 0, 1, 2]), alternatives, index))
        data = vocab_file(entries, delete=keys.index(b"\x7f"))
        tokenizer, vocabulary = PLAIN.TokenMonster(data, "random"), parse(data, "random")
        for _ in range(8):
            text = "".join(rng.choices("   aaaabbbb1.'\u2019\u0301\u4e00", k=40))
            ids, dropped = tokenizer.encode_counted(text)
            data = slow_bytes(unicodedata.normalize("NFD", text))
            assert (ids.tolist(), dropped) == slow_ids(vocabulary, data)
