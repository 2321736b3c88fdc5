"""Narrow weights are what they are said to be, and multiply as said."""
from copy import deepcopy

import pytest
import torch

from backend import PRECISIONS
from decoding.narrow import DTYPES, GROUP, NarrowLinear, columns, dequantize, narrow, quantize_int4, widen_int4
from quant_t4 import quantize
from tests.decoding.models import llama

WIDTHS = [2, 7, 16, 32, 40, 64, 65, 100, 192]
SHAPES = [(1,), (2,), (8,), (9,), (40,), (1, 1), (3, 4), ()]


@pytest.mark.parametrize("width", WIDTHS)
def test_int4(rng, width):
    """Each weight is an integer from -7 to 7 times its group's scale, the nearest one; the scale is the group's largest
    magnitude over 7, to FP16's precision. What was rounded once is rounded to the same again."""
    weight = torch.randn(rng.randint(1, 30), width) * 10 ** rng.uniform(-3, 2)
    weight[0, :GROUP] = 0
    nibbles, scale = quantize_int4(weight)
    padded = -(-width // 64) * 64
    assert nibbles.shape == (len(weight), padded // 2) and nibbles.dtype == torch.uint8
    assert scale.shape == (len(weight), padded // 32) and torch.equal(scale, scale.half().float())
    wide = widen_int4(nibbles, scale, padded)
    assert not wide[:, width:].any() and not wide[0, :GROUP].any()
    for row in range(len(weight)):
        for start in range(0, width, GROUP):
            here, s = weight[row, start:start + GROUP], scale[row, start // GROUP]
            assert s == pytest.approx(float(here.abs().max() / 7), rel=2**-10, abs=2**-24)
            integers = wide[row, start:start + len(here)] / s.clamp_min(1e-30)
            assert torch.allclose(integers, integers.round(), atol=1e-5) and integers.abs().max() < 7.001
            assert ((wide[row, start:start + len(here)] - here).abs() <= 0.505 * s + 1e-7).all()
    again = quantize_int4(wide[:, :width])
    assert torch.equal(again[0], nibbles) and torch.equal(again[1], scale)


@torch.no_grad()
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_narrow_linear(rng, dtype, width):
    """The product in float64 of the weights and the inputs as they were rounded, but for the sums' rounding."""
    weight = torch.randn(rng.randint(1, 50), width) * 10 ** rng.uniform(-2, 1)
    linear = NarrowLinear(weight, dtype)
    wide = linear.wide()
    assert wide.shape == weight.shape and not any(p.requires_grad for p in linear.parameters())
    if dtype in PRECISIONS:
        assert torch.equal(wide, weight.to(PRECISIONS[dtype]).float()) and linear.scale is None
    elif dtype == "int8":
        integers, scale = quantize(weight)
        assert torch.equal(linear.weight, integers) and torch.equal(linear.scale, scale)
    unit = {"bf16": 2**-8, "fp16": 2**-11}.get(dtype, 2**-24)  # of the result's type
    for shape in SHAPES:
        x = torch.randn(*shape, width) * 10 ** rng.uniform(-1, 1)
        integers, scale = quantize(x)
        rounded = integers * scale if linear.scale is not None else x.to(linear.weight.dtype)
        y, exact = linear(x), rounded.double() @ wide.double().t()
        magnitudes = rounded.double().abs() @ wide.double().abs().t() + (2**-13 if dtype == "fp16" else 0)
        assert y.shape == (*shape, len(weight)) and y.dtype == torch.float32
        assert ((y - exact).abs() <= (1.01 * unit + 2**-24 * (2 * width**0.5 + 8)) * magnitudes).all(), shape


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_sixteen_bits_are_those_of_autocast(rng, dtype):
    """In 16 bits it gives what a Linear gives under autocast, to a rounding of the result."""
    linear = torch.nn.Linear(rng.randint(1, 90), rng.randint(1, 50), bias=False)
    x = torch.randn(rng.choice([1, 3, 8, 20]), linear.in_features)
    with torch.autocast("cpu", dtype=PRECISIONS[dtype]):
        theirs = linear(x).float()
    ours = NarrowLinear(linear.weight.detach(), dtype)(x)
    magnitudes = x.abs() @ linear.weight.abs().t()
    assert ((ours - theirs).abs() <= torch.finfo(PRECISIONS[dtype]).eps * magnitudes + 2**-24).all()


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_narrow(rng, dtype, tied):
    """All Linears and the embedding are narrow, a tied head and the embedding one matrix; norms are as they were, and
    nothing can be trained. Head and embedding of an INT4 model are INT8. In FP32 logits are the same to the bit."""
    plain = llama(tie_word_embeddings=tied)
    model = narrow(deepcopy(plain), dtype)
    linears = [module for module in model.modules() if isinstance(module, NarrowLinear)]
    assert len(linears) == 15 and not any(isinstance(m, (torch.nn.Linear, torch.nn.Embedding)) for m in model.modules())
    finest = "int8" if dtype == "int4" else dtype
    assert {m.dtype for m in linears if m is not model.lm_head} == {dtype}
    assert model.lm_head.dtype == model.model.embed_tokens.dtype == finest
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(p, dict(plain.named_parameters())[name])
               for name, p in model.named_parameters() if "norm" in name)
    ids = torch.randint(60, (2, 30))
    assert torch.equal(model.model.embed_tokens(ids),
                       torch.nn.functional.embedding(ids, model.model.embed_tokens.wide()))
    if dtype == "fp32":
        assert torch.equal(model(ids)[0], plain(ids)[0])


def test_dequantize(rng):
    """The tensors of a file as FP32 weights of the model's shapes; what is not rounded stays."""
    weight = torch.randn(rng.randint(1, 9), rng.choice(WIDTHS))
    (nibbles, scales), (integers, scale) = quantize_int4(weight), quantize(weight)
    shape, norm = tuple(weight.shape), torch.ones(3)
    wide = dequantize({"a.weight": nibbles, "a.weight_scale": scales.half(), "b.weight": integers,
                       "b.weight_scale": scale, "norm.weight": norm}, {"a.weight": shape, "b.weight": shape})
    assert wide.keys() == {"a.weight", "b.weight", "norm.weight"} and torch.equal(wide["norm.weight"], norm)
    assert torch.equal(wide["a.weight"], widen_int4(nibbles, scales, weight.size(1)))
    assert torch.equal(wide["b.weight"], integers * scale)
    assert columns(tuple(nibbles.shape), shape) == shape
    assert columns((len(weight), nibbles.size(1) + 32), shape) == (len(weight), nibbles.size(1) + 32)
