"""Speculative decoding: several tokens for one reading of the weights, and the same text as without it.

Reading the weights takes the time, and a pass over five tokens reads them just as often as a pass over one: once. So
something fast guesses the next few tokens, and the model looks at all of them in one pass. That gives the model's own
distribution p at each place. If a guess x came from a distribution q, we keep it with probability min(1, p(x) / q(x)).
We replace the first guess that we do not keep by a token drawn from max(0, p - q), and drop the guesses after it. Then
every token has the same distribution as if drawn from p (Leviathan, Kalman, Matias 2023, Fast Inference from
Transformers via Speculative Decoding, appendix A). Here is why: x either comes from q and is kept, with probability
min(p, q), or it comes from the replacement, which adds exactly what is missing, p - min(p, q). If we keep all guesses,
the pass gives one more token for free.

The guesses come from a smaller model, or from the text itself: what came after its newest words the last time they
occurred (prompt lookup, Saxena 2023). Such a guess is certain: its q is 1.
"""

from collections.abc import Collection, Iterator

import torch
import torch.nn.functional as F

from decoding.choice import GREEDY, Sampler, draw
from decoding.generate import Reader, as_ids, end_ids
from model import Llama


class Draft:
    """Guesses from a smaller model, drawn with the same settings as the text."""

    def __init__(self, model: Llama, sampler: Sampler, vocab_size: int):
        self.reader, self.sampler, self.vocab_size = Reader(model), sampler, vocab_size

    def guess(self, ids: list[int], seen, count: int) -> tuple[list[int], torch.Tensor | None]:
        """Guess up to `count` ids after `ids`. `seen` (V,) bool marks the ids so far.

        Returns the guesses, a list, and the distributions that they were drawn from, a tensor (guesses, V).
        """
        guesses, seen, distributions = [], seen.clone(), []
        for _ in range(count):
            logits = self.reader.read([ids + guesses])[0, -1, :self.vocab_size]
            distributions.append(self.sampler.distribution(logits, seen))
            guesses.append(int(draw(distributions[-1][None], self.sampler.chance(1))))
            seen[guesses[-1]] = True
        return guesses, torch.stack(distributions) if guesses else None


class Lookup:
    """Guesses from the text: what came after its newest three ids, or else two, the last time they occurred."""

    def __init__(self, vocab_size: int):
        self.vocab_size, self.known = vocab_size, 0
        self.ends = {}  # n-gram -> index of the id that came after it the last time

    def guess(self, ids: list[int], seen, count: int) -> tuple[list[int], torch.Tensor | None]:
        """As Draft.guess."""
        for end in range(max(2, self.known), len(ids)):
            self.ends[tuple(ids[end - 3:end])] = self.ends[tuple(ids[end - 2:end])] = end
        self.known = len(ids)
        place = self.ends.get(tuple(ids[-3:])) or self.ends.get(tuple(ids[-2:])) or len(ids)
        guesses = [token for token in ids[place:place + count] if token < self.vocab_size]
        return guesses, F.one_hot(torch.tensor(guesses, dtype=torch.int64), self.vocab_size).float()


@torch.no_grad()
def generate(model: Llama, draft: Llama | str, input_ids, max_new_tokens: int, draft_tokens: int = 4,
             sampler: Sampler = GREEDY, eos_id: int | Collection[int] | None = None) -> Iterator[int]:
    """As generate.generate, but `draft` guesses draft_tokens at a time: a model with the same vocabulary, or "lookup".

    If greedy, the ids are those of generate.generate, unless rounding breaks a tie. Otherwise they have the same
    distribution, but the same seed gives another text.
    """
    ids = as_ids(input_ids)
    vocab_size = sampler.vocab_size or model.config.vocab_size
    drafter = Lookup(vocab_size) if draft == "lookup" else Draft(draft, sampler, vocab_size)
    reader, end, ends = Reader(model), len(ids) + max_new_tokens, end_ids(eos_id)
    seen = torch.zeros(vocab_size, dtype=torch.bool)
    seen[ids] = True
    while len(ids) < end:
        # A guess must not push the oldest tokens out of the context: without the guess the model would still see them.
        count = min(draft_tokens, end - len(ids) - 1, reader.room(len(ids)))
        guesses, q = drafter.guess(ids, seen, max(0, count))
        logits = reader.read([ids + guesses], len(guesses) + 1)[0, :, :vocab_size]  # (guesses + 1, V)
        for place, guess in enumerate([*guesses, None]):
            p = sampler.distribution(logits[place], seen)
            if guess is None:
                token = int(draw(p[None], sampler.chance(1)))
            elif torch.rand((), generator=sampler.generator) * q[place, guess] < p[guess]:
                token = guess
            else:
                missing = (p - q[place]).clamp(min=0)
                weights = missing if missing.any() else p  # nothing is missing if p equals q up to rounding
                token = int(draw(weights[None], sampler.chance(1)))
            if token in ends:
                return
            ids.append(token)
            seen[token] = True
            yield token
            if token != guess:
                break
