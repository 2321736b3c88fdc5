"""Reading a prompt, next to transformers and llama.cpp."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

import backend
from backend import Backend
from bench import Table, TimedOptions, alternate
from bench.machine import describe, gemm_rate
from bench.models import BYTES, Contestant, llama_cpp, named, next_to_peers, transformers_llama, writer
from decoding.generate import Reader
from model import Llama


@dataclass
class Options(TimedOptions):
    """Tokens a second of reading a prompt of half the context, up to the logits that follow it."""

    config: str = "stentor3_20m"
    """Name of the config whose shape is run."""


def contestants(plain: Llama, prompt: list[int], device: Backend, folder: Path) -> dict[str, Contestant]:
    """Everyone who reads the prompt, in every type."""
    peer = transformers_llama(plain.config, device).eval()
    ids = torch.tensor([prompt], device=device.device)  # (1, T)

    def ours(dtype: str) -> Contestant:
        model = writer(plain, dtype, device)
        return Contestant(lambda: Reader(model).read([prompt]), dtype.upper())

    entered = {"transformers, FP32": Contestant(
        lambda: peer.lm_head(peer.model(ids, use_cache=True)[0][:, -1:]), "FP32")}
    for dtype in BYTES:
        entered[f"ours, {dtype.upper()}"] = ours(dtype)
        if engine := llama_cpp(folder, plain, dtype):
            entered[f"llama.cpp, {dtype.upper()}"] = Contestant(lambda engine=engine: engine(prompt, 0), dtype.upper())
    return entered


@torch.no_grad()
def measure(options: Options) -> Table:
    """Tokens/s of each, and next to the peers and to the speed of a plain matrix product."""
    config = named(options.config).model
    device = backend.pick(dtype="fp32", tpu=False)
    length, plain = config.max_position_embeddings // 2, Llama(config).eval()
    prompt = torch.randint(config.vocab_size, (length,)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        entered = contestants(plain, prompt, device, Path(folder))
        seconds = alternate({name: contestant.run for name, contestant in entered.items()}, options.rounds, settle=True)
    flops = length * plain.flops_per_token(length) / 3  # the forward pass is a third of a training step
    rates = {"FP32": gemm_rate(torch.float32, device.device), "BF16": gemm_rate(torch.bfloat16, device.device)}
    rows = []
    for name, contestant in entered.items():
        time_, precision = seconds[name], contestant.precision
        rows.append((name, f"{length / time_:,.0f}", *next_to_peers(seconds, name, contestant),
                     f"{flops / time_ / rates[precision]:.0%}" if precision in rates else ""))
    print(f"{options.config}'s shape, random weights, {describe()}, torch {torch.__version__}; {length:,} tokens, "
          f"medians of {options.rounds}\n")
    return ("what", "tokens/s", "x transformers, FP32", "x llama.cpp, same type", "of the GEMM rate"), rows
