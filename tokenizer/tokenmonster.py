"""TokenMonster: a vocabulary file, and the search that turns text into its ids.

    tokenizer = TokenMonster(Path("vocabs/quickstart-2048.vocab").read_bytes(), "quickstart-2048")
    ids = tokenizer.encode("Hello, world!")          # (n,) uint16
    tokenizer.decode(ids)                            # "Hello, world!"

(tokenizer/__init__.py finds a vocabulary's file by its name.) There are four steps, in the order of this file:

1. The file (`parse`). A vocabulary is a list of entries. Each has a byte string, the id it stands for, and a few facts
   that the trainer worked out beforehand. Above all these are two *alternatives*: shorter entries that this one begins
   with, and that are worth trying in its place.
2. Text to bytes (`_write_bytes`). If words came with and without a space, " the" and "the" would take up two ids. So
   every word gets a space. Where the text has none, as in "(the", we insert a delete mark, 0x7F, and then the space.
   Decoding removes the mark and the one byte after it.
3. Bytes to ids (`_segment`). A greedy tokenizer takes the longest entry that matches, and often regrets it one token
   later. This search is *ungreedy*: it looks one token ahead. At every step it tries three first tokens (the longest
   match and its two alternatives), finds the longest match after each, scores the three pairs, and keeps only the first
   token of the best pair.
4. Ids to bytes (`decode_bytes`). Join the entries' bytes, and drop what the marks delete.

Steps 2 and 3 are loops over single characters. Numba compiles them if it is installed. Without it the same lines run as
plain Python: the ids are the same, and it takes some thirty times as long.

The ids are those of the reference implementation (github.com/alasdairforsythe/tokenmonster). To compare the two on your
own text, run `python -m tokenizer check FILE...`.

This file needs nothing from the project, and no library but numpy. An export puts it, whole, into the tokenizer that
transformers loads (for_transformers.py).
"""

import codecs
import hashlib
import os
import re
import struct
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NoReturn

import numpy as np

try:
    import numba
    COMPILED = not numba.config.DISABLE_JIT
except ImportError:
    COMPILED = False


def _compile(function: Callable) -> Callable:
    """Compile a loop if numba is there to do it.

    The cache keeps the machine code beside this file, so only the very first run waits for it. With nogil, the threads
    of encode_batch run at the same time. The loops' parameters have no type hints, since numba finds out their types by
    itself. Their docstrings give the shapes and dtypes of arrays; all the rest are ints, or a bool.
    """
    if not COMPILED:
        return function
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no folder can hold a cache, as in some containers
        return numba.njit(nogil=True)(function)


# What the loops read and write: the arrays themselves when compiled. Plain Python gets memoryviews of them, whose items
# are Python's own ints: quicker to reach than numpy's scalars, and unlike a uint8 they cannot overflow.
_view = (lambda array: array) if COMPILED else memoryview


class VocabularyError(ValueError):
    """A vocabulary that cannot be used. The message is one line: what is wrong, and what to do."""


# ---------------------------------------------------------------------------------------------------------------
# The interface


