"""TokenMonster for transformers: AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)

The file that export.py puts beside the vocabulary, with all of vocabulary.py in the place of its import: so it needs
nothing but transformers (and numpy, which that needs). numba makes it some thirty times faster where it is installed.
The ids are those that the model was trained on.
"""

import os
import shutil

from transformers import PreTrainedTokenizer

from vocabulary import COMPLETE_DELETE, TokenMonster, byte_characters

FILE = "tokenmonster.vocab"


class TokenMonsterTokenizer(PreTrainedTokenizer):
    """A slow tokenizer (as transformers calls what is not in Rust) around TokenMonster.

    transformers wants a text's tokens as strings: a token's bytes are written as GPT-2 writes them, one character for
    each (byte_characters).
    """

    vocab_files_names = {"vocab_file": FILE}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file, eos_id=None, eos_token="<|endoftext|>", **kwargs):
        """vocab_file: path of a .vocab file. eos_id: int, the id of eos_token, which ends every document."""
        self.vocab_file = vocab_file
        with open(vocab_file, "rb") as file:
            self.vocabulary = TokenMonster(file.read(), FILE, eos_id)
        characters = byte_characters()
        self.tokens = ["".join(characters[byte] for byte in piece) for piece in self.vocabulary.pieces]
        self.tokens[self.vocabulary.eos_id] = str(eos_token)
        self.ids = {token: id_ for id_, token in enumerate(self.tokens)}
        super().__init__(eos_id=self.vocabulary.eos_id, eos_token=eos_token, **kwargs)

    @property
    def vocab_size(self):
        return self.vocabulary.vocab_size

    def get_vocab(self):
        return {**self.ids, **self.added_tokens_encoder}

    def _tokenize(self, text, **kwargs):
        return [self.tokens[id_] for id_ in self.vocabulary.encode(text).tolist()]

    def _convert_token_to_id(self, token):
        return self.ids.get(token)

    def _convert_id_to_token(self, index):
        return self.tokens[index] if index < len(self.tokens) else ""  # the model may have rows that no token has

    def convert_tokens_to_string(self, tokens):
        """Tokens -> text. Special tokens, which some versions hand over with the others, stand for themselves.

        A line end with an open delete mark keeps the mark: TextStreamer forgets what it has when a text ends in
        "\\n", and the space that the mark is to delete would begin the next line. No whole text ends so.
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

    def save_vocabulary(self, save_directory, filename_prefix=None):
        path = os.path.join(save_directory, (f"{filename_prefix}-" if filename_prefix else "") + FILE)
        if os.path.abspath(path) != os.path.abspath(self.vocab_file):
            shutil.copyfile(self.vocab_file, path)
        return (path,)
