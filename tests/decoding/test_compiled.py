"""Narrow weights multiply as said, and a compiled model writes what it writes uncompiled."""
import os
from copy import deepcopy
from functools import partial

import pytest
import torch
import torch._inductor.config as inductor

from decoding import choice, compiled, speculative
from decoding.choice import Sampler
from decoding.compiled import DTYPES, NarrowLinear, Step, narrow, summing
from decoding.generate import Reader, generate, generate_batch
from model import causal_attention
from quant_t4 import Int8LinearT4, quantize
from tests.decoding.models import llama

CONTEXT = 32
UNIT = {"fp32": 2**-24, "bf16": 2**-8, "fp16": 2**-11, "int8": 2**-8}  # half the distance of 1 and the next number
NARROWED = [(dtype, False) for dtype in DTYPES] + [("int8", True)]


def reference(model):
    """The same model with FP32 Linears whose weights are rounded to INT8 and back."""
    rounded = deepcopy(model)
    rounded.lm_head.weight = torch.nn.Parameter(rounded.lm_head.weight.detach().clone())
    rounded.config.tie_word_embeddings = False
    for module in rounded.modules():
        if isinstance(module, torch.nn.Linear):
            integers, scale = quantize(module.weight.detach())
            module.weight.data = integers * scale
    return rounded


def relative_error(ours, theirs):
    return ((ours - theirs).double().pow(2).mean() / theirs.double().pow(2).mean()).sqrt().item()


# -----------------------------------------------------------------------------
# one product

def products(linear, x):
    """What a NarrowLinear is to give of x, in float64 and of its weights as they are, and the sums of magnitudes."""
    weight = linear.weight.double() * (1 if linear.scale is None else linear.scale.double()[:, None])
    x = (x.to(linear.weight.dtype) if linear.scale is None else x).double()
    return x @ weight.t(), x.abs() @ weight.t().abs()


SHAPES = [(1,), (2,), (8,), (9,), (40,), (1, 1), (3, 4), (2, 1), (5, 3), ()]


