"""TokenMonster for transformers: AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)

An export puts this file beside the vocabulary, with the whole of tokenmonster.py in place of its import. So it needs
nothing but transformers (and numpy, which transformers needs). It runs some thirty times faster if numba is installed.
The ids are those that the model was trained on.
"""

import os
import shutil

from transformers import PreTrainedTokenizer

from tokenizer.tokenmonster import COMPLETE_DELETE, TokenMonster, byte_characters

FILE = "tokenmonster.vocab"


class TokenMonsterTokenizer(PreTrainedTokenizer):
    """TokenMonster as a "slow" tokenizer, which is what transformers calls any that is not in Rust.

    transformers wants the tokens of a text as strings. We write a token's bytes as GPT-2 does, one character for each
    (`byte_characters`).
    """

    vocab_files_names = {"vocab_file": FILE}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file: str, eos_id: int | None = None, eos_token: str = "<|endoftext|>", **kwargs):
        """`vocab_file` is the path of a .vocab file, and `eos_id` the id of eos_token, which ends every document."""
        self.vocab_file = vocab_file
        with open(vocab_file, "rb") as file:
            self.vocabulary = TokenMonster(file.read(), FILE, eos_id)
        characters = byte_characters()
        self.tokens = ["".join(characters[byte] for byte in piece) for piece in self.vocabulary.pieces]
        self.tokens[self.vocabulary.eos_id] = str(eos_token)
        self.ids = {token: id_ for id_, token in enumerate(self.tokens)}
        super().__init__(eos_id=self.vocabulary.eos_id, eos_token=eos_token, **kwargs)

    @property
    def vocab_size(self) -> int:
        return self.vocabulary.vocab_size

    def get_vocab(self) -> dict[str, int]:
        return {**self.ids, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        return [self.tokens[id_] for id_ in self.vocabulary.encode(text).tolist()]

    def _convert_token_to_id(self, token: str) -> int | None:
        return self.ids.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.tokens[index] if index < len(self.tokens) else ""  # a model may have more rows than tokens

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens. Special tokens, which some versions pass along with the others, stand for themselves.

        If an open delete mark follows the end of a line, the text keeps the mark. TextStreamer forgets what it has when
        a text ends in "\\n", and then the space that the mark should delete would begin the next line. No complete text
        ends like that.
        """
        text, ids, special = [], [], set(self.all_special_tokens)
        for token in tokens:
            if token in self.ids and token not in special:
                ids.append(self.ids[token])
            else:
                text += [self.vocabulary.decode(ids), token]
                ids = []
        data = b"".join(self.vocabulary.pieces[id_] for id_ in ids)
        open_line = self.vocabulary.marks and COMPLETE_DELETE.sub(b"", data).endswith(b"\n\x7f")
        return "".join([*text, self.vocabulary.decode(ids), "\x7f" if open_line else ""])

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        path = os.path.join(save_directory, (f"{filename_prefix}-" if filename_prefix else "") + FILE)
        if os.path.abspath(path) != os.path.abspath(self.vocab_file):
            shutil.copyfile(self.vocab_file, path)
        return (path,)
