"""Several processes: what they learn together is what one learns alone, and when one dies the others end."""
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.commands import ROOT, metrics, run
from tests.test_train import TINY, wait_for_lines

# 8 sequences a step, so 1, 2 or 4 processes; accumulation on each; in FP32, so that only the order of sums differs.
OPTIONS = [*TINY, "--backend=cpu", "--dtype=fp32", "--max_steps=20", "--schedule=cosine", "--eval_interval=5",
           "--micro_batch_size=1", "--eval_blocks=7", "--keep_checkpoints=9"]


def launcher(processes):
    """The command line that starts a script as so many processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable, *torchrun * (processes > 1)]


@pytest.fixture
def torchrun(tmp_path):
    """Starts train.py as so many processes, on the CPU; its output is collected as text. None outlives the test."""
    started = []

    def start(processes, *arguments, script=ROOT / "train.py"):
        started.append(subprocess.Popen([*launcher(processes), str(script), *map(str, arguments)], cwd=tmp_path,
                                        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        env={**os.environ, "PYTHONUNBUFFERED": "1"}, start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        for pid in workers(process).values():  # in sessions of their own
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()


def changed(directory, lines):
    """A train.py that first runs these lines."""
    path = directory / "changed.py"
    path.write_text(f"import os, signal, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport torch, train\n{lines}\n"
                    f"train.script(train.main)\n")
    return path


def workers(process):
    """The processes that a torchrun has started, by rank; None where they are not there yet."""
    children = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            parent = int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1])
            environment = open(f"/proc/{pid}/environ").read()
        except OSError:  # it has just ended
            continue
        if parent == process.pid and (rank := re.search(r"\0RANK=(\d+)", environment)):
            children[int(rank[1])] = int(pid)
    return children


@pytest.fixture(scope="module")
def alone(quickstart_data, tmp_path_factory):
    """The run of one process, with two sequences where each of two processes has one."""
    directory = tmp_path_factory.mktemp("alone")
    code, out, err = run("train.py", "--data_dir", quickstart_data, *OPTIONS, cwd=directory)
    assert code == 0, (out, err)
    return directory / "out/quickstart"


def same_end(run_dir, alone):
    """Assert that a run has ended with the weights and the moments of one process."""
    for name in ("model.safetensors", "optimizer.safetensors"):
        there, here = (load_file(directory / "step_00000020" / name) for directory in (alone, run_dir))
        assert there.keys() == here.keys()
        for key in there:  # weights are of the order of 1; moments are of all orders
            tolerance = 1e-6 if name == "model.safetensors" else 1e-5 * float(there[key].abs().max())
            assert torch.allclose(here[key], there[key], atol=tolerance, rtol=0), key


def test_two_processes_learn_what_one_does(quickstart_data, alone, tmp_path, torchrun):
    """Parameters after 20 steps and all losses, training and held out, to 1e-6; one writes, one speaks."""
    process = torchrun(2, "--data_dir", quickstart_data, *OPTIONS)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, (out, err)
    ours, theirs = metrics(tmp_path / "out/quickstart"), metrics(alone)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for line, other in zip(ours, theirs):
        assert line == pytest.approx(other, abs=1e-6, rel=1e-6)
    same_end(tmp_path / "out/quickstart", alone)
    assert "2 devices x 4 sequences x 32 tokens, in 4 micro-batches" in out and "2 x CPU" in out
    assert out.count("trained 20 steps") == 1
    start = torch.cat([p.flatten() for p in load_file(alone / "step_00000005/model.safetensors").values()])
    end = torch.cat([p.flatten() for p in load_file(alone / "step_00000020/model.safetensors").values()])
    assert (start - end).abs().max() > 1e-3  # a thousand times what is tolerated has been learnt


def test_resumed_on_other_numbers_of_processes(quickstart_data, alone, tmp_path):
    """Two processes, then one, then four: the same trajectory."""
    options = ["--data_dir", quickstart_data, *OPTIONS, "--resume"]
    for processes, steps in ((2, 7), (1, 12), (4, 20)):
        source = changed(tmp_path, f"""
