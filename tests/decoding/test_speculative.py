"""Guessing ahead changes nothing: greedy ids are the same, and drawn ones have the model's own distribution."""
from copy import deepcopy

import pytest
import torch
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from decoding import speculative
from decoding.choice import Sampler
from decoding.generate import generate
from tests.decoding import models


def llama(**changes):
    """A tiny model with weights so large that it is sure of something else at every place, in FP64: no near ties."""
    return models.llama(**dict(vocab_size=40, num_hidden_layers=1, fp32_norms=False, fp32_blocks=())
                        | changes).double()


def passes_of(model):
    """A list that grows with every pass of the model: (tokens that its cache held, tokens read)."""
    passes = []
    model.register_forward_pre_hook(
        lambda _, args, more: passes.append((more["cache"].length, args[0].size(1))), with_kwargs=True)
    return passes


# -----------------------------------------------------------------------------
# greedy

@pytest.mark.parametrize("draft_tokens", range(1, 7))
@pytest.mark.parametrize("guesser", ["another", "itself", "lookup"])
def test_greedy_ids(rng, guesser, draft_tokens):
    """The ids are generate's, whoever guesses: in contexts of a few tokens, with a penalty or without, up to an
    end of document and with rows of the model that no token has."""
    for _ in range(8):
        model = llama(max_position_embeddings=rng.choice([1, 2, 3, 5, 8, 13, 32]))
        draft = {"another": llama(max_position_embeddings=model.config.max_position_embeddings), "itself": model,
                 "lookup": "lookup"}[guesser]
        prompt = [rng.randrange(30) for _ in range(rng.randint(1, 20))]
        sampler = Sampler(repetition_penalty=rng.choice([1.0, 1.2]), vocab_size=rng.choice([None, 30]))
        eos_id = rng.choice([None, rng.randrange(30)])
        plain = list(generate(model, prompt, 40, sampler, eos_id))
        guessed = list(speculative.generate(model, draft, prompt, 40, draft_tokens, sampler, eos_id))
        assert guessed == plain, (model.config, prompt, sampler, eos_id)


