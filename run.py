"""A run and its directory, out/NAME: what it measures, logs and draws, and what it needs to resume.

    out/NAME/config.json      the settings, as JSON
    out/NAME/metrics.jsonl    a line for each logged step and each evaluation
    out/NAME/curves.png       the same, as a picture

checkpoint.py writes the checkpoints beside them.
"""

import importlib
import io
import json
import math
import os
import shutil
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import checkpoint
import tokenizer
from backend import Backend
from cli import BadInput, brief, is_count, is_number, is_positive, misfit, parse_json
from config import LONG_SPELLINGS, Config, Source
from data import Batches
from model import Llama, ModelConfig
from tokenizer import Tokenizer

# ---------------------------------------------------------------------------------------------------------------
# How good the model is


@torch.no_grad()
def held_out_losses(model: torch.nn.Module, held_out: dict[str, Batches], device: Backend) -> dict[str, float]:
    """Mean loss of each source's held-out blocks, in nats per token, summed over tokens in float64.

    With several processes each takes every world_size-th batch.
    """
    losses = {}
    for name, batches in held_out.items():
        total, count = 0.0, 0
        for step in range(device.rank, len(batches), device.world_size):
            input_ids, targets = batches[step]
            tokens = int((targets != -100).sum())
            with device.autocast():
                _, loss = model(device.put(input_ids), device.put(targets))
            total += loss.item() * tokens
            count += tokens
        total, count = device.total(total, count)
        losses[name] = total / count
    return losses


def mixed(losses: dict[str, float], sources: dict[str, Source], meta: dict) -> dict[str, float]:
    """The losses of the sources as the figures of one held-out text, in which the sources are mixed by their ratios.

    loss is in nats per token. bits_per_byte is the same loss in bits, divided by the bytes of the decoded text (from
    meta.json). So it can be compared between vocabularies; loss and perplexity cannot.
    """
    loss, bytes_per_token = 0.0, 0.0
    for name, source in sources.items():
        counts = meta["sources"][name]["val"]
        loss += source.ratio * losses[name]
        bytes_per_token += source.ratio * counts["bytes"] / counts["tokens"]
    return {"loss": loss, "perplexity": math.exp(min(loss, 700)),
            "bits_per_byte": loss / math.log(2) / bytes_per_token}


# ---------------------------------------------------------------------------------------------------------------
# Where a run starts


def alone(config: Config) -> AbstractContextManager:
    """A context in which no other process trains in the run's directory. (Of several processes only rank 0 writes.)

    Entering it raises BadInput if one does already: two runs would mix their metrics and their checkpoints.
    """
    if os.environ.get("RANK", "0") != "0":
        return nullcontext()
    return checkpoint.alone(config.out_dir, f"train.py is at work in {config.out_dir}; wait for it, stop it, or choose "
                                            f"another --name")


def check_memory(config: Config, device: Backend):
    """Raise BadInput if this machine cannot hold the model: weights, gradients and two moments, in FP32.

    A GPU has a memory of its own. But the weights are drawn on the CPU.
    """
    parameters = sum(map(math.prod, config.model.shapes().values()))
    needed = parameters * (16 if device.device.type == "cpu" else 4)
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf
    if needed > there:
        raise BadInput(f"a model of this shape needs {needed / 1e9:,.0f} GB of memory, and there are "
                       f"{there / 1e9:,.0f}; choose a smaller --model.hidden_size or --model.num_hidden_layers")


def earlier_checkpoint(config: Config) -> Path | None:
    """The checkpoint to resume from, or None to start at step 0. Raises BadInput if that would destroy a run."""
    if not (config.out_dir / "latest").exists():
        return None
    if config.resume:
        step_dir = checkpoint.find(config.out_dir)
        state = checkpoint.read_state(step_dir)
        if "imported_from" in state:
            raise BadInput(f"{config.out_dir} was imported, so there is nothing to resume; start another run from it: "
                           f"--init_from {config.out_dir} --name another")
        if wrong := misfit(state, {"config": {"max_steps": is_count}}):
            raise BadInput(f"{step_dir / 'state.json'} is damaged: {wrong}; choose another step of {config.out_dir}")
        return step_dir
    if config.overwrite:
        return None
    raise BadInput(f"{config.out_dir} already holds a run: add --resume to go on with it, --name another to keep it, "
                   f"or --overwrite to delete it")


def tokenizer_of(config: Config, meta: dict) -> Tokenizer:
    """The config's tokenizer. Raises BadInput if the data (meta is its meta.json) was prepared with another one."""
    vocabulary = tokenizer.load(config.tokenizer, config.tokenizer_segmentation, config.eos_token)
    if vocabulary.sha256 != meta["recipe"].get("tokenizer", {}).get("sha256"):
        raise BadInput(f"{config.data_dir} was prepared with another vocabulary than {vocabulary.name}; "
                       f"use the same --tokenizer and --tokenizer_segmentation as then")
    if meta.get("eos_id", vocabulary.eos_id) != vocabulary.eos_id:
        raise BadInput(f"{config.data_dir} was prepared with the id {meta['eos_id']} after each document, and not "
                       f"{vocabulary.eos_id}; use --eos_token {meta['eos_id']}, or prepare it again")
    return vocabulary


