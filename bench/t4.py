"""The INT8 linears of Stentor2 on this machine's device, and what a GPU that is not here will choose."""

import re
from dataclasses import dataclass

import torch

import backend
import quant_t4
from bench import Row, Table, TimedOptions, alternate, show
from bench.models import named
from cli import BadInput
from model import Llama


@dataclass
class Options(TimedOptions):
    """Milliseconds of the linears of an inner block of Stentor2, and what a GPU of --capability will choose."""

    tokens: int = 4096
    """Tokens that go through the linears."""
    capability: str = "7.5"
    """Compute capability of the GPU to tell of; 7.5 is a T4's."""


def parse_capability(text: str) -> tuple[int, int]:
    """"7.5" as (7, 5). Raises BadInput if it is no compute capability."""
    if not re.fullmatch(r"\d+\.\d+", text):
        raise BadInput(f"--capability {text}: write it like 7.5")
    major, minor = text.split(".")
    return int(major), int(minor)


def choices(capability: tuple[int, int]) -> list[tuple[str, str]]:
    """What a GPU of this compute capability will run with, as rows (what, choice).

    The first three rows are what the code decides; the others, what is to be expected when it tries.
    """
    half = backend.half_precision(capability)

    def attention(dtype: torch.dtype) -> str:
        return ("flash, grouped key and value heads" if backend.takes_grouped_heads(capability, dtype) else
                "memory-efficient, keys and values expanded to all heads")

    return [("matrix products", {torch.float16: "float16, with a GradScaler", torch.bfloat16: "bfloat16"}[half]),
            ("attention of the inner blocks", attention(half)),
            ("attention of the FP32 blocks", attention(torch.float32)),
            ("INT8 products", "of integers (torch._int_mm) or fake, whichever is faster when the run begins"
                              if capability >= (7, 5) else "fake: no integer tensor cores"),
            ("--compile", "Triton" if capability >= (7, 0) else "falls back: Triton needs 7.0")]


def rows_of(name: str, dtype: str, options: Options) -> list[Row]:
    """The rows of a config: its linears plain, in INT8 with fake products, and with those of integers."""
    config, device = named(name), backend.pick(dtype=dtype, tpu=False)
    models = {product: Llama(config.model).to(device.device) for product in ("plain", "fake", "integers")}
    for product in ("fake", "integers"):
        quant_t4.apply_t4_recipe(models[product], config.int8_linears)
    quant_t4.use_integers(models["integers"], True)
    passes = {product: quant_t4.block_passes(model, options.tokens, device.autocast)
              for product, model in models.items()}
    seconds = alternate(passes, options.rounds)
    return [(name, str(device.dtype).removeprefix("torch."), product, f"{1000 * time_:.2f}",
             f"{time_ / seconds['plain']:.2f}") for product, time_ in seconds.items()]


def measure(options: Options) -> Table:
    """Milliseconds of the linears, forward and backward, and next to plain ones."""
    capability = parse_capability(options.capability)
    rows = []
    for dtype in ("fp32", "fp16" if torch.cuda.is_available() else "bf16"):
        for name in ("stentor2_12m", "stentor2_30m"):
            rows += rows_of(name, dtype, options)
    print(f"A GPU of compute capability {options.capability} will run with\n")
    show(("what", "choice"), choices(capability), options.markdown)
    print(f"\n{backend.pick(tpu=False).name}, {torch.get_num_threads()} threads, {options.tokens:,} tokens, eager, "
          f"medians of {options.rounds}\n")
    return ("block of", "products", "linears", "ms, forward and backward", "x plain"), rows