@pytest.mark.parametrize("theirs, ours", [(4, 32), (2, 13), (1, 8), (32, 5), (13, 2)])
def test_a_draft_of_another_context(rng, theirs, ours):
    """A draft that remembers less, even less than it guesses at a time, or more: the ids are the same."""
    for draft_tokens in range(1, 9):
        model, draft = llama(max_position_embeddings=ours), llama(max_position_embeddings=theirs)
        prompt = [rng.randrange(40) for _ in range(rng.randint(1, 10))]
        assert (list(speculative.generate(model, draft, prompt, 40, draft_tokens))
                == list(generate(model, prompt, 40)))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_guess_of_the_model_itself_is_kept(rng, temperature):
    """Where the draft is the model, a pass gives draft_tokens + 1 tokens; the last pass those that are left."""
    model, count, draft_tokens = llama(max_position_embeddings=64), rng.randint(1, 40), rng.randint(1, 6)
    draft, passes = deepcopy(model), passes_of(model)
    sampler = Sampler(temperature, generator=torch.Generator().manual_seed(rng.randrange(2**31)))
    ids = list(speculative.generate(model, draft, [1, 2, 3], count, draft_tokens, sampler))
    assert len(ids) == count and len(passes) == -(-count // (draft_tokens + 1))


def test_a_text_that_repeats_itself():
    """Lookup makes fewer passes than tokens where the text goes round in circles."""
    model = llama(hidden_size=40, max_position_embeddings=128)  # counts to 39, and begins again
    for p in model.parameters():
        p.data.zero_()
    model.model.norm.weight.data.fill_(1)
    model.model.embed_tokens.weight.data.copy_(torch.eye(40))
    model.lm_head.weight.data.copy_(torch.eye(40).roll(1, 0))
    passes = passes_of(model)
    ids = list(speculative.generate(model, "lookup", [0], 119, 5))
    assert ids == [place % 40 for place in range(1, 120)]
    assert len(passes) == 41 + 13  # from the second 1 on, the 41st, two ids are known: then six tokens in a pass


@pytest.mark.parametrize("guesser", ["another", "itself", "lookup"])
def test_nothing_is_guessed_that_cannot_be_kept(rng, guesser):
    """No pass reads more than the text without its last token, nor more than the context holds."""
    for _ in range(10):
        model, count = llama(max_position_embeddings=rng.randint(2, 32)), rng.randint(1, 30)
        context = model.config.max_position_embeddings
        draft = {"another": llama(), "itself": deepcopy(model), "lookup": "lookup"}[guesser]
        passes, prompt = passes_of(model), [rng.randrange(3) for _ in range(rng.randint(1, 12))]
        assert len(list(speculative.generate(model, draft, prompt, count, rng.randint(1, 9)))) == count
        assert all(1 <= read and held + read <= min(context, len(prompt) + count - 1) for held, read in passes)
        reads = sum(read for _, read in passes if count == 1)
        assert count > 1 or reads == min(len(prompt), context)


def test_lookup(rng):
    """A guess is what followed the newest three ids, or else the newest two, where they stood last."""
    for _ in range(30):
        lookup, text = speculative.Lookup(4), [rng.randrange(4) for _ in range(rng.randint(1, 3))]
        while len(text) < 60:
            count = rng.randint(0, 5)
            places = [place for n in (3, 2) if n < len(text) for place in range(len(text) - 1, n - 1, -1)
                      if text[place - n:place] == text[-n:]]
            wanted = text[places[0]:places[0] + count] if places else []
            guesses, q = lookup.guess(text, None, count)
            assert guesses == wanted, (text, count)
            assert q.shape == (len(wanted), 4) and q.argmax(-1).tolist() == wanted and (q.sum(-1) == 1).all()
            text += [rng.randrange(4) for _ in range(rng.randint(1, 4))]


# -----------------------------------------------------------------------------
# drawn

def exact(model, prompt, count, temperature, top_k=None, top_p=None, repetition_penalty=1.0, eos_id=None,
          vocab_size=None):
    """All texts of `count` ids at most that can follow, and their probabilities: products of float64 distributions
    that transformers' filters leave. {ids: probability}"""
    filters = [RepetitionPenaltyLogitsProcessor(repetition_penalty), TemperatureLogitsWarper(temperature)]
    filters += [TopKLogitsWarper(top_k)] if top_k else []
    filters += [TopPLogitsWarper(top_p)] if top_p else []
    texts, done = {(): 1.0}, {}
    for _ in range(count):
        longer = {}
        for text, chance in texts.items():
            ids = torch.tensor([[*prompt, *text]])
            logits = model(ids)[0][:, -1, :vocab_size].double()
            for step in filters:
                logits = step(ids, logits)
            for token, p in enumerate(logits.softmax(-1)[0].tolist()):
                if p > 0:
                    (done if token == eos_id else longer)[text if token == eos_id else (*text, token)] = chance * p
        texts = longer
    return texts | done


def chi_square_is_right(counts, probabilities, draws):
    """Whether counts are as if drawn with these probabilities, by chi-square; what is rare is counted together.

    The bound is the quantile of six deviations (Wilson & Hilferty 1931): wrong for once in 10^9 right counts.
    """
    assert set(counts) <= set(probabilities), "a text that the filters leave no chance"
    common = {text: p for text, p in probabilities.items() if draws * p >= 10}
    pairs = [(counts.get(text, 0), draws * p) for text, p in common.items()]
    rest = draws - sum(count for count, _ in pairs), draws - sum(wanted for _, wanted in pairs)
    pairs += [rest] if rest[1] >= 10 else []
    degrees = len(pairs) - 1
    assert degrees >= 1
    spread = 2 / (9 * degrees)
    statistic = sum((count - wanted) ** 2 / wanted for count, wanted in pairs)
    return statistic < degrees * (1 - spread + 6 * spread ** 0.5) ** 3


@torch.no_grad()
@pytest.mark.parametrize("guesser, settings", [
    ("another", dict(temperature=1.0)), ("another", dict(temperature=0.7, top_k=3)),
    ("another", dict(temperature=1.4, top_p=0.8)), ("lookup", dict(temperature=1.2)),
    ("another", dict(temperature=1.2, repetition_penalty=3.0, vocab_size=5)),
    ("lookup", dict(temperature=1.3, top_k=4, top_p=0.95, repetition_penalty=2.0, eos_id=3)),
], ids=str)
def test_distribution(rng, guesser, settings):
    """Of 1,200 texts of three ids each comes as often as the model alone would draw it, with guesses of which many are
    refused."""
    model, draft = llama(vocab_size=6), "lookup" if guesser == "lookup" else llama(vocab_size=6)
    prompt = [0, 1, 0, 1]  # known to be followed by 0, 1
    probabilities, eos_id = exact(model, prompt, 3, **settings), settings.get("eos_id")
    sampler = Sampler(**{name: value for name, value in settings.items() if name != "eos_id"},
                      generator=torch.Generator().manual_seed(rng.randrange(2**31)))
    counts = {}
    for _ in range(1200):
        text = tuple(speculative.generate(model, draft, prompt, 3, 2, sampler, eos_id))
        counts[text] = counts.get(text, 0) + 1
    assert chi_square_is_right(counts, probabilities, 1200), (counts, probabilities)


def test_seed(rng):
    """A seed gives the same text again, and another seed another."""
    for draft in ("lookup", llama()):
        model = llama()
        drawn = []
        for seed in (1, 1, 2):
            sampler = Sampler(1.0, generator=torch.Generator().manual_seed(seed))
            drawn.append(list(speculative.generate(model, draft, [1], 30, 3, sampler)))
        assert drawn[0] == drawn[1] != drawn[2]


def test_empty_prompt_is_refused():
    """There is nothing to begin with."""
    with pytest.raises(ValueError, match="empty"):
        next(speculative.generate(llama(), "lookup", [], 5))
