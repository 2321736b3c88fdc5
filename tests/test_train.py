"""train.py: that it learns, that it stops and goes on exactly, and that it says what is wrong in one line."""
import importlib.util
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import time
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import backend
import checkpoint
import eval
import prepare
import sample
import tokenizer
import train
from cli import BadInput
from config import Config, load
from data import Batches, read_meta
from run import changes, earlier_checkpoint, mixed, read_metrics, read_run
from tests.commands import metrics, refused, run, start

# Small enough for a step in milliseconds; with the curriculum, accumulation and every source in play.
TINY = ["--model.hidden_size=32", "--model.intermediate_size=64", "--model.num_hidden_layers=2",
        "--model.num_attention_heads=4", "--model.num_key_value_heads=2", "--model.head_dim=8",
        "--model.max_position_embeddings=32", "--model.fp32_blocks", "0", "--block_size=32", "--tokens_per_step=256",
        "--micro_batch_size=4", "--max_steps=60", "--train_minutes=None", "--max_minutes=None", "--log_interval=1",
        "--eval_interval=3", "--eval_blocks=4", "--learning_rate=1e-3"]


VOCABULARY = tokenizer.load("quickstart-2048")


@pytest.fixture
def tiny(quickstart_data):
    """The command line of a tiny run on the embedded data."""
    return ["--data_dir", str(quickstart_data), *TINY]


@pytest.fixture
def command(in_tmp_path):
    """train.py in tmp_path."""
    return partial(in_tmp_path, train.main)


@pytest.fixture(scope="module")
def whole_run(quickstart_data, tmp_path_factory):
    """A tiny run that nothing interrupted."""
    directory = tmp_path_factory.mktemp("whole")
    code, out, err = run("train.py", "--data_dir", quickstart_data, *TINY, cwd=directory)
    assert code == 0, (out, err)
    return directory / "out" / "quickstart"


def same_run(run_dir, whole_run):
    """Assert that two runs logged the same figures and ended with the same bytes."""
    assert metrics(run_dir) == metrics(whole_run)
    for name in ("model.safetensors", "optimizer.safetensors"):
        end = "step_00000060"
        assert (run_dir / end / name).read_bytes() == (whole_run / end / name).read_bytes(), name
    assert (run_dir / "best").read_text() == (whole_run / "best").read_text()


def wait_for_lines(path, count, process):
    """Wait until a file has so many lines, or the process has ended."""
    while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < count):
        time.sleep(0.005)


@pytest.mark.parametrize("attempt", range(2))
def test_a_killed_run_resumes_bit_for_bit(tiny, whole_run, tmp_path, attempt):
    """SIGKILL at a random moment, in the middle of saving as likely as not, twice; then to the end."""
    seed = random.SystemRandom().randrange(2**32)
    rng = random.Random(seed)
    run_dir = tmp_path / "out" / "quickstart"
    lines = 0
    for _ in range(2):
        lines = rng.randint(lines, lines + 40)
        process = start("train.py", *tiny, "--resume", cwd=tmp_path)
        wait_for_lines(run_dir / "metrics.jsonl", lines, process)
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        process.communicate()
    code, out, err = run("train.py", *tiny, "--resume", cwd=tmp_path)
    assert code == 0, (seed, out, err)
    same_run(run_dir, whole_run)
    assert not list(run_dir.glob(".*")), seed  # what the killed saves left is gone


def test_a_stopped_run_saves_and_resumes(tiny, whole_run, tmp_path):
    """SIGTERM, then Ctrl-C: a checkpoint at the very step, a line that says so, exit code 0, and the rest as it was."""
    metrics_path, lines = tmp_path / "out/quickstart/metrics.jsonl", 0
    for number in (signal.SIGTERM, signal.SIGINT):
        process = start("train.py", *tiny, "--resume", cwd=tmp_path)
        wait_for_lines(metrics_path, lines + random.randint(1, 30), process)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and err == "", (out, err)
        last = out.strip().splitlines()[-1]
        assert f"stopped by {number.name}" in last and "--resume" in last
        lines = metrics_path.read_bytes().count(b"\n")
    assert run("train.py", *tiny, "--resume", cwd=tmp_path)[0] == 0
    # The stop itself logs its step, as every step is logged here: so nothing differs at all.
    same_run(tmp_path / "out" / "quickstart", whole_run)


