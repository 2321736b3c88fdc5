"""INT8 quantization-aware training: the linear layers of Stentor2's recipe for Kaggle's T4s.

A model that will run in INT8 should learn in INT8. Quantization-aware training (Jacob et al. 2017) rounds weights and
activations to 8 bits in the forward pass, as the finished model will, and lets the FP32 weights underneath learn to
live with it. There are three parts:

1. Rounding (`quantize`). A row of numbers becomes integers from -127 to 127 and one FP32 scale: the row's largest
   magnitude divided by 127. Each output channel of a weight has its own scale. With one scale for all, a channel of
   small weights next to one of large weights would be left with a few levels, or with zeros. Each token's activation
   has its own scale too.

2. The product. On hardware that multiplies INT8, integers times integers, summed exactly, then multiplied by the two
   scales: `Int8Product` (a T4 does this twice as fast as FP16). On any device, floating point: the integers are
   multiplied by their scales first. That is called fake quantization. In FP32 the two differ only by rounding. Under
   autocast the fake values are rounded to 16 bits, which costs another few tenths of a percent in bfloat16.

3. The gradient. Rounding is a staircase: its derivative is zero wherever it exists, so nothing would ever learn. The
   straight-through estimator (Bengio et al. 2013) pretends in the backward pass that rounding is the identity, and
   gives the gradient of the rounded weight to the FP32 weight. Rounding moves a number by half a step at most, so this
   gradient is that of a point nearby. An update too small to change the rounded weight is not lost either: such updates
   add up in FP32 until they do. (The scale comes from the row's largest number, so nothing is clipped and no gradient
   has to be cut off. The gradient ignores that the scale itself depends on the row.)

The master weight is the module's own FP32 `weight`, under the name that every loader knows.
"""

import math
import time
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

from backend import Backend
from cli import BadInput
from model import Llama, RMSNorm

LEVELS = 127  # of each sign. -128 stays unused, so that negation is exact and zero is in the middle.


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round the rows of x (..., n) to INT8: integers (..., n) int8 and scales (..., 1) FP32, x near integers * scales.

    Ties go to even, as in IEEE 754. The error is at most half a scale. A row of zeros stays exactly zero, and the
    largest number of a row comes back unchanged, up to FP32 rounding. If a row holds an infinity or NaN, so does its
    scale, and a GradScaler sees the overflow.
    """
    x = x.float()
    scale = (x.abs().amax(-1, keepdim=True) / LEVELS).clamp_min(torch.finfo(torch.float32).tiny)  # not 0 / 0
    return torch.round(x / scale).clamp(-LEVELS, LEVELS).to(torch.int8), scale


class FakeQuantize(torch.autograd.Function):
    """Round x to INT8 and back, row by row. The gradient passes straight through."""

    @staticmethod
    def forward(ctx, x):
        integers, scale = quantize(x)
        return (integers * scale).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad


class Int8Product(torch.autograd.Function):
    """x @ weight.T, both rounded to INT8 by rows and multiplied as integers. The gradients are those of FakeQuantize.

    It keeps only the integers for the backward pass: a quarter of the memory of FP32 activations.
    """

    @staticmethod
    def forward(ctx, x, weight, dtype):
        # (..., in) -> (tokens, in), and a scale for each token; weight (out, in), and a scale for each output channel
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
        return grad_x.view(ctx.shape).to(ctx.dtypes[0]), grad_weight.to(ctx.dtypes[1]), None  # (..., in), (out, in)


class Int8LinearT4(nn.Linear):
    """A Linear that rounds its weight and its input to INT8 in the forward pass. Its `weight` stays FP32, and learns.

    quantize_weight, quantize_input    False leaves that one in floating point
    integers                           multiply integers, not their floating-point values; both must be quantized
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
    """Turn the named linears (q_proj, ..., down_proj) into INT8 linears, in every block that does not run in FP32.

    The weights stay the same parameters under the same names. So optimizers and checkpoints notice nothing, and the
    recipe can be applied twice. The head is not in a block, so it never changes. Returns how many modules of each kind
    the model now has. Raises BadInput for a name that no block has.
    """
    blocks = model.model.layers
    parents = [parent for block in blocks if not block.fp32 for parent in (block.self_attn, block.mlp)]
    known = {name for parent in (blocks[0].self_attn, blocks[0].mlp) for name, _ in parent.named_children()}
    if unknown := sorted(set(linears) - known):
        raise BadInput(f"int8_linears: there is no linear {', '.join(unknown)} in a block; there are "
                       f"{', '.join(sorted(known))}")
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
    """Make all INT8 linears multiply integers, or the same numbers in floating point."""
    for module in model.modules():
        if isinstance(module, Int8LinearT4):
            module.integers = integers


