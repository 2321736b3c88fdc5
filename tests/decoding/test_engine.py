"""The loops compute what the model computes, in every type, and write the same texts."""
import json
import os
import subprocess
import sys
from copy import deepcopy

import numpy as np
import pytest
import torch

from decoding import loops, ready, speculative
from decoding.choice import Sampler
from decoding.engine import FEW, Engine
from decoding.generate import Reader, generate, generate_batch
from decoding.narrow import DTYPES, narrow
from model import Llama
from quant_t4 import quantize
from tests.commands import ROOT
from tests.decoding.models import llama

CONTEXT = 32
TYPES = [dtype for dtype in DTYPES if dtype != "fp16"]


def engine(plain, dtype="fp32"):
    """A copy of a model, as an Engine."""
    model, remark = ready(deepcopy(plain), dtype)
    assert isinstance(model, Engine) and not remark
    return model


def any_shape(rng):
    """A model of a shape drawn afresh: heads, groups, tied or not, widths that are no multiple of anything."""
    K, D = rng.choice([1, 2, 3]), rng.choice([2, 6, 8, 16, 32])
    return llama(hidden_size=rng.choice([6, 10, 30, 64, 65, 96, 192]), intermediate_size=rng.choice([1, 7, 40, 96]),
                 num_key_value_heads=K, num_attention_heads=K * rng.choice([1, 2, 4]), head_dim=D,
                 num_hidden_layers=rng.choice([1, 2, 3]), tie_word_embeddings=rng.random() < 0.5,
                 rope_theta=10 ** rng.uniform(2, 5), vocab_size=rng.choice([60, 61, 97]))


class RoundedInputs(torch.nn.Module):
    """A narrow matrix in float64, and its inputs rounded as the loops round them."""

    def __init__(self, matrix):
        super().__init__()
        self.weight, self.rounds = matrix.wide().double(), matrix.scale is not None

    def forward(self, x):
        if self.rounds:
            integers, scale = quantize(x)
            x = integers.double() * scale
        return x @ self.weight.t()


def in_float64(plain, dtype):
    """The narrow model in float64: the same rounding of weights and inputs, and no other."""
    model = narrow(deepcopy(plain), dtype)
    exact = deepcopy(plain).double()
    embedding = torch.nn.Embedding.from_pretrained(model.model.embed_tokens.wide().double())
    exact.model.embed_tokens, exact.lm_head = embedding, RoundedInputs(model.lm_head)
    for theirs, block in zip(exact.model.layers, model.model.layers, strict=True):
        theirs.fp32 = False
        for norm in (theirs.input_layernorm, theirs.post_attention_layernorm):
            norm.fp32 = False
        for parent, narrowed in ((theirs.self_attn, block.self_attn), (theirs.mlp, block.mlp)):
            for name, matrix in narrowed.named_children():
                setattr(parent, name, RoundedInputs(matrix))
    exact.model.norm.fp32 = False
    return exact


def read_in_pieces(model, ids, sizes):
    """The logits of ids (B, T), read so many at a time."""
    cache = model.new_cache(ids.size(1))
    return torch.cat([model(piece, cache)[0] for piece in ids.split(sizes, dim=1)], dim=1)


def pieces(rng, length):
    """Sizes that add up to length, most of them 1."""
    sizes = []
    while sum(sizes) < length:
        sizes.append(min(length - sum(sizes), rng.choice([1, 1, 1, 2, 3, 9, 12])))
    return sizes


@torch.no_grad()
@pytest.mark.parametrize("case", range(20))
def test_fp32_logits_and_texts(rng, monkeypatch, case):
    """In FP32 the logits are those of float64 to rounding, of one text or several, read in pieces of any size, in loops
    or with torch; and the greedy texts are those of the model itself, token by token."""
    monkeypatch.setattr("decoding.engine.FEW", rng.choice([1, 8, FEW]))
    plain = any_shape(rng)
    model, exact = engine(plain), in_float64(plain, "fp32")
    ids, sizes = torch.randint(60, (rng.choice([1, 1, 2, 3]), CONTEXT)), pieces(rng, CONTEXT)
    logits = exact(ids)[0]
    assert (read_in_pieces(model, ids, sizes) - logits).abs().max() < 1e-4 * logits.abs().max().clamp(min=1), sizes
    prompt = [rng.randrange(60) for _ in range(rng.choice([1, 5, 20]))]
    assert_same(plain, prompt, list(generate(model, prompt, 70)), list(generate(plain, prompt, 70)))


@torch.no_grad()
@pytest.mark.parametrize("case", range(5))
@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
def test_logits_of_narrow_weights(rng, dtype, case):
    """Against float64 with the same rounding of weights and, for integers, of inputs. BF16 has no other error in loops;
    an input at the edge between two integers may fall on either side, and then differs by one of 127 levels."""
    plain = any_shape(rng)
    model, exact = engine(plain, dtype), in_float64(plain, dtype)
    ids = torch.randint(60, (rng.choice([1, 3]), CONTEXT))
    logits, ours = exact(ids)[0], read_in_pieces(model, ids, [1] * CONTEXT)
    error = ((ours - logits).pow(2).mean() / logits.pow(2).mean()).sqrt()
    assert error < (1e-5 if dtype == "bf16" else 0.05), error
    if dtype == "int4":  # rounding all to INT4 is something else
        assert ((logits - plain(ids)[0]).pow(2).mean() / logits.pow(2).mean()).sqrt() > 0.02


