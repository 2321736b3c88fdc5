"""From logits to a token: the usual filters, in HF's order and with HF's definitions, and chance.

The filters are repetition penalty, temperature, top-k and top-p. Called one by one, these dozen operations on a few
thousand numbers take half as long as the step of a small model that made the numbers: hence `choose_of_few`, a form
that the compiled step takes in (decode.py).
"""

from dataclasses import dataclass

import torch

LIKELIEST = 256  # tokens that mostly are enough to see where top-p cuts; to sort thousands takes longer


def penalize_repetition(logits, seen, penalty: float):
    """Make the tokens `seen` (..., V) bool less likely in logits (..., V): x / penalty if x > 0, else x * penalty
    (Keskar et al. 2019)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def filter_logits(logits, temperature: float, top_k: int | None, top_p: float | None):
    """Logits (..., V) to those of the distribution to draw from; what is cut off becomes -inf.

    Tokens that are as likely as the last that is kept are kept too.
    """
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None and top_p < 1:
        probabilities = logits.softmax(-1)
        likeliest = probabilities.topk(min(LIKELIEST, logits.size(-1))).values  # in falling order
        if likeliest.sum(-1).min() < top_p:
            likeliest = probabilities.sort(descending=True).values
        # Cut a token when those before it already reach top_p; so the first always stays.
        kept = likeliest.cumsum(-1) - likeliest < top_p
        least = likeliest.where(kept, torch.inf).amin(-1, keepdim=True)
        logits = logits.masked_fill(probabilities < least, -torch.inf)
    return logits


def draw(weights, chance):
    """An index for each row of weights (B, V), as often as its share of their sum: (B,) int64.

    The first whose sum with all before it passes the fraction `chance` (B, 1) float64, in [0, 1), of the whole; a
    weight of 0 passes nothing. In float64, where sums of thousands keep the small ones.
    """
    sums = weights.double().cumsum(-1)
    return torch.searchsorted(sums, sums[:, -1:] * chance, right=True).clamp(max=weights.size(-1) - 1)[:, 0]


def choose_of_few(logits, seen, settings, chance):
    """As Sampler.choose, with no way to take but one: a part of the model's compiled step (decode.py).

    Of FP32 logits (B, V), the tokens `seen` (B, V) bool, Sampler.settings and Sampler.chance's numbers (B, 1). Returns
    (B,) int64, with -1 where the LIKELIEST do not tell what top-k or top-p keeps. All settings are there always, so
    that one program serves any of them.
    """
    temperature, top_k, top_p, penalty, vocab_size = settings.unbind()
    V, places = logits.size(-1), torch.arange(logits.size(-1), device=logits.device)
    logits = penalize_repetition(logits.where(places < vocab_size, -torch.inf), seen, penalty)
    p = (logits / temperature.where(temperature > 0, 1)).softmax(-1)
    likeliest = p.topk(min(LIKELIEST, V)).values  # (B, L), in falling order
    L = likeliest.size(-1)
    kth = likeliest.where(places[:L] < top_k, 1).amin(-1, keepdim=True).where(top_k <= L, 0)
    p = p.where(p >= kth, 0)
    enough = top_p * p.sum(-1, keepdim=True)
    kept = likeliest.cumsum(-1) - likeliest < enough
    least = likeliest.where(kept, 1).amin(-1, keepdim=True).where(top_p < 1, 0)
    told = ((top_k <= L) | (top_k >= V)) & ((top_p == 1) | (likeliest.sum(-1) >= enough[:, 0]))
    drawn = draw(p.where(p >= least, 0), chance).where(told, -1)
    return drawn.where(temperature > 0, logits.argmax(-1))


@dataclass
class Sampler:
    """How a token is chosen. temperature 0 takes the likeliest; vocab_size leaves out the logits that no token has."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    generator: torch.Generator | None = None  # on the CPU: so chance is the same wherever logits are computed
    vocab_size: int | None = None

    def __post_init__(self):
        # as choose_of_few takes them: (5,) FP32
        self.settings = torch.tensor([self.temperature, self.top_k or torch.inf, self.top_p or 1.0,
                                      self.repetition_penalty, self.vocab_size or torch.inf])

    def penalized(self, logits, seen):
        """Logits (..., V) of the vocabulary's tokens, those `seen` (..., V) bool penalized if the settings say so."""
        logits, seen = logits[..., :self.vocab_size], seen[..., :self.vocab_size]
        return logits if self.repetition_penalty == 1.0 else penalize_repetition(logits, seen, self.repetition_penalty)

    def choose(self, logits, seen, chance):
        """The next tokens (B,) int64, of logits (B, V) FP32, the tokens `seen` (B, V) bool and what `chance` gave."""
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
        """Numbers (count, 1) float64, drawn from [0, 1)."""
        return torch.rand(count, 1, dtype=torch.float64, generator=self.generator)
