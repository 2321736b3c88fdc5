"""A weight times one vector or several, in each type, against float64."""
import numpy as np
import pytest
import torch

from decoding.narrow import Narrow
from decoding.products import linear, lines, stacked
from quant_t4 import quantize


@torch.no_grad()
@pytest.mark.parametrize("case", range(6))
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "int4"])
def test_linear(rng, dtype, case):
    """A weight of two layers and any number of rows: the product of float64 but for the sums' rounding."""
    width, rows = rng.choice([1, 2, 7, 31, 32, 40, 64, 100, 192, 320]), rng.choice([1, 1, 2, 3, 4, 5, 8, 13])
    if width == 1 and dtype == "int8":
        width = 2
    matrices = [[Narrow(torch.randn(out, width) * 10 ** rng.uniform(-2, 1), dtype) for out in (rng.randint(1, 40), 5)]]
    matrices.append([Narrow(torch.randn(len(m.weight), width), dtype) for m in matrices[0]])
    before = [[m.wide() for m in layer] for layer in matrices]
    weight, x = stacked(matrices), torch.randn(rows, width) * 10 ** rng.uniform(-1, 1)
    integers, scale = quantize(x)
    rounded = (integers * scale if matrices[0][0].scale is not None else x).double()
    for layer in range(2):
        assert all(torch.equal(m.wide(), wide) for m, wide in zip(matrices[layer], before[layer], strict=True))
        wide = torch.cat(before[layer]).double()
        y = torch.from_numpy(linear(weight, np.int64(layer), x.numpy()))
        magnitudes = rounded.abs() @ wide.abs().t()
        assert y.shape == (rows, len(wide))
        assert ((y - rounded @ wide.t()).abs() <= 2**-24 * (2 * width**0.5 + 8) * magnitudes).all()


def test_lines(rng):
    """Room for as many columns as asked for, in rows that begin at a multiple of 64 bytes."""
    for _ in range(20):
        rows, columns = rng.randint(1, 9), rng.randint(1, 99)
        room = lines(rows, columns)
        assert room.shape[0] == rows and room.shape[1] >= columns and room.dtype == np.float32
        assert room.ctypes.data % 64 == room.strides[0] % 64 == 0
