"""From logits to a token: the usual filters, in HF's order and with HF's definitions, and then chance.

The filters are repetition penalty, temperature, top-k and top-p. They are written here as operations of torch, for
every device. On a CPU `Sampler.choose` runs them as loops instead (filters.py).
"""

from dataclasses import dataclass

import numpy as np
import torch

from decoding import loops

LIKELIEST = 256  # this many tokens usually show where top-p cuts; sorting thousands takes longer


def penalize_repetition(logits, seen, penalty: float):
    """Make the tokens `seen` (..., V) bool less likely in logits (..., V): x / penalty if x > 0, else x * penalty
    (Keskar et al. 2019)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def filter_logits(logits, temperature: float, top_k: int | None, top_p: float | None):
    """Logits (..., V) of the distribution to draw from. Tokens that are cut off get -inf.

    Tokens as likely as the last one kept are kept too.
    """
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None and top_p < 1:
        probabilities = logits.softmax(-1)
        likeliest = probabilities.topk(min(LIKELIEST, logits.size(-1))).values  # (..., L), in falling order
        if likeliest.sum(-1).min() < top_p:
            likeliest = probabilities.sort(descending=True).values
        # Cut a token if those before it already reach top_p. So the first always stays.
        kept = likeliest.cumsum(-1) - likeliest < top_p
        least = likeliest.where(kept, torch.inf).amin(-1, keepdim=True)
        logits = logits.masked_fill(probabilities < least, -torch.inf)
    return logits


def draw(weights, chance):
    """Draw an index from each row of weights (B, V), with a probability proportional to its weight: (B,) int64.

    It takes the first index at which the running sum passes the fraction `chance` (B, 1) float64, in [0, 1), of the
    whole. A weight of 0 is never drawn. The sums are float64, so that small weights among thousands do not get lost.
    """
    sums = weights.double().cumsum(-1)  # (B, V)
    return torch.searchsorted(sums, sums[:, -1:] * chance, right=True).clamp(max=weights.size(-1) - 1)[:, 0]  # (B,)


@dataclass
class Sampler:
    """How to choose a token.

    temperature           divides the logits; 0 takes the likeliest token
    top_k, top_p          keep the k likeliest tokens, or the likeliest that together reach p; all if None
    repetition_penalty    1 is off
    generator             source of chance, on the CPU, so that a seed gives the same text on every device
    vocab_size            leaves out the model's rows that belong to no token
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    generator: torch.Generator | None = None
    vocab_size: int | None = None

    def penalized(self, logits, seen):
        """Logits (..., V) of the vocabulary's tokens, with the penalty on those `seen` (..., V) bool, if any."""
        logits, seen = logits[..., :self.vocab_size], seen[..., :self.vocab_size]
        return logits if self.repetition_penalty == 1.0 else penalize_repetition(logits, seen, self.repetition_penalty)

    def choose(self, logits, seen, chance):
        """The next tokens (B,) int64, from logits (B, V) FP32, tokens `seen` (B, V) bool and numbers from `chance`."""
        if logits.device.type == "cpu" and not loops.missing():
            from decoding import filters  # here, as numba is optional
            V = min(self.vocab_size or logits.size(-1), logits.size(-1))
            return torch.from_numpy(filters.choose(
                logits.contiguous().numpy(), seen.numpy(), chance[:, 0].numpy(), V, np.float32(self.temperature),
                min(self.top_k or V, V), np.float32(self.top_p or 1), np.float32(self.repetition_penalty)))
        if self.temperature == 0:
            return self.penalized(logits, seen).argmax(-1)
        return draw(self.distribution(logits, seen), chance)

    def distribution(self, logits, seen):
        """The probabilities (..., V) that `choose` draws from."""
        logits = self.penalized(logits, seen)
        if self.temperature == 0:
            return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        return filter_logits(logits, self.temperature, self.top_k, self.top_p).softmax(-1)

    def chance(self, count: int):
        """Random numbers (count, 1) float64 from [0, 1)."""
        return torch.rand(count, 1, dtype=torch.float64, generator=self.generator)


GREEDY = Sampler()
