"""A tokenizer.json file (Mistral's BPE, for example), through Hugging Face's `tokenizers` library.

The library does the work. What is left for us: which token stands between documents (delimiters.py), how many bytes of
a text no token covers, and a decoder where the file lacks one.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from cli import BadInput, brief
from tokenizer.delimiters import END_OF_TEXT, Beside, no_end
from tokenizer.interface import Tokenizer
from tokenizer.tokenmonster import byte_characters

SPACE = "\u2581"  # stands for a space in a Metaspace
KEPT_WHOLE = ("ByteLevel", "Metaspace", "Digits", "UnicodeScripts", "FixedLength")  # pre-tokenizers that remove nothing
PROBES = {"two spaces in a row": "{0}  {0}", "line breaks": "{0}\n{0}", "tabs": "{0}\t{0}",
          "capital letters": "{1}", "accents": "caf\u00e9",
          "the spaces around punctuation": "{0},{0}"}  # {0} is a letter, {1} the same in upper case


def guarded(name: str, does: str, work: Callable, *arguments: Any) -> Any:
    """work(*arguments). The library raises bare Exceptions, and panics; both become a BadInput, "`name`: `does`"."""
    try:
        return work(*arguments)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of Rust code is no Exception
        raise BadInput(f"{name}: {does}: {brief(error)}") from None


def parts(tree: Any) -> Iterator[dict]:
    """A normalizer, pre-tokenizer or decoder of a tokenizer.json, and all that a Sequence is made of."""
    if isinstance(tree, dict):
        yield tree
        for inner in ("normalizers", "pretokenizers", "decoders"):
            for part in tree.get(inner) or ():
                yield from parts(part)


def missing_decoder(spec: dict) -> dict | None:
    """The decoder that belongs to a tokenizer.json which has none; None if tokens are words, with spaces between."""
    before = [*parts(spec.get("normalizer")), *parts(spec.get("pre_tokenizer"))]
    model, found = spec["model"], []
    metaspace = next((part for part in before if part["type"] == "Metaspace"), None)
    if any(part["type"] == "ByteLevel" for part in before):
        return {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    if metaspace:
        found = [{"type": "ByteFallback"}] * bool(model.get("byte_fallback")) + [metaspace]
    elif any(part["type"] == "Replace" and part.get("content") == SPACE for part in before):
        found = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"},
                 {"type": "Fuse"}]
        if any(part["type"] == "Prepend" for part in before):
            found.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    elif model.get("byte_fallback"):
        found = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    elif model.get("end_of_word_suffix"):
        found = [{"type": "BPEDecoder", "suffix": model["end_of_word_suffix"]}]
    elif model.get("type") == "WordPiece":
        found = [{"type": "WordPiece", "prefix": model.get("continuing_subword_prefix", "##"), "cleanup": False}]
    return found[0] if len(found) == 1 else {"type": "Sequence", "decoders": found} if found else None


class TokenizerJson(Tokenizer):
    """What the library makes of a tokenizer.json, behind our interface."""

    def __init__(self, data: bytes, name: str, eos_token: str | int | None = None, bos_token: str | int | None = None,
                 beside: Beside | None = None):
        """`data` is the content of a tokenizer.json file. Raises BadInput if it is not one, or has no end of text.

        eos_token    what follows a document: a token, or its id. If None, what the files `beside` it say, or else a
                     token of a usual name
        bos_token    what a prompt begins with; if None, eos_token
        """
        try:
            import tokenizers  # here, as a .vocab file does without it
        except ImportError:
            raise BadInput(f"{name}: needs a library to read it: pip install tokenizers") from None
        self.name, self.data, self.sha256 = name, data, hashlib.sha256(data).hexdigest()
        self._open = tokenizers.Tokenizer.from_str
        self._library = guarded(name, "not a tokenizer.json file", lambda: self._open(data.decode()))
        self.spec = guarded(name, "not a tokenizer.json file", json.loads, data)  # as a tokenizer.json of its own
        if not self.spec.get("decoder") and (decoder := missing_decoder(self.spec)):
            self.spec["decoder"] = decoder
            self._library = guarded(name, "not a tokenizer.json file", self._open, json.dumps(self.spec))
        self._choose_delimiters(eos_token, bos_token, beside or Beside())
        self.special_tokens = tuple(self.special.values())
        self._special_ids = {*self.special, self.eos_id, self.bos_id}
        self._quiet(self._library)
        self._unknown = self._unknown_id()

    @staticmethod
    def _quiet(library: Any):
        """Only we end documents, pad and cut: "</s>" in a text is text."""
        library.encode_special_tokens = True
        library.no_padding()
        library.no_truncation()

    def _choose_delimiters(self, eos_token: str | int | None, bos_token: str | int | None, beside: Beside):
        """Set eos_id, bos_id and vocab_size, and say in `delimited` where they come from."""
        ids = self._library.get_vocab(with_added_tokens=True)
        if isinstance(eos_token, str) and eos_token not in ids:
            if not eos_token.isdecimal():  # a new token, after all others
                self._library.add_special_tokens([eos_token])
                ids = self._library.get_vocab(with_added_tokens=True)
                self.spec = json.loads(self._library.to_str())
        names = {token: content for content, token in ids.items()}
        added = self._library.get_added_tokens_decoder().items()
        self.special = {token: added.content for token, added in added if added.special}  # id -> special token
        special = set(self.special)
        if not ids:
            raise BadInput(f"{self.name}: not a tokenizer.json file: it has no tokens")
        self.guessed_eos = next((ids[token] for token in END_OF_TEXT if token in ids), None)
        if eos_token is not None:
            self.eos_id, origin = self._id_of(eos_token, ids, names), None
        else:
            self.eos_id, origin = beside.eos(ids, special) or (self.guessed_eos, "by its name")
        if self.eos_id is None:
            raise BadInput(no_end(self.name, list(self.special.values())))
        self.bos_id = self.eos_id if bos_token is None else self._id_of(bos_token, ids, names)
        self.vocab_size = max(ids.values()) + 1
        self.eos_token, self.bos_token = names[self.eos_id], names[self.bos_id]
        self.origin = origin

    def _id_of(self, token: str | int, ids: dict[str, int], names: dict[int, str]) -> int:
        """The id of a token that somebody named. Raises BadInput if there is none."""
        found = ids.get(token, int(token) if str(token).isdecimal() else None)
        if found not in names:
            raise BadInput(f"{self.name} has no token {token}, of that name or id; name one of its tokens")
        return found

    def name_of(self, token: int | None) -> str | None:
        """The token of an id, if there is one."""
        return None if token is None or token < 0 else self._library.id_to_token(token)

    @property
    def delimiters(self) -> dict[str, str]:
        usual = self.eos_id == self.bos_id == self.guessed_eos
        return {} if usual else {"eos_token": self.eos_token, "bos_token": self.bos_token}

    @property
    def ends(self) -> tuple[int, ...]:
        return (self.eos_id, self.bos_id)

    def whole(self) -> bytes:
        """The file, with the decoder and the end token that it lacked: for a program that has only the file."""
        return self.data if json.loads(self.data) == self.spec else json.dumps(
            self.spec, ensure_ascii=False).encode()

    def within(self, rows: int):
        """Let go of special tokens beyond the rows of a model. Raises BadInput if a text may need one of them."""
        ids = self._library.get_vocab(with_added_tokens=True)
        beyond = [token for token in ids.values() if token >= rows]
        if not beyond:
            return
        if self.eos_id >= rows or self.bos_id >= rows or not self._special_ids.issuperset(beyond):
            raise BadInput(f"{self.name} has {self.vocab_size:,} ids, and the model has rows for {rows:,}: it is "
                           f"another model's")
        self.vocab_size = rows

    # -----------------------------------------------------------------------------------------------------------
    # Text to ids

    def encode_counted(self, text: str) -> tuple[np.ndarray, int]:
        return self.encode_batch_counted([text])[0]

    def encode_batch_counted(self, texts: list[str]) -> list[tuple[np.ndarray, int]]:
        # The library takes no lone surrogates (JSON can smuggle them in): they become U+FFFD, as with TokenMonster.
        texts = [text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace") for text in texts]
        does = "the tokenizers library cannot encode this text"
        encode = self._library.encode_batch
        if self._kind == "Unigram" and self._unknown < 0:  # it ends with an error where a piece is missing
            alphabet = {character for piece, _ in self.spec["model"]["vocab"] for character in piece}
            kept = ["".join(c for c in text if self._written(c) <= alphabet) for text in texts]
        else:
            kept = texts
        results = []
        for text, part, encoding in zip(texts, kept, guarded(
                self.name, does, lambda: encode(kept, add_special_tokens=False))):  # on threads of its own
            if self._spelled_out(encoding):
                encoding = guarded(self.name, does, lambda: self._literal.encode(part, add_special_tokens=False))
            lost, ids = len(text.encode()) - len(part.encode()), encoding.ids
            if self._unknown in (self.eos_id, self.bos_id):  # GPT-2's is: but what is unknown must not end a document
                ids = [token for token in ids if token != self._unknown]
            results.append((np.array(ids, self.dtype), lost + self._count_lost(part, encoding)))
        return results

    def _spelled_out(self, encoding: Any) -> bool:
        """Whether text has become a special token, other than the one that stands for what is unknown."""
        if self._special_ids.isdisjoint(encoding.ids):
            return False
        if not self._special_ids.isdisjoint(set(encoding.ids) - {self._unknown}):
            return True
        return self._kind == "Unigram" and self._unknown in self.special and self.special[self._unknown] in (
            piece for token, piece in zip(encoding.ids, encoding.tokens) if token == self._unknown)

    @cached_property
    def _literal(self) -> Any:
        """The same tokenizer, for texts that spell out a special token which is a piece of the model too.

        A Unigram finds "</s>" as it finds any piece. Here such pieces have names that no text holds.
        """
        spec = json.loads(json.dumps(self.spec))
        model, hidden = spec["model"], {self.name_of(token): f"\ufdd0{token}\ufdd1" for token in self._special_ids
                                        if token != self._unknown or self._kind == "Unigram" and token in self.special}
        if self._kind == "Unigram":
            model["vocab"] = [[hidden.get(piece, piece), score] for piece, score in model["vocab"]]
            rest = len(model["vocab"])
        else:
            merged = {part for pair in model.get("merges") or () for part in ("".join(pair), pair.replace(" ", "")
                      if isinstance(pair, str) else pair[0] + pair[1])}
            model["vocab"] = {piece if piece in merged else hidden.get(piece, piece): token
                              for piece, token in model["vocab"].items()}
            rest = len(model["vocab"])
        spec["added_tokens"] = [token for token in spec["added_tokens"]
                                if token["id"] >= rest or token["content"] not in hidden]
        library = self._open(json.dumps(spec))
        self._quiet(library)
        return library

    # -----------------------------------------------------------------------------------------------------------
    # What no token covers

    @cached_property
    def _kind(self) -> str:
        return type(self._library.model).__name__

    @cached_property
    def _pre(self) -> list[dict]:
        return [*parts(self.spec.get("pre_tokenizer"))]

    @cached_property
    def _by_bytes(self) -> bool:
        return any(part["type"] == "ByteLevel" for part in [*parts(self.spec.get("normalizer")), *self._pre])

    def _unknown_id(self) -> int:
        """The id that stands for what has no token; -1 if there is none."""
        if self._kind == "Unigram":
            unknown = self.spec["model"].get("unk_id")
            return -1 if unknown is None else unknown
        unknown = self._library.token_to_id(getattr(self._library.model, "unk_token", None) or "")
        return -1 if unknown is None else unknown

    @cached_property
    def _removes(self) -> bool:
        """Whether text may be gone before the model sees it, other than by its own doing."""
        def gone(part: dict) -> bool:
            return part["type"] in ("BertNormalizer", "Precompiled", "Nmt", "Strip") or str(
                part.get("behavior", "")).lower() == "removed" or part.get("content") == ""

        inner = [part for part in self._pre if part["type"] not in (*KEPT_WHOLE, "Sequence", "Split", "Punctuation")]
        return bool(inner) or any(map(gone, [*parts(self.spec.get("normalizer")), *self._pre]))

    @cached_property
    def _alphabet(self) -> set[str] | None:
        """The characters that a BPE has tokens for, if it drops all others without a word; None if it drops none."""
        model = self.spec["model"]
        if self._kind != "BPE" or self._unknown >= 0:
            return None
        vocab, end = model["vocab"], model.get("end_of_word_suffix") or ""
        prefix = model.get("continuing_subword_prefix") or ""
        known = {token for token in vocab if len(token) == 1}
        known |= {token.removesuffix(end).removeprefix(prefix) for token in vocab}
        known = {token for token in known if len(token) == 1}
        if model.get("byte_fallback") and all(f"<0x{byte:02X}>" in vocab for byte in range(256)):
            return None
        return None if self._by_bytes and known.issuperset(byte_characters()) else known

    def _written(self, character: str) -> set[str]:
        """The characters as which the pre-tokenizer hands one to the model."""
        if self._by_bytes:
            characters = byte_characters()
            return {characters[byte] for byte in character.encode()}
        metaspace = any(part["type"] == "Metaspace" for part in self._pre)
        return {SPACE if metaspace and character == " " else character}

    @cached_property
    def _between(self) -> set[str]:
        """White space that the pre-tokenizer takes out, since the border of two tokens says it."""
        found = set()
        for space in " \t\n\r":
            pieces = "a" + space + "a"
            if self._library.normalizer is not None:
                pieces = self._library.normalizer.normalize_str(pieces)
            if self._library.pre_tokenizer is not None:
                pieces = "".join(piece for piece, _ in self._library.pre_tokenizer.pre_tokenize_str(pieces))
            if pieces == "aa":
                found.add(space)
        return found

    def _count_lost(self, text: str, encoding: Any) -> int:
        """How many bytes of a text no token covers. White space that tokens have between them counts as covered."""
        if self._alphabet is not None:  # the offsets of what follows a dropped character are not right
            if self._library.normalizer is not None:
                text = self._library.normalizer.normalize_str(text)
            characters = set(text) - self._between
            if self._by_bytes:
                data, names = text.encode(), byte_characters()
                return sum(data.count(byte) for byte in {*"".join(characters).encode()}
                           if names[byte] not in self._alphabet)
            return sum(text.count(character) * len(character.encode()) for character in characters
                       if not self._written(character) <= self._alphabet)
        lost = 0
        if self._unknown in encoding.ids:
            lost = sum(self._unknown_bytes(text, encoding, place) for place, token in enumerate(encoding.ids)
                       if token == self._unknown)
        if self._removes:
            reached = 0
            for start, stop in (*encoding.offsets, (len(text), len(text))):
                if start > reached:
                    lost += len("".join(text[reached:start].split()).encode())
                reached = max(reached, stop)
        return lost

    def _unknown_bytes(self, text: str, encoding: Any, place: int) -> int:
        """Bytes of the text that one unknown token stands for."""
        start, stop = encoding.offsets[place]
        if self._kind != "Unigram":
            return len(text[start:stop].encode())
        piece = encoding.tokens[place]  # a Unigram says what it did not know
        if piece == self.name_of(self._unknown):  # "?" may stand for what is unknown, and for itself
            return 0
        return len(piece) if self._by_bytes else len(piece.replace(SPACE, " ").encode())

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What to tell whoever uses this tokenizer: which tokens delimit documents, and what does not come back."""
        said = []
        if self.delimiters:
            begin = f", and begin with {self.bos_token}" if self.bos_id != self.eos_id else ""
            origin = f" ({self.origin})" if self.origin else ""
            said.append(f"{self.name}: documents end with {self.eos_token}{origin}{begin}")
        letter = next((letter for letter in "aeotnsr" if not self.encode_counted(letter)[1]), None)
        if letter is None:
            return tuple(said)
        plain, lost = self.decode(self.encode(letter)), []
        if plain == f" {letter}":
            lost.append("a text gets a space before it")
        for what, probe in PROBES.items():
            probe = probe.format(letter, letter.upper())
            ids, dropped = self.encode_counted(probe)
            back = self.decode(ids).removeprefix(" " * (plain == f" {letter}"))
            if not dropped and back != probe:
                lost.append(f"{what} may change")
        if lost:
            said.append(f"{self.name}: a text does not always come back from its tokens: {', '.join(lost)}; bits per "
                        f"byte are counted on the text as it was")
        return tuple(said)

    # -----------------------------------------------------------------------------------------------------------
    # Ids to text

    def decode(self, ids: list[int] | np.ndarray) -> str:
        ids = [token for token in self._checked(ids) if token != self.eos_id]
        return guarded(self.name, "the tokenizers library cannot decode these ids",
                       lambda: self._library.decode(ids, skip_special_tokens=True))

    def decode_bytes(self, ids: list[int] | np.ndarray) -> bytes:
        return self.decode(ids).encode()

    def stream(self, before: Sequence[int] = ()) -> "TextStream":
        return TextStream(self, before)


