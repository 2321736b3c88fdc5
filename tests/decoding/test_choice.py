"""The filters are transformers', draws are as likely as they ought to be, and the loops choose the same."""
import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from decoding.choice import Sampler, draw, filter_logits, penalize_repetition
from decoding.filters import threshold


@pytest.mark.parametrize("case", range(20))
def test_penalty_is_that_of_transformers(rng, case):
    """Seen tokens of each text of a batch lose what they lose in transformers, on both sides of 0 to the bit; others
    nothing."""
    logits, penalty = torch.randn(3, 50) * 5, rng.uniform(0.5, 3)
    ids = torch.randint(50, (3, rng.randint(1, 80)))
    seen = torch.zeros(3, 50, dtype=torch.bool).scatter(1, ids, True)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    ours = penalize_repetition(logits, seen, penalty)
    assert torch.equal(ours, theirs) and torch.equal(ours != logits, seen)
    assert all(torch.equal(penalize_repetition(logits[i], seen[i], penalty), theirs[i]) for i in range(3))


@pytest.mark.parametrize("size", [50, 2000])
@pytest.mark.parametrize("top_k", [None, 1, 3, 20, 500])
@pytest.mark.parametrize("top_p", [None, 1.0, 0.9, 0.3, 1e-6])
def test_filters_are_those_of_transformers(rng, top_k, top_p, size):
    """Temperature, top-k and top-p, alone or together, leave the logits that transformers leaves, of flat and of steep
    distributions in one batch, and the same of each alone."""
    logits, temperature = torch.randn(4, size) * torch.tensor([[0.01], [0.3], [2], [8]]), rng.uniform(0.2, 3)
    theirs, edge = TemperatureLogitsWarper(temperature)(None, logits), torch.zeros(4, size, dtype=torch.bool)
    if top_k is not None:
        theirs = TopKLogitsWarper(top_k)(None, theirs)
    if top_p is not None and top_p < 1:
        p, order = theirs.double().softmax(-1).sort(descending=True)
        before = p.cumsum(-1) - p  # where this is top_p but for rounding, a token may fall on either side
        edge = edge.scatter(-1, order, (before - top_p).abs() < torch.where(before > 0, 1e-5, 0))
        theirs = TopPLogitsWarper(top_p)(None, theirs)
    ours = filter_logits(logits, temperature, top_k, top_p)
    alone = torch.stack([filter_logits(row, temperature, top_k, top_p) for row in logits])
    assert not (~edge & (ours != theirs)).any() and not (~edge & (ours != alone)).any() and edge.sum() < 9


def test_draws(rng):
    """Of 30,000 draws for each row of weights, which need not sum to 1, an index comes as often as its weight says, by
    chi-square, and one without weight never; a seed draws the same again."""
    weights = torch.rand(4, 40) ** 6 * torch.tensor([[1e-20], [1], [1e-3], [1e20]])
    weights[torch.rand(4, 40) < 0.3] = 0
    weights[:, 0], weights[:, 39], weights[3, :39] = 0, 0, 0
    weights[:3, 20], weights[3, 5] = weights[:3].amax(-1), 1e-30  # the last row has one index alone
    seed, draws = rng.randrange(2**31), 30_000
    drawn = []
    for _ in range(2):
        sampler = Sampler(1.0, generator=torch.Generator().manual_seed(seed))
        drawn.append(draw(weights.repeat(draws, 1), sampler.chance(4 * draws)).view(draws, 4))
    assert torch.equal(*drawn) and drawn[0].dtype == torch.int64
    for row in range(4):
        counts = torch.bincount(drawn[0][:, row], minlength=40)
        wanted = draws * weights[row].double() / weights[row].double().sum()
        assert len(counts) == 40 and not counts[wanted == 0].any()
        common = wanted > 10  # chi-square is not for rare ones
        assert ((counts - wanted)[common] ** 2 / wanted[common]).sum() < 120  # 39 degrees of freedom at most


