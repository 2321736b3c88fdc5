"""The number of threads follows what their steps cost, and the exponential is that of float64."""
import numpy as np
import pytest

from decoding import loops
from decoding.loops import Threads, exp


@loops.loop
def exponentials(x, y):
    for j in range(len(x)):
        y[j] = exp(x[j])


def test_exp(rng):
    """To 4 units of FP32's last place over its range; beyond it the ends of the range, and never a NaN."""
    x = np.random.default_rng(rng.randrange(2**32)).uniform(-87, 88, 100_000).astype(np.float32)
    x[:3] = 0, -87, 88
    y = np.empty_like(x)
    exponentials(x, y)
    assert np.abs(y / np.exp(x.astype(np.float64)) - 1).max() < 4 * 2**-23 and y[0] == 1
    ends = np.array([-1e30, -100, 100, 1e30], np.float32)
    exponentials(ends, y[:4])
    assert (y[:2] == y[0]).all() and y[0] < 2e-38 and (y[2:4] == y[2]).all() and 1e38 < y[2] < np.inf


class Machine:
    """Steps whose cost depends on the number of threads; a clock that they move."""

    def __init__(self, most):
        self.now = 0.0
        self.threads = Threads(most)

    def run(self, steps, cost):
        """Run so many steps; cost(count) gives the seconds of one. Returns what they took, and the counts."""
        start, counts = self.now, []
        for _ in range(steps):
            counts.append(self.threads.count)
            seconds = cost(self.threads.count)
            self.now += seconds
            self.threads.learn(seconds, self.now)
        return self.now - start, counts


@pytest.mark.parametrize("most", [2, 4, 6])
def test_quiet(rng, most):
    """Where threads help, steps have the most, but for a few."""
    machine = Machine(most)
    took, counts = machine.run(5000, lambda count: 0.001 / count * rng.uniform(0.9, 1.1))
    assert counts.count(most) > 0.95 * len(counts) and took < 1.06 * 5000 * 0.001 / most
    assert len(set(counts)) > 1  # others are tried


def test_busy(rng):
    """Where two threads often stand still one alone is used, and little is lost by trying; when the machine is quiet
    again, two are, and again one when it is not."""
    def busy(count):
        return 0.001 if count == 1 else 0.0006 + (rng.random() < 0.1) * rng.uniform(0.02, 0.2)

    def quiet(count):
        return 0.001 / count

    machine = Machine(2)
    machine.run(200, busy)
    for _ in range(2):
        took, counts = machine.run(20_000, busy)
        assert counts.count(1) > 0.9 * len(counts) and took < 1.15 * 20_000 * 0.001
        machine.run(30_000, quiet)
        took, counts = machine.run(2000, quiet)
        assert counts.count(2) > 0.9 * len(counts)


def test_one_core(rng):
    machine = Machine(1)
    assert set(machine.run(500, lambda count: rng.random())[1]) == {1}
