"""Which token stands between documents: what the files beside a tokenizer.json say, or a token of a usual name.

In this order: what somebody asks for (eos_token in a config, export.py --eos_token), the model's config.json,
special_tokens_map.json, tokenizer_config.json, and END_OF_TEXT.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

END_OF_TEXT = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eos|>", "<|im_end|>", "[SEP]", "[EOS]",
               "<|end|>", "<end>", "<|eot_id|>")
FILES = ("config.json", "special_tokens_map.json", "tokenizer_config.json")


def no_end(name: str, special: list[str]) -> str:
    """What to say if no token can end a document."""
    there = f"; its special tokens are {' '.join(special[:8])}" if special else ""
    return (f"{name}: has no end-of-text token; looked for {' '.join(END_OF_TEXT)}{there}; name one: --eos_token TOKEN "
            f"(or its id)")


def content(token: Any) -> str | None:
    """The text of a token in a JSON file, where it is a string or an object."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def whole_numbers(value: Any) -> list[int]:
    """The ids that a config gives: one, several or none."""
    return [token for token in (value if isinstance(value, list) else [value]) if type(token) is int and token >= 0]


@dataclass
class Beside:
    """What the files beside a tokenizer.json say. Each is {} if it is missing or damaged."""

    config: dict = field(default_factory=dict)
    special_tokens_map: dict = field(default_factory=dict)
    tokenizer_config: dict = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> "Beside":
        """Read the files of a folder. (Whoever needs all of one reads it again, and complains if it is damaged.)"""
        def read(name: str) -> dict:
            try:
                value = json.loads((folder / name).read_text(encoding="utf-8-sig"))
            except (OSError, ValueError, RecursionError):
                return {}
            return value if isinstance(value, dict) else {}

        return cls(*map(read, FILES))

    def eos(self, ids: dict[str, int], special: set[int]) -> tuple[int, str] | None:
        """The id that ends documents, and the file that says so. `special` are the ids of special tokens."""
        for token in whole_numbers(self.config.get("eos_token_id")):
            if token in special:
                return token, "config.json"
        for name in FILES[1:]:
            token = content(getattr(self, name.removesuffix(".json")).get("eos_token"))
            if token in ids:
                return ids[token], name
        return None

    def bos(self, special: dict[int, str], post_processor: Any) -> str | None:
        """The token that documents begin with, if the model's config has one and its tokenizer does not leave it out.

        special           id -> special token
        post_processor    that of the tokenizer.json, whose template says what comes before a text
        """
        found = next((special[token] for token in whole_numbers(self.config.get("bos_token_id")) if token in special),
                     None)
        template = post_processor.get("single") if isinstance(post_processor, dict) else None
        added = [piece["SpecialToken"].get("id") for piece in template or ()
                 if isinstance(piece, dict) and isinstance(piece.get("SpecialToken"), dict)]
        left_out = self.tokenizer_config.get("add_bos_token") is False or template and found not in added[:1]
        return None if left_out else found
