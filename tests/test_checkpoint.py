"""A checkpoint comes back bit for bit, and whatever interrupts a save, a run still holds a whole one."""
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import backend
import checkpoint
import tokenizer
from cli import BadInput
from model import Llama, ModelConfig

REPOSITORY = Path(checkpoint.__file__).parent


def shape(**changes):
    return ModelConfig(**dict(vocab_size=50, hidden_size=8, intermediate_size=12, num_attention_heads=2,
                              num_hidden_layers=2, max_position_embeddings=16) | changes)


def trained(steps=2, **changes):
    """A tiny model and its AdamW after some real steps."""
    model = Llama(shape(**changes))
    optimizer = torch.optim.AdamW(model.parameter_groups(0.1), lr=1e-2, betas=(0.9, 0.95), fused=True)
    for _ in range(steps):
        train(model, optimizer, torch.randint(50, (2, 9)))
    return model, optimizer


def train(model, optimizer, ids):
    model(ids[:, :-1], ids[:, 1:])[1].backward()
    optimizer.step()
    optimizer.zero_grad()


def save(run, model, optimizer, step=1, best=False, keep=9, **more):
    state = {"step": step, "config": {"model": asdict(model.config)}} | more
    return checkpoint.save(run, model, optimizer, state, best, keep)


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def moments(optimizer):
    return {(number, kind): value for number, values in optimizer.state_dict()["state"].items()
            for kind, value in values.items()}


def refused(action, *words):
    with pytest.raises(BadInput) as refusal:
        action()
    assert "\n" not in str(refusal.value) and all(word in str(refusal.value) for word in words)


# -----------------------------------------------------------------------------
# there and back

