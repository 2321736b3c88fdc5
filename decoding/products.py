"""A weight and a vector, in plain loops: the products that a step (engine.py) consists of.

Each type of weights has three functions of a few lines: `dot` multiplies a row of the weight with a vector, `widen`
writes the row in FP32, and `inputs_for` makes the vectors ready.

    FP32    four bytes a weight: what was trained
    BF16    two bytes: the upper half of an FP32 number
    INT8    one byte, and a scale for each row (quant_t4.py). Vectors are rounded to INT8 too, so sums are of integers
    INT4    half a byte, and a scale for each 32 weights (narrow.py); vectors again in INT8

For one vector `linear` is a `dot` for each row, as fast as the rows come from memory. For several, texts side by side
or guesses to check, it reads each row only once, widens it, and multiplies it with all of them (`tiles`).

Shapes in the comments: R vectors; a weight has `out` rows of W columns, which is `in`, and for INT4 a multiple of 64.
"""

from typing import NamedTuple

import numpy as np
import torch
from numba import prange
from numba.core import types
from numba.extending import overload

from decoding.loops import SETTINGS, as_float, loop
from decoding.narrow import GROUP, Narrow

BLOCK = 16  # rows of a weight that a thread widens at a time
f32, i16, i32 = np.float32, np.int16, np.int32


# ---------------------------------------------------------------------------------------------------------------
# A row of a weight and a vector


def dot_fp32(weight, scale, x):
    """weight (in) FP32, x (in) FP32."""
    total = f32(0)
    for j in range(len(weight)):
        total += weight[j] * x[j]
    return total


def dot_bf16(weight, scale, x):
    """weight (in), the upper halves of FP32 numbers; x (in) FP32."""
    total = f32(0)
    for j in range(len(weight)):
        total += as_float(np.uint32(weight[j]) << np.uint32(16)) * x[j]
    return total


def dot_int8(weight, scale, x):
    """weight (in) INT8 and its scale (1), x (in) integers of INT8. The many casts let LLVM see products of 16 bits."""
    total = i32(0)
    for j in range(len(weight)):
        total = i32(total + i32(i16(weight[j]) * x[j]))
    return f32(total) * scale[0]