class TextStream:
    """Decodes ids one at a time, for a tokenizer that can only decode many.

    What the library makes of an id depends on those before it: the first token of a text loses the space that it
    carries. So we decode a few old ids with the new ones, and without them, and print the difference. It takes the same
    time for every id.
    """

    KEPT = 8  # old ids to begin with
    LONGEST = 64  # ids that may be held back, while a character is incomplete

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()):
        """`before` are the ids that the text continues, of which nothing is printed."""
        self._tokenizer, self._pending = tokenizer, []  # ids whose text has not been printed
        self._old = [int(token) for token in before][-self.KEPT:]
        self._told = self._decode(self._old)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids) if ids else ""

    def push(self, token: int) -> str:
        """The text that is certain after one more id, often ""."""
        self._pending.append(int(token))
        text = self._decode(self._old + self._pending)
        if text.endswith("\ufffd") and len(self._pending) < self.LONGEST:  # an incomplete character
            return ""
        return self._print(text)

    def finish(self) -> str:
        """The rest of the text."""
        return self._print(self._decode(self._old + self._pending)) if self._pending else ""

    def _print(self, text: str) -> str:
        new, latest = text[len(self._told):], self._decode(self._pending)
        if latest:  # it can stand for all that came before
            self._old, self._told = self._pending, latest
        else:
            self._old, self._told = self._old + self._pending, text
        self._pending = []
        return new
