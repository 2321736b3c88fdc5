"""A tokenizer.json file (Mistral's BPE, for example), through Hugging Face's `tokenizers` library."""

import hashlib

import numpy as np

from cli import BadInput, brief
from tokenizer.tokenmonster import Tokenizer

END_OF_TEXT = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eos|>", "<|im_end|>", "[SEP]")


class TokenizerJson(Tokenizer):
    """What the library makes of a tokenizer.json, behind our interface."""

    def __init__(self, data: bytes, name: str):
        """`data` is the content of a tokenizer.json file. Raises BadInput if it is not one."""
        try:
            from tokenizers import Tokenizer as Library  # here, as a .vocab file does without it
        except ImportError:
            raise BadInput(f"{name}: needs a library to read it: pip install tokenizers") from None
        try:
            self._library = Library.from_str(data.decode())
        except Exception as error:  # the library raises bare Exceptions
            raise BadInput(f"{name}: not a tokenizer.json file: {brief(error)}") from None
        ids = self._library.get_vocab(with_added_tokens=True)
        eos = [ids[token] for token in END_OF_TEXT if token in ids]
        if not eos:
            raise BadInput(f"{name}: has no end-of-text token; looked for {' '.join(END_OF_TEXT)}")
        self.name, self.data, self.sha256 = name, data, hashlib.sha256(data).hexdigest()
        self.eos_id, self.vocab_size = eos[0], max(ids.values()) + 1
        self.eos_token = self._library.id_to_token(self.eos_id)
        model = self._library.model  # a byte-level or byte-fallback BPE never drops anything
        self._unknown = ids.get(getattr(model, "unk_token", None), -1)
        self._library.encode_special_tokens = True  # "</s>" in a text is text: only we end documents
        self._library.no_padding()
        self._library.no_truncation()

    def encode_counted(self, text: str) -> tuple[np.ndarray, int]:
        return self.encode_batch_counted([text])[0]

    def encode_batch_counted(self, texts: list[str]) -> list[tuple[np.ndarray, int]]:
        # The library takes no lone surrogates (JSON can smuggle them in): they become U+FFFD, as with TokenMonster.
        texts = [text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace") for text in texts]
        encodings = self._library.encode_batch(texts, add_special_tokens=False)  # on threads of its own
        return [(np.array(encoding.ids, self.dtype), self._count_unknown(text, encoding))
                for text, encoding in zip(texts, encodings)]

    def _count_unknown(self, text: str, encoding) -> int:
        """Bytes of the text that became the unknown token."""
        if self._unknown not in encoding.ids:
            return 0
        return sum(len(text[start:stop].encode()) for token, (start, stop)
                   in zip(encoding.ids, encoding.offsets) if token == self._unknown)

    def decode(self, ids) -> str:
        ids = [token for token in self._checked(ids) if token != self.eos_id]
        return self._library.decode(ids, skip_special_tokens=True)

    def decode_bytes(self, ids) -> bytes:
        return self.decode(ids).encode()

    def stream(self) -> "WholeTextStream":
        return WholeTextStream(self)


class WholeTextStream:
    """Decodes ids one at a time, as TokenMonsterStream does.

    What the library's decoder makes of an id depends on those before it, so each push decodes all of them: fine for a
    page of text.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._ids, self._shown = tokenizer, [], 0

    def push(self, token: int) -> str:
        """The text that is certain after one more id, often ""."""
        self._ids.append(int(token))
        text = self._tokenizer.decode(self._ids)
        return "" if text.endswith("\ufffd") else self._rest(text)  # U+FFFD: an incomplete character

    def finish(self) -> str:
        """The rest of the text."""
        return self._rest(self._tokenizer.decode(self._ids))

    def _rest(self, text: str) -> str:
        new, self._shown = text[self._shown:], len(text)
        return new
