"""What the rest of the code sees of a tokenizer.

tokenmonster.py travels with exports, and knows nothing of our prompts and notes. So its two classes get them here.
"""

from collections.abc import Sequence
from typing import Any

from tokenizer.tokenmonster import Tokenizer as BareTokenizer
from tokenizer.tokenmonster import TokenMonster as BareTokenMonster
from tokenizer.tokenmonster import TokenMonsterStream


class Tokenizer(BareTokenizer):
    """Text to ids and back. A subclass has encode_counted, decode_bytes and stream."""

    bos_id: int  # what a prompt begins with: eos_id, unless the model's documents begin with a token of their own
    special_tokens: tuple[str, ...] = ()  # as a text may spell them out
    notes: tuple[str, ...] = ()  # what whoever uses it should know, a line each

    @property
    def delimiters(self) -> dict[str, str]:
        """eos_token and bos_token, as tokenizer.load takes them; empty if it finds them by itself."""
        return {}

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids that end a text."""
        return (self.eos_id,)

    def within(self, rows: int):
        """Raise BadInput if a model with so many rows lacks one for an id. (Only a tokenizer.json is ever checked.)"""

    def stream(self, before: Sequence[int] = ()) -> Any:
        """A decoder for ids that come one at a time: .push(id) -> str, then .finish() -> str.

        They continue the ids `before`, which decide whether a space comes first.
        """
        raise NotImplementedError


class TokenMonster(Tokenizer, BareTokenMonster):
    """A TokenMonster vocabulary: a document begins where another ends."""

    @property
    def bos_id(self) -> int:
        return self.eos_id

    def __reduce__(self) -> tuple:
        return TokenMonster, (self.data, self.name, self.eos_id)

    def stream(self, before: Sequence[int] = ()) -> TokenMonsterStream:
        stream = TokenMonsterStream(self)
        for token in list(before)[-4:]:  # no character, and no delete mark, reaches further back
            stream.push(token)
        return stream