@pytest.mark.parametrize("tied", [True, False])
def test_round_trip(rng, tmp_path, tied):
    """Model, moments and state come back bit for bit, and the next step is the one it would have been."""
    model, optimizer = trained(rng.randint(1, 4), tie_word_embeddings=tied)
    state = {"step": 3, "loss": rng.random(), "best_loss": float("inf"), "note": "\u00fc"}
    step_dir = checkpoint.save(tmp_path / "run", model, optimizer, state, False, 1)
    other, its_optimizer = trained(1, tie_word_embeddings=tied)
    assert checkpoint.load(step_dir, other, its_optimizer) == state
    assert same(other.state_dict(), model.state_dict())
    assert same(moments(its_optimizer), moments(optimizer)) and len(moments(optimizer)) > 30
    assert (other.lm_head.weight is other.model.embed_tokens.weight) == tied
    ids = torch.randint(50, (2, 9))
    train(model, optimizer, ids)
    train(other, its_optimizer, ids)
    assert same(other.state_dict(), model.state_dict()) and same(moments(its_optimizer), moments(optimizer))


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_transformers_own(rng, tmp_path, tied):
    """The file holds transformers' names, a tied head once, and says "pt": transformers can read it."""
    from transformers import LlamaConfig, LlamaForCausalLM  # not above: the process that crashes needs none
    model, optimizer = trained(tie_word_embeddings=tied)
    weights_file = save(tmp_path, model, optimizer) / "model.safetensors"
    c = model.config
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads, tie_word_embeddings=tied, bos_token_id=None,
        eos_token_id=None))
    assert load_file(weights_file).keys() == dict(theirs.named_parameters()).keys()
    with safe_open(weights_file, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    theirs.load_state_dict(load_file(weights_file), strict=not tied)
    assert same(theirs.state_dict(), model.state_dict())


def named(vocabulary, model):
    """What state.json holds of a run with this vocabulary."""
    return {"config": {"model": asdict(model.config), "tokenizer": "quickstart-2048"},
            "tokenizer_sha256": vocabulary.sha256}


def test_open_trained(rng, tmp_path):
    """The model is built from the shape in state.json, and the tokenizer is the one that is named there."""
    model, optimizer = trained(hidden_size=12, head_dim=4, num_hidden_layers=3, fp32_blocks=(1,),
                               rope_theta=77.0, tie_word_embeddings=True)
    vocabulary = tokenizer.load("quickstart-2048")
    step_dir = save(tmp_path, model, optimizer, step=7, **named(vocabulary, model))
    opened = checkpoint.open_trained(step_dir)
    assert opened.state["step"] == 7 and opened.model.config == model.config and opened.step_dir == step_dir
    ids = torch.randint(50, (1, 16))
    assert torch.equal(opened.model(ids)[0], model(ids)[0])
    assert opened.vocabulary.sha256 == vocabulary.sha256 and opened.vocabulary.decode([300]) == vocabulary.decode([300])
    save(tmp_path, model, optimizer, step=8, **named(vocabulary, model) | {"tokenizer_sha256": "0"})
    refused(lambda: checkpoint.open_trained(tmp_path), "another vocabulary than the quickstart-2048")


def test_which_one_is_opened(rng, tmp_path, monkeypatch):
    """A run's best checkpoint or its latest, and without a path the newest run; with the attention of a device."""
    monkeypatch.chdir(tmp_path)
    refused(lambda: checkpoint.open_trained(), "train.py")
    model, optimizer = trained()
    more = named(tokenizer.load("quickstart-2048"), model)
    for run, times in (("a", 1e9), ("b", 9e9)):
        save(tmp_path / "out" / run, model, optimizer, 3, best=True, **more)
        save(tmp_path / "out" / run, model, optimizer, 4, **more)
        os.utime(tmp_path / "out" / run / "latest", (times, times))
    assert checkpoint.open_trained().step_dir == Path("out/b/step_00000003")
    assert checkpoint.open_trained(tmp_path / "out/a").state["step"] == 3
    assert checkpoint.open_trained(tmp_path / "out/a", "latest").state["step"] == 4
    device, ids = backend.pick("cpu", "fp32"), torch.randint(50, (1, 16))
    opened = checkpoint.open_trained(tmp_path / "out/a", device=device).model
    assert all(block.self_attn.attend is device.attention() for block in opened.model.layers)
    assert torch.equal(opened(ids)[0], model(ids)[0])


# -----------------------------------------------------------------------------
# finding and pruning

def test_find(rng, tmp_path):
    """A run's directory means its latest or best checkpoint, best meaning latest before there is one."""
    model, optimizer = trained()
    refused(lambda: checkpoint.find(tmp_path), "no checkpoint")
    refused(lambda: checkpoint.find(tmp_path / "nothing"), "no checkpoint")
    first = save(tmp_path, model, optimizer, 1)
    assert checkpoint.find(tmp_path) == checkpoint.find(tmp_path, "best") == checkpoint.find(first) == first
    best = save(tmp_path, model, optimizer, 20, best=True)
    latest = save(tmp_path, model, optimizer, 100)
    assert checkpoint.find(tmp_path) == latest and checkpoint.find(tmp_path, "best") == best
    assert checkpoint.find(first, "best") == first
    shutil.rmtree(latest)
    refused(lambda: checkpoint.find(tmp_path), latest.name)


def test_newest_run(rng, tmp_path):
    """The newest run is the one that saved last, whatever its name and its steps."""
    refused(lambda: checkpoint.newest_run(tmp_path), "train.py")
    model, optimizer = trained()
    for name, steps in (("b", 500), ("c", 3), ("a", 4)):
        save(tmp_path / name, model, optimizer, steps)
    os.utime(tmp_path / "c" / "latest", (9e9, 9e9))
    assert checkpoint.newest_run(tmp_path) == tmp_path / "c"


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_pruning(rng, tmp_path, keep):
    """The newest `keep` checkpoints stay, and the best, and no other."""
    model, optimizer = trained()
    steps = sorted(rng.sample(range(1, 10**6), 8))
    best = None
    for number, step in enumerate(steps):
        best = step if rng.random() < 0.3 else best
        save(tmp_path, model, optimizer, step, best == step, keep)
        kept = set(steps[:number + 1][-keep:]) | ({best} if best else set())
        assert sorted(path.name for path in tmp_path.glob("step_*")) == sorted(f"step_{s:08}" for s in kept)
        assert not list(tmp_path.glob(".*"))


# -----------------------------------------------------------------------------
# what is not a checkpoint, or not this model's

@pytest.mark.parametrize("changes, named", [
    ({"hidden_size": 16}, "lm_head.weight is (50, 8) there and (50, 16) here"),
    ({"vocab_size": 51}, "lm_head.weight"),
    ({"num_hidden_layers": 3}, "layers.2."), ({"num_hidden_layers": 1, "fp32_blocks": ()}, "layers.1."),
    ({"tie_word_embeddings": True}, "lm_head.weight"), ({"intermediate_size": 8}, "mlp"),
])
def test_another_shape(rng, tmp_path, changes, named):
    """A checkpoint of another shape is refused, with a parameter's name, and the model is left as it was."""
    model, optimizer = trained()
    step_dir = save(tmp_path, model, optimizer)
    other, its_optimizer = trained(**{"num_key_value_heads": 2} | changes)
    before = {name: p.clone() for name, p in other.state_dict().items()}
    refused(lambda: checkpoint.load(step_dir, other, its_optimizer), named, "another model")
    assert same(before, other.state_dict())


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_damaged(rng, tmp_path, name):
    """A file that is missing, cut anywhere or overwritten is refused by its name."""
    model, optimizer = trained()
    step_dir = save(tmp_path, model, optimizer)
    file, whole = step_dir / name, (step_dir / name).read_bytes()
    for damaged in [b"", b"\0" * len(whole), b"\xff" * len(whole), whole[1:],
                    *(whole[:rng.randrange(len(whole))] for _ in range(20)), whole[:-1]]:
        file.write_bytes(damaged)
        refused(lambda: checkpoint.load(step_dir, model, optimizer), name)
    file.unlink()
    if name == "state.json":
        refused(lambda: checkpoint.find(step_dir))
    else:
        refused(lambda: checkpoint.load(step_dir, model, optimizer), name)


@pytest.mark.parametrize("state", [[], {}, {"config": 1}, {"config": {"model": {"width": 3}}},
                                   {"config": {"model": {"vocab_size": "many"}}},
                                   {"config": {"model": {"head_dim": 3}}}])
def test_state_that_describes_no_model(rng, tmp_path, state):
    """open_trained refuses a state.json from which no model can be built."""
    step_dir = save(tmp_path, *trained())
    (step_dir / "state.json").write_text(json.dumps(state))
    refused(lambda: checkpoint.open_trained(step_dir), "does not describe a model")


def test_moments_of_another_model(rng, tmp_path):
    """Every moment is filled and none is left over, or the checkpoint is refused."""
    step_dir = save(tmp_path, *trained())
    smaller = save(tmp_path / "smaller", *trained(num_hidden_layers=1, fp32_blocks=()))
    shutil.copy(smaller / "optimizer.safetensors", step_dir)
    refused(lambda: checkpoint.load(step_dir, *trained()), "optimizer.safetensors")


@pytest.mark.parametrize("change", [
    lambda tensors, name: tensors.clear(), lambda tensors, name: tensors.pop(name),
    lambda tensors, name: tensors.update({name: torch.zeros(1)}),
    lambda tensors, name: tensors.update({name: tensors[name].double().flatten()[:1].expand(3, 2).contiguous()}),
    lambda tensors, name: tensors.update(nothing=torch.zeros(2)),
    lambda tensors, name: tensors.update({"exp_avg.nothing": torch.zeros(2)}),
    lambda tensors, name: tensors.update({f"max_{name}": tensors.pop(name)})])
def test_exactly_the_moments_of_the_model(rng, tmp_path, change):
    """A file without tensors, or with one too many, too few or of another shape, does not resume."""
    step_dir = save(tmp_path, *trained())
    tensors = load_file(step_dir / "optimizer.safetensors")
    change(tensors, rng.choice([name for name in tensors if name.startswith("exp_avg")]))
    save_file(tensors, step_dir / "optimizer.safetensors")
    refused(lambda: checkpoint.load(step_dir, *trained()), "optimizer.safetensors", "--init_from")
    assert checkpoint.load(step_dir, trained()[0])["step"] == 1  # its weights are good


@pytest.mark.parametrize("changes", [
    {"num_hidden_layers": 10**9}, {"num_hidden_layers": 999}, {"hidden_size": 2**17}, {"vocab_size": 2**22},
    {"intermediate_size": 2**20}, {"max_position_embeddings": 10**12}, {"hidden_size": 8.0}, {"vocab_size": "5" * 9999},
    {"num_attention_heads": True}, {"head_dim": 10**9}, {"rope_theta": float("nan")}, {"fp32_blocks": 3},
    {"initializer_range": 10**400}, {"rope_theta": 10**40}])
def test_a_state_that_asks_for_more_than_there_is(rng, tmp_path, changes):
    """A shape that the weights have not is refused by their header, before a model of it is made."""
    step_dir = save(tmp_path, *trained())
    state = json.loads((step_dir / "state.json").read_text())
    state["config"]["model"] |= changes
    (step_dir / "state.json").write_text(json.dumps(state))
    with pytest.raises(BadInput) as refusal:
        checkpoint.open_trained(step_dir)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 500


@pytest.mark.parametrize("text", [b"null", b'{"step": -1}', b'{"step": 1, "seconds": "long"}', b"[" * 100_000, b"\xff",
                                  b'{"step": 1, "config": {"model": {}, "sources": {"a": {}}}}',
                                  b'{"step": 1, "bits_per_byte": null}', b'{"step": 1, "train_tokens": {"a": 1.5}}',
                                  b'{"step": 1, "rounded_to": "int3"}'])
def test_damaged_state(rng, tmp_path, text):
    step_dir = save(tmp_path, *trained())
    (step_dir / "state.json").write_bytes(text)
    refused(lambda: checkpoint.read_state(step_dir), "state.json", "damaged")


# -----------------------------------------------------------------------------
# the lock

HOLD = """
import sys, time
from pathlib import Path
sys.path.insert(0, ".")
import checkpoint
with checkpoint.alone(Path(sys.argv[1]), "run"):
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no flock")
def test_one_process_at_a_time(tmp_path):
    """Another process is refused, and told by whom; once the first is killed, the folder is free."""
    folder = tmp_path / "out" / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, folder], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"

    def hold():
        with checkpoint.alone(folder, "train.py is at work"):
            pass

    refused(hold, "another train.py is at work")
    assert folder.is_dir()  # it is the other's
    holder.kill()
    holder.communicate()
    hold()


def test_a_lock_leaves_nothing(tmp_path):
    """What it has made and nobody has filled is removed again, and nothing else, whatever happens in between."""
    for kept, error in (("", None), ("", ValueError), ("a/b/file", None), ("a/file", ValueError)):
        (tmp_path / "kept").mkdir(exist_ok=True)
        try:
            with checkpoint.alone(tmp_path / "kept" / "a" / "b", "run"):
                if kept:
                    (tmp_path / "kept" / kept).touch()
                if error:
                    raise error
        except ValueError:
            assert error
        assert (tmp_path / "kept" / "a" / "b").exists() == kept.startswith("a/b") and (tmp_path / "kept").exists()
        assert (tmp_path / "kept" / "a").exists() == bool(kept)
        shutil.rmtree(tmp_path / "kept")


# -----------------------------------------------------------------------------
# a save that is interrupted

def whole(step_dir):
    """The step of a checkpoint that loads with its optimizer."""
    model = Llama(checkpoint.read_shape(step_dir, checkpoint.read_state(step_dir)))
    return checkpoint.load(step_dir, model, torch.optim.AdamW(model.parameter_groups(0.1)))["step"]


def test_on_disk_before_it_has_its_name(rng, tmp_path, monkeypatch):
    """What is renamed is on the disk (fsync) before, whole, and its new name is before the next rename."""
    synced, renamed, real = set(), [], {name: getattr(os, name) for name in ("fsync", "rename", "replace")}

    def fsync(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        real["fsync"](descriptor)

    def rename(name):
        def checked(source, target):
            folder = Path(target).parent.stat().st_ino
            for path in (Path(source), *Path(source).rglob("*")):
                assert path.stat().st_ino in synced, f"{path} may not be on the disk yet"
            assert folder in synced or not renamed, f"the name {renamed[-1]} may not be on the disk yet"
            synced.discard(folder)
            renamed.append(Path(target))
            real[name](source, target)
        return checked

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename("rename"))
    monkeypatch.setattr(os, "replace", rename("replace"))
    save(tmp_path, *trained(), step=4, best=True)
    assert [path.name for path in renamed] == ["step_00000004", "latest", "best"]
    assert tmp_path.stat().st_ino in synced


CRASHES = """
import contextlib, os, shutil, sys
from pathlib import Path
sys.path[:0] = ["tests", "."]
from test_checkpoint import save, trained
root, before, scandir = Path(sys.argv[1]), Path(sys.argv[2]), os.scandir
by_name = lambda entry: entry.name
os.scandir = lambda path: contextlib.nullcontext(sorted(scandir(path), key=by_name))  # as NTFS lists files
model, optimizer = trained()
number, code = 0, 1
while code and number < 99:  # once more with the crash one operation later, until the save comes through
    number += 1
    shutil.copytree(before, root / str(number))
    if not (child := os.fork()):
        left = number
        def count(event, arguments):
            global left
            left -= event == "open" or event.startswith(("os.", "shutil."))
            if left <= 0:
                os._exit(1)
        sys.addaudithook(count)
        save(root / str(number), model, optimizer, 4, True, 1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""


@pytest.fixture(scope="module")
def crashes(tmp_path_factory):
    """Copies of a run in which the save of step 4 was killed at its first file operation, its second, ..."""
    if not hasattr(os, "fork"):
        pytest.skip("forks a process for every crash")
    before, root = tmp_path_factory.mktemp("before"), tmp_path_factory.mktemp("crashes")
    model, optimizer = trained()
    for step, best in ((1, True), (2, False), (3, False)):
        save(before, model, optimizer, step, best, keep=2)
    (before / ".step_00000004.tmp").mkdir()  # a save of step 4 was killed before, early
    shutil.copytree(before / "step_00000003", before / "step_00000004")  # and another, after its rename
    subprocess.run([sys.executable, "-c", CRASHES, root, before], cwd=REPOSITORY, check=True, timeout=60)
    return sorted(root.iterdir(), key=lambda run: int(run.name))


def test_killed_at_any_moment(crashes):
    """Killed at any file operation, a save leaves a run whose latest and best are whole, new or old."""
    found = [(whole(checkpoint.find(run)), whole(checkpoint.find(run, "best"))) for run in crashes]
    assert len(found) > 25 and found[0] == (3, 1) and found[-1] == (4, 4)
    assert found == sorted(found) and set(found) <= {(3, 1), (4, 1), (4, 4)}, found


def test_killed_and_nothing_looks_like_a_checkpoint_and_is_not(crashes):
    """Every step directory that `find` takes for a checkpoint, given its path, is one."""
    for run in crashes:
        for state in run.glob("step_*/state.json"):
            whole(checkpoint.find(state.parent))


def test_killed_and_saved_again(crashes, tmp_path):
    """After any crash the next save works and prunes what the crash left, but for what begins with a dot."""
    model, optimizer = trained()
    for run in crashes:
        shutil.copytree(run, tmp_path / run.name)
        save(tmp_path / run.name, model, optimizer, 4, True, 1)
        found = [whole(checkpoint.find(tmp_path / run.name, which)) for which in ("latest", "best")]
        left = sorted(path.name for path in (tmp_path / run.name).glob("[!.]*"))  # train.py clears the others
        assert found == [4, 4] and left == ["best", "latest", "step_00000004"]


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files")
def test_full_disk(rng, tmp_path):
    """Where a file cannot be written, save raises OSError, leaves nothing, and the last checkpoint stands."""
    import resource
    model, optimizer = trained()
    first = save(tmp_path, model, optimizer, 1, best=True)
    sizes = sorted(path.stat().st_size for path in first.iterdir())[1:]  # of the weights and of the moments
    limits = [0, *(size - rng.randint(1, 1000) for size in sizes), sizes[1] + 1000]  # the last: state.json
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in limits:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(OSError):
                save(tmp_path, model, optimizer, 2, best=True, keep=1, padding="x" * 100_000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "latest", "step_00000001"]
        assert whole(checkpoint.find(tmp_path)) == whole(checkpoint.find(tmp_path, "best")) == 1
    save(tmp_path, model, optimizer, 2, padding="x" * 100_000)


def test_a_pointer_that_is_no_text(rng, tmp_path):
    """A `latest` that a broken disk has filled with anything is said to name nothing that is there."""
    (tmp_path / "latest").write_bytes(b"\xff\x00" + rng.randbytes(20))
    with pytest.raises(BadInput, match="choose another step"):
        checkpoint.find(tmp_path)


def test_a_pointer_that_cannot_be_replaced(rng, tmp_path):
    """A directory where a pointer's partial file should go stops a save; the run stays whole."""
    model, optimizer = trained()
    save(tmp_path, model, optimizer, 1)
    (tmp_path / ".latest.tmp").mkdir()
    with pytest.raises(OSError):
        save(tmp_path, model, optimizer, 2)
    assert whole(checkpoint.find(tmp_path)) == 1