@torch.no_grad()
@pytest.mark.parametrize("width", [1, 7, 16, 24, 40, 64, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_narrow_linear(rng, dtype, width):
    """The product of float64 but for a rounding of the inputs and one of the result, whatever the number of rows; the
    weights are the FP32 ones to a rounding, and INT8 ones to half a scale."""
    weight = torch.randn(rng.randint(1, 50), width) * 10 ** rng.uniform(-2, 1)
    linear = NarrowLinear(weight, DTYPES[dtype])
    if dtype == "int8":
        integers, scale = quantize(weight)
        assert torch.equal(linear.weight, integers) and torch.equal(linear.scale, scale.flatten())
        assert ((integers * scale - weight).abs() <= 0.5001 * scale).all()
    else:
        assert torch.equal(linear.weight, weight.to(DTYPES[dtype])) and linear.scale is None
    assert not any(p.requires_grad for p in linear.parameters())
    for shape in SHAPES:
        x = torch.randn(*shape, width) * 10 ** rng.uniform(-1, 1)
        y, (exact, magnitudes) = linear(x), products(linear, x)
        assert y.shape == (*shape, len(weight))
        assert y.dtype == (torch.float32 if dtype == "int8" else DTYPES[dtype])
        bound = (2.01 if dtype == "int8" else 1.01) * UNIT[dtype] + 2**-24 * (2 * width**0.5 + 4)
        if dtype == "fp16":
            magnitudes = magnitudes + 2**-13  # what is below its smallest normal number loses more
        assert ((y - exact).abs() <= bound * magnitudes).all(), (shape, weight.shape)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_those_of_autocast(rng, dtype):
    """In 16 bits it gives what a Linear gives under autocast, to a rounding of the result."""
    linear = torch.nn.Linear(rng.randint(1, 90), rng.randint(1, 50), bias=False)
    x = torch.randn(rng.choice([1, 3, 8, 20]), linear.in_features)
    with torch.autocast("cpu", dtype):
        theirs = linear(x)
    ours = NarrowLinear(linear.weight.detach(), dtype)(x)
    _, magnitudes = products(NarrowLinear(linear.weight.detach(), dtype), x)
    assert ours.dtype == theirs.dtype == dtype
    assert ((ours.double() - theirs.double()).abs() <= torch.finfo(dtype).eps * magnitudes + 2**-24).all()


@torch.no_grad()
def test_rounded_inputs_are_those_of_training(rng):
    """With int8_activations the products are those of integers in quantization-aware training, to two FP32 roundings.

    (Of inputs of one number PyTorch's own product of integers makes nonsense; no model has such.)
    """
    for shape in SHAPES:
        trained = Int8LinearT4(rng.randint(2, 100), rng.randint(1, 50), bias=False)
        trained.integers = True
        linear = NarrowLinear(trained.weight.detach(), torch.int8, int8_activations=True)
        x = torch.randn(*shape, trained.in_features) * 10 ** rng.uniform(-2, 2)
        assert torch.allclose(linear(x), trained(x), rtol=1e-6, atol=0)


@torch.no_grad()
def test_compiled_products(rng):
    """In a compiled program one row, a few and many give the same products, INT8 weights without rounding inputs."""
    weight = torch.randn(37, 24)
    kinds = [("bf16", False), ("int8", False), ("int8", True)]
    linears = [NarrowLinear(weight, DTYPES[dtype], int8_activations) for dtype, int8_activations in kinds]
    inputs = [torch.randn(1, 24), torch.randn(1, 5, 24), torch.randn(4, 3, 24)]
    program = torch.compile(lambda inputs: [[linear(x) for x in inputs] for linear in linears], fullgraph=True)
    for linear, (dtype, int8_activations), results in zip(linears, kinds, program(inputs), strict=True):
        for x, y in zip(inputs, results, strict=True):
            exact, magnitudes = products(linear, x)
            if int8_activations:
                assert torch.allclose(y, linear(x), rtol=1e-5, atol=1e-6)
            else:
                unit = UNIT["fp32" if dtype == "int8" else dtype]  # compiled, it rounds no inputs
                assert ((y - exact).abs() <= (1.01 * unit + 2**-20) * magnitudes).all(), (dtype, x.shape)
                assert y.dtype == linear(x).dtype


# -----------------------------------------------------------------------------
# a model

@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype, int8_activations", NARROWED)
def test_narrow(rng, dtype, int8_activations, tied):
    """All Linears are narrow, the head too, and a tied one too; the embedding and norms are as they were, and nothing
    can be trained. So it stays when the model is moved."""
    plain = llama(tie_word_embeddings=tied)
    model = narrow(deepcopy(plain), dtype, int8_activations)
    assert model is model.to("cpu") and type(model.lm_head) is NarrowLinear
    narrowed = [module for module in model.modules() if isinstance(module, NarrowLinear)]
    assert len(narrowed) == 15 and not any(isinstance(module, torch.nn.Linear) for module in model.modules())
    kinds = {(module.weight.dtype, module.int8_activations) for module in narrowed}
    assert kinds == {(DTYPES[dtype], int8_activations)}
    assert torch.equal(model.model.embed_tokens.weight, plain.model.embed_tokens.weight)
    assert all(torch.equal(p, dict(plain.named_parameters())[name])
               for name, p in model.named_parameters() if "norm" in name)
    assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if "norm" in name or "embed" in name)
    assert not any(p.requires_grad for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype, int8_activations", NARROWED)
def test_logits_of_narrow_models(rng, dtype, int8_activations, tied):
    """FP32 logits are the plain model's to rounding; others differ by 24 units of rounding at most, in the mean square.

    INT8 is measured against the plain model with its weights; what rounding those costs is the format's own.
    """
    plain = llama(tie_word_embeddings=tied, hidden_size=32, intermediate_size=48, fp32_norms=False, fp32_blocks=())
    ids = torch.randint(60, (2, CONTEXT))
    exact = (reference(plain) if dtype == "int8" else deepcopy(plain)).double()(ids)[0]
    model = narrow(plain, dtype, int8_activations)
    cache, whole = model.new_cache(CONTEXT), model(ids)[0]
    steps = torch.cat([model(ids[:, t:t + 1], cache=cache)[0] for t in range(CONTEXT)], dim=1)
    if dtype == "fp32":
        assert (whole - exact).abs().max() < 3e-4 and (steps - exact).abs().max() < 3e-4
        return
    bound = 0.15 if int8_activations else 24 * UNIT[dtype]
    assert relative_error(whole, exact) < bound and relative_error(steps, exact) < bound
    if dtype == "int8" and not int8_activations:  # many rows at once are not rounded
        assert (whole - exact).abs().max() < 3e-4


@torch.no_grad()
def test_summing(rng):
    """Attention of one token written as sums is causal attention, for heads in groups too; of several, or where a
    mask says who sees whom, it is that."""
    for _ in range(20):
        B, K, group, S, D = (rng.randint(1, 4) for _ in range(5))
        S = rng.randint(1, 70)
        q, k, v = torch.randn(B, K * group, 1, 2 * D), torch.randn(B, K, S, 2 * D), torch.randn(B, K, S, 2 * D)
        y = summing(causal_attention)(q, k, v, None)
        assert y.shape == q.shape
        assert (y - causal_attention(q.double(), k.double(), v.double())).abs().max() < 1e-5
    q, k, mask = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 7, 8), torch.tensor([[True] * 5 + [False] * 2])
    assert torch.equal(summing(causal_attention)(q, k, k, None), causal_attention(q, k, k))
    assert torch.equal(summing(causal_attention)(q[:, :, :1], k, k, mask), causal_attention(q[:, :, :1], k, k, mask))


# -----------------------------------------------------------------------------
# compiled

@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_parameters(rng, dtype, tied):
    """Packed, a model computes what it did, of parameters that lie in one tensor for each type."""
    model, ids = narrow(llama(tie_word_embeddings=tied), dtype), torch.randint(60, (2, CONTEXT))
    names, before = [name for name, _ in model.named_parameters()], model(ids)[0]
    packed = Step(model).pack()
    assert sum(map(torch.numel, packed.values())) == sum(p.numel() for p in model.parameters())
    assert len(packed) == (1 if dtype == "fp32" else 2) and [name for name, _ in model.named_parameters()] == names
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert storages == {numbers.data_ptr() for numbers in packed.values()}
    assert torch.equal(model(ids)[0], before)


def in_steps(model, cache, ids):
    """The logits of ids, a list, read one at a time."""
    return torch.cat([model(torch.tensor([[token]]), cache)[0] for token in ids], dim=1)


@pytest.fixture(scope="module")
def fp32():
    """A plain model, and the same compiled for one token and for four."""
    plain = llama(num_hidden_layers=1)
    model, reason = compiled.compile(narrow(deepcopy(plain), "fp32"), lengths=(1, 4))
    assert not reason
    return plain, model


@pytest.fixture(scope="module")
def int8():
    """A plain model with INT8 weights in FP32, and the narrow one compiled."""
    plain = llama(num_hidden_layers=1)
    model, reason = compiled.compile(narrow(deepcopy(plain), "int8"))
    assert not reason
    return reference(plain), model


@torch.no_grad()
def assert_likeliest(plain, prompt, ids, tolerance=1e-3, when_read=None):
    """Each id is the plain model's likeliest after the prompt and those before it, or as likely but for rounding; where
    a text was just read, or read again, up to when_read."""
    reader, start = Reader(plain), None
    for place, token in enumerate(ids):
        logits = reader.read([prompt + ids[:place]])[0, -1]
        allowed = tolerance if when_read is None or start == reader.start else when_read
        assert logits[token] > logits.max() - allowed, (prompt, ids, place)
        start = reader.start


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 9, 31])
def test_compiled_logits(rng, fp32, length):
    """Step by step to the cache's last position, logits are the plain model's to rounding, of the same two programs."""
    plain, model = fp32
    cache, programs = model.new_cache(CONTEXT), len(model.programs)
    ids = [rng.randrange(60) for _ in range(CONTEXT)]
    prompt = model(torch.tensor([ids[:length]]), cache)[0]
    logits = torch.cat([prompt, in_steps(model, cache, ids[length:])], dim=1)
    assert (logits - plain(torch.tensor([ids]))[0]).abs().max() < 1e-3
    assert programs == len(model.programs) == 2