rate = train.learning_rate
def learning_rate(step, config):
    if step == {steps} and step < 20: signal.raise_signal(signal.SIGTERM)  # in every process
    return rate(step, config)
train.learning_rate = learning_rate""")
        result = subprocess.run([*launcher(processes), str(source), *map(str, options)], cwd=tmp_path, text=True,
                                capture_output=True, timeout=300)
        assert result.returncode == 0, result
        assert (f"at step {steps} of 20 " if steps < 20 else "trained 20 steps") in result.stdout
    run_dir = tmp_path / "out/quickstart"
    theirs = {line["step"]: line["train_loss"] for line in metrics(alone) if "train_loss" in line}
    ours = {line["step"]: line["train_loss"] for line in metrics(run_dir) if "train_loss" in line}
    assert ours == pytest.approx(theirs, abs=1e-6)
    same_end(run_dir, alone)


def test_one_dies_and_the_other_ends(quickstart_data, tmp_path, rng, torchrun):
    """Within a minute, with a line that says what has happened and what to do."""
    options = ["--data_dir", quickstart_data, *OPTIONS, "--max_steps=100000", "--eval_interval=10"]
    process = torchrun(2, *options)
    wait_for_lines(tmp_path / "out/quickstart/metrics.jsonl", 15, process)
    both = workers(process)
    os.kill(both[rng.choice([0, 1])], signal.SIGKILL)
    killed = time.monotonic()
    out, err = process.communicate(timeout=300)
    assert time.monotonic() - killed < 60
    assert process.returncode != 0
    assert "error: lost touch with another process of the run" in err and "--resume" in err
    assert not any(os.path.exists(f"/proc/{pid}") for pid in both.values())
    assert json.loads((tmp_path / "out/quickstart" / (tmp_path / "out/quickstart/latest").read_text()
                       / "state.json").read_text())["step"] >= 10


@pytest.mark.parametrize("whom", ["one", "all"])
def test_asked_to_stop(quickstart_data, tmp_path, whom, torchrun):
    """SIGTERM to one process alone, or Ctrl-C to torchrun, which passes it on to all: they stop together, and save."""
    process = torchrun(2, "--data_dir", quickstart_data, *OPTIONS, "--max_steps=100000")
    wait_for_lines(tmp_path / "out/quickstart/metrics.jsonl", 3, process)
    if whom == "one":
        os.kill(workers(process)[1], signal.SIGTERM)
    else:
        os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert "and saved; go on with the same command and --resume" in out, (out, err)
    step = int(re.search(r"stopped by .* at step ([\d,]+)", out)[1].replace(",", ""))
    assert (tmp_path / "out/quickstart/latest").read_text() == f"step_{step:08}"


def test_compile_falls_back_together(quickstart_data, tmp_path, torchrun):
    """Where compiling fails in one process, the other too goes on without; in FP16, each with the same scale."""
    script = changed(tmp_path, """
def failing(model):
    def compiled(*batch): raise RuntimeError("cannot find -lcuda")
    return compiled
torch.compile = failing if os.environ["RANK"] == "1" else lambda model: lambda *batch: model(*batch)""")
    process = torchrun(2, "--data_dir", quickstart_data, *OPTIONS, "--max_steps=3", "--dtype=fp16", "--compile",
                       script=script)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, (out, err)
    assert "torch.compile failed, going on without it: in another process" in out
    assert "float16 products, eager" in out and "skipped 0" in out and "trained 3 steps" in out


def test_bad_input_under_torchrun(quickstart_data, tmp_path, torchrun):
    """Sequences that do not divide over the processes; torchrun adds its own words."""
    process = torchrun(3, "--data_dir", quickstart_data, *OPTIONS)
    out, err = process.communicate(timeout=300)
    assert process.returncode != 0 and "error: 8 sequences a step do not divide over 3 devices" in err
    assert "/train.py\", line" not in err and not (tmp_path / "out").exists()
