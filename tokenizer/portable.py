"""A TokenMonster vocabulary as a plain tokenizer.json, which every tokenizer library reads.

The `tokenizers` library does not have TokenMonster's own search (tokenmonster.py). So transformers needs our code for
it, and llama.cpp cannot run it at all. But the same pieces, under the same ids, can be put together in another way that
all of them know: a Unigram (Kudo 2018). Of all ways to write a text, it takes the one whose pieces' scores have the
largest sum. The score of a piece is -100 plus the logarithm of its frequency. So a word gets as few pieces as possible,
and of several such ways the one with the commoner pieces. Scores are multiples of 1/4096. That makes their sums exact:
two ways that are equally good in one place are equally good everywhere.

Two kinds of pieces are left out. Their score is DEAD, so they are never the best.

- Pieces with a delete mark, and the mark itself: nothing here puts marks into a text.
- Pieces that hold the end of a word and the space after it (" of a"). Without them, every word that a single space sets
  off begins a token, and the tokens of a text do not depend on the words that follow. "of" + " a" is never one token,
  the ids of a prompt are the beginning of those of the prompt with an answer, and every answer has a token of its own.
  TokenMonster can promise none of this, and programs that score answers rely on it.

There are two forms. The lossless one is for a model that learns with this segmentation
(tokenizer_segmentation="portable" in its config). Bytes for which the vocabulary has no piece take the ids of pieces
that are left out, so every text comes back as it was. The other form is for a model that has learnt with TokenMonster's
own search. To that model those ids mean something, and its text has marks to delete. So this form writes text as the
vocabulary does (NFD, line ends), and turns into "?" whatever has no piece.
"""

import json
import math
import re

from cli import BadInput
from tokenizer.tokenmonster import COMPLETE_DELETE, TokenMonster, byte_characters

END_OF_DOCUMENT = "<|endoftext|>"
DEAD = -100_000.0  # lower than the score of 255 bytes, the longest piece possible, written one by one
RAREST = 1e-7  # frequency of a piece that the vocabulary's trainer did not count
MARK = b"\x7f"
ACROSS_WORDS = re.compile(rb"\S (?:\S|$)")  # a space that sets off a word, and something before it
UTF8 = {*range(0x00, 0xC0), *range(0xC2, 0xF5)}  # the bytes that occur in UTF-8
CHARACTERS = byte_characters()


def live_score(share: float) -> float:
    """The score of a piece that makes up this share of the tokens of the trainer's text."""
    return round(4096 * (-100 + math.log(max(share, RAREST)))) / 4096


def pieces(vocabulary: TokenMonster, lossless: bool) -> tuple[list[bytes], list[float]]:
    """The bytes and the score of each id, in the lossless form or in the one for models of TokenMonster's own search.

    The end of a document has no bytes. Raises BadInput if too few ids are free for the missing bytes.
    """
    texts, scores, taken = [], [], set()
    for token, (piece, share) in enumerate(zip(vocabulary.pieces, vocabulary.scores + [-1.0])):
        text = COMPLETE_DELETE.sub(b"", piece) if vocabulary.marks else piece  # mark, space, "0" is just "0"
        text = piece if text in taken or not text else text
        marked = vocabulary.marks and MARK in text and not (lossless and text == MARK)  # a mark in the text itself
        dead = token == vocabulary.eos_id or marked or ACROSS_WORDS.search(text)
        texts.append(text)
        taken.add(text)
        scores.append(DEAD if dead else live_score(share))
    if lossless:
        missing = sorted(UTF8 - {text[0] for text, score in zip(texts, scores) if len(text) == 1 and score != DEAD})
        free = [token for token, score in enumerate(scores) if score == DEAD and token != vocabulary.eos_id]
        if len(missing) > len(free):
            raise BadInput(f"{vocabulary.name}: {len(missing)} bytes have no token, and only {len(free)} ids are free "
                           f"for them; use tokenizer_segmentation exact")
        for byte, token in zip(missing, free):
            texts[token], scores[token] = bytes([byte]), live_score(RAREST)
    return texts, scores


def tokenizer_json(vocabulary: TokenMonster, lossless: bool) -> bytes:
    """The tokenizer.json of a TokenMonster, in one of the two forms above: the same bytes on every machine.

    Raises BadInput if the vocabulary does not have the ids or tokens that the form needs.
    """
    texts, scores = pieces(vocabulary, lossless)
    names = ["".join(CHARACTERS[byte] for byte in text) for text in texts]
    names[vocabulary.eos_id] = END_OF_DOCUMENT
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    normalizers, pre_tokenizer, decoder, unknown = [], byte_level, byte_level, None
    if not lossless:
        normalizers = [{"type": "NFD"}] if vocabulary.nfd else []
        for pattern, content in [("\r\n", "\n"), ("\r", "\n")] + [("\x7f", "\x14")] * vocabulary.marks:
            normalizers.append({"type": "Replace", "pattern": {"String": pattern}, "content": content})
        unknown = next((token for text in (b"?", b" ") for token in range(len(texts)) if texts[token] == text), None)
        if unknown is None:
            raise BadInput(f"{vocabulary.name}: has no token for ? or a space to stand for what it cannot write")
        # The library merges unknown tokens in a row into one, and takes a "?" in the text itself for one of them.
        stand_in = re.escape(texts[unknown].decode())
        apart = {"type": "Split", "pattern": {"Regex": f"{stand_in}(?={stand_in})"}, "behavior": "Isolated",
                 "invert": False}
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [apart, byte_level]}
        if vocabulary.marks:  # in the joined text, a mark deletes what follows it
            delete = {"type": "Replace", "pattern": {"Regex": r"\x7f[\s\S]?"}, "content": ""}
            decoder = {"type": "Sequence", "decoders": [decoder, delete]}
    return json.dumps({
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": vocabulary.eos_id, "content": END_OF_DOCUMENT, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False, "special": True}],
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": {"type": "Unigram", "unk_id": unknown, "vocab": list(zip(names, scores)), "byte_fallback": False},
    }, ensure_ascii=False).encode()