def test_compiled_text(rng, fp32):
    """Greedy texts that outgrow the context twice, of prompts of one id, some, and too many."""
    plain, model = fp32
    for length in (1, 4, 12, 50):
        prompt = [rng.randrange(60) for _ in range(length)]
        ids = list(generate(model, prompt, 70))
        assert len(ids) == 70
        assert_likeliest(plain, prompt, ids)


def test_compiled_and_guessed(rng, fp32):
    """With tokens guessed four are read in a compiled pass; it makes the same text."""
    plain, model = fp32
    for draft, length in (("lookup", 3), (plain, 1), (llama(num_hidden_layers=1), 40)):
        prompt = [rng.randrange(60) for _ in range(length)]
        assert_likeliest(plain, prompt, list(speculative.generate(model, draft, prompt, 70, 3)))


@pytest.mark.parametrize("settings", [dict(temperature=0.7), dict(temperature=1.3, top_p=0.8, repetition_penalty=1.4),
                                      dict(temperature=2.0, top_k=7, vocab_size=50), dict(repetition_penalty=1.4)])
def test_compiled_draws(rng, fp32, settings):
    """With a seed the compiled step draws what is drawn of the plain model's logits, past the context too."""
    plain, model = fp32
    prompt, seed = [rng.randrange(50) for _ in range(rng.randint(1, 40))], rng.randrange(2**31)
    texts = [list(generate(which, prompt, 60, Sampler(**settings, generator=torch.Generator().manual_seed(seed))))
             for which in (plain, model)]
    assert texts[0] == texts[1] and len(texts[0]) == 60