def test_a_lost_terminal_or_reader_is_a_stop(tiny, whole_run, tmp_path):
    """SIGHUP of a closed ssh session, then `| head -1`: each saves its very step, and the rest comes as it was."""
    run_dir = tmp_path / "out" / "quickstart"
    metrics_path = run_dir / "metrics.jsonl"
    process = start("train.py", *tiny, cwd=tmp_path)
    wait_for_lines(metrics_path, random.randint(1, 20), process)
    process.send_signal(signal.SIGHUP)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err == "" and "stopped by SIGHUP" in out.splitlines()[-1], (out, err)
    lines = metrics_path.read_bytes().count(b"\n")

    process = start("train.py", *tiny, "--resume", cwd=tmp_path)
    assert process.stdout.readline().startswith("model ")
    wait_for_lines(metrics_path, lines + random.randint(0, 10), process)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(60) == 0
    assert (run_dir / "latest").read_text() != "step_00000060"
    step = int((run_dir / "latest").read_text().removeprefix("step_"))
    assert metrics(run_dir)[-1]["step"] == step  # the checkpoint is of the last step that was taken
    assert run("train.py", *tiny, "--resume", cwd=tmp_path)[0] == 0
    same_run(run_dir, whole_run)


def test_a_hangup_under_nohup(tiny, whole_run, tmp_path):
    """Where SIGHUP was ignored before, the run goes on to its end; and a closed stdout is no reason to stop either."""
    process = start("train.py", *tiny, cwd=tmp_path, preexec_fn=lambda: (
        signal.signal(signal.SIGHUP, signal.SIG_IGN), os.close(1)))
    wait_for_lines(tmp_path / "out/quickstart/metrics.jsonl", 5, process)
    process.send_signal(signal.SIGHUP)
    assert process.stderr.read() == "" and process.wait(60) == 0
    same_run(tmp_path / "out" / "quickstart", whole_run)


