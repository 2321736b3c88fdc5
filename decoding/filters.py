"""choice.py's filters as loops over the logits, for a CPU.

torch needs a dozen operations for them, each a few microseconds long, and together they take as long as a step of a
small model. And it sorts thousands of numbers to find out where top-p cuts. No sorting is needed: we only look for a
threshold, the smallest probability that is kept. To tell for one threshold what it would keep takes a single loop, and
bisection finds the right one in thirty.
"""

import numpy as np

from decoding.loops import as_float, exp, loop

f32 = np.float32


@loop
def threshold(weights, amounts, limit):
    """The smallest t such that those of weights (V), from 0 to 1, that are larger than t have amounts (V) of less than
    `limit` in all.

    So weights >= t are the likeliest that reach the limit together, with those as likely as the last of them. Positive
    FP32 numbers have the order of their bits, so we bisect these.
    """
    low, high = -1, 0x3F800000  # the bits of 1; nothing is larger, so that is enough
    while high - low > 1:
        middle = (low + high) // 2
        t, larger = as_float(np.uint32(middle)), f32(0)
        for j in range(len(weights)):
            larger += amounts[j] if weights[j] > t else f32(0)
        if larger < limit:
            high = middle
        else:
            low = middle
    return as_float(np.uint32(high))


@loop
def likeliest(logits):
    """The place of the largest of logits (V), the first one if there are several."""
    best = 0
    for j in range(len(logits)):
        if logits[j] > logits[best]:
            best = j
    return best


@loop
def cut(weights, least):
    """Set to 0 those of weights (V) that are smaller than `least`."""
    for j in range(len(weights)):
        weights[j] = weights[j] if weights[j] >= least else f32(0)


@loop
def draw(weights, chance):
    """A place, with a probability proportional to its weight: the first one at which the running sum of weights (V)
    passes the fraction `chance` of the whole. The sums are float64, as in choice.draw."""
    total, running, last = 0.0, 0.0, 0
    for j in range(len(weights)):
        total += weights[j]
    for j in range(len(weights)):
        if weights[j] > 0:
            running, last = running + weights[j], j
            if running > total * chance:
                break
    return last


@loop
def choose(logits, seen, chances, vocab_size, temperature, top_k, top_p, penalty):
    """The next tokens (B) int64, from logits (B, V) FP32: choice.Sampler.choose in loops.

    seen (B, V) bool are the tokens so far, chances (B) float64 are numbers from [0, 1), and temperature to penalty the
    Sampler's. Temperature 0 takes the likeliest token. top_k = vocab_size and top_p = 1 keep all.
    """
    tokens, weights, ones = np.empty(len(logits), np.int64), np.empty(vocab_size, f32), np.ones(vocab_size, f32)
    for b in range(len(logits)):
        for j in range(vocab_size):
            x = logits[b, j]
            weights[j] = x if penalty == 1 or not seen[b, j] else x / penalty if x > 0 else x * penalty
        tokens[b] = likeliest(weights)
        if temperature > 0:
            largest = weights[tokens[b]]
            for j in range(vocab_size):
                weights[j] = exp((weights[j] - largest) / temperature)  # from 0 to 1
            if top_k < vocab_size:
                cut(weights, threshold(weights, ones, top_k))
            if top_p < 1:
                cut(weights, threshold(weights, weights, top_p * weights.sum()))
            tokens[b] = draw(weights, chances[b])
    return tokens