def starting_point(config: Config, vocabulary: Tokenizer) -> tuple[Config, Path | None, Path | None]:
    """Where a run starts: (the config, the checkpoint to resume, the checkpoint whose weights it starts with).

    At most one of the two checkpoints is not None. With --init_from the config takes the shape of that model. Raises
    BadInput if that would destroy a run.
    """
    resumed = earlier_checkpoint(config)
    if not config.init_from:
        return config, resumed, None
    beginning = None if resumed else checkpoint.find(config.init_from, "best")
    shaped = shaped_like(config, resumed or beginning, vocabulary)
    if beginning and config.out_dir.resolve() in beginning.resolve().parents:
        raise BadInput(f"the new run would delete {beginning}, which it starts from; choose another --name")
    return shaped, resumed, beginning


def shaped_like(config: Config, step_dir: Path, vocabulary: Tokenizer) -> Config:
    """The config with the shape of a checkpoint's model, so that the run can start with its weights (--init_from).

    What has nothing to do with the shape (FP32 blocks, the initial weights) stays as in the config. Raises BadInput if
    the checkpoint was trained with another vocabulary, or if its context is shorter than a block.
    """
    state = checkpoint.read_state(step_dir)
    if state.get("tokenizer_sha256") != vocabulary.sha256:
        raise BadInput(f"{step_dir} was trained with another vocabulary than {vocabulary.name}: prepare the data with "
                       f"that one (--tokenizer, and another --data_dir), and train with it")
    theirs = asdict(checkpoint.read_shape(step_dir, state))
    ours = ("initializer_range", "scale_residual_init", "fp32_norms", "fp32_blocks")
    block_size, context = config.block_size, theirs["max_position_embeddings"]
    if block_size == Config.block_size:  # nobody has chosen it
        block_size = min(block_size, context)
    try:
        shaped = replace(config, block_size=block_size,
                         model=replace(config.model, **{k: v for k, v in theirs.items() if k not in ours}))
        shaped.check_context()
        return shaped
    except ValueError as error:
        raise BadInput(f"cannot start from {step_dir}: {error}") from error


def as_json(config: Config) -> dict:
    """The config as it is saved in JSON: paths become strings, and tuples lists."""
    return json.loads(json.dumps(asdict(config), default=str))


def filled(before: dict, today: dict) -> dict:
    """The values of an older object for the fields of today's; the default for each field that it lacks."""
    return {field: before.get(field, default) for field, default in today.items()}


def changes(before: dict, config: Config) -> list[str]:
    """The settings that a resumed run changes, each as "name old -> new". `before` are those in its checkpoint.

    A checkpoint may be older than a field of today. Then its run had the default, which is no change.
    """
    today = as_json(Config(sources={"any": Source("")}))
    sources = {name: filled(source, today["sources"]["any"]) for name, source in before.get("sources", {}).items()}
    before = filled(before, today) | {
        "model": filled(before.get("model", {}), today["model"]), "sources": sources,
        "dtype": LONG_SPELLINGS.get(before.get("dtype"), before.get("dtype"))}
    return [f"{name} {before[name]} -> {value}" for name, value in as_json(config).items()
            if name not in ("resume", "overwrite", "max_minutes") and before[name] != value]


# ---------------------------------------------------------------------------------------------------------------
# What a run leaves behind


def duration(seconds: float) -> str:
    """A length of time, for people to read."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def is_figure(value: Any) -> bool:
    """Whether it is a number that a run logs; the loss may be NaN."""
    return isinstance(value, float) or is_number(value)


METRICS = {"step": is_count, "train_loss?": is_figure, "learning_rate?": is_figure, "tokens?": is_count,
           "val_loss?": is_figure, "val_perplexity?": is_figure, "val_bits_per_byte?": is_figure}


def read_metrics(path: Path, last_step: int) -> list[dict]:
    """The lines of metrics.jsonl up to a step.

    The last line may be half-written, if the run was killed. Raises BadInput if another is damaged.
    """
    whole, metrics = path.read_bytes().split(b"\n")[:-1] if path.exists() else [], []
    for place, line in enumerate(whole, 1):
        try:
            metrics.append(parse_json(line, METRICS))
        except ValueError as error:
            raise BadInput(f"{path}, line {place}, is damaged: {error}; delete that line") from error
    return [m for m in metrics if m["step"] <= last_step]


def make_ready(config: Config, last_step: int) -> list[dict]:
    """Prepare the run's directory to go on after a step. Returns the lines of metrics.jsonl up to that step."""
    config.out_dir.mkdir(parents=True, exist_ok=True)
    stale = list(config.out_dir.glob(".*.tmp"))  # left over if a run was killed while saving
    if last_step == 0:
        stale += [config.out_dir / name for name in ("latest", "best", "benchmarks")]
        stale += config.out_dir.glob("step_*")
    for path in stale:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    metrics_path = config.out_dir / "metrics.jsonl"
    metrics = read_metrics(metrics_path, last_step)
    checkpoint.replace(metrics_path, "".join(json.dumps(m) + "\n" for m in metrics).encode())
    checkpoint.replace(config.out_dir / "config.json", json.dumps(as_json(config), indent=2).encode())
    return metrics


