"""A TokenMonster vocabulary as a plain tokenizer.json, which every library of tokenizers reads.

TokenMonster's own search (vocabulary.py) is not one that the `tokenizers` library has, so transformers needs our code
to run it, and llama.cpp cannot. The same pieces, under the same ids, can be put together in another way that all of
them know, a Unigram (Kudo 2018): of all ways to write a text, the one whose pieces' scores have the largest sum. With
-100 for any piece and the logarithm of its frequency added, a word gets the fewest pieces that make it up, and of
several such ways the one with the commoner pieces. Scores are multiples of 1/4096: so the sums are exact, and two ways
that are equally good in one place are so in any other.

Two kinds of pieces are left out: with a score of DEAD they are never the best.

- Those with a delete mark, and the mark itself: nothing here puts marks into a text.
- Those that hold the end of a word and the space after it (" of a"). So every word begins a token wherever a single
  space sets it off, and the tokens of a text do not depend on the words that follow: "of" + " a" is never one token,
  the ids of a prompt begin those of the prompt with an answer, and no answer is without a token of its own.
  TokenMonster can promise none of these, and programs that score answers rely on them.

There are two forms. A model that learns with this segmentation (tokenizer_segmentation="portable" in its config) has
the lossless one: bytes for which the vocabulary has no piece take the ids of pieces that are left out, so every text
comes back as it was. For a model that has learnt with TokenMonster's own search those ids have a meaning, and its text
has marks to delete: it gets the other form, in which text is written as the vocabulary writes it (NFD, line ends), and
what has no piece becomes "?".
"""

import json
import math
import re

from vocabulary import COMPLETE_DELETE, VocabularyError, byte_characters

END_OF_DOCUMENT = "<|endoftext|>"
DEAD = -100_000.0  # less than 255 bytes, the longest that a piece can be, cost one by one
RAREST = 1e-7  # frequency of a piece that the vocabulary's trainer did not count
MARK = b"\x7f"
ACROSS_WORDS = re.compile(rb"\S (?:\S|$)")  # a space that sets off a word, and what is before it
UTF8 = {*range(0x00, 0xC0), *range(0xC2, 0xF5)}  # the bytes that occur in UTF-8
CHARACTERS = byte_characters()


def live_score(share: float) -> float:
    """The score of a piece that is this share of the tokens of the trainer's text."""
    return round(4096 * (-100 + math.log(max(share, RAREST)))) / 4096


def pieces(vocabulary, lossless: bool) -> tuple[list[bytes], list[float]]:
    """The bytes and the score of each id, in the lossless form or in that for models of TokenMonster's own search.

    The end of a document has no bytes. Raises VocabularyError where no ids are left for the missing bytes.
    """
    texts, scores, taken = [], [], set()
    for token, (piece, share) in enumerate(zip(vocabulary.pieces, vocabulary.scores + [-1.0])):
        text = COMPLETE_DELETE.sub(b"", piece) if vocabulary.marks else piece  # mark, space, "0" is "0" alone
        text = piece if text in taken or not text else text
        marked = vocabulary.marks and MARK in text and not (lossless and text == MARK)  # a mark of the text's own
        dead = token == vocabulary.eos_id or marked or ACROSS_WORDS.search(text)
        texts.append(text)
        taken.add(text)
        scores.append(DEAD if dead else live_score(share))
    if lossless:
        missing = sorted(UTF8 - {text[0] for text, score in zip(texts, scores) if len(text) == 1 and score != DEAD})
        free = [token for token, score in enumerate(scores) if score == DEAD and token != vocabulary.eos_id]
        if len(missing) > len(free):
            raise VocabularyError(f"{vocabulary.name}: {len(missing)} bytes have no token, and only {len(free)} ids "
                                  f"are free to give them one; use tokenizer_segmentation exact")
        for byte, token in zip(missing, free):
            texts[token], scores[token] = bytes([byte]), live_score(RAREST)
    return texts, scores


def tokenizer_json(vocabulary, lossless: bool) -> bytes:
    """The tokenizer.json of a vocabulary.TokenMonster; the same bytes on every machine. See the two forms above.

    Raises VocabularyError where the vocabulary does not have what it takes.
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
            raise VocabularyError(f"{vocabulary.name}: has no token for ? or a space, to put for what it cannot write")
        # The library writes several unknown tokens in a row as one, and takes a "?" of the text's own for one of them.
        stand_in = re.escape(texts[unknown].decode())
        apart = {"type": "Split", "pattern": {"Regex": f"{stand_in}(?={stand_in})"}, "behavior": "Isolated",
                 "invert": False}
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [apart, byte_level]}
        if vocabulary.marks:  # a mark deletes what follows it, in the joined text
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