def test_distribution(rng):
    """A Sampler's distribution is the softmax of penalised and filtered logits; greedy, all on their likeliest."""
    logits, seen = torch.randn(3, 50) * 3, torch.rand(3, 50) < 0.5
    penalized = penalize_repetition(logits, seen, 1.7)
    drawn = Sampler(0.8, 9, 0.7, 1.7).distribution(logits, seen)
    assert torch.equal(drawn, filter_logits(penalized, 0.8, 9, 0.7).softmax(-1))
    greedy = Sampler(0.0, 9, 0.7, 1.7).distribution(logits, seen)
    assert torch.equal(greedy, torch.eye(50)[penalized.argmax(-1)])
    assert torch.equal(draw(greedy, Sampler().chance(3)), penalized.argmax(-1))


# -----------------------------------------------------------------------------
# in loops

def any_sampler(rng, size):
    """A Sampler of settings drawn afresh, those that switch a filter off among them."""
    return Sampler(rng.choice([0.0, rng.uniform(0.2, 3)]), rng.choice([None, 1, rng.randint(1, size), size + 9]),
                   rng.choice([None, 1.0, rng.uniform(0.01, 1)]), rng.choice([1.0, rng.uniform(0.5, 3)]),
                   torch.Generator().manual_seed(rng.randrange(2**31)), rng.choice([None, rng.randint(1, size)]))


@pytest.mark.parametrize("size", [1, 60, 300, 4096])
def test_choices_in_loops(rng, size):
    """With the same chance the loops take the token that torch's operations take, of flat and of steep distributions
    and with ties; where a running sum meets the chance but for rounding, perhaps its neighbour."""
    for _ in range(60):
        sampler = any_sampler(rng, size)
        logits = torch.randn(4, size) * torch.tensor([[0.01], [1], [4], [9]])
        logits[rng.randrange(4)] = logits[rng.randrange(4)].round()  # ties
        seen, chance = torch.rand(4, size) < rng.random(), sampler.chance(4)
        before = logits.clone()
        tokens, p = sampler.choose(logits, seen, chance), sampler.distribution(logits, seen)
        assert tokens.dtype == torch.int64 and torch.equal(logits, before)
        sums = p.double().cumsum(-1)
        for row, token in enumerate(tokens.tolist()):
            assert p[row, token] > 0, sampler
            low = sums[row, token] - p[row, token].double()
            assert low - 1e-4 <= chance[row, 0] * sums[row, -1] <= sums[row, token] + 1e-4 or not sampler.temperature
            if not sampler.temperature:
                assert token == p[row].argmax()


def test_threshold(rng):
    """The smallest weight that is kept, against sorting in float64."""
    for _ in range(100):
        weights = torch.rand(rng.randint(1, 400)) ** rng.choice([1, 20])
        weights[rng.randrange(len(weights))] = 1.0
        if rng.random() < 0.3:
            weights = (weights * 8).round() / 8
        k = rng.randint(1, len(weights))
        kept = weights >= threshold(weights.numpy(), np.ones(len(weights), np.float32), k)
        assert torch.equal(kept, weights >= weights.sort(descending=True).values[k - 1])
        share = rng.uniform(0.01, 0.99)
        kept = weights >= threshold(weights.numpy(), weights.numpy(), np.float32(share * weights.sum()))
        above = torch.tensor([weights[weights > w].double().sum() for w in weights])
        edge = (above - share * weights.double().sum()).abs() < 1e-4 * weights.sum()
        assert torch.equal(kept[~edge], above[~edge] < share * weights.double().sum())


def test_draws_in_loops(rng):
    """Of 40,000 tokens each comes as often as the Sampler's distribution says, by chi-square."""
    sampler = Sampler(0.9, 30, 0.95, 1.2, torch.Generator().manual_seed(rng.randrange(2**31)))
    logits, seen, draws = torch.randn(1, 60) * 2, torch.rand(1, 60) < 0.3, 40_000
    tokens = sampler.choose(logits.expand(draws, -1), seen.expand(draws, -1), sampler.chance(draws))
    wanted = draws * sampler.distribution(logits, seen)[0].double()
    counts = torch.bincount(tokens, minlength=60)
    assert not counts[wanted == 0].any()
    common = wanted > 10
    assert ((counts - wanted)[common] ** 2 / wanted[common]).sum() < 90  # 29 degrees of freedom at most