class Tokenizer:
    """What the rest of the code sees. A subclass has encode_counted, decode_bytes and stream."""

    name: str  # the vocabulary's own name
    data: bytes  # the vocabulary's file
    sha256: str  # hex digest of the file, by which data and model prove that they share it
    eos_id: int  # follows every document, and decodes to nothing
    vocab_size: int  # rows that a model's embedding needs, eos included

    def encode_counted(self, text: str) -> tuple[np.ndarray, int]:
        """The (n,) ids of a text, and how many of its bytes no token covers."""
        raise NotImplementedError

    def encode_batch_counted(self, texts: list[str]) -> list[tuple[np.ndarray, int]]:
        """encode_counted of each text, with one thread per core.

        Of n threads, thread k takes every n-th text from the k-th on, so long and short documents spread evenly.
        """
        threads = max(1, min(os.cpu_count() or 1, len(texts)))
        results = [None] * len(texts)

        def work(k: int):
            results[k::threads] = [self.encode_counted(text) for text in texts[k::threads]]

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(threads)))  # list() raises a thread's exception here
        return results

    def encode(self, text: str) -> np.ndarray:
        """The (n,) ids of a text: uint16 if the vocabulary allows it, else uint32. Adds no eos."""
        return self.encode_counted(text)[0]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """The same as [encode(text) for text in texts], on all cores."""
        return [ids for ids, _ in self.encode_batch_counted(texts)]

    def count_dropped(self, text: str) -> int:
        """How many bytes of the text are lost because the vocabulary has no token for them."""
        return self.encode_counted(text)[1]

    def decode_bytes(self, ids: list[int] | np.ndarray) -> bytes:
        """The bytes of the ids, broken UTF-8 included. Raises ValueError if an id is unknown."""
        raise NotImplementedError

    def decode(self, ids: list[int] | np.ndarray) -> str:
        """The text of the ids. Bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def count_bytes(self, ids: list[int] | np.ndarray) -> int:
        """How many bytes the ids stand for: the denominator of bits per byte."""
        return len(self.decode_bytes(ids))

    def stream(self) -> Any:
        """A decoder for ids that come one at a time: .push(id) -> str, then .finish() -> str."""
        raise NotImplementedError

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """The smallest integer type of a bin that holds every id."""
        return np.uint16 if self.vocab_size <= 65536 else np.uint32

    def _checked(self, ids: int | list[int] | np.ndarray) -> list[int]:
        """An id, or a list, array or CPU tensor of them, as a list. Raises ValueError if one is out of range.

        A model padded to a round number of rows can produce such an id. As a list index of -1 or a wrapped uint16 it
        would turn into some other token without a word.
        """
        ids = np.asarray(ids, dtype=np.int64).reshape(-1)
        if ids.size and not (0 <= ids.min() and ids.max() < self.vocab_size):
            bad = ids[(ids < 0) | (ids >= self.vocab_size)][0]
            raise ValueError(f"id {bad} is not in {self.name}, whose ids are 0 to {self.vocab_size - 1}")
        return ids.tolist()


# ---------------------------------------------------------------------------------------------------------------
# 1. The vocabulary file

# The array `entries` (int32) has a row for each entry of the vocabulary. Its columns:
LENGTH, FLAG, WORDS, ID, BRANCH = 0, 1, 2, 3, 4  # BRANCH, +1, +2: the entry itself and its alternatives

# FLAG holds facts about the entry's bytes that the trainer worked out, one bit each:
#   0x01 ends with a letter         0x08 ends with a mark       0x40 is a special token
#   0x02 begins with a letter       0x10 begins with a mark     0x80 words and spaces only, or no letter
#   0x04 begins with a space        0x20 is a space, then one word
BEGINS_LETTER, ONE_WORD, SPECIAL = 0x02, 0x20, 0x40

MARK = 0x7F           # the delete mark
NONE = 0xFFFFFF       # "no such id" or "no such entry" in a 3-byte field
MAX_FILE = 20 << 20   # a hundred times the vocabulary with 8,000 ids
MAX_NODES = 1 << 19   # the trie has a row of 1 kB for each: stay below half a gigabyte


def parse(data: bytes, name: str) -> dict[str, Any]:
    """Read a whole .vocab file, and check everything that the search later relies on. All numbers are little-endian.

    Returns dict(entries (N, 7) int32, keys list of N bytes, scores list of N float, begin (256,) uint8, size int,
    delete_id int or -1, marks bool, nfd bool). A score is the entry's share of the tokens of the trainer's text, or -1
    if the trainer did not count it. Raises VocabularyError, and nothing else, if the file is not a usable vocabulary.
    """
    def refuse(what: str) -> NoReturn:
        raise VocabularyError(f"{name}: {what}")

    def need(count: int):  # never read past the end, whatever lengths the file gives
        if at + count > len(data):
            refuse(f"the file ends at byte {len(data)}, inside a record: truncated or corrupt; download it again")

    def u24(offset: int) -> int:
        return int.from_bytes(data[offset:offset + 3], "little")

    at = 0
    need(24)
    capcode, charset, normalization = data[0:3]
    unk_id, size, reverse_size, count, delete_id = (u24(offset) for offset in (8, 11, 14, 17, 20))
    longest = data[23]
    # Byte 3 is the trainer's mode and byte 4 its reserved characters. Encoding needs neither.
    if capcode > 2 or charset > 2 or data[5:8] != bytes(3):
        refuse("not a TokenMonster vocabulary (.vocab) file")
    if capcode == 2:
        refuse("uses full capcode (2), which is not supported; take a nocapcode vocabulary")
    if charset != 1:
        refuse(f"is for charset {charset} ({('none', 'UTF-8', 'UTF-16')[charset]}); only UTF-8 is supported")
    if normalization & ~1:
        refuse(f"asks for normalization {normalization:#04x}; only NFD (0x01) or none is supported")
    if unk_id != NONE:
        refuse("has an UNK token, which is not supported (no Stentor vocabulary has one)")
    if not 0 < size <= count or reverse_size != size:
        refuse(f"corrupt: {count} entries and {reverse_size} reverse entries for {size} ids")

    at = 24
    keys, scores, rows, index_of = [], [], [], {}
    for index in range(count):
        need(1)
        length = data[at]
        need(1 + length + 15)
        key = data[at + 1:at + 1 + length]
        at += 1 + length
        flag, words, token, alternatives = data[at], data[at + 1], u24(at + 8), (u24(at + 2), u24(at + 5))
        scores.append(*struct.unpack("<f", data[at + 11:at + 15]))
        at += 15
        if not 0 < length <= longest:
            refuse(f"corrupt: entry {index} is {length} bytes long, the header says 1 to {longest}")
        if index_of.setdefault(key, index) != index:
            refuse(f"corrupt: entry {index} repeats entry {index_of[key]}")
        if token >= size:
            refuse(f"corrupt: entry {index} has id {token} of {size}")
        if flag & SPECIAL:
            refuse("has special tokens, which are not supported (no Stentor vocabulary has one)")
        for other in alternatives:
            # The search takes an alternative without looking. Only a prefix is sure to match where the entry did.
            if other != NONE and (other >= index or len(keys[other]) >= length or not key.startswith(keys[other])):
                refuse(f"corrupt: entry {index} has alternative {other}, which is not a prefix of it")
        keys.append(key)
        rows.append((length, flag, words, token, index, *(-1 if a == NONE else a for a in alternatives)))

    need(256 + 3)
    begin = np.frombuffer(data, np.uint8, 256, at)
    deleted = u24(at + 256)
    at += 256 + 3
    for _ in range(deleted):  # entries that the trainer was told to leave out: skip over them
        need(1)
        need(1 + data[at] + 7)
        at += 1 + data[at] + 7
    if at != len(data):
        refuse(f"{len(data) - at} bytes follow the end of the vocabulary: corrupt or not a .vocab file")

    if len({row[ID] for row in rows}) != size:
        refuse("corrupt: some ids have no entry")
    if begin.max() > 15:
        refuse("corrupt: the table of first bytes has a class above 15")
    if capcode == 1:
        mark, space = (index_of.get(bytes([byte]), -1) for byte in (MARK, 0x20))
        if mark < 0 or space < 0 or rows[mark][ID] != delete_id:
            refuse("corrupt: text with delete marks needs a delete token and a space, and one is missing")
    return dict(entries=np.array(rows, np.int32), keys=keys, scores=scores, begin=begin, size=size,
                delete_id=delete_id if capcode == 1 else -1, marks=capcode == 1, nfd=normalization == 1)


def build_trie(keys: list[bytes], name: str) -> tuple[np.ndarray, np.ndarray]:
    """The tree of the keys' prefixes, as two tables.

    next_node    (nodes, 256) uint16 or int32: the node that a byte leads to; 0, the root, if no key goes on with it
    entry_of     (nodes,) int32: the key that ends at the node, or -1

    Dense rows are wasteful (half a kilobyte each) and quick: one load per byte, no hashing, no comparing. The 8,000
    vocabulary has 21,517 nodes, 11 MB, and text touches few of them. Raises VocabularyError if MAX_NODES is exceeded.
    """
    node_of, edges, ends = {b"": 0}, [], []
    for key in keys:
        if len(node_of) > MAX_NODES:
            raise VocabularyError(f"{name}: too large: more than {MAX_NODES} prefixes")
        length = len(key)
        while key[:length] not in node_of:  # back to the longest prefix that is there already
            length -= 1
        parent = node_of[key[:length]]
        for at in range(length, len(key)):
            node = node_of[key[:at + 1]] = len(node_of)
            edges.append((parent, key[at], node))
            parent = node
        ends.append(parent)
    next_node = np.zeros((len(node_of), 256), np.uint16 if len(node_of) <= 65536 else np.int32)
    parents, bytes_, nodes = np.array(edges, np.int64).T
    next_node[parents, bytes_] = nodes
    entry_of = np.full(len(node_of), -1, np.int32)
    entry_of[ends] = np.arange(len(keys))
    return next_node, entry_of


# ---------------------------------------------------------------------------------------------------------------
# 2. Text to bytes

OTHER, SPACE, LETTER, COMBINING, NUMBER, APOSTROPHE = range(6)  # the classes that decide where marks go


@cache
def character_classes(count: int) -> np.ndarray | memoryview:
    """The class of each of the first `count` code points, (count,) uint8.

    All 0x110000 of them take a tenth of a second, so ASCII text makes do with the first 128.
    """
    of_category = {"L": LETTER, "M": COMBINING, "N": NUMBER}
    classes = bytearray(of_category.get(unicodedata.category(chr(code))[0], OTHER) for code in range(count))
    for code, kind in ((0x20, SPACE), (0x27, APOSTROPHE), (0x2019, APOSTROPHE)):
        if code < count:
            classes[code] = kind
    return _view(np.frombuffer(classes, np.uint8))


@_compile
def _write_bytes(codes, classes, marks, data) -> int:
    """Write code points to `data` as UTF-8 with delete marks. Returns the number of bytes.

    codes      (n,) uint32
    classes    (m,) uint8 (`character_classes`)
    marks      bool: whether this vocabulary uses delete marks
    data       (6 * n,) uint8: a character takes at most 4 bytes, and a mark with its space 2 more

    A mark goes before a word that no space sets off. Whether a character begins a word depends on the characters before
    it in the text, never on what was inserted.
    """
    size = 0
    before, before_that = OTHER, OTHER
    for position in range(len(codes)):
        code = codes[position]
        kind = classes[code]
        if marks:
            if kind == LETTER:  # "don't" is one word; in "'tis" the apostrophe follows no letter
                inside = (before == SPACE or before == LETTER or before == COMBINING
                          or (before == APOSTROPHE and before_that == LETTER))
            elif kind == NUMBER:
                inside = before == SPACE or before == NUMBER
            else:
                inside = True
            if not inside:
                data[size] = MARK
                data[size + 1] = 0x20
                size += 2
            if code == MARK:
                code = 0x14  # a mark that the text itself holds must not delete anything
        before, before_that = kind, before

        if 0xD800 <= code <= 0xDFFF:
            code = 0xFFFD  # a lone surrogate has no UTF-8
        if code < 0x80:
            data[size] = code
            size += 1
        elif code < 0x800:
            data[size] = 0xC0 | code >> 6
            data[size + 1] = 0x80 | code & 0x3F
            size += 2
        elif code < 0x10000:
            data[size] = 0xE0 | code >> 12
            data[size + 1] = 0x80 | code >> 6 & 0x3F
            data[size + 2] = 0x80 | code & 0x3F
            size += 3
        else:
            data[size] = 0xF0 | code >> 18
            data[size + 1] = 0x80 | code >> 12 & 0x3F
            data[size + 2] = 0x80 | code >> 6 & 0x3F
            data[size + 3] = 0x80 | code & 0x3F
            size += 4
    return size


# ---------------------------------------------------------------------------------------------------------------
# 3. Bytes to ids


@_compile
def _longest(next_node, entry_of, node, data, start, end) -> int:
    """Walk down the trie from `node` along data[start:end], which is uint8. Returns the last entry met, or -1."""
    found = -1
    for position in range(start, end):
        node = next_node[node, data[position]]
        if node == 0:
            break
        if entry_of[node] >= 0:
            found = entry_of[node]
    return found


@_compile
def _score(flag, words, next_flag, next_words, total, after) -> int:
    """How good it is to write one token and then another: the terms that both kinds of pair share.

    flag, words              of the first token; words is how many words begin in it
    next_flag, next_words    of the second
    total                    bytes that the two cover
    after                    class of the byte that follows (see _segment)
    """
    return (total                                            # The pair reaches far,
            + (flag >> 7) + (next_flag >> 7)                 # its tokens do not mix words with punctuation,
            + max(0, words - 1) + max(0, next_words - 1)     # they hold several words at once,
            + ((after >> 2) & 1)                             # and a space follows: a point or so each.
            + 100 * (words + next_words + (after >> 3))      # What decides: words begun, and ended.
            - 100 * ((flag >> 3) & 1 & (next_flag >> 4))     # Two marks in a row (as the reference has it).
            - 3 * (next_flag & 1 & after))                   # The pair ends between two letters.


@_compile
def _segment(data, end, ids, next_node, entry_of, entries, begin, delete_id, space_node) -> tuple[int, int]:
    """The ungreedy search, from data[:end] to ids. Returns the number of ids and the number of bytes dropped.

    data          (>= end,) uint8: what _write_bytes wrote
    ids           (3 * end,) uint16 or uint32, written to. Every step emits an id, sometimes with a delete token, and
                  moves on by at least one byte. Only the step right after a delete token may stay where it is, once.
    next_node, entry_of    the trie (`build_trie`)
    entries       (N, 7) int32: columns LENGTH ... BRANCH + 2
    begin         (256,) uint8: what a byte, if it comes next, says about the text before it: 1, a word goes on (a
                  letter); 12, a word is over (the space); 10, the same (most punctuation); 0, neither. The trainer
                  classed each byte by its main use, so "x" may be a 0.
    delete_id     id of the token that is one delete mark, or -1
    space_node    the trie's node for " "

    `entry` is the match at i: it has been looked up, or it is the second token of the last pair chosen. After a delete
    token, `entry` begins with a space that the data does not have, and after_delete is 1. Then it covers one byte less,
    and the word that it begins has begun already.
    """
    count, dropped = 0, 0
    i, entry, after_delete = 0, -1, 0
    while i < end:
        if entry < 0:
            entry = _longest(next_node, entry_of, 0, data, i, end)
            if entry < 0:  # no token has this byte
                dropped += 1
                i += 1
                continue

        length = entries[entry, LENGTH] - after_delete
        if i + length >= end or (entries[entry, FLAG] & ONE_WORD and begin[data[i + length]] == 12):
            # The last token; or the everyday case, a whole word that another follows. There is nothing to improve.
            ids[count] = entries[entry, ID]
            count += 1
            i += length
            entry, after_delete = -1, 0
            continue

        best_score, best = -1000000, (-1, -1, 0, 0)  # the best pair: first, second, step, and whether with a delete
        for branch in range(3):
            first = entries[entry, BRANCH + branch]
            if first < 0:
                break
            step = entries[first, LENGTH] - after_delete
            second = _longest(next_node, entry_of, 0, data, i + step, end)
            if second < 0:
                continue
            flag, words = entries[first, FLAG], entries[first, WORDS] - after_delete
            next_flag, next_words = entries[second, FLAG], entries[second, WORDS]
            total = step + entries[second, LENGTH]
            after = begin[data[i + total]] if i + total < end else begin[0]
            score = (_score(flag, words, next_flag, next_words, total, after)
                     + ((next_flag >> 2) & 1)                   # The cut is before a space: a point.
                     - 103 * (flag & 1 & (next_flag >> 1)))     # Or between two letters: a word in pieces.
            if branch > 0:  # a shorter first token has to earn its place
                score -= 10000 if total == length else 100 if total < length else 0
            # If scores are equal, the first of the plain pairs wins, and only then one with a delete token.
            if score > best_score or (score == best_score and best[3]):
                best_score, best = score, (first, second, step, 0)

            # The second token begins and ends inside one word. A delete token, then an entry that begins with a space
            # (most words have only that form), may reach further. (A step of 0 would lead back here, for ever.)
            if delete_id >= 0 and step > 0 and next_flag & BEGINS_LETTER and after == 1 and next_words == 0:
                second = _longest(next_node, entry_of, space_node, data, i + step, end)
                if second < 0 or entries[second, LENGTH] - 1 <= total - step:
                    continue
                next_flag, next_words = entries[second, FLAG], entries[second, WORDS]
                total = step + entries[second, LENGTH] - 1
                after = begin[data[i + total]] if i + total < end else begin[0]
                score = (_score(flag, words, next_flag, next_words, total, after)
                         - 103 * (flag & 1)     # A word in pieces, as above,
                         - 1)                   # and one token more.
                if branch > 0:
                    score -= 10000 if total == length else 100 if total < length else 0
                if score > best_score:
                    best_score, best = score, (first, second, step, 1)

        if best[0] < 0:  # nothing matches after any of the three: the byte after this one will be dropped
            best = (entry, -1, length, 0)
        first, entry, step, after_delete = best
        ids[count] = entries[first, ID]
        count += 1
        if after_delete:
            ids[count] = delete_id
            count += 1
        i += step
    return count, dropped


@_compile
def _count(ids, visible, open_mark) -> int:
    """How many bytes the ids decode to, without making the text; -1 if an id is out of range.

    ids          (n,) integers
    visible      (2, size) int32: bytes of a token that are text; in row 1, a mark before it deletes the first
    open_mark    (2, size) uint8: whether the token ends with a mark that has had nothing to delete yet
    """
    total, mark = 0, 0
    for position in range(len(ids)):
        token = ids[position]
        if not 0 <= token < visible.shape[1]:
            return -1
        total += visible[mark, token]
        mark = open_mark[mark, token]
    return total


# ---------------------------------------------------------------------------------------------------------------
# 4. The tokenizer, and ids to bytes

COMPLETE_DELETE = re.compile(rb"\x7f.", re.DOTALL)


def byte_characters() -> list[str]:
    """The character that stands for each of the 256 bytes where tokens must be text.

    A byte that is a visible character is written as itself, any other as a character from U+0100 on. This is GPT-2's
    table, which the libraries' "ByteLevel" has built in.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(hidden)) for byte in range(256)]


