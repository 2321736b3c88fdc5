"""Checkpoints that are whole or not there.

    out/NAME/step_00001000/   model.safetensors  optimizer.safetensors  state.json
    out/NAME/latest, best     text files that name a step directory

A step directory is written under a temporary name, flushed to the disk (fsync) and then renamed. If the process is
killed at any moment, or the disk fills up, the earlier checkpoints stay, and no half-written one looks like a whole
one. The weights have Hugging Face's parameter names. Nothing is pickled.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

import tokenizer
from backend import Backend
from cli import BadInput
from model import Llama, ModelConfig
from quant_t4 import dequantize
from tokenizer import Tokenizer


def write(path: Path, data: bytes):
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path):
    """Wait until a directory's entries (new names, renames) are on the disk."""
    if os.name == "nt":  # Windows keeps its own order, and cannot open a directory
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(path: Path, data: bytes):
    """Replace a file. A reader sees the old one or the new one, never a part."""
    partial = path.with_name(f".{path.name}.tmp")
    try:
        write(partial, data)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` at the end of the context. After an error nothing is left of it.

    Raises BadInput if there is already something at `out`.
    """
    if out.exists() and not out.is_dir() or out.is_dir() and any(out.iterdir()):
        raise BadInput(f"{out} is there already, and not empty; delete it or choose another --out")
    target = out.resolve()
    if target == Path.cwd() or any(parent.is_file() for parent in target.parents):
        raise BadInput(f"{out} cannot be made: you are in that directory, or part of the path is a file")
    above = next(parent for parent in target.parents if parent.is_dir())  # on the same disk, so a rename is enough
    partial = above / f".{target.name}.{os.getpid()}.partial"
    partial.mkdir()
    try:
        yield partial
        if target.is_dir():
            target.rmdir()
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove(path: Path):
    """Delete a step directory. It loses its name first, so if we are killed half-way `find` does not see the rest."""
    doomed = path.with_name(f".{path.name}.old.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def save(out_dir: Path, model: Llama, optimizer: torch.optim.Optimizer | None, state: dict, best: bool,
         keep: int) -> Path:
    """Save a checkpoint of state["step"] as the latest, and as the best if it is. Returns its directory.

    Without an optimizer you can sample from it or start a run with it, but not resume it. `state` is anything that json
    can hold. The best and the `keep` newest checkpoints are kept, the others deleted. If the disk is full, raises
    OSError and leaves nothing behind.
    """
    parameters = dict(model.named_parameters())  # a tied head appears once, as the embedding
    weights = {name: p.detach().cpu().contiguous() for name, p in parameters.items()}
    moments = {f"{key}.{name}": value.detach().cpu().contiguous()
               for name, p in parameters.items() for key, value in optimizer.state[p].items()} if optimizer else {}
    step_dir = out_dir / f"step_{state['step']:08d}"
    partial = out_dir / f".{step_dir.name}.tmp"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial / "model.safetensors", to_bytes(weights, {"format": "pt"}))
        write(partial / "optimizer.safetensors", to_bytes(moments, {"format": "pt"}))
        write(partial / "state.json", json.dumps(state, indent=2).encode())
        sync_directory(partial)
        # A directory of this step exists only if a run was killed after the rename below and before it wrote `latest`,
        # and has now reached the same step again. No pointer names it, so deleting it is safe.
        if step_dir.exists():
            remove(step_dir)
        partial.rename(step_dir)
        sync_directory(out_dir)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    replace(out_dir / "latest", step_dir.name.encode())
    if best:
        replace(out_dir / "best", step_dir.name.encode())
    kept = {(out_dir / name).read_text() for name in ("latest", "best") if (out_dir / name).exists()}
    for old in sorted(out_dir.glob("step_*"))[:-keep]:
        if old.name not in kept:
            remove(old)
    return step_dir


def find(path: Path, which: str = "latest") -> Path:
    """The step directory that a path means: the path itself, or the "latest" or "best" of a run's directory.

    A run that has not been evaluated yet has no best; then it is the latest. Raises BadInput if there is no checkpoint.
    """
    if (path / "state.json").is_file():
        return path
    pointer = path / which if (path / which).is_file() else path / "latest"
    if not pointer.is_file():
        raise BadInput(f"there is no checkpoint in {path}; train one with train.py")
    step_dir = path / pointer.read_text(errors="replace").strip()
    if not (step_dir / "state.json").is_file():
        raise BadInput(f"{pointer} names {step_dir.name}, which is not there; choose another step of {path}")
    return step_dir


def run_dir(step_dir: Path) -> Path:
    """The run that a step directory belongs to. One that stands alone, such as an export, is its own run."""
    return step_dir.parent if (step_dir.parent / "latest").is_file() else step_dir


def newest_run(out: Path = Path("out")) -> Path:
    """The run under out/ that was saved last. Raises BadInput if there is none."""
    pointers = sorted(out.glob("*/latest"), key=lambda pointer: pointer.stat().st_mtime)
    if not pointers:
        raise BadInput(f"there is no trained model under {out}/; make one with prepare.py and then train.py")
    return pointers[-1].parent


def read_state(step_dir: Path) -> dict:
    """What was saved beside the weights. Raises BadInput if the file is damaged."""
    try:
        return json.loads((step_dir / "state.json").read_text())
    except ValueError as error:
        raise BadInput(f"{step_dir / 'state.json'} is damaged: {error}") from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file. Raises BadInput if it is missing or damaged."""
    try:
        return load_file(path)
    except (SafetensorError, FileNotFoundError) as error:
        raise BadInput(f"{path} is missing or damaged: {error}") from error


@torch.no_grad()
def fill(model: Llama, weights: dict[str, torch.Tensor], where: str, hint: str):
    """Copy each tensor into the parameter of its name. Every parameter is filled, and no tensor is left over.

    If names or shapes differ, raises BadInput, "`where`: ...; `hint`", and leaves the model as it was.
    """
    parameters = dict(model.named_parameters())
    for name in sorted(parameters.keys() | weights.keys()):
        ours = tuple(parameters[name].shape) if name in parameters else "absent"
        theirs = tuple(weights[name].shape) if name in weights else "absent"
        if ours != theirs:
            raise BadInput(f"{where}: {name} is {theirs} there and {ours} here; {hint}")
    for name, p in parameters.items():
        p.copy_(weights[name])


def load(step_dir: Path, model: Llama, optimizer: torch.optim.Optimizer | None = None) -> dict:
    """Load a checkpoint into the model, and into the optimizer if given. Returns the saved state.

    Every parameter is filled, and no tensor is left over. Raises BadInput if the checkpoint is damaged or holds a model
    of another shape.
    """
    state = read_state(step_dir)
    parameters = dict(model.named_parameters())
    weights = dequantize(read_tensors(step_dir / "model.safetensors"))
    fill(model, weights, f"{step_dir} holds another model", "use the config that it was trained with")
    if optimizer is not None:
        moments = {}  # parameter name -> {"step", "exp_avg", "exp_avg_sq"}
        for key, value in read_tensors(step_dir / "optimizer.safetensors").items():
            kind, name = key.split(".", 1)  # exp_avg.model.norm.weight
            moments.setdefault(name, {})[kind] = value
        names = {id(p): name for name, p in parameters.items()}
        order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
        shapes = {name: parameters[name].shape for name in order}
        if moments and {name: kinds["exp_avg"].shape for name, kinds in moments.items()} != shapes:
            raise BadInput(f"{step_dir / 'optimizer.safetensors'} is of another model than model.safetensors beside it")
        optimizer.load_state_dict({"state": {i: moments[name] for i, name in enumerate(order) if name in moments},
                                   "param_groups": optimizer.state_dict()["param_groups"]})
    return state


def read_shape(step_dir: Path, state: dict) -> ModelConfig:
    """The shape of a checkpoint's model, from its state. Raises BadInput if the state does not describe a model."""
    try:
        return ModelConfig(**state["config"]["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{step_dir / 'state.json'} does not describe a model: {error!r}") from error


def load_tokenizer(step_dir: Path, state: dict) -> Tokenizer:
    """The tokenizer that a checkpoint was trained with.

    It is a file of that name beside the checkpoint or in its run's directory, or else what tokenizer.load finds. Raises
    BadInput if it is missing, if the state does not name it, or if it is not the same one.
    """
    try:
        name, sha256 = str(state["config"]["tokenizer"]), state["tokenizer_sha256"]
    except (KeyError, TypeError) as error:
        raise BadInput(f"{step_dir / 'state.json'} does not say which tokenizer the model has: {error!r}") from error
    near = [folder / name for folder in (step_dir, step_dir.parent) if (folder / name).is_file()]
    vocabulary = tokenizer.load(near[0] if near else name, state["config"].get("tokenizer_segmentation", "exact"))
    if vocabulary.sha256 != sha256:
        raise BadInput(f"{step_dir} was trained with another vocabulary than the {vocabulary.name} that is here")
    return vocabulary


@dataclass
class Trained:
    """An open checkpoint: its directory, the model, the model's tokenizer, and what was saved beside the weights."""

    step_dir: Path
    model: Llama
    vocabulary: Tokenizer
    state: dict


def open_trained(path: Path | None = None, which: str = "best", device: Backend | None = None) -> Trained:
    """Open a checkpoint: a run (out/NAME), one of its step directories, or the newest run if None.

    The model gets the shape that was saved with it. It goes to `device` and uses that device's attention kernel; with
    None it stays on the CPU. Raises BadInput as `find`, `load` and `load_tokenizer` do.
    """
    step_dir = find(path or newest_run(), which)
    model = Llama(read_shape(step_dir, read_state(step_dir)))
    state = load(step_dir, model)
    vocabulary = load_tokenizer(step_dir, state)
    if device is not None:
        model.to(device.device).run_with(device.attention())
    return Trained(step_dir, model, vocabulary, state)