def dot_int4(weight, scale, x):
    """weight (W / 2) nibbles and scales (W / 32) as in narrow.quantize_int4, x (W) integers of INT8."""
    total = f32(0)
    for pair in range(len(weight) // GROUP):  # of groups: their nibbles share bytes
        low, high = i32(0), i32(0)
        for j in range(GROUP):
            both = weight[pair * GROUP + j]
            low = i32(low + i32(i16(i16(both & 15) - i16(8)) * x[2 * pair * GROUP + j]))
            high = i32(high + i32(i16(i16(both >> 4) - i16(8)) * x[2 * pair * GROUP + GROUP + j]))
        total += f32(low) * scale[2 * pair] + f32(high) * scale[2 * pair + 1]
    return total


def widen_fp32(weight, scale, room):
    """An FP32 row needs no room: `wide` is the row itself."""


def widen_bf16(weight, scale, room):
    """Write a row of a weight in FP32 to room (in)."""
    for j in range(len(weight)):
        room[j] = as_float(np.uint32(weight[j]) << np.uint32(16))


def widen_int8(weight, scale, room):
    """As widen_bf16."""
    s = scale[0]  # read once: for all the compiler knows, the next line writes it
    for j in range(len(weight)):
        room[j] = f32(weight[j]) * s


def widen_int4(weight, scale, room):
    """As widen_bf16, to room (W)."""
    for pair in range(len(weight) // GROUP):
        low, high = scale[2 * pair], scale[2 * pair + 1]
        for j in range(GROUP):
            both = weight[pair * GROUP + j]
            room[2 * pair * GROUP + j] = (f32(i32(both & 15)) - f32(8)) * low
            room[2 * pair * GROUP + GROUP + j] = (f32(i32(both >> 4)) - f32(8)) * high


def keep(weight, x, columns):
    """The inputs x (R, in) for a weight of 16 or 32 bits: as they are, with scales of 1."""
    return x, np.ones(len(x), f32)


def round_to_int8(weight, x, columns):
    """The inputs x (R, in) for an INT8 or INT4 weight, rounded as in quant_t4.quantize: integers (R, columns) int16, 0
    beyond `in`, and scales (R) FP32."""
    integers, scales = np.zeros((len(x), columns), i16), np.empty(len(x), f32)
    for r in range(len(x)):
        largest = f32(0)
        for j in range(x.shape[1]):
            largest = max(largest, abs(x[r, j]))
        scales[r] = max(largest / f32(127), f32(1e-38))
        for j in range(x.shape[1]):
            integers[r, j] = i16(np.rint(x[r, j] / scales[r]))
    return integers, scales


def dot(weight, scale, x):
    """The product of a row of a weight and a vector that `inputs_for` has made ready: an FP32 number."""


def widen(weight, scale, room):
    """Write a row of a weight that is not FP32 to room (W) in FP32."""


def wide(weight, room):
    """The row in FP32 after `widen`: the weight's own if it is FP32, else the room."""


def inputs_for(weight, x, columns):
    """The inputs x (R, in) as the type of a weight of so many columns wants them: (R, columns), and scales (R) FP32."""


TYPES = {types.float32: (dot_fp32, widen_fp32, keep), types.uint16: (dot_bf16, widen_bf16, keep),
         types.int8: (dot_int8, widen_int8, round_to_int8), types.uint8: (dot_int4, widen_int4, round_to_int8)}
overload(dot, jit_options=SETTINGS)(lambda weight, scale, x: TYPES[weight.dtype][0])
overload(widen, jit_options=SETTINGS)(lambda weight, scale, room: TYPES[weight.dtype][1])
overload(wide, jit_options=SETTINGS)(lambda weight, room: (lambda weight, room: weight) if weight.dtype == types.float32
                                     else (lambda weight, room: room))
overload(inputs_for, jit_options=SETTINGS)(lambda weight, x, columns: TYPES[weight.dtype][2])


# ---------------------------------------------------------------------------------------------------------------
# A weight and one or several vectors


class Weight(NamedTuple):
    """A weight of all layers."""

    values: np.ndarray
    """(layers, out, W) FP32, uint16 for BF16, INT8; (layers, out, W / 2) uint8 for INT4."""
    scales: np.ndarray
    """(layers, out, groups) FP32: one group for INT8, one for each 32 columns for INT4; unused for the others."""


@loop
def lines(rows, columns):
    """An empty FP32 array (rows, at least `columns`). Its rows begin where a line of the cache (64 bytes) does, so that
    the processor's vectors do not lie across two lines."""
    width = -(-columns // 16) * 16
    whole = np.empty(rows * width + 15, f32)
    start = (-whole.ctypes.data % 64) // 4
    return whole[start:start + rows * width].reshape(rows, width)


@loop
def in_lines(x):
    """x (R, columns) of any type in FP32, in such an array."""
    y = lines(x.shape[0], x.shape[1])
    for r in range(x.shape[0]):
        for j in range(x.shape[1]):
            y[r, j] = x[r, j]
    return y


@loop
def tiles(values, scales, x, columns, y, start, stop):
    """y[:, start:stop] of y (R, out) = x @ weight.T, in FP32. Each weight is read once, and widened.

    Two rows of the weight meet four vectors at a time: eight sums in registers for six numbers read.
    """
    room = lines(2, columns)
    for i in range(start, stop, 2):
        last = min(i + 1, stop - 1)  # of an odd number of rows the last one is its own neighbour
        widen(values[i], scales[i], room[0])
        widen(values[last], scales[last], room[1])
        a, b = wide(values[i], room[0]), wide(values[last], room[1])
        for r in range(0, len(x), 4):
            r1, r2, r3 = min(r + 1, len(x) - 1), min(r + 2, len(x) - 1), min(r + 3, len(x) - 1)
            x0, x1, x2, x3 = x[r], x[r1], x[r2], x[r3]
            a0, a1, a2, a3, b0, b1, b2, b3 = f32(0), f32(0), f32(0), f32(0), f32(0), f32(0), f32(0), f32(0)
            for j in range(columns):
                a0, b0 = a0 + a[j] * x0[j], b0 + b[j] * x0[j]
                a1, b1 = a1 + a[j] * x1[j], b1 + b[j] * x1[j]
                a2, b2 = a2 + a[j] * x2[j], b2 + b[j] * x2[j]
                a3, b3 = a3 + a[j] * x3[j], b3 + b[j] * x3[j]
            y[r, i], y[r1, i], y[r2, i], y[r3, i] = a0, a1, a2, a3
            y[r, last], y[r1, last], y[r2, last], y[r3, last] = b0, b1, b2, b3


@loop(parallel=True)
def linear(weight, layer, x):
    """y (R, out) = x (R, in) @ weight.T"""
    values, scales = weight.values[layer], weight.scales[layer]
    out, y = len(values), np.empty((len(x), len(values)), f32)
    columns = values.shape[1] if scales.shape[1] == 1 else GROUP * scales.shape[1]  # of INT4 there are always several
    inputs, input_scales = inputs_for(values, x, columns)
    if len(x) == 1:
        for i in prange(out):
            y[0, i] = dot(values[i], scales[i], inputs[0]) * input_scales[0]
        return y
    floats = in_lines(inputs)
    for block in prange(-(-out // BLOCK)):
        tiles(values, scales, floats, columns, y, block * BLOCK, min((block + 1) * BLOCK, out))
    return multiplied(y, input_scales)


@loop
def multiplied(y, scales):
    """y (R, n) with row r multiplied by scales[r]."""
    for r in range(y.shape[0]):
        for j in range(y.shape[1]):
            y[r, j] *= scales[r]
    return y


# ---------------------------------------------------------------------------------------------------------------
# From torch


def stacked(matrices: list[list[Narrow]]) -> Weight:
    """The matrices of each layer, one below the other, as a Weight. They become views of it: nothing is kept twice."""
    values = torch.stack([torch.cat([m.weight.data for m in layer]) for layer in matrices])  # (layers, out, W)
    scales = torch.stack([torch.cat([m.weight.new_ones(len(m.weight), 1, dtype=torch.float32) if m.scale is None
                                     else m.scale.data for m in layer]) for layer in matrices])  # (layers, out, groups)
    for layer, rows, factors in zip(matrices, values, scales):
        start = 0
        for matrix in layer:
            here = slice(start, start := start + len(matrix.weight))
            matrix.weight.data = rows[here]
            if matrix.scale is not None:
                matrix.scale.data = factors[here]
    bits = values.view(torch.uint16) if values.dtype == torch.bfloat16 else values
    return Weight(bits.numpy(), scales.numpy())
