"""INT8 quantization-aware training: the linear layers of Stentor2's recipe for Kaggle's T4s.

A model that will run in INT8 had better learn in INT8. Quantization-aware training (Jacob et al. 2017) rounds weights
and activations to 8 bits in the forward pass, as the finished model will, and lets the FP32 weights underneath learn to
live with it. In three steps:

1. Rounding (`quantize`). A row of numbers becomes integers from -127 to 127 and one FP32 scale, its largest magnitude
   divided by 127. Each output channel of a weight has a scale of its own: a channel of small weights next to one of
   large ones would otherwise be left with a few levels, or with zeros. So has each token's activation.

2. The product. Integers times integers, summed exactly, then multiplied by the two scales: `Int8Product`, on hardware
   that multiplies INT8 (a T4 does so twice as fast as FP16). Or in floating point, on any device: the integers are
   multiplied by their scales first, which is called fake quantization. In FP32 the two differ by rounding alone; under
   autocast fake values are rounded to 16 bits, which costs another few tenths of a percent in bfloat16.

3. The gradient. Rounding is a staircase, its derivative zero wherever there is one, and nothing would ever be learnt.
   The straight-through estimator (Bengio et al. 2013) takes it for the identity in the backward pass: the gradient of
   the rounded weight is given to the FP32 weight. Rounding moves a number by half a step at most, so the slope that it
   is given is that of a point nearby; and an update too small to change the rounded weight is not lost, but adds up in
   FP32 until it does. (As the scale is the row's largest number, nothing is clipped and no gradient has to be cut off;
   that the scale itself depends on the row is left out of the gradient.)

The master weight is the module's own FP32 `weight`, under the name that every loader knows.
"""

import math
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Llama, RMSNorm

