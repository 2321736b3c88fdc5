"""Vocabularies, and what several tests do with them."""
import pytest

import tokenizer as T
from cli import BadInput
from tests.commands import ROOT
from tokenizer.tokenmonster import NONE

SHARED = ROOT.parent / "shared" / "tokenmonster"  # the large vocabularies, where a checkout has them
QUICKSTART = T.VOCABULARY_FOLDER / "quickstart-2048.vocab"
ENGLISH = ("english-4096-strict-nocapcode-v1", "english-8000-strict-nocapcode-v1")


def english(name):
    if not (SHARED / f"{name}.vocab").is_file():
        pytest.skip(f"{name}.vocab is not here")
    return T.load(SHARED / f"{name}.vocab")


def vocab_file(entries, capcode=1, charset=1, normalization=1, unk=NONE, delete=1, deleted=()):
    """The bytes of a .vocab file. entries: (key, flag, words, alternatives, id)"""
    def u24(number):
        return number.to_bytes(3, "little")

    size = len({token for *_, token in entries})
    begin = bytearray(256)
    begin[0x20], begin[0x0A], begin[0x7F] = 12, 10, 10
    begin[ord("a"):ord("z") + 1] = bytes([1]) * 26
    out = bytes([capcode, charset, normalization, 4, 0, 0, 0, 0])
    longest = max(len(key) for key, *_ in entries)
    out += u24(unk) + u24(size) + u24(size) + u24(len(entries)) + u24(delete) + bytes([longest])
    for key, flag, word_count, alternatives, token in entries:
        alternatives = (list(alternatives) + [NONE, NONE])[:2]
        out += bytes([len(key)]) + key + bytes([flag, word_count])
        out += u24(alternatives[0]) + u24(alternatives[1]) + u24(token) + bytes(4)
    out += bytes(begin) + u24(len(deleted))
    return out + b"".join(bytes([len(key)]) + key + u24(0) + bytes(4) for key in deleted)


TINY = [(b" ", 0x84, 0, (), 0), (b"\x7f", 0x98, 0, (), 1), (b"\r", 0x80, 0, (), 2), (b"a", 0x83, 0, (), 3),
        (b"b", 0x83, 0, (), 4), (b"x", 0x83, 0, (), 5), (b"1", 0x80, 0, (), 6), (b"\xc3", 0x80, 0, (), 7),
        (b" a", 0xA5, 1, (0,), 8), (b"ab", 0x83, 0, (3,), 9), (b" ab", 0xA5, 1, (8, 0), 10),
        (b"\x7f a", 0x11, 1, (1,), 3), (b"abab", 0x83, 0, (9, 3), 11), (b" abab", 0xA5, 1, (10, 8), 12)]


def stream(tokenizer, ids):
    decoder = tokenizer.stream()
    return "".join([decoder.push(token) for token in ids] + [decoder.finish()])


def refused(make, *words, error=BadInput):
    with pytest.raises(error) as caught:
        make()
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words)