def block_passes(model: Llama, tokens: int, autocast: Callable) -> Callable[[], None]:
    """A function that runs an inner block's linears forward and backward over `tokens` tokens and waits for the device.
    Each forward pass is in the context that autocast() returns."""
    block = next(block for block in model.model.layers if not block.fp32)
    linears = [module for module in block.modules() if isinstance(module, nn.Linear)]

    def run():
        for linear in linears:
            x = torch.ones(tokens, linear.in_features, device=linear.weight.device, requires_grad=True)
            with autocast():
                y = linear(x)  # (tokens, in) -> (tokens, out)
            gradients = torch.autograd.grad(y, (x, linear.weight), torch.ones_like(y))
        float(gradients[1][0, 0])  # waits for the device

    return run


def time_products(model: Llama, tokens: int, autocast: Callable) -> dict[str, float]:
    """Seconds that an inner block's linears take on this device with each product: {"fake", "integers"}.

    They run as in `block_passes`, not compiled. The fastest run within a second counts. The time is infinite if the
    device cannot multiply integers, or not of this shape. The model is left with the fake product.
    """
    passes, rounds, begun = block_passes(model, tokens, autocast), 0, time.perf_counter()
    best = {"fake": math.inf, "integers": math.inf}
    while rounds < 2 or rounds < 20 and time.perf_counter() < begun + 1:  # by turns; the first run of each warms up
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


def choose_product(asked: str, earlier: str | None, model: Llama, tokens: int, device: Backend) -> tuple[str, str]:
    """Choose how the INT8 linears multiply, "integers" or "fake", and set it. Returns the choice, and why, in words.

    asked      --int8_product; "auto" takes the faster one, measured on `tokens` tokens
    earlier    the choice of a run that is resumed. It keeps that if it can: the two products agree up to rounding, not
               bit for bit

    Raises BadInput if integers are asked for and the device cannot multiply them.
    """
    product, why = (asked, "as --int8_product says") if asked != "auto" else (earlier, "as the run began")
    if product != "fake":
        seconds = {"fake": 0.0, "integers": math.inf}
        if device.multiplies_integers:
            seconds = {kind: device.agreed(time_)
                       for kind, time_ in time_products(model, tokens, device.autocast).items()}
        if seconds["integers"] == math.inf:
            if asked == "integers":
                raise BadInput("--int8_product integers: this device does not multiply integers of this shape; use "
                               "fake")
            product, why = "fake", "the device does not multiply integers of this shape"
        elif product is None:
            product = min(seconds, key=seconds.get)
            why = ", ".join(f"{kind} {1000 * time_:.2f} ms a block" for kind, time_ in seconds.items())
    use_integers(model, product == "integers")
    return product, why


def quantize_for_export(model: Llama) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The INT8 weights of a model trained with the recipe, by module name: (out, in) int8 and (out, 1) FP32 scales.

    Their product is, bit for bit, the weight that the forward pass uses.
    """
    return {name: quantize(module.weight.detach())
            for name, module in model.named_modules() if isinstance(module, Int8LinearT4) and module.quantize_weight}
