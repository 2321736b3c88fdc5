"""A training step: ours, eager and compiled, next to the plain loop of transformers."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

import backend
from backend import Backend
from bench import Row, Table, TimedOptions, alternate
from bench.machine import describe, gemm_rate, wait
from bench.models import named, transformers_llama
from cli import BadInput
from model import Llama, ModelConfig

PRECISIONS = {"FP32": torch.float32, "BF16": torch.bfloat16}


@dataclass
class Options(TimedOptions):
    """Training tokens a second of a config's shape: this model and transformers', eager and compiled."""

    config: str = "stentor3_20m"
    """Name of the config whose shape is trained."""
    shapes: tuple[str, ...] = ("8x256", "2x1024")
    """Batches to train on: sequences x tokens."""


def parse_shape(text: str, context: int) -> tuple[int, int]:
    """B x T of a command line, "8x256", as two numbers. Raises BadInput if it is none, or T exceeds the context."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise BadInput(f"--shapes {text}: write sequences x tokens, like 8x256")
    B, T = map(int, text.split("x"))
    if T > context:
        raise BadInput(f"--shapes {text}: the model's context is {context:,} tokens")
    return B, T


def training_step(model: torch.nn.Module, loss: Callable[[], torch.Tensor], device: Backend,
                  dtype: torch.dtype) -> Callable[[], None]:
    """A function that trains for one step of loss(), as both loops do it: forward, backward, clip, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        with torch.autocast(device.device.type, dtype, enabled=dtype != torch.float32):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait()

    return step


def our_model(config: ModelConfig, device: Backend) -> Llama:
    """A Llama of ours on the device, with its attention kernel."""
    model = Llama(config).to(device.device)
    model.run_with(device.attention())
    return model


def contestants(config: ModelConfig, device: Backend, precision: str, ids: torch.Tensor,
                targets: torch.Tensor) -> dict[str, Callable[[], None]]:
    """A training step on ids and targets (B, T) in one precision, of each model."""
    dtype, steps = PRECISIONS[precision], {}

    def enter(name: str, model: torch.nn.Module):
        steps[f"{name}, {precision}"] = training_step(model, lambda: model(ids, targets)[1], device, dtype)

    peer = transformers_llama(config, device)
    steps[f"transformers, {precision}"] = training_step(peer, lambda: peer(input_ids=ids, labels=targets).loss, device,
                                                        dtype)
    enter("eager", our_model(config, device))
    enter("compiled", torch.compile(our_model(config, device)))
    if precision == "BF16":  # as transformers computes: autocast in every block
        enter("compiled, no FP32 blocks", torch.compile(our_model(replace(config, fp32_blocks=()), device)))
    return steps


def rows_of(shape: tuple[int, int], config: ModelConfig, device: Backend, rounds: int) -> list[Row]:
    """The rows of batches of B x T tokens."""
    B, T = shape
    ids, targets = (torch.randint(config.vocab_size, (B, T), device=device.device) for _ in range(2))
    steps, precisions, first = {}, {}, {}
    for precision in PRECISIONS:
        for name, step in contestants(config, device, precision, ids, targets).items():
            start = time.perf_counter()
            step()
            steps[name], precisions[name], first[name] = step, precision, time.perf_counter() - start
    seconds = alternate(steps, rounds)
    flops = B * T * Llama(config).flops_per_token(T)
    rates = {precision: gemm_rate(dtype, device.device) for precision, dtype in PRECISIONS.items()}
    return [(f"{B} x {T:,}", name, f"{B * T / time_:,.0f}",
             f"{seconds[f'transformers, {precisions[name]}'] / time_:.2f}",
             f"{seconds['transformers, FP32'] / time_:.2f}", f"{flops / time_ / rates[precisions[name]]:.0%}",
             f"{first[name]:.0f} s") for name, time_ in seconds.items()]


def measure(options: Options) -> Table:
    """Tokens/s of each model on each shape of batch, and next to transformers."""
    config, device, rows = named(options.config).model, backend.pick(tpu=False), []
    if not options.shapes:
        raise BadInput("--shapes: name at least one, like 8x256")
    for shape in [parse_shape(text, config.max_position_embeddings) for text in options.shapes]:
        rows += rows_of(shape, config, device, options.rounds)
    print(f"{options.config}'s shape, {describe()}, torch {torch.__version__}, medians of {options.rounds}; BF16 is "
          f"autocast, of ours with the FP32 blocks and norms\n")
    return ("batch", "what", "tokens/s", "x transformers, same precision", "x transformers, FP32",
            "of the GEMM rate", "first step"), rows