LEVELS = 127  # of each sign. -128 is left unused, so that negation is exact and zero is in the middle.


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round the rows of x (..., n) to INT8: integers (..., n) int8 and scales (..., 1) FP32, x near integers * scales.

    Half a step is rounded to even, as IEEE 754 does. The error is at most half a scale. A row of zeros is zeros
    exactly, and the largest number of a row comes back as it was, to a rounding of FP32. Where a row holds an
    infinity or NaN its scale does too, so that a GradScaler sees an overflow.
    """
    x = x.float()
    scale = (x.abs().amax(-1, keepdim=True) / LEVELS).clamp_min(torch.finfo(torch.float32).tiny)  # not 0 / 0
    return torch.round(x / scale).clamp(-LEVELS, LEVELS).to(torch.int8), scale


class FakeQuantize(torch.autograd.Function):
    """x rounded to INT8 and back, row by row; the gradient passes straight through."""

    @staticmethod
    def forward(ctx, x):
        integers, scale = quantize(x)
        return (integers * scale).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad


class Int8Product(torch.autograd.Function):
    """x @ weight.T, both rounded to INT8 by rows and multiplied as integers; gradients as if through FakeQuantize.

    What is kept for the backward pass is the integers: a quarter of the memory that FP32 activations take.
    """

    @staticmethod
    def forward(ctx, x, weight, dtype):
        (x8, x_scale), (weight8, weight_scale) = quantize(x.reshape(-1, x.size(-1))), quantize(weight)
        ctx.save_for_backward(x8, x_scale, weight8, weight_scale)
        ctx.shape, ctx.dtypes = x.shape, (x.dtype, weight.dtype)
        sums = torch._int_mm(x8, weight8.t())  # (tokens, in) @ (in, out) -> (tokens, out) int32, exact
        return (sums * x_scale * weight_scale.t()).to(dtype).view(*x.shape[:-1], -1)  # (..., out)

    @staticmethod
    def backward(ctx, grad):
        x8, x_scale, weight8, weight_scale = ctx.saved_tensors
        grad = grad.reshape(-1, grad.size(-1))  # (tokens, out)
        grad_x = grad @ (weight8 * weight_scale).to(grad.dtype)  # (tokens, in)
        grad_weight = grad.t() @ (x8 * x_scale).to(grad.dtype)  # (out, in)
        return grad_x.view(ctx.shape).to(ctx.dtypes[0]), grad_weight.to(ctx.dtypes[1]), None


class Int8LinearT4(nn.Linear):
    """A Linear whose forward pass rounds its weight and its input to INT8; its `weight` stays FP32 and is what learns.

    quantize_weight, quantize_input    either can be left in floating point
    integers                           multiply integers (both must be quantized), not their floating-point values
    """

    quantize_weight = quantize_input = True
    integers = False

    def forward(self, x):
        if self.integers and self.quantize_weight and self.quantize_input:
            dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
            y = Int8Product.apply(x, self.weight, dtype)  # (..., in) -> (..., out)
            return y if self.bias is None else y + self.bias
        weight = FakeQuantize.apply(self.weight) if self.quantize_weight else self.weight
        x = FakeQuantize.apply(x) if self.quantize_input else x
        return F.linear(x, weight, self.bias)


def apply_t4_recipe(model: Llama, linears: tuple[str, ...]) -> dict[str, int]:
    """Make INT8 linears of those that are named (q_proj, ..., down_proj), in every block that does not run in FP32.

    The weights stay the parameters that they are, under the names that they have: so an optimizer and checkpoints
    do not notice, and the recipe may be applied again. The head is in no block, and is never touched. Returns how
    many modules the model now has of each kind of the recipe. Raises ValueError for a name that no block has.
    """
    blocks = model.model.layers
    parents = [parent for block in blocks if not block.fp32 for parent in (block.self_attn, block.mlp)]
    known = {name for parent in (blocks[0].self_attn, blocks[0].mlp) for name, _ in parent.named_children()}
    if unknown := sorted(set(linears) - known):
        raise ValueError(f"there is no linear {', '.join(unknown)} in a block; there are {', '.join(sorted(known))}")
    for parent in parents:
        for name, linear in list(parent.named_children()):
            if name in linears:
                int8 = Int8LinearT4(linear.in_features, linear.out_features, bias=False, device="meta")
                int8.weight = linear.weight
                setattr(parent, name, int8)
    modules = list(model.modules())
    return {"INT8 linears": sum(isinstance(module, Int8LinearT4) for module in modules),
            "FP32 norms": sum(isinstance(module, RMSNorm) and module.fp32 for module in modules),
            "FP32 blocks": sum(block.fp32 for block in blocks)}


def use_integers(model: Llama, integers: bool):
    """Let all INT8 linears multiply integers, or the same numbers in floating point."""
    for module in model.modules():
        if isinstance(module, Int8LinearT4):
            module.integers = integers


def block_passes(model: Llama, tokens: int, autocast):
    """A function that runs the linears of an inner block forward and backward over `tokens` tokens, each in the context
    that autocast() gives, and waits for the device."""
    block = next(block for block in model.model.layers if not block.fp32)
    linears = [module for module in block.modules() if isinstance(module, nn.Linear)]

    def run():
        for linear in linears:
            x = torch.ones(tokens, linear.in_features, device=linear.weight.device, requires_grad=True)
            with autocast():
                y = linear(x)  # (tokens, in) -> (tokens, out)
            gradients = torch.autograd.grad(y, (x, linear.weight), torch.ones_like(y))
        float(gradients[1][0, 0])  # waits

    return run


def time_products(model: Llama, tokens: int, autocast) -> dict[str, float]:
    """Seconds that the linears of an inner block take on this device with either product: {"fake", "integers"}.

    As `block_passes` runs them, not compiled: the fastest of those that fit into a second. Infinite where the device
    cannot multiply integers, or not these. Leaves the model with the fake product.
    """
    passes, rounds, begun = block_passes(model, tokens, autocast), 0, time.perf_counter()
    best = {"fake": math.inf, "integers": math.inf}
    while rounds < 2 or rounds < 20 and time.perf_counter() < begun + 1:  # in turns; the first of each warms up
        for product in best:
            use_integers(model, product == "integers")
            start = time.perf_counter()
            try:
                passes()
            except RuntimeError:
                continue
            best[product] = min(best[product], time.perf_counter() - start)
        rounds += 1
    use_integers(model, False)
    return best


def quantize_for_export(model: Llama) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The INT8 weights of a model trained with the recipe, by module name: (out, in) int8 and (out, 1) FP32 scales.

    Their product is, bit for bit, the weight that the forward pass has been using.
    """
    return {name: quantize(module.weight.detach())
            for name, module in model.named_modules() if isinstance(module, Int8LinearT4) and module.quantize_weight}


def dequantize(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a file in which export.py put INT8 weights, as those of one in which it did not: `name` (out, in)
    int8 and `name_scale` (out, 1) become `name`, FP32."""
    scales = {name.removesuffix("_scale"): scale for name, scale in weights.items() if name.endswith(".weight_scale")}
    return {name: weight * scales[name] if name in scales else weight
            for name, weight in weights.items() if not name.endswith(".weight_scale")}
