"""Checkpoints that are whole or not there.

    out/NAME/step_00001000/   model.safetensors  optimizer.safetensors  state.json
    out/NAME/latest, best     text files that name a step directory

A step directory is written under a temporary name, flushed to the disk (fsync) and then renamed. If the process is
killed at any moment, or the disk fills up, the earlier checkpoints stay, and no half-written one looks like a whole
one. The weights have Hugging Face's parameter names. Nothing is pickled.
"""

import contextlib
import dataclasses
import glob
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

import tokenizer
from backend import Backend
from cli import BadInput, brief, is_count, is_number, is_positive, parse_json
from decoding.narrow import DTYPES, columns, dequantize
from model import Llama, ModelConfig
from tokenizer import Tokenizer

VOCABULARY = "vocabulary"  # the tensor of a bundle that is the vocabulary's file
FILES = ("tokenmonster.vocab", "tokenizer.json")  # what that may be called


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


def is_running(pid: int) -> bool:
    """Whether there is another process of this number."""
    if pid == os.getpid():
        return False
    if os.name == "nt":  # there os.kill would end it
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is somebody else's
        pass
    return True


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
    for path in above.glob(f".{glob.escape(target.name)}.*.partial"):  # what exports that were killed have left
        pid = path.name.split(".")[-2]
        if path.is_dir() and pid.isdecimal() and not is_running(int(pid)):
            shutil.rmtree(path, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if target.is_dir():
            target.rmdir()
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def alone(folder: Path, otherwise: str) -> Iterator[None]:
    """Hold a folder's lock. The folder is made if it is missing, and removed again if it is still empty at the end.

    If another process holds the lock for longer than the workers of a killed run need to notice
    (`workers.follow_parent`: they are forked, so they share its lock), raises BadInput: "another `otherwise`".
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    descriptor, deadline = None, time.monotonic() + 5
    try:
        while descriptor is None:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = lock(folder)
            if descriptor is None and time.monotonic() > deadline:
                raise BadInput(f"another {otherwise}")
            time.sleep(0.1 if descriptor is None else 0)
        yield
    finally:
        if descriptor is not None:
            unlock(descriptor)
        with contextlib.suppress(OSError):  # not empty, or another process has it now
            for path in missing:
                path.rmdir()


def lock(folder: Path) -> int | None:
    """Lock a folder: a number to unlock it with, or None if another process has it. It ends with this process."""
    if os.name == "nt":  # Windows has no flock
        return -1
    import fcntl
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.isdir(folder) and os.path.samestat(os.fstat(descriptor), os.stat(folder)):
            return descriptor
    except BlockingIOError:
        pass
    except OSError:  # some network drives have no locks
        return descriptor
    os.close(descriptor)  # somebody else has it, or has just removed the folder
    return None


def unlock(descriptor: int):
    """Undo `lock`."""
    if os.name == "nt":
        return
    import fcntl
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # if we only closed it, workers on their way out would keep it
    os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints


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
    name = pointer.read_text(errors="replace").strip()[:100]
    if not name.isprintable() or not (path / name / "state.json").is_file():
        raise BadInput(f"{pointer} names {name!r}, which is not there; choose another step of {path}")
    return path / name


def run_dir(step_dir: Path) -> Path:
    """The run that a step directory belongs to. One that stands alone, such as an export, is its own run."""
    return step_dir.parent if (step_dir.parent / "latest").is_file() else step_dir


def newest_run(out: Path = Path("out")) -> Path:
    """The run under out/ that was saved last. Raises BadInput if there is none."""
    pointers = sorted(out.glob("*/latest"), key=lambda pointer: pointer.stat().st_mtime)
    if not pointers:
        raise BadInput(f"there is no trained model under {out}/; make one with prepare.py and then train.py")
    return pointers[-1].parent


CONFIG = {  # of a saved Config, what is read again
    "model": dict, "name?": str, "data_dir?": str, "tokenizer?": str, "int8_linears?": list, "dtype?": str,
    "tokens_per_step?": is_positive, "block_size?": is_positive, "max_steps?": is_positive,
    "anneal_fraction?": is_number,
    "sources?": {str: {"dataset": str, "ratio": is_number, "anneal_ratio": is_number, "data_files": list}}}
STATE = {"step": is_count, "seconds?": is_number, "best_loss?": is_number, "val_loss?": is_number,
         "bits_per_byte?": is_number, "config?": CONFIG, "train_tokens?": {str: is_positive}, "commits?": {str: str},
         "scaler?": dict, "imported_from?": str, "rounded_to?": DTYPES.__contains__}


def read_state(step_dir: Path) -> dict:
    """What was saved beside the weights. Raises BadInput if the file is damaged."""
    path = step_dir / "state.json"
    try:
        return parse_json(path.read_bytes(), STATE)
    except ValueError as error:
        raise BadInput(f"{path} is damaged, or does not describe a model: {error}") from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file. Raises BadInput if it is missing or damaged."""
    try:
        return load_file(path)
    except (SafetensorError, FileNotFoundError) as error:
        raise BadInput(f"{path} is missing or damaged: {brief(error)}") from error


def read_weights(step_dir: Path, shapes: dict[str, tuple]) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint for parameters of these shapes, by name. Raises BadInput if their file is missing or
    damaged."""
    path = step_dir / "model.safetensors"
    try:
        return dequantize(read_tensors(path), shapes)
    except RuntimeError as error:  # scales that do not fit
        raise BadInput(f"{path} is damaged: {brief(error)}") from error


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
    """The shape of each tensor."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def compare(ours: dict[str, tuple], theirs: dict[str, tuple], where: str, hint: str):
    """Raise BadInput, "`where`: ...; `hint`", unless two sets of tensors have the same names and shapes."""
    for name in sorted(ours.keys() | theirs.keys()):
        here, there = ours.get(name, "absent"), theirs.get(name, "absent")
        if here != there:
            raise BadInput(f"{where}: {name[:100]} is {there} there and {here} here; {hint}")


@torch.no_grad()
def fill(model: Llama, weights: dict[str, torch.Tensor], where: str, hint: str):
    """Copy each tensor into the parameter of its name. Every parameter is filled, and no tensor is left over.

    If names or shapes differ, raises BadInput, "`where`: ...; `hint`", and leaves the model as it was.
    """
    parameters = dict(model.named_parameters())
    compare(shapes(parameters), shapes(weights), where, hint)
    for name, p in parameters.items():
        p.copy_(weights[name])


def fill_moments(optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter], path: Path):
    """Give AdamW the moments of a file. Raises BadInput unless it has just those of every parameter."""
    tensors, names = read_tensors(path), {id(p): name for name, p in parameters.items()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    kinds = ("step", "exp_avg", "exp_avg_sq")
    wanted = {f"{kind}.{name}": () if kind == "step" else tuple(parameters[name].shape)
              for name in order for kind in kinds}
    compare(wanted, shapes(tensors), f"{path} does not belong to the model.safetensors beside it",
            "resume from another step, or start a new run with these weights (--init_from)")
    state = {i: {kind: tensors[f"{kind}.{name}"] for kind in kinds} for i, name in enumerate(order)}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def load(step_dir: Path, model: Llama, optimizer: torch.optim.Optimizer | None = None) -> dict:
    """Load a checkpoint into the model, and into the optimizer if given. Returns the saved state.

    Every parameter is filled, and no tensor is left over. Raises BadInput if the checkpoint is damaged or holds a model
    of another shape.
    """
    state = read_state(step_dir)
    weights = read_weights(step_dir, model.config.shapes())
    fill(model, weights, f"{step_dir} holds another model", "use the config that it was trained with")
    if optimizer is not None:
        fill_moments(optimizer, dict(model.named_parameters()), step_dir / "optimizer.safetensors")
    return state


def read_shape(step_dir: Path, state: dict) -> ModelConfig:
    """The shape of a checkpoint's model, from its state. Raises BadInput if the state does not describe a model."""
    try:
        return ModelConfig(**state["config"]["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{step_dir / 'state.json'} does not describe a model: {error!r}") from error


def check_shape(step_dir: Path, shape: ModelConfig):
    """Raise BadInput unless the weights of a checkpoint have this shape.

    It reads only the header of their file, so a damaged state.json cannot ask for more memory than there is.
    """
    path = step_dir / "model.safetensors"
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys() if not name.endswith(".weight_scale")}
            theirs = {name: tuple(part.get_shape()) for name, part in slices.items()}
            nibbles = {name for name, part in slices.items() if part.get_dtype() == "U8"}  # INT4
    except (SafetensorError, FileNotFoundError) as error:
        raise BadInput(f"{path} is missing or damaged: {brief(error)}") from error
    ours = shape.shapes()
    theirs |= {name: columns(theirs[name], ours[name]) for name in nibbles & ours.keys()}
    compare(ours, theirs, f"{step_dir} holds another model than its state.json says", "one of the two is damaged")


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
    delimiters = {key: state[key] for key in ("eos_token", "bos_token") if isinstance(state.get(key), str)}
    vocabulary = tokenizer.load(near[0] if near else name, state["config"].get("tokenizer_segmentation", "exact"),
                                **delimiters, beside=False)
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
    if path is not None and path.suffix == ".safetensors":
        return open_bundle(path, device)
    step_dir = find(path or newest_run(), which)
    shape = read_shape(step_dir, read_state(step_dir))
    check_shape(step_dir, shape)
    model = Llama(shape)
    state = load(step_dir, model)
    vocabulary = load_tokenizer(step_dir, state)
    vocabulary.within(shape.vocab_size)
    if device is not None:
        model.to(device.device).run_with(device.attention())
    return Trained(step_dir, model, vocabulary, state)


def open_bundle(path: Path, device: Backend | None) -> Trained:
    """Open a bundle (formats/packed.py): one file with the weights, state.json and the vocabulary. As open_trained."""
    tensors = read_tensors(path)
    try:
        with safe_open(path, "pt") as file:
            state = parse_json(file.metadata()["state"].encode(), {"config": {"tokenizer": FILES.__contains__}})
        vocabulary, name = tensors.pop(VOCABULARY).numpy().tobytes(), state["config"]["tokenizer"]
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{path} is no bundle of export.py --format bundle: {brief(error)}") from error
    with tempfile.TemporaryDirectory() as folder:
        for file, data in (("model.safetensors", to_bytes(tensors)), (name, vocabulary),
                           ("state.json", json.dumps(state).encode())):
            (Path(folder) / file).write_bytes(data)
        trained = open_trained(Path(folder), "latest", device)
    return dataclasses.replace(trained, step_dir=path)
