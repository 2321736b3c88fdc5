"""Speculative decoding: several tokens for one reading of the weights, and the same text as without.

What takes time is to read the weights, and a pass over five tokens reads them as often as a pass over one: once. So let
something quick guess the next few tokens, and the model look at all of them in one pass. It thereby computes its own
distribution p at each place. A guess x that was drawn from a distribution q is kept with probability
min(1, p(x) / q(x)); the first that is not kept is replaced by a token drawn from max(0, p - q), and what was guessed
after it is dropped. Then every token is distributed as if drawn from p (Leviathan, Kalman, Matias 2023, Fast Inference
from Transformers via Speculative Decoding, appendix A): x either comes from q and is kept, with probability min(p, q),
or comes from the replacement, which makes up for exactly what is missing, p - min(p, q). If all are kept, the pass has
given one token more for nothing.

The guesses come from a smaller model, or from the text itself: what followed the last time that its newest words stood
there (prompt lookup, Saxena 2023). Such a guess is certain of itself: q is 1 for it.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import sample
from choice import Sampler, draw
from model import Llama


class Draft:
    """Guesses of a smaller model, drawn with the same settings as the texts."""

    def __init__(self, model: Llama, sampler: Sampler, vocab_size: int):
        self.reader, self.sampler, self.vocab_size = sample.Reader(model), sampler, vocab_size

    def guess(self, ids: list[int], seen, count: int):
        """Up to `count` ids to follow ids, of which `seen` (V,) bool has a mark each; and of what distributions: a
        list, and a tensor (guesses, V)."""
        guesses, seen, distributions = [], seen.clone(), []
        for _ in range(count):
            logits = self.reader.read([ids + guesses])[0, -1, :self.vocab_size]
            distributions.append(self.sampler.distribution(logits, seen))
            guesses.append(int(draw(distributions[-1][None], self.sampler.chance(1))))
            seen[guesses[-1]] = True
        return guesses, torch.stack(distributions) if guesses else None


class Lookup:
    """Guesses by what followed the newest three ids, or else two, the last time that they stood in the text."""

    def __init__(self, vocab_size: int):
        self.vocab_size, self.known = vocab_size, 0
        self.ends = {}  # n-gram -> index of what followed it last

    def guess(self, ids: list[int], seen, count: int):
        """As Draft.guess."""
        for end in range(max(2, self.known), len(ids)):
            self.ends[tuple(ids[end - 3:end])] = self.ends[tuple(ids[end - 2:end])] = end
        self.known = len(ids)
        place = self.ends.get(tuple(ids[-3:])) or self.ends.get(tuple(ids[-2:])) or len(ids)
        guesses = [token for token in ids[place:place + count] if token < self.vocab_size]
        return guesses, F.one_hot(torch.tensor(guesses, dtype=torch.int64), self.vocab_size).float()


@torch.no_grad()
def generate(model: Llama, draft: Llama | str, input_ids, max_new_tokens: int, draft_tokens: int = 4,
             temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None,
             repetition_penalty: float = 1.0, eos_id: int | None = None, vocab_size: int | None = None,
             generator: torch.Generator | None = None) -> Iterator[int]:
    """As sample.generate, with draft_tokens guessed at a time by another model of the same vocabulary, or "lookup".

    Greedy, the ids are those of sample.generate, but for ties of rounding; else they have the same distribution, and
    are others for the same seed.
    """
    ids = sample.as_ids(input_ids)
    sampler = Sampler(temperature, top_k, top_p, repetition_penalty, generator)
    vocab_size = vocab_size or model.config.vocab_size
    drafter = Lookup(vocab_size) if draft == "lookup" else Draft(draft, sampler, vocab_size)
    reader, end = sample.Reader(model), len(ids) + max_new_tokens
    seen = torch.zeros(vocab_size, dtype=torch.bool)
    seen[ids] = True
    while len(ids) < end:
        # No guess is to push the oldest tokens out of the context: without it they would still be seen.
        count = min(draft_tokens, end - len(ids) - 1, reader.room(len(ids)))
        guesses, q = drafter.guess(ids, seen, max(0, count))
        logits = reader.read([ids + guesses], len(guesses) + 1)[0, :, :vocab_size]  # (guesses + 1, V)
        for place, guess in enumerate([*guesses, None]):
            p = sampler.distribution(logits[place], seen)
            if guess is None:
                token = int(draw(p[None], sampler.chance(1)))
            elif torch.rand((), generator=generator) * q[place, guess] < p[guess]:
                token = guess
            else:
                missing = (p - q[place]).clamp(min=0)
                weights = missing if missing.any() else p  # where p is q, but for rounding: p
                token = int(draw(weights[None], sampler.chance(1)))
            if token == eos_id:
                return
            ids.append(token)
            seen[token] = True
            yield token
            if token != guess:
                break