class TokenMonster(Tokenizer):
    """A TokenMonster vocabulary in UTF-8, with "nocapcode" or no capcode at all."""

    pieces: list[bytes]  # what each id decodes to, delete marks included
    scores: list[float]  # each id's share of the tokens of the trainer's text, -1 if unknown
    marks: bool  # whether there are delete marks
    nfd: bool  # whether text is brought to NFD

    def __init__(self, data: bytes, name: str, eos_id: int | None = None):
        """`data` is the content of a .vocab file. Raises VocabularyError if it is not usable.

        If eos_id is None, it is the id of "\\r", which cleaned text does not hold, or else the one after the last id.
        """
        vocabulary = parse(data, name)
        next_node, entry_of = build_trie(vocabulary["keys"], name)
        self.marks, self.nfd = vocabulary["marks"], vocabulary["nfd"]
        self._search = (*map(_view, (next_node, entry_of, vocabulary["entries"], vocabulary["begin"])),
                        vocabulary["delete_id"], int(next_node[0, 0x20]))

        # Several entries may share an id ("0" and mark, space, "0"). It decodes to the last of them.
        self.pieces, self.scores = [b""] * vocabulary["size"], [-1.0] * vocabulary["size"]
        for key, score, token in zip(vocabulary["keys"], vocabulary["scores"], vocabulary["entries"][:, ID].tolist()):
            self.pieces[token] = key
            self.scores[token] = max(score, self.scores[token])

        if eos_id is None:
            eos_id = self.pieces.index(b"\r") if b"\r" in self.pieces else vocabulary["size"]
        self.name, self.data, self.sha256, self.eos_id = name, data, hashlib.sha256(data).hexdigest(), eos_id
        self.vocab_size = max(vocabulary["size"], eos_id + 1)
        self.pieces[eos_id:eos_id + 1] = [b""]  # the end of a document is no text
        self._count_tables = self._make_count_tables()

    def __reduce__(self) -> tuple:
        """For pickle and copy: make it anew from the file. (The memoryviews of plain Python cannot be pickled.)"""
        return TokenMonster, (self.data, self.name, self.eos_id)

    def _make_count_tables(self) -> tuple:
        """The two tables of `_count`."""
        keys = self.pieces + [b""] * (self.vocab_size - len(self.pieces))
        visible, open_mark = np.zeros((2, len(keys)), np.int32), np.zeros((2, len(keys)), np.uint8)
        for mark in (0, 1):
            for token, key in enumerate(keys):
                rest = b"\x7f" * mark + key
                rest = COMPLETE_DELETE.sub(b"", rest) if self.marks else key
                open_mark[mark, token] = self.marks and rest.endswith(b"\x7f")
                visible[mark, token] = len(rest) - open_mark[mark, token]
        return _view(visible), _view(open_mark)

    def encode_counted(self, text: str) -> tuple[np.ndarray, int]:
        if text == "":
            return np.empty(0, self.dtype), 0
        classes = character_classes(128 if text.isascii() else 0x110000)
        if self.nfd and not text.isascii():
            text = unicodedata.normalize("NFD", text)  # returns at once if the text is in NFD already
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        data = np.empty(6 * len(codes), np.uint8)
        size = _write_bytes(_view(codes), classes, self.marks, _view(data))
        ids = np.empty(3 * size, self.dtype)
        count, dropped = _segment(_view(data), size, _view(ids), *self._search)
        return ids[:count].copy(), dropped  # the copy lets go of the oversized buffer

    def count_bytes(self, ids: list[int] | np.ndarray) -> int:
        ids = np.asarray(ids)
        count = _count(_view(ids), *self._count_tables) if ids.size else 0
        return count if count >= 0 else len(self._checked(ids))  # which raises, and says why

    def decode_bytes(self, ids: list[int] | np.ndarray) -> bytes:
        data = b"".join(map(self.pieces.__getitem__, self._checked(ids)))
        return COMPLETE_DELETE.sub(b"", data).removesuffix(b"\x7f") if self.marks else data

    def stream(self) -> "TokenMonsterStream":
        return TokenMonsterStream(self)


class TokenMonsterStream:
    """Decodes ids one at a time, and holds back what the next one may still change.

    That is a delete mark with nothing after it yet, and the first bytes of an incomplete UTF-8 character.
    """

    def __init__(self, tokenizer: TokenMonster):
        self._tokenizer, self._mark = tokenizer, b""
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that is certain after one more id, often "". Raises ValueError if the id is unknown."""
        [token] = self._tokenizer._checked(token)
        data = self._mark + self._tokenizer.pieces[token]
        if self._tokenizer.marks:
            data = COMPLETE_DELETE.sub(b"", data)  # a mark that is left stands at the very end
            self._mark = b"\x7f" if data.endswith(b"\x7f") else b""
            data = data.removesuffix(b"\x7f")
        return self._utf8.decode(data)

    def finish(self) -> str:
        """The rest of the text, with U+FFFD for a character that was never completed."""
        return self._utf8.decode(b"", final=True)