def test_compiled_draws_of_many(rng, monkeypatch):
    """Where the likeliest tokens do not tell what top-p keeps, it is chosen as uncompiled, with the same chance."""
    monkeypatch.setattr(choice, "LIKELIEST", 4)
    plain = llama(num_hidden_layers=1, hidden_size=8)
    model, reason = compiled.compile(narrow(deepcopy(plain), "fp32"))
    chosen, choose = [], choice.Sampler.choose
    monkeypatch.setattr(choice.Sampler, "choose", lambda *inputs: chosen.append(1) or choose(*inputs))
    texts = [list(generate(which, [1, 2], 25, Sampler(0.9, top_p=0.7, generator=torch.Generator().manual_seed(3))))
             for which in (model, plain)]
    assert not reason and texts[0] == texts[1] and len(chosen) > 26


def test_compiled_int8(rng, int8):
    """After a prompt of more than eight tokens nothing is rounded but the weights, past the context neither: the text
    is that of an FP32 model with those weights. After a shorter one it is so to the rounding of bfloat16, as is the
    first token after any reading, for which the head has a single row."""
    plain, model = int8
    for length, tolerance in ((9, 1e-3), (30, 1e-3), (1, 1.0), (4, 1.0)):
        prompt = [rng.randrange(60) for _ in range(length)]
        ids = list(generate(model, prompt, 70))
        assert_likeliest(plain, prompt, ids[:CONTEXT - length], tolerance, when_read=1.0)
        assert_likeliest(plain, prompt, ids, tolerance, when_read=1.0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_compiled_batch(rng, request, kind):
    """A batch gets a program of its own at its first step; its logits are the plain model's (INT8 rounds nothing but
    the weights, after a prompt of more than eight tokens), and so are its texts."""
    plain, model = request.getfixturevalue(kind)
    prompt, cache = [rng.randrange(60) for _ in range(9)], model.new_cache(CONTEXT)
    model(torch.tensor([prompt]), cache)
    cache.repeat(3)
    ids = torch.tensor([prompt + [rng.randrange(60) for _ in range(CONTEXT - 9)] for _ in range(3)])
    logits = torch.cat([model(torch.tensor(step)[:, None].contiguous(), cache)[0] for step in ids.t()[9:].tolist()], 1)
    assert (logits - plain(ids)[0][:, 9:]).abs().max() < 1e-3
    rows = zip(*generate_batch(model, prompt, 3, 50))
    for row in rows:
        assert_likeliest(plain, prompt, list(row), when_read=1.0 if kind == "int8" else None)


@torch.no_grad()
def test_two_compiled_models(rng, fp32, int8):
    """Compiled models of one process, two of them of one shape, take turns and keep to their own programs."""
    again = llama(num_hidden_layers=1)
    models = [fp32, int8, (again, compiled.compile(narrow(deepcopy(again), "fp32"))[0])]
    ids = [rng.randrange(60) for _ in range(CONTEXT)]
    caches = [model.new_cache(CONTEXT) for _, model in models]
    pieces = [[model(torch.tensor([ids[:9]]), cache)[0]] for (_, model), cache in zip(models, caches)]
    for token in ids[9:]:
        for (_, model), cache, piece in zip(models, caches, pieces):
            piece.append(in_steps(model, cache, [token]))
    for (plain, _), piece in zip(models, pieces):
        assert (torch.cat(piece, dim=1) - plain(torch.tensor([ids]))[0]).abs().max() < 1e-3


def test_what_cannot_be_compiled(rng, tmp_path, monkeypatch):
    """Without a C++ compiler the model itself comes back, with a line that says so, and still works."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # else it might find its program
    model = narrow(llama(num_hidden_layers=1, hidden_size=24), "fp32")
    with inductor.patch({"cpp.cxx": (os.path.join(tmp_path, "g++"),), "force_disable_caches": True}):
        result, reason = compiled.compile(model)
    assert result is model and "C++" in reason and "\n" not in reason and len(reason) <= 300
    assert len(list(generate(result, [1], 40))) == 40


def test_one_token_alone_is_compiled(rng, monkeypatch):
    """What has another length, or begins a text, runs as before."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    plain = llama()
    model, reason = compiled.compile(narrow(deepcopy(plain), "fp32"), lengths=(1, 3))
    runs, run = [], model.run
    model.run = lambda ids, *rest: runs.append(tuple(ids.shape)) or run(ids, *rest)
    cache, ids = model.new_cache(CONTEXT), [rng.randrange(60) for _ in range(15)]
    pieces = [ids[:1], ids[1:2], ids[2:4], ids[4:7], ids[7:8], ids[8:12], ids[12:]]
    logits = torch.cat([model(torch.tensor([piece]), cache)[0] for piece in pieces], dim=1)
    assert not reason and runs == [(1, 1), (1, 3), (1, 1), (1, 3)]
    assert (logits - plain(torch.tensor([ids]))[0]).abs().max() < 1e-3
