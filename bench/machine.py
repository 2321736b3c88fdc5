"""The machine: what it is, and what it can do at best."""

import os
import time
from pathlib import Path

import torch

from bench import alternate


def describe() -> str:
    """The GPU's name, or else the cores and what their vector unit can do."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    has = " ".join(flag for flag in known if flag in flags)
    return f"{torch.get_num_threads()} threads on {os.cpu_count()} cores, {has or 'CPU'}"


def wait():
    """Wait until the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def gemm_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a matrix product of the size that training has: the best of 20, or of those that fit into 5 seconds."""
    a, b = (torch.randn(2048, 2048, device=device).to(dtype) for _ in range(2))
    times = []
    while len(times) < 20 and sum(times) < 5:  # a CPU without BF16 takes 20 seconds for one
        start = time.perf_counter()
        a @ b
        wait()
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(times)


def reading_time(megabytes: float) -> float:
    """Seconds to read so many MB of memory once: their sum, the median of 30."""
    numbers = torch.ones(int(megabytes * 1e6 / 4))
    return alternate({"": numbers.sum}, 30)[""]
