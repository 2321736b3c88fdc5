"""The command exports the checkpoint that is asked for, and touches nothing else; what it cannot do is refused in one
line, and leaves nothing. These tests also run with transformers 4.46 (make compat)."""
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import export
from formats import hf, packed
from tests.commands import refused
from tests.formats.exports import PORTABLE_FILES, contents, llama, names, save

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture
def command(in_tmp_path):
    """export.py in tmp_path."""
    return partial(in_tmp_path, export.main)


@pytest.fixture
def run(tmp_path):
    """A run in tmp_path."""
    return save(tmp_path / "run", llama())


def test_which_checkpoint(rng, command, tmp_path):
    """The newest run's best checkpoint is exported, or its latest, or the step that is named."""
    run = Path("out/tiny")
    best, latest = llama(), llama()
    save(tmp_path / run, best, step=7)
    state = checkpoint.read_state(checkpoint.find(run))
    checkpoint.save(tmp_path / run, latest, None, state | {"step": 9}, False, 2)
    of_step = ["--checkpoint", run / "step_00000007"]
    for arguments, model in (([], best), (["--which", "latest"], latest), (of_step, best)):
        assert command(*arguments, "--out", "hf", "--tokenizer", "portable")[0] == 0
        assert torch.equal(load_file("hf/model.safetensors")["model.norm.weight"], model.model.norm.weight)
        shutil.rmtree("hf")


# -----------------------------------------------------------------------------
# what the user can put right

@pytest.mark.parametrize("arguments, words", [
    (["--checkpoint", "out/nothing"], ["no checkpoint", "out/nothing"]), ([], ["prepare.py", "train.py"]),
    (["--dtype", "q8_0"], ["q8_0", "gguf"]), (["--format", "int8", "--dtype", "q8_0"], ["q8_0", "gguf"]),
    (["--format", "onnx", "--dtype", "fp16"], ["onnx", "fp32"]),
    (["--format", "int8", "--tokenizer", "exact"], ["int8", "tokenizer"]), (["--format", "pickle"], ["pickle"]),
    (["--dtype", "float64"], ["float64"]), (["--which", "worst"], ["worst"]), (["--tokenizer", "fast"], ["fast"]),
])
def test_refusals(command, arguments, words, tmp_path):
    """What cannot be asked for is refused, and nothing is written."""
    refused(command("--out", "export", *arguments), *words)
    assert os.listdir() == []


def test_foreign_folder(command, exported, run, tmp_path):
    """A folder that train.py did not make is no checkpoint, and neither is one whose state.json is not."""
    Path("foreign").mkdir()
    Path("foreign/notes.txt").write_text("mine")
    for folder in ("foreign", exported / "hf"):
        refused(command("--checkpoint", folder, "--out", "export"), "no checkpoint", str(folder))
    for state in ("", "{", "[]", "{}", '{"config": {"model": {"hidden_size": 7}}}'):
        Path("foreign/state.json").write_text(state)
        refused(command("--checkpoint", "foreign", "--out", "export"), "state.json")
    assert sorted(os.listdir()) == ["foreign", "run"] and sorted(os.listdir("foreign")) == ["notes.txt", "state.json"]


def test_damaged_checkpoint(command, run):
    """Missing weights, and a missing or another vocabulary, are refused by their names."""
    step_dir = checkpoint.find(run)
    state = json.loads((step_dir / "state.json").read_text())
    gone = {"config": state["config"] | {"tokenizer": "gone.vocab"}}
    for changes, word in ((gone, "gone.vocab"), ({"tokenizer_sha256": "0"}, "another vocabulary")):
        (step_dir / "state.json").write_text(json.dumps(state | changes))
        refused(command("--checkpoint", "run", "--out", "export"), word)
    (step_dir / "state.json").write_text(json.dumps(state))
    (step_dir / "model.safetensors").unlink()
    refused(command("--checkpoint", "run", "--out", "export"), "model.safetensors")
    assert os.listdir() == ["run"]


