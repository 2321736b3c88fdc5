"""The command finds every run that there is, and refuses what it cannot use in one line."""
import pytest
import torch

import checkpoint
import demo
from tests.web.models import llama, save_run
from web import page


def test_find_models(tmp_path, rng, monkeypatch, capsys):
    """Every run under out/ is found, and gives its own logits; a damaged one is left out with a note; a step directory
    and a name that comes twice are told apart."""
    monkeypatch.chdir(tmp_path)
    models = {name: save_run(tmp_path / "out" / name, rng) for name in ("one", "two")}
    save_run(tmp_path / "other" / "one", rng)
    (tmp_path / "out" / "broken").mkdir()
    (tmp_path / "out" / "broken" / "latest").write_text("step_00000007")
    (tmp_path / "out" / "noise").mkdir()
    (tmp_path / "out" / "noise" / "latest").write_bytes(b"\xff\0")
    shelf = demo.find_models(demo.Options())
    left_out = capsys.readouterr().err
    assert list(shelf.entries) == ["one", "two"] and "out/broken" in left_out and "out/noise" in left_out
    ids = torch.tensor([[rng.randrange(2048) for _ in range(9)]])
    for name, model in models.items():
        assert torch.equal(shelf.get(name).model(ids)[0], model(ids)[0])
        assert shelf.entry(name).parameters == model.num_parameters()
    step_dir = checkpoint.find(tmp_path / "out" / "one")
    chosen = demo.find_models(demo.Options(checkpoint=(tmp_path / "out" / "one", tmp_path / "other" / "one", step_dir)))
    assert list(chosen.entries) == ["one", "one (2)", f"one/{step_dir.name}"]


def test_a_run_that_goes_on_training(tmp_path, rng, monkeypatch):
    """A run whose checkpoint was replaced after the demo had started gives the newer one."""
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / "out" / "one", rng)
    shelf = demo.find_models(demo.Options())
    old = checkpoint.find(tmp_path / "out" / "one")
    model, state = llama(), checkpoint.read_state(old)
    checkpoint.save(tmp_path / "out" / "one", model, None, state | {"step": 1000}, True, 1)
    assert not old.exists()
    ids = torch.tensor([[rng.randrange(2048) for _ in range(9)]])
    assert torch.equal(shelf.get("one").model(ids)[0], model(ids)[0])


@pytest.mark.parametrize("arguments, word", [
    ([], "no trained model under out/"), (["--checkpoint", "out/none"], "no checkpoint in out"),
    (["--hf", "none/such/model"], "cannot load none/such/model"), (["--port", "0"], "port is 0"),
    (["--port", "70000"], "port is 70000"), (["--ports", "1"], "--port"), (["--port", "x"], "port")])
def test_command_refusals(in_process, tmp_path, monkeypatch, offline, arguments, word):
    """What the user can put right is one line on stderr and exit code 2."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(page, "gr", page.gr or object())
    code, out, err = in_process(demo.main, *arguments)
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("error: ") and word in err


def test_gradio_is_missing(in_process, monkeypatch):
    """Without gradio there is one line, and it says what to install."""
    monkeypatch.setattr(page, "gr", None)
    code, out, err = in_process(demo.main)
    assert code == 2 and out == "" and err.count("\n") == 1 and 'pip install ".[web]"' in err