def open_tracker(config: Config) -> Any:
    """A run of wandb or trackio; both have the calls that we need. Raises BadInput if it cannot be opened."""
    try:
        library = importlib.import_module(config.tracker)
        return library.init(project="nanostentor", name=config.name, config=as_json(config), resume="allow")
    except ImportError as error:
        raise BadInput(f"--tracker {config.tracker} needs {error.name}: pip install {config.tracker}") from error
    except Exception as error:  # no account, no network: the library says it best
        raise BadInput(f"--tracker {config.tracker}: {brief(error)}") from error


class Journal:
    """Logs a run to metrics.jsonl, and to a tracker if the config names one."""

    def __init__(self, config: Config, last_step: int):
        """Go on after a step. Raises BadInput if the tracker cannot be opened."""
        self.config = config
        self.tracker = open_tracker(config) if config.tracker != "none" else None
        self.metrics = make_ready(config, last_step)

    def log(self, entry: dict):
        """Add an entry. It must have a "step"."""
        self.metrics.append(entry)
        with (self.config.out_dir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")
        try:
            if self.tracker:
                self.tracker.log(entry, step=entry["step"])
        except Exception as error:  # its server or network failed: no reason to end a run
            print(f"--tracker {self.config.tracker} has failed, and is left out from here on: {error}", flush=True)
            self.tracker = None

    def close(self):
        """Draw the curves, and finish the tracker's run."""
        draw_curves(self.metrics, self.config.out_dir / "curves.png")
        if self.tracker:
            self.tracker.finish()


def draw_curves(metrics: list[dict], path: Path):
    """Training loss, held-out loss and perplexity over steps, as on the Stentor cards."""
    from matplotlib.figure import Figure  # imported here because it takes half a second

    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, perplexities = figure.subplots(1, 2)
    train = [m for m in metrics if "train_loss" in m]
    val = [m for m in metrics if "val_loss" in m and "val_perplexity" in m]
    losses.plot([m["step"] for m in train], [m["train_loss"] for m in train], label="training", color="C0", alpha=0.5)
    losses.plot([m["step"] for m in val], [m["val_loss"] for m in val], label="held out", color="C1", marker=".")
    losses.set(title="Loss", xlabel="step", ylabel="nats per token")
    losses.legend()
    perplexities.plot([m["step"] for m in val], [m["val_perplexity"] for m in val], color="C1", marker=".")
    perplexities.set(title="Held-out perplexity", xlabel="step", yscale="log")
    for axes in (losses, perplexities):
        axes.grid(alpha=0.3)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    checkpoint.replace(path, image.getvalue())


# ---------------------------------------------------------------------------------------------------------------
# Runs side by side


# What the config.json of a run must say.
LOGGED = checkpoint.CONFIG | {"block_size": is_positive, "tokens_per_step": is_positive}


def read_run(run: Path) -> dict:
    """A run's parameters, and its evaluations over tokens and FLOPs. Raises BadInput if it has none."""
    try:
        config = parse_json((run / "config.json").read_bytes(), LOGGED)
        with torch.device("meta"):  # shapes without numbers
            model = Llama(ModelConfig(**config["model"]))
        flops = model.flops_per_token(config["block_size"])
        metrics = read_metrics(run / "metrics.jsonl", sys.maxsize)
        evaluations = [entry for entry in metrics if "val_bits_per_byte" in entry]
        tokens = [entry["step"] * config["tokens_per_step"] for entry in evaluations]
    except FileNotFoundError as error:
        raise BadInput(f"{run} is no run of train.py: there is no {error.filename}") from None
    except BadInput:
        raise
    except (ValueError, TypeError) as error:
        raise BadInput(f"{run / 'config.json'} is damaged: {brief(error)}") from error
    if not evaluations:
        raise BadInput(f"{run} has not been evaluated yet: its metrics.jsonl has no held-out loss")
    return {"name": run.name, "parameters": model.num_parameters(), "tokens": tokens,
            "flops": [count * flops for count in tokens],
            "bits_per_byte": [entry["val_bits_per_byte"] for entry in evaluations]}


def draw_runs(runs: list[dict], path: Path):
    """Draw bits per byte over tokens and over FLOPs, of runs as `read_run` gives them."""
    from matplotlib.figure import Figure  # imported here because it takes half a second

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, unit, label in zip(figure.subplots(1, 2, sharey=True), ("tokens", "flops"), ("tokens", "FLOPs")):
        for run in runs:
            axes.plot(run[unit], run["bits_per_byte"], marker=".", label=run["name"])
        axes.set(xlabel=label, xscale="log", ylabel="held-out bits per byte")
        axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=110)