def test_out_that_is_taken(command, run, exported, tmp_path):
    """A folder with something in it and a file are left as they are; an empty folder is filled."""
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine")
    Path("file").write_text("mine")
    before = contents(tmp_path)
    for out in ("full", "file", "file/inside", "run"):
        for arguments in (["--checkpoint", "run"], ["--from", exported / "hf"]):
            refused(command(*arguments, "--out", out), out)
            assert contents(tmp_path) == before
    Path("empty").mkdir()
    assert command("--checkpoint", "run", "--out", "empty", "--tokenizer", "portable")[0] == 0
    assert names(Path("empty")) == PORTABLE_FILES
    Path("none").mkdir()
    assert command("--from", exported / "hf", "--out", "none")[0] == 0
    assert checkpoint.open_trained(Path("none"), "latest").model
    assert sorted(os.listdir()) == ["empty", "file", "full", "none", "run"]


def test_out_that_is_here(command, run, tmp_path, monkeypatch):
    """The current folder, empty, as --out is filled or refused."""
    Path("here").mkdir()
    monkeypatch.chdir("here")
    result = command("--checkpoint", run, "--out", ".", "--tokenizer", "portable")
    if result[0]:
        refused(result)
    assert names(tmp_path / "here") == ([] if result[0] else PORTABLE_FILES)
    assert sorted(os.listdir(tmp_path)) == ["here", "run"]


# -----------------------------------------------------------------------------
# what ends in the middle, and what lies beside

@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files")
@pytest.mark.parametrize("arguments", [[], ["--tokenizer", "portable"], ["--format", "int8"], ["--from"]],
                         ids=["exact", "portable", "int8", "import"])
def test_full_disk(rng, command, run, exported, tmp_path, arguments):
    """Where a file cannot be written there is one line, and nothing is left."""
    import resource
    if arguments == ["--from"]:
        arguments = ["--from", exported / "hf"]
    else:
        arguments = ["--checkpoint", "run", *arguments]
    contents_before, before = contents(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 1000, 20_000, rng.randint(60_000, 500_000)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            result = command(*arguments, "--out", "export")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        refused(result)
        assert contents(tmp_path) == contents_before


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("module, name, arguments", [
    (hf, "write_tokenizer", []), (hf, "check", []), (export, "model_card", []),
    (packed, "write_tensors", ["--format", "int8"]), (checkpoint, "save", ["--from"]), (shutil, "copyfile", ["--from"]),
])
def test_interrupted(command, run, exported, tmp_path, monkeypatch, module, name, arguments):
    """Ctrl-C at any point leaves nothing, and the next export is as if there had been none."""
    arguments = ["--from", exported / "hf"] if arguments == ["--from"] else ["--checkpoint", "run", *arguments]
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupt)
        code, _, err = command(*arguments, "--out", "export")
    assert code == 130 and err == "interrupted\n" and contents(tmp_path) == before


def test_what_a_killed_export_leaves(command, run, tmp_path):
    """The next export of that name removes it; what another process is at work on, and other names, stay."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    kept = [f".export.{os.getppid()}.partial", f".other.{ended.pid}.partial", ".export.mine.partial", ".export.partial"]
    for name in (f".export.{ended.pid}.partial", *kept):
        Path(name).mkdir()
        Path(name, "model.safetensors").write_bytes(b"half")
    assert command("--checkpoint", "run", "--out", "export", "--tokenizer", "portable")[0] == 0
    assert sorted(os.listdir()) == sorted([*kept, "export", "run"])
    assert all(names(Path(name)) == ["model.safetensors"] for name in kept)


def test_beside_others(command, run, tmp_path):
    """An export touches nothing but its own folder, whatever the folders beside it are called."""
    Path("export.partial").mkdir()
    Path("export.partial/thesis.txt").write_text("precious")
    assert command("--checkpoint", "run", "--out", "export", "--tokenizer", "portable")[0] == 0
    assert names(Path("export")) == PORTABLE_FILES
    assert sorted(os.listdir()) == ["export", "export.partial", "run"]
    assert names(Path("export.partial")) == ["thesis.txt"]
