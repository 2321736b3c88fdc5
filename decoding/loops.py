"""Loops that numba compiles, and the number of threads that they run on.

engine.py and filters.py are written as plain loops over numbers. numba makes machine code of them at the first call,
which takes seconds, and keeps it on disk beside the file.

A step of a tiny model has some sixty loops that run on several threads, each a few microseconds long. So threads must
start and meet quickly. OpenMP and TBB need a microsecond for that, and numba's own layer, "workqueue", fifty: it is no
use here.
"""

import contextlib
import importlib
import math
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

Result = TypeVar("Result")
LAYERS = {"omp": "omppool", "tbb": "tbbpool"}  # numba's name of a threading layer: the module that needs its library
# Sums in any order, so that they become vectors; no exception where something is divided by 0; other threads may go on.
SETTINGS = {"fastmath": True, "error_model": "numpy", "nogil": True}

try:
    import numba
    from numba.core import types
    from numba.extending import intrinsic
except ImportError:
    numba = None


def forget_old_programs():
    """Delete kept machine code that is older than any file here. numba compares it with its own file alone, but a loop
    holds what it calls from the others."""
    folder = Path(__file__).parent
    newest = max(path.stat().st_mtime for path in folder.glob("*.py"))
    for index in (folder / "__pycache__").glob("*.nbi"):
        with contextlib.suppress(OSError):  # another process was first, or we may not
            if index.stat().st_mtime < newest:
                index.unlink()


@cache
def missing() -> str:
    """What keeps the loops from running here, and what to do about it; "" if nothing does."""
    if numba is None:
        return "numba is not installed: pip install numba"
    if numba.config.DISABLE_JIT:
        return "NUMBA_DISABLE_JIT is set"
    for layer, module in LAYERS.items():
        try:
            importlib.import_module(f"numba.np.ufunc.{module}")
        except ImportError:
            continue
        numba.config.THREADING_LAYER = layer
        forget_old_programs()
        return ""
    return "numba finds neither OpenMP nor TBB: pip install tbb"


def loop(function: Callable | None = None, *, parallel: bool = False) -> Callable:
    """Compile a function of loops. With `parallel` its `numba.prange` loops are divided among threads."""
    if function is None:
        return lambda function: loop(function, parallel=parallel)
    try:
        return numba.njit(parallel=parallel, cache=True, **SETTINGS)(function)
    except RuntimeError:  # no folder can hold a cache, as in some containers
        return numba.njit(parallel=parallel, **SETTINGS)(function)


if numba:
    @intrinsic
    def as_float(context, bits):
        """The FP32 number that these 32 bits are."""
        def generate(context, builder, signature, arguments):
            return builder.bitcast(arguments[0], context.get_value_type(types.float32))
        return types.float32(types.uint32), generate

    @loop
    def exp(x):
        """e^x of an FP32 number, to some 2^-22 of it, in a form that LLVM makes vectors of, unlike a library's.

        x = n ln 2 + r, with a whole n: e^x is 2^n, which is n in the exponent's bits, times e^r, and for so small an r
        a few terms of the Taylor series do. What is out of FP32's range becomes e^-87 or e^88.
        """
        x = min(max(x, np.float32(-87)), np.float32(88))
        n = np.rint(x * np.float32(1 / math.log(2)))
        r = x - n * np.float32(math.log(2))  # at most ln 2 / 2
        series = np.float32(1)
        for divisor in (7, 6, 5, 4, 3, 2, 1):  # 1 + r (1 + r / 2 (1 + r / 3 ...)))
            series = np.float32(1) + series * r * np.float32(1 / divisor)
        return series * as_float(np.uint32((np.int32(n) + np.int32(127)) << np.int32(23)))


class Threads:
    """How many threads a step should have, found out while it runs again and again.

    Threads that wait for each other suffer when another program takes one of their cores: most steps are as fast as
    before, but now and again one stands still until the core is free, which can take as long as a hundred steps. Then
    one thread alone is faster. So we keep the mean time of a step for each count, use the best, and now and again try
    its neighbours for a few steps. A trial that lost time is made up for before the next.
    """

    MEMORY = 50  # steps that a mean goes back
    TRIAL_STEPS = 3
    TRIAL_SHARE = 0.02  # of the time may be lost in trials
    TRIAL_EVERY = 0.25  # seconds, at least

    def __init__(self, most: int):
        """`most`: at most so many."""
        self.counts = sorted({most, *(2**n for n in range(most.bit_length()) if 2**n < most)})  # 1, 2, 4, ..., most
        self.seconds, self.steps = [0.0] * len(self.counts), [-1] * len(self.counts)  # the first step is not counted
        self.now = len(self.counts) - 1  # place in counts of the next step's
        self.trial, self.lost, self.next_trial = 0, 0.0, 0.0  # steps left of a trial, and seconds that it has lost

    @property
    def count(self) -> int:
        """How many the next step gets."""
        return self.counts[self.now]

    def run(self, step: Callable[..., Result], *inputs: Any) -> Result:
        """step(*inputs), on the number of threads that seems best, or on another, to try it."""
        numba.set_num_threads(self.count)
        started = time.perf_counter()
        result = step(*inputs)
        ended = time.perf_counter()
        self.learn(ended - started, ended)
        return result

    def learn(self, seconds: float, ended: float):
        """A step took so many seconds: decide how the next one runs."""
        here = self.now
        self.steps[here] += 1
        if self.steps[here] > 0:
            self.seconds[here] += (seconds - self.seconds[here]) / min(self.steps[here], self.MEMORY)
        best = min((place for place, steps in enumerate(self.steps) if steps > 0), default=here,
                   key=self.seconds.__getitem__)
        if self.trial:
            self.lost += seconds - self.seconds[best]
            self.trial = self.trial - 1 if seconds < 2 * self.seconds[best] else 0  # one that goes badly ends at once
            if not self.trial:
                self.now, self.next_trial = best, ended + max(self.TRIAL_EVERY, self.lost / self.TRIAL_SHARE)
        elif ended > self.next_trial and self.steps[here] >= self.TRIAL_STEPS and len(self.counts) > 1:
            neighbours = [place for place in (best - 1, best + 1) if 0 <= place < len(self.counts)]
            self.now, self.trial, self.lost = min(neighbours, key=self.steps.__getitem__), self.TRIAL_STEPS, 0.0
        else:
            self.now = best
