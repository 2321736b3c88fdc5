"""Weights with fewer bits, for a model that only writes.

To write a token a model reads every weight once, and does one multiplication and one addition with it. So a step takes
as long as the weights take to come from memory: half the bytes, half the time.

`narrow` turns the products of a model into those of one of DTYPES. Only products are narrow; what is between them
(norms, RoPE, attention, the residual stream, the cache) is FP32. The embedding is narrow too. In INT4 it and the head,
where rounding shows most, are INT8.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from backend import PRECISIONS
from model import Llama
from quant_t4 import quantize

DTYPES = (*PRECISIONS, "int8", "int4")
GROUP = 32  # INT4 weights that share a scale, as in llama.cpp's Q4_0


def quantize_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round weight (out, in) to INT4: nibbles (out, W / 2) uint8 and scales (out, W / 32) FP32.

    W is `in` rounded up to a multiple of 64; the columns beyond it are 0. Each group of 32 columns has a scale, its
    largest magnitude divided by 7, in FP16's precision; a weight is near (nibble - 8) * scale, with nibbles from 1 to
    15. Byte j of each 32 holds column j in its lower half and column 32 + j in its upper half: so 32 bytes are two
    groups that can be read side by side.
    """
    padded = F.pad(weight.float(), (0, -weight.size(1) % (2 * GROUP)))  # (out, W)
    groups = padded.view(len(weight), -1, GROUP)  # (out, W) -> (out, W / 32, 32)
    scale = (groups.abs().amax(-1) / 7).half().float()  # (out, W / 32)
    integers = torch.round(groups / scale[..., None].clamp_min(2**-24)).clamp(-7, 7).to(torch.uint8) + 8  # mod 256
    low, high = integers.view(len(weight), -1, 2, GROUP).unbind(2)  # (out, W / 64, 32) each
    return (low | high << 4).flatten(1), scale  # (out, W / 64, 32) -> (out, W / 2)


def widen_int4(nibbles: torch.Tensor, scale: torch.Tensor, columns: int) -> torch.Tensor:
    """The weight (out, columns) FP32 that `quantize_int4` rounded."""
    bytes_ = nibbles.view(len(nibbles), -1, 1, GROUP)  # (out, W / 2) -> (out, W / 64, 1, 32)
    integers = torch.cat([bytes_ & 15, bytes_ >> 4], 2).float() - 8  # (out, W / 64, 2, 32)
    return (integers.flatten(1, 2) * scale[..., None]).flatten(1)[:, :columns]  # (out, W / 32, 32) -> (out, columns)


class Narrow(nn.Module):
    """A matrix (out, in) in one of DTYPES: `weight`, as it lies in memory, and `scale`, if the type has one."""

    def __init__(self, weight: torch.Tensor, dtype: str):
        """weight (out, in) FP32. If dtype is "fp32", it is used directly, not copied."""
        super().__init__()
        self.dtype, self.columns, scale = dtype, weight.size(1), None
        if dtype == "int8":
            weight, scale = quantize(weight)  # (out, in), (out, 1)
        elif dtype == "int4":
            weight, scale = quantize_int4(weight)  # (out, W / 2), (out, W / 32)
        else:
            weight = weight.to(PRECISIONS[dtype])
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = None if scale is None else nn.Parameter(scale, requires_grad=False)

    def wide(self) -> torch.Tensor:
        """The matrix (out, in) in FP32."""
        if self.dtype == "int4":
            return widen_int4(self.weight, self.scale, self.columns)
        return self.weight.float() if self.scale is None else self.weight * self.scale


class NarrowLinear(Narrow):
    """A Linear with a narrow weight. It takes and returns FP32.

    In 16 bits it computes what a Linear computes under autocast. INT8 and INT4 weights meet inputs that are rounded to
    INT8, token by token, as in quantization-aware training (quant_t4.py).
    """

    def forward(self, x):
        rows = x.reshape(-1, self.columns)  # (..., in) -> (rows, in)
        if self.scale is None:
            y = F.linear(rows.to(self.weight.dtype), self.weight)
        else:
            rows, row_scale = quantize(rows)
            if self.dtype == "int8":
                y = torch._int_mm(rows, self.weight.t()) * row_scale * self.scale.t()  # (rows, in) @ (in, out)
            else:
                y = F.linear(rows.float(), self.wide()) * row_scale
        return y.float().view(*x.shape[:-1], -1)  # (rows, out) -> (..., out)


class NarrowEmbedding(Narrow):
    """An Embedding with a narrow weight. It returns FP32."""

    def forward(self, input_ids):
        rows = self.weight[input_ids].float()  # (B, T, C)
        return rows if self.scale is None else rows * self.scale[input_ids]


def narrow(model: Llama, dtype: str) -> Llama:
    """Make the Linears of a model, its head and its embedding narrow. Returns the same model, which cannot learn now.

    FP32 blocks become narrow too: they keep training stable, and a trained model does not need them (BENCHMARKS.md).
    """
    finest = "int8" if dtype == "int4" else dtype
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, linear in list(parent.named_children()):
                setattr(parent, name, NarrowLinear(linear.weight.detach(), dtype))
    head, embedding = model.lm_head.weight, model.model.embed_tokens.weight
    model.lm_head = NarrowLinear(head.detach(), finest)
    model.model.embed_tokens = NarrowEmbedding(embedding.detach(), finest)
    if head is embedding:  # tied: one matrix
        model.model.embed_tokens.weight, model.model.embed_tokens.scale = model.lm_head.weight, model.lm_head.scale
    return model.requires_grad_(False)


def dequantize(tensors: dict[str, torch.Tensor], shapes: dict[str, tuple]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint file with FP32 weights in place of the rounded ones that export.py may have written:
    `name`, int8 or nibbles, and `name_scale` become `name`. `shapes` are those of the model's parameters."""
    wide = {}
    for name, tensor in tensors.items():
        scale = tensors.get(f"{name}_scale")
        if tensor.dtype == torch.uint8 and scale is not None and name in shapes:
            wide[name] = widen_int4(tensor, scale.float(), shapes[name][1])
        elif not name.endswith(".weight_scale"):
            wide[name] = tensor if scale is None else tensor * scale
    return wide


def columns(stored: tuple, shape: tuple) -> tuple:
    """The shape of a weight that lies in a file as nibbles of shape `stored`, if `shape` is what the model has."""
    return shape if stored == (shape[0], -(-shape[-1] // (2 * GROUP)) * GROUP) else stored
