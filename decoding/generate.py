"""Text, one token at a time: the prompt in one pass, then a step for each new token.

The KV cache keeps the keys and values of all tokens so far, so each step after the prompt is the work of one token.
choice.py chooses a token from the logits; engine.py makes a step fast.
"""

import re
import unicodedata
from collections.abc import Collection, Iterator

import torch

from decoding.choice import GREEDY, Sampler
from model import Llama
from tokenizer import Tokenizer


def as_ids(input_ids) -> list[int]:
    """input_ids (T,), a list or tensor, as a list. Raises ValueError for an empty prompt."""
    ids = torch.as_tensor(input_ids, dtype=torch.int64).flatten().tolist()  # (T,)
    if not ids:
        raise ValueError("input_ids is empty; begin a document with the end-of-document token")
    return ids


class Reader:
    """A model that has read some texts of one length, and its memory of them (the cache)."""

    def __init__(self, model: Llama):
        self.model, self.context = model, model.config.max_position_embeddings
        self.device = model.lm_head.weight.device
        self.start, self.cache = 0, None  # where in the texts its memory begins

    def room(self, length: int) -> int:
        """How many tokens beyond `length` fit before the model must forget the oldest ones."""
        return max(0, self.start + self.context - length) if self.cache else self.context - length

    def unread(self, texts: list[list[int]], count: int = 1):
        """The ids (B, T) of B texts that the model has not read yet; one row if it has read none and all are equal.

        The texts may differ from those read before in their last `count` ids, and be longer or shorter. A text that
        outgrows the context is read again, from its newest half on.
        """
        length = len(texts[0])
        if not self.cache or not count <= length - self.start <= self.context:
            keep = max(1, self.context // 2) if self.cache else self.context
            self.start, self.cache = max(0, length - keep), self.model.new_cache(self.context)
        self.cache.length = min(self.cache.length, length - self.start - count)
        fresh = [text[self.start + self.cache.length:] for text in texts]
        once = self.cache.length == 0 and all(text == fresh[0] for text in fresh)
        return torch.tensor(fresh[:1] if once else fresh, device=self.device)

    def read(self, texts: list[list[int]], count: int = 1):
        """Read B texts (`unread`). Returns the logits (B, count, V) after their last `count` ids, FP32 on the CPU."""
        ids = self.unread(texts, count)
        logits, _ = self.model(ids, cache=self.cache, logits_to_keep=count)
        self.cache.repeat(len(texts) // len(ids))
        return logits.float().cpu().expand(len(texts), -1, -1)  # (B, count, V)

    def choose(self, texts: list[list[int]], sampler: Sampler, seen):
        """Choose the next token of each of B texts: (B,) int64. Marks the ids that it reads in `seen` (B, V) bool."""
        ids = self.unread(texts)
        seen.scatter_(1, ids.expand(len(texts), -1), True)  # (1 or B, T) -> (B, T)
        chance = sampler.chance(len(texts)).to(self.device)
        logits, _ = self.model(ids, cache=self.cache, logits_to_keep=1)
        self.cache.repeat(len(texts) // len(ids))
        return sampler.choose(logits[:, -1].float().expand(len(texts), -1), seen, chance)  # logits (B, V)


@torch.no_grad()
def generate_batch(model: Llama, input_ids, num_samples: int, max_new_tokens: int, sampler: Sampler = GREEDY,
                   eos_id: int | Collection[int] | None = None) -> Iterator[list[int | None]]:
    """Write num_samples texts that begin with input_ids (T,), a list or tensor. Yields the next id of each, as a list.

    After eos_id (or one of several) a text yields None, until all texts have ended or max_new_tokens have come. A text
    that outgrows the context goes on from its newest half. Raises ValueError for an empty prompt.
    """
    prompt = as_ids(input_ids)
    reader, texts = Reader(model), [list(prompt) for _ in range(num_samples)]
    seen = torch.zeros(num_samples, model.config.vocab_size, dtype=torch.bool, device=reader.device)
    seen[:, prompt] = True
    ended, ends = set(), end_ids(eos_id)
    for _ in range(max_new_tokens):
        for text, token in zip(texts, reader.choose(texts, sampler, seen).tolist()):
            text.append(token)
        ended |= {row for row, text in enumerate(texts) if text[-1] in ends}
        if len(ended) == num_samples:
            return
        yield [None if row in ended else text[-1] for row, text in enumerate(texts)]


def generate(model: Llama, input_ids, max_new_tokens: int, sampler: Sampler = GREEDY,
             eos_id: int | Collection[int] | None = None) -> Iterator[int]:
    """Yield up to max_new_tokens ids that follow input_ids (T,), one at a time, until eos_id comes up.

    Raises ValueError for an empty prompt.
    """
    for [token] in generate_batch(model, input_ids, 1, max_new_tokens, sampler, eos_id):
        yield token


def end_ids(eos_id: int | Collection[int] | None) -> set[int]:
    """The ids that end a text: none, one or several."""
    return set() if eos_id is None else {eos_id} if isinstance(eos_id, int) else set(eos_id)


def clean_prompt(prompt: str) -> str:
    """The prompt, normalised like the training text, and without one space at its end.

    The vocabulary writes a space together with the word after it, so "1 + 1 = " would ask for a word without its space.
    """
    prompt = prompt.encode("utf-8", "replace").decode()  # bytes that are not UTF-8 become "?"
    text = unicodedata.normalize("NFKC", prompt).replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(r"(?<=\S) \Z", "", text)


def prompt_ids(vocabulary: Tokenizer, prompt: str) -> list[int]:
    """The token ids of a prompt, after the end-of-document id: in the training data every document follows one.

    (The documents of an imported model may begin with an id of their own instead.)
    """
    return [vocabulary.bos_id, *vocabulary.encode(clean_prompt(prompt)).tolist()]


def continuation(vocabulary: Tokenizer, before: list[int], ids: list[int]) -> str:
    """The text of ids that follow others. Decoded alone, many a tokenizer's first word would lose its space."""
    stream = vocabulary.stream(before)
    return "".join([stream.push(token) for token in ids]) + stream.finish()
