"""What quantization-aware training buys, by training with it and without."""

import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import backend
import checkpoint
import quant_t4
from bench import ROOT, Table, TableOptions
from bench.models import named
from cli import BadInput
from config import load
from data import Batches, read_meta
from run import held_out_losses, mixed


@dataclass
class Options(TableOptions):
    """Train the quickstart's model with INT8 linears and without, and run both both ways.

    Runs that are there already, out/qat_fp32_1, out/qat_int8_1 and so on, are not trained again.
    """

    seeds: int = 3
    """Seeds to train with."""
    steps: int = 1200
    """Optimizer steps of each run."""


@torch.no_grad()
def bits_per_byte(run: Path, int8_linears: tuple[str, ...]) -> float:
    """Held-out bits per byte of a run's last checkpoint, with these of its linears in INT8 and all else in FP32."""
    trained = checkpoint.open_trained(run, which="latest")
    quant_t4.apply_t4_recipe(trained.model, int8_linears)
    config = load(["--data_dir", trained.state["config"]["data_dir"]])
    held_out = {name: Batches(config, "val", name) for name in config.sources}
    losses = held_out_losses(trained.model.eval(), held_out, backend.pick("cpu", "fp32"))
    return mixed(losses, config.sources, read_meta(config))["bits_per_byte"]


def trained_run(kind: str, seed: int, steps: int, options: tuple[str, ...]) -> Path:
    """Train a run in FP32, or go on with it if it is there: its directory. Raises BadInput if that fails."""
    name = f"qat_{kind}_{seed}"
    command = [sys.executable, str(ROOT / "train.py"), "--dtype=fp32", "--resume", f"--max_steps={steps}",
               "--train_minutes=None", "--max_minutes=None", f"--seed={seed}", f"--name={name}", *options]
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise BadInput("train.py has failed; what it says is above")
    return Path("out") / name


def measure(options: Options) -> Table:
    """Held-out bits per byte for each seed and in the mean: trained plain or in INT8, run in FP32 or in INT8."""
    linears, figures = named("stentor2_12m").int8_linears, []
    for seed in range(1, options.seeds + 1):
        plain = trained_run("fp32", seed, options.steps, ())
        int8 = trained_run("int8", seed, options.steps, ("--int8_linears", *linears, "--int8_product=fake"))
        figures.append([bits_per_byte(run, in_int8) for run in (plain, int8) for in_int8 in ((), linears)])
    figures.append([statistics.mean(column) for column in zip(*figures)])
    names = [*(f"seed {seed}" for seed in range(1, options.seeds + 1)), "mean"]
    rows = [(name, *(f"{figure:.4f}" for figure in (plain, rounded, qat_plain, qat, qat / plain, qat / rounded)))
            for name, (plain, rounded, qat_plain, qat) in zip(names, figures)]
    print(f"Held-out bits per byte after {options.steps:,} steps of the quickstart's model\n")
    return (("", "FP32 baseline", "it in INT8", "QAT in FP32", "QAT in INT8", "QAT in INT8 / baseline",
             "QAT in INT8 / baseline in INT8"), rows)