@torch.no_grad()
@pytest.mark.parametrize("dtype", TYPES)
def test_prompts_and_steps_agree(rng, dtype):
    """What torch reads of a prompt and what the loops read are the same to the rounding of the type."""
    plain = llama()
    model, ids = engine(plain, dtype), torch.randint(60, (2, CONTEXT))
    whole = model(ids, model.new_cache(CONTEXT))[0]
    assert 2 * CONTEXT > FEW
    steps = read_in_pieces(model, ids, [1] * CONTEXT)
    error = ((whole - steps).pow(2).mean() / whole.pow(2).mean()).sqrt()
    assert error < {"fp32": 1e-5, "bf16": 0.05}.get(dtype, 0.05), error


def test_weights_are_kept_once(rng):
    """The model's parameters are views of what the loops read."""
    for dtype in TYPES:
        model = engine(llama(tie_word_embeddings=rng.random() < 0.5), dtype)
        held = {array.__array_interface__["data"][0]: array.nbytes
                for weight in model.weights if hasattr(weight, "values") and not isinstance(weight, np.ndarray)
                for array in (weight.values,)}
        for name, p in model.model.named_parameters():
            if p.dim() == 2 and not name.endswith("scale"):
                assert any(start <= p.data_ptr() < start + size for start, size in held.items()), (dtype, name)


@torch.no_grad()
def assert_likeliest(plain, prompt, ids, tolerance=1e-3):
    """Each id is the plain model's likeliest after the prompt and those before it, or as likely but for rounding."""
    reader = Reader(plain)
    for place, token in enumerate(ids):
        logits = reader.read([prompt + ids[:place]])[0, -1]
        assert logits[token] > logits.max() - tolerance, (prompt, ids, place)


def assert_same(plain, prompt, ours, theirs):
    """Two texts are the same, or ours is as likely but for rounding: once in some thousand tokens two are tied."""
    assert len(ours) == len(theirs)
    if ours != theirs:
        assert_likeliest(plain, prompt, ours, 1e-4)


def test_several_texts(rng):
    """Several texts that begin alike are each what one alone may be, past the context too."""
    plain = llama()
    model, prompt = engine(plain), [rng.randrange(60) for _ in range(rng.choice([1, 6, 15]))]
    for text in zip(*generate_batch(model, prompt, 3, 70)):
        assert_likeliest(plain, prompt, list(text))
    drawn = [list(generate_batch(which, prompt, 4, 20, Sampler(1.0, generator=torch.Generator().manual_seed(5))))
             for which in (model, plain)]
    assert drawn[0] == drawn[1] and len({tuple(text) for text in zip(*drawn[0])}) > 1


@pytest.mark.parametrize("guesses", [1, 3, 12])
def test_guesses(rng, guesses):
    """Guesses of another model, or from the text, are checked in loops up to FEW at a time; the text is the model's."""
    plain = llama()
    model, other = engine(plain), engine(llama(num_hidden_layers=1))
    for draft, length in (("lookup", 3), (other, 1), (model, 40)):
        prompt = [rng.randrange(60) for _ in range(length)]
        assert_likeliest(plain, prompt, list(speculative.generate(model, draft, prompt, 70, guesses)))


@pytest.mark.parametrize("reason", ["numba", "DISABLE_JIT", "threads", "fp16"])
def test_without_the_loops(rng, monkeypatch, reason):
    """Where the loops cannot run the model itself comes back, narrow, with what is missing; it writes the same."""
    plain, prompt = llama(), [rng.randrange(60) for _ in range(4)]
    wanted = list(generate(engine(plain), prompt, 40))
    loops.missing.cache_clear()
    if reason == "numba":
        monkeypatch.setattr(loops, "numba", None)
    elif reason == "DISABLE_JIT":
        monkeypatch.setattr(loops.numba.config, "DISABLE_JIT", 1)
    elif reason == "threads":
        monkeypatch.setattr(loops, "LAYERS", {"omp": "nothing_of_that_name"})
    try:
        model, remark = ready(deepcopy(plain), "fp16" if reason == "fp16" else "fp32")
        word = {"numba": "pip install numba", "DISABLE_JIT": "NUMBA_DISABLE_JIT", "threads": "pip install tbb",
                "fp16": "FP16"}[reason]
        assert isinstance(model, Llama) and word in remark and "\n" not in remark
        if reason != "fp16":
            assert_same(plain, prompt, wanted, list(generate(model, prompt, 40)))
    finally:
        loops.missing.cache_clear()


def test_threads(rng, tmp_path):
    """On several threads the logits are those of one, in a process of its own that has two."""
    script = """
import json, sys, numba, torch
from copy import deepcopy
from decoding import ready
from tests.decoding.models import llama
torch.manual_seed(int(sys.argv[1]))
plain, ids = llama(hidden_size=64, intermediate_size=96), torch.randint(60, (3, 20))
differences, counts = [], set()
for dtype in ("fp32", "int8"):
    one, two = (ready(deepcopy(plain), dtype, threads)[0] for threads in (1, None))
    caches = [model.new_cache(20) for model in (one, two)]
    for column in ids.t():
        logits = [model(column[:, None], cache)[0] for model, cache in zip((one, two), caches)]
        differences.append(float((logits[0] - logits[1]).abs().max()))
        counts.add(two.threads.count)
print(json.dumps([max(differences), sorted(counts), one.threads.counts, two.threads.counts]))
"""
    done = subprocess.run([sys.executable, "-c", script, str(rng.randrange(2**31))], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | {"NUMBA_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stderr
    difference, counts, one, two = json.loads(done.stdout)
    assert difference < 1e-4 and 2 in counts and one == [1] and two == [1, 2]


def test_what_the_loops_would_not_notice(rng):
    """An id that is no row and a place beyond the cache are refused: compiled loops check no index."""
    model = engine(llama())
    for ids, length in (([[60]], 4), ([[-1]], 4), ([[1, 2, 3]], 2)):
        with pytest.raises(IndexError):
            model(torch.tensor(ids), model.new_cache(length))