@pytest.mark.parametrize("option", ["--resume", "--overwrite"])
def test_two_runs_in_one_directory(tiny, whole_run, tmp_path, command, option):
    """The second is refused in one line and changes nothing; the first is the run that it would have been alone."""
    run_dir = tmp_path / "out" / "quickstart"
    process = start("train.py", *tiny, option, cwd=tmp_path)
    wait_for_lines(run_dir / "metrics.jsonl", 3, process)
    process.send_signal(signal.SIGSTOP)  # a slow one: it is at work for as long as we look
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    refused(command(*tiny, option, "--seed=7"), "at work in out/quickstart", "--name")
    assert before == {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 0
    same_run(run_dir, whole_run)


def test_max_minutes(tiny, tmp_path, command):
    code, out, _ = command(*tiny, "--max_minutes=0.0001")
    assert code == 0 and "stopped by --max_minutes" in out
    assert (tmp_path / "out/quickstart/latest").read_text() == "step_00000001"


def test_train_minutes_fits_the_run(tiny, tmp_path, command):
    """A run that would take too long is made shorter while it runs, decays in full, and stays at that length."""
    assert command(*tiny, "--max_steps=1", "--name=first")[0] == 0  # a process's first step imports for seconds
    tiny = [*tiny, "--max_steps=20000", "--train_minutes=0.05", "--log_interval=1", "--eval_interval=20"]
    started = time.monotonic()
    code, out, err = command(*tiny)
    assert code == 0 and "steps fit into 0.05 minutes" in out, (out, err)
    assert time.monotonic() - started < 60
    run_dir = tmp_path / "out" / "quickstart"
    steps = json.loads((run_dir / (run_dir / "latest").read_text() / "state.json").read_text())["step"]
    rates = [m["learning_rate"] for m in metrics(run_dir) if "learning_rate" in m]
    assert steps == len(rates) < 20_000 and max(rates) == 1e-3 and rates[-1] < 0.3e-3
    code, out, _ = command(*tiny, "--resume")
    assert code == 0 and f"trained {steps:,} steps" in out


def test_a_timed_run_without_a_decay_ends(tiny, command):
    """Its last step is not a step at which the clock may still add one, and one, and one more."""
    code, out, err = command(*tiny, "--max_steps=400", "--train_minutes=0.0001", "--decay_fraction=0",
                             "--eval_interval=1", "--eval_blocks=1")
    assert code == 0 and "trained 2 steps" in out, (out, err)


def test_the_length_may_change_before_the_anneal(quickstart_data, rng):
    """A longer run reads the same sequences as a shorter one up to where the shorter one's anneal begins."""
    for _ in range(5):
        short, long = sorted(rng.sample(range(60, 400), 2))
        one, other = (Batches(load(["--data_dir", str(quickstart_data), f"--max_steps={n}"]), "train")
                      for n in (short, long))
        same = int(0.8 * len(one.order))  # the anneal is the last 15%; a few sequences before look ahead to it
        assert [one.sequence(k) for k in range(same)] == [other.sequence(k) for k in range(same)]


def test_a_run_is_not_overwritten_by_accident(tiny, tmp_path, command):
    short = [*tiny, "--max_steps=3"]
    assert command(*short)[0] == 0
    before = (tmp_path / "out/quickstart/metrics.jsonl").read_bytes()
    refused(command(*short), "--resume", "--overwrite", "--name")
    assert (tmp_path / "out/quickstart/metrics.jsonl").read_bytes() == before
    refused(command(*short, "--resume", "--model.intermediate_size=72"), "down_proj", "72")
    assert command(*short, "--overwrite", "--seed=1")[0] == 0
    assert (tmp_path / "out/quickstart/metrics.jsonl").read_bytes() != before


def test_more_than_the_machine_has(tiny, tmp_path, command):
    """A model larger than its memory is refused in one line, before anything is made."""
    refused(command(*tiny, "--model.hidden_size=131072", "--model.intermediate_size=1048576"), "GB of memory")
    refused(command(*tiny, "--max_steps=100000000000000"), "max_steps")
    assert not (tmp_path / "out").exists()


def damages(rng, whole, count):
    """Mutations of a file: bytes changed, cut, repeated or removed, a value of another type, and deep nesting."""
    junk = [b"null", b"-1", b"NaN", b"1e999", b"[]", b"{}", b'"x"', b"true", b"9" * 400, b"\xff", b"\0", b"["]
    yield from (b"", b"null", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"\0" * len(whole))
    numbers = [match.span() for match in re.finditer(rb'(?<=[:\[] )[^,\n\[{}\]]+|(?<=:)[^ ,{}\[\]\n]+', whole)]
    for _ in range(count - 8):
        at, end = sorted(rng.randrange(len(whole) + 1) for _ in range(2))
        kind = rng.randrange(6)
        if kind == 0 and numbers:
            at, end = rng.choice(numbers)
            yield whole[:at] + rng.choice(junk) + whole[end:]
        elif kind == 1:
            yield whole[:at] + rng.randbytes(2) + whole[at + 2:]
        elif kind == 2:
            yield whole[:at]
        elif kind == 3:
            yield whole[:at] + whole[min(end, at + 20):]
        elif kind == 4:
            yield whole[:end] + whole[at:]
        else:
            yield whole[:at] + rng.choice(junk) + whole[at:]


def read_state(config, recipe):
    """As train.py --resume and eval.py do."""
    state = checkpoint.read_state(earlier_checkpoint(config))
    changes(state["config"], config)
    checkpoint.check_shape(earlier_checkpoint(config), checkpoint.read_shape(config.out_dir, state))
    sources = state["config"].get("sources", {})
    eval.mixture({name: {"loss": 2.0, "loss_stderr": 0.1, "tokens": 5, "bytes": 9} for name in sources}, sources)


def read_data(config, recipe):
    """As train.py and eval.py do."""
    mixed(dict.fromkeys(config.sources, 2.0), config.sources, read_meta(config))
    Batches(config, "val", "math")
    eval.held_out(config.data_dir, ["math"], VOCABULARY)


READERS = {
    "state.json": read_state, "latest": read_state, "meta.json": read_data, "math_val.bin": read_data,
    "metrics.jsonl": lambda config, recipe: (read_metrics(config.out_dir / "metrics.jsonl", 30),
                                             read_run(config.out_dir)),
    "config.json": lambda config, recipe: read_run(config.out_dir),
    "progress.json": lambda config, recipe: prepare.earlier_progress(config.data_dir, recipe),
    "quiz.jsonl": lambda config, recipe: sample.read_quiz(config.data_dir / "quiz.jsonl")}


@pytest.mark.parametrize("name", READERS)
def test_damaged_files(whole_run, quickstart_data, tmp_path, rng, name, monkeypatch):
    """500 mutations of each file of a run and of its data: who reads it takes it or refuses it in one short line."""
    monkeypatch.chdir(tmp_path)
    run_dir, data_dir = tmp_path / "out" / "run", tmp_path / "data"
    shutil.copytree(whole_run, run_dir)
    data_dir.mkdir()
    (data_dir / "quiz.jsonl").write_text('{"prompt": "1 + 1 =", "answer": "2"}\n' * 9)
    ids = np.fromfile(quickstart_data / "math_val.bin", "<u2")
    ids = ids[:np.flatnonzero(ids == 2)[50] + 1]  # fifty documents, as each is decoded
    ids.tofile(data_dir / "math_val.bin")
    meta = json.loads((quickstart_data / "meta.json").read_text())
    meta["recipe"]["sources"] = {"math": meta["recipe"]["sources"]["math"]}
    meta["sources"] = {"math": meta["sources"]["math"]}
    meta["sources"]["math"]["val"]["tokens"] = len(ids)
    for file in ("meta.json", "progress.json"):
        (data_dir / file).write_text(json.dumps(meta, indent=2))
        if file == name == "progress.json":
            (data_dir / "meta.json").unlink()
    config = load(["--data_dir", str(data_dir), *TINY, "--name=run", "--resume"])
    config.sources = {"math": config.sources["math"]}
    [path, *_] = [found for folder in (data_dir, earlier_checkpoint(config), run_dir) for found in folder.glob(name)]
    whole, refusals = path.read_bytes(), 0
    READERS[name](config, meta["recipe"])
    for damaged in damages(rng, whole, 500):
        path.write_bytes(damaged)
        try:
            READERS[name](config, meta["recipe"])
        except (BadInput, FileNotFoundError) as refusal:
            refusals += 1
            assert "\n" not in str(refusal) and len(str(refusal)) < 1000, str(refusal)[:2000]
    assert refusals > 100


def test_a_loss_that_is_not_finite_stops_the_run(tiny, tmp_path, command):
    """With the step, exit code 1, and no checkpoint of it."""
    code, out, _ = command(*tiny, "--learning_rate=1e30", "--max_grad_norm=1e30")
    assert code == 1
    last = out.strip().splitlines()[-1]
    step = int(last.split("at step ")[1].split()[0])
    assert "not finite" in last and "learning_rate" in last
    run_dir = tmp_path / "out" / "quickstart"
    assert all(int(path.name.split("_")[1]) < step for path in run_dir.glob("step_*"))
    assert all(math.isfinite(m.get("train_loss", 0)) for m in metrics(run_dir))


def test_full_disk_while_saving(tiny, tmp_path):
    """Files of 200 kB at most, which the weights are more than: one line, exit code 2, nothing half-written."""
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    refused(run("train.py", *tiny, cwd=tmp_path, preexec_fn=limit))
    run_dir = tmp_path / "out" / "quickstart"
    assert not list(run_dir.glob("step_*")) and not list(run_dir.glob(".*")) and not (run_dir / "latest").exists()


def test_bad_input(tiny, tmp_path, quickstart_data, command):
    refused(run("train.py", "--blok_size=3", cwd=tmp_path), "--blok_size", "--block_size")
    refused(command("--max_steps=many"), "max_steps", "many")
    refused(command("config/none.py"), "config/none.py", "config/quickstart.py")
    refused(command(), "no prepared data in data/quickstart", "prepare.py")
    refused(command(*tiny, "--model.vocab_size=100"), "2048", "100")
    refused(command(*tiny, "--tokenizer", "nowhere"), "nowhere")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in quickstart_data.iterdir():
        os.link(path, damaged / path.name)
    ids = np.fromfile(damaged / "code.bin", np.uint16)
    ids[random.randrange(len(ids))] = 2048
    (damaged / "code.bin").unlink()
    ids.tofile(damaged / "code.bin")
    refused(command(*tiny, "--data_dir", damaged), "code.bin", "2048")
    ids[:-1].tofile(damaged / "code.bin")
    refused(command(*tiny, "--data_dir", damaged), "code.bin", "meta.json")
    assert not (tmp_path / "out").exists()


def test_what_a_run_leaves(whole_run):
    assert (whole_run / "curves.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((whole_run / "config.json").read_text())
    assert config["block_size"] == 32 and config["model"]["hidden_size"] == 32
    entries = metrics(whole_run)
    assert [m["step"] for m in entries if "train_loss" in m] == list(range(1, 61))
    evaluated = [m for m in entries if "val_loss" in m]
    assert [m["step"] for m in evaluated] == list(range(3, 61, 3))
    assert evaluated[-1]["val_loss"] < evaluated[0]["val_loss"] - 0.2  # it learns
    assert (whole_run / "latest").read_text() == "step_00000060"
    assert len(list(whole_run.glob("step_*"))) <= 3  # the two newest and the best


def test_a_checkpoint_names_the_commits_of_its_text(tiny, tmp_path, quickstart_data, command):
    """Those that meta.json has: a card prints them (test_card.py), and the data directory may be gone by then."""
    shutil.copytree(quickstart_data, tmp_path / "data")
    meta = json.loads((tmp_path / "data/meta.json").read_text())
    for name, commit in (("web", "0123456789" * 4), ("code", None)):  # and a preparation of before has none
        meta["sources"][name]["commit"] = commit
    del meta["sources"]["math"]["commit"]
    (tmp_path / "data/meta.json").write_text(json.dumps(meta))
    assert command(*tiny, "--data_dir", "data", "--max_steps=1")[0] == 0
    assert checkpoint.read_state(checkpoint.find(tmp_path / "out/quickstart"))["commits"] == {"web": "0123456789" * 4}
    meta["sources"]["web"]["commit"] = 7
    (tmp_path / "data/meta.json").write_text(json.dumps(meta))
    refused(command(*tiny, "--data_dir", "data", "--overwrite"), "meta.json is damaged", "commit")


def test_micro_batches_do_not_change_the_run(tiny, tmp_path, command):
    """One forward pass of 8 sequences, or accumulation over passes of 3, 3 and 2: the same losses to FP32 rounding."""
    for size in (8, 3):
        code, _, err = command(*tiny, "--dtype=fp32", f"--micro_batch_size={size}", f"--name={size}",
                               "--max_steps=8", "--schedule=cosine")
        assert code == 0, err
    ours, theirs = ([m["train_loss"] for m in metrics(tmp_path / "out" / size) if "train_loss" in m]
                    for size in ("8", "3"))
    assert ours == pytest.approx(theirs, rel=1e-5) and len(ours) == 8


def test_compile_falls_back(tiny, tmp_path):
    """Without a C++ compiler torch.compile fails: one line says so, and the run goes on."""
    environment = {"CXX": "/nonexistent/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    code, out, err = run("train.py", *tiny, "--compile", "--model.num_hidden_layers=1", "--max_steps=3", cwd=tmp_path,
                         env=environment)
    assert code == 0, (out, err)
    assert len([line for line in out.splitlines() if line.startswith("torch.compile failed")]) == 1
    assert "eager" in out and "trained 3 steps" in out


def test_attention_in_chunks_and_blocks_recomputed(tiny, tmp_path, command):
    """--attention and --recompute change what a step needs, not what it computes, to FP32 rounding."""
    for name, options in (("plain", []), ("spare", ["--attention=chunked", "--recompute"])):
        code, _, err = command(*tiny, "--dtype=fp32", "--max_steps=8", "--schedule=cosine", f"--name={name}",
                               *options)
        assert code == 0, err
    ours, theirs = ([m["train_loss"] for m in metrics(tmp_path / "out" / name) if "train_loss" in m]
                    for name in ("spare", "plain"))
    assert ours == pytest.approx(theirs, rel=1e-5) and len(ours) == 8


@pytest.mark.skipif(importlib.util.find_spec("torch_xla") is not None, reason="torch_xla is here")
def test_xla_where_it_is_absent(tiny, command):
    """One line that says what to install."""
    refused(command(*tiny, "--backend=xla"), "torch_xla", "pip install")
    refused(command(*tiny, "--attention=flash"), "TPU", "sdpa")


def test_learning_rate():
    """The Stentor3 card's schedule at the steps that arithmetic gives, and the shape of the other."""
    config = Config(max_steps=32_425, learning_rate=8e-4, warmup_fraction=0.05)
    assert config.warmup_steps == 1621
    assert train.learning_rate(1, config) == pytest.approx(8e-4 / 1621)
    assert train.learning_rate(1621, config) == pytest.approx(8e-4)
    assert train.learning_rate(17_023, config) == pytest.approx(4e-4)
    assert train.learning_rate(32_425, config) == pytest.approx(0, abs=1e-12)
    rates = [train.learning_rate(step, config) for step in range(1, 32_426)]
    assert min(rates) > 0 and np.argmax(rates) == 1620
    assert (np.diff(rates[:1621]) > 0).all() and (np.diff(rates[1620:]) < 0).all()
    config = Config(max_steps=100, learning_rate=1.0, schedule="wsd", warmup_fraction=0.1, decay_fraction=0.2)
    rates = [train.learning_rate(step, config) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert rates[10:80] == [1.0] * 70
    assert rates[80:] == pytest.approx([1 - n / 21 for n in range(1, 21)])


def test_fp16_skips_an_overflow_and_recovers(tiny, tmp_path, monkeypatch, rng):
    """A scale far too large: steps are skipped and change nothing, the scale backs off, and then it learns; a run that
    is stopped among the skipped steps and resumed is the run that was not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backend.Backend, "scaler", lambda self: torch.amp.GradScaler("cpu", init_scale=2.0**40))
    options = [*tiny, "--dtype=fp16", "--max_steps=30", "--eval_interval=1", "--eval_blocks=1",
               "--keep_checkpoints=30"]
    train.main([*options, "--name=whole"])
    lines = [m for m in metrics(tmp_path / "out/whole") if "train_loss" in m]
    skipped = lines[-1]["skipped_steps"]
    assert 3 < skipped < 26 and lines[-1]["loss_scale"] == 2.0 ** (40 - skipped)
    for line, before in zip(lines, [{"skipped_steps": 0}, *lines]):
        assert (line["grad_norm"] is None) == (line["skipped_steps"] > before["skipped_steps"])
    first = next(number for number, line in enumerate(lines) if line["grad_norm"])  # so many skipped at the start
    weights = [load_file(tmp_path / f"out/whole/step_{step:08}/model.safetensors") for step in (1, first, 30)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not any(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    stop = rng.randint(2, first + 5)
    monkeypatch.setattr(train, "learning_rate", stopping_at(stop, train.learning_rate))
    train.main([*options, "--name=parts"])
    train.main([*options, "--name=parts", "--resume"])
    assert metrics(tmp_path / "out/parts") == metrics(tmp_path / "out/whole")


def stopping_at(step, learning_rate):
    """A learning_rate that asks for a stop at a step, as SIGTERM would, once."""
    asked = []

    def stopping(number, config):
        if number == step and not asked:
            asked.append(number)
            signal.raise_signal(signal.SIGTERM)
        return learning_rate(number, config)

    return stopping
