"""The same train.py on torch_xla: XLA's CPU client runs the programs that a TPU would get. Run by `make tpu-test`."""
import collections
import json
import os
import re

import pytest
import torch

pytest.importorskip("torch_xla", reason="torch_xla is not installed: make tpu-test")

import torch_xla
import torch_xla.debug.metrics as xla_metrics

import backend
import train
from backend import chunked_attention
from cli import BadInput
from model import causal_attention
from tests.commands import metrics, refused, run
from tests.test_train import TINY, stopping_at

backend.pick("xla")  # before any backward pass: at its first, autograd counts the devices that there will ever be

# 8 sequences a step, in two micro-batches on one device; FP32, so that only the order of sums differs.
OPTIONS = [*TINY, "--dtype=fp32", "--max_steps=30", "--schedule=cosine", "--eval_interval=10", "--eval_blocks=7"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Runs go to a directory of their own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tiny(quickstart_data):
    return ["--data_dir", str(quickstart_data), *OPTIONS]


def count(event):
    """How often has it happened so far: UncachedCompile, ExecuteReplicated."""
    return xla_metrics.counter_value(event) or 0


def figures(directory):
    """Every logged figure of a run, by name: those of training, gradients and held-out text alike."""
    return [(line["step"], key, value) for line in metrics(directory) for key, value in line.items()]


def assert_close(ours, theirs, tolerance):
    assert [line[:2] for line in figures(ours)] == [line[:2] for line in figures(theirs)]
    for (step, key, value), (_, _, other) in zip(figures(ours), figures(theirs)):
        assert value == pytest.approx(other, rel=tolerance, abs=1e-12), (step, key)


@pytest.fixture
def recorded(monkeypatch):
    """The programs of the steps, as HLO before any optimization: recorded["programs"], the first of which prepares."""
    record = {"programs": [], "model": None}
    end_step, parallel = backend.XlaBackend.end_step, backend.XlaBackend.parallel

    def recording_parallel(self, model, optimizer):
        record["model"] = model
        return parallel(self, model, optimizer)

    def recording_end_step(self):
        record["programs"].append(torch_xla._XLAC._get_xla_tensors_hlo(list(record["model"].parameters())))
        end_step(self)

    monkeypatch.setattr(backend.XlaBackend, "parallel", recording_parallel)
    monkeypatch.setattr(backend.XlaBackend, "end_step", recording_end_step)
    return record


def dots(program):
    """Matrix products of a program by the type of what they multiply: {"f32": 54, "bf16": 273}."""
    types = dict(re.findall(r"(%\S+) = (\w+)\[", program))
    return collections.Counter(types[name] for name in re.findall(r" dot\(\S+ (%[\w.-]+),", program))


def test_it_learns_what_the_cpu_learns(tiny, tmp_path):
    """30 steps: the CPU backend's losses, gradients and held-out figures to 1e-4; a tied head stays tied."""
    for name in ("cpu", "xla"):
        train.main([*tiny, f"--backend={name}", f"--name={name}"])
    assert_close(tmp_path / "out/xla", tmp_path / "out/cpu", 1e-4)
    losses = [line["train_loss"] for line in metrics(tmp_path / "out/xla") if "train_loss" in line]
    assert len(losses) == 30 and losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("schedule", ["--schedule=cosine", "--schedule=wsd"])
def test_one_program_for_training_and_one_for_evaluation(tiny, monkeypatch, schedule):
    """Over 400 steps (the second moment's correction becomes exactly 1 at 324), whatever else goes on: a warmup to a
    rate that equals another number of the program, evaluations, checkpoints, logging at another pace, a decay to almost
    nothing; and a step is run once."""
    compiles, end_step = [], backend.XlaBackend.end_step

    def counting(self):
        before = count("UncachedCompile")
        end_step(self)
        compiles.append(count("UncachedCompile") - before)

    monkeypatch.setattr(backend.XlaBackend, "end_step", counting)
    before = count("UncachedCompile"), count("ExecuteReplicated")
    train.main([*tiny, "--backend=xla", "--model.num_hidden_layers=1", "--max_steps=400", "--tokens_per_step=64",
                "--log_interval=7", "--eval_interval=90", "--weight_decay=0.01", "--learning_rate=0.01",
                "--warmup_fraction=0.1", schedule])
    torch_xla.sync(wait=True)
    # The second of the two runs finds the programs of the first.
    assert len(compiles) == 401 and compiles[1] <= 1 and sum(compiles[2:]) == 0
    assert count("UncachedCompile") - before[0] <= sum(compiles) + 1  # the evaluation's
    # One to prepare, 400 steps, and 5 evaluations of two batches for each of three sources.
    assert count("ExecuteReplicated") - before[1] == 1 + 400 + 5 * 2 * 3


@pytest.mark.parametrize("chips", [2, 4])
def test_several_chips_learn_what_one_does(tiny, tmp_path, chips):
    """To 2e-4, with the same sequences a step; they exchange sums, and gather nothing."""
    train.main([*tiny, "--backend=xla", "--name=one"])
    flags = f"--xla_dump_to={tmp_path / 'hlo'} --xla_dump_hlo_as_text"
    code, out, err = run("train.py", *tiny, "--backend=xla", "--name=several", f"--micro_batch_size={4 // chips}",
                         cwd=tmp_path, env={"CPU_NUM_DEVICES": str(chips), "XLA_FLAGS": flags})
    assert code == 0, (out, err)
    assert f"{chips} devices x {8 // chips} sequences x 32 tokens, in 2 micro-batches" in out
    assert_close(tmp_path / "out/several", tmp_path / "out/one", 2e-4)
    step = max((tmp_path / "hlo").glob("*cpu_after_optimizations.txt"), key=lambda path: path.stat().st_size)
    program = step.read_text()
    assert len(re.findall(r" all-reduce\(", program)) > 10
    assert not re.findall(r" (all-gather|all-to-all|collective-permute)\(", program)


@pytest.mark.parametrize("recompute", [True, False])
def test_fp32_islands_in_the_program(tiny, recorded, recompute):
    """Under bfloat16, of 12 blocks: FP32 products exactly in the first and the last, forward and backward, none
    elsewhere; every norm in FP32."""
    def run_with(blocks):
        train.main([*tiny, "--backend=xla", "--dtype=bf16", "--model.num_hidden_layers=12", "--max_steps=1",
                    "--micro_batch_size=8", f"--recompute={recompute}", "--attention=sdpa", "--overwrite",
                    "--model.fp32_blocks", *blocks])
        return recorded["programs"][-1]

    # A block has 9 products: 7 linears, 2 in attention. Each has two in the backward pass. The head's are bfloat16.
    # A block that is recomputed runs forward twice, but for its last product, which no gradient needs.
    block = 9 * 3 + 8 * recompute
    program = run_with(["0", "-1"])
    assert dots(program) == {"f32": 2 * block, "bf16": 10 * block + 3}
    assert dots(run_with(["3"])) == {"f32": block, "bf16": 11 * block + 3}
    assert dots(run_with([])) == {"bf16": 12 * block + 3}
    roots = re.findall(r"= (\w+)\[[\d,]*\]\S* rsqrt\(", program)
    assert roots == ["f32"] * (25 + 24 * recompute)


def test_chunks_attend_like_the_whole(rng):
    """And the program for chunks has no array of all scores."""
    device = torch_xla.device()
    T, length = 96, rng.choice([16, 32, 40])
    q, k, v = (torch.randn(2, 4, T, 8, device=device, requires_grad=True) for _ in range(3))
    y = chunked_attention(q, k, v, length=length)
    program = torch_xla._XLAC._get_xla_tensors_hlo([y])
    assert "96,96" not in program
    assert "96,96" in torch_xla._XLAC._get_xla_tensors_hlo([causal_attention(q, k, v)])
    gradients = torch.autograd.grad(y.square().sum(), (q, k, v))
    q, k, v = (x.detach().cpu().double().requires_grad_() for x in (q, k, v))
    exact = causal_attention(q, k, v)
    assert torch.allclose(y.detach().cpu().double(), exact, atol=1e-5)
    for ours, theirs in zip(gradients, torch.autograd.grad(exact.square().sum(), (q, k, v))):
        assert torch.allclose(ours.cpu().double(), theirs, atol=1e-4)


def stopped_at(tiny, step, *options):
    """Train until a SIGTERM in this step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "learning_rate", stopping_at(step, train.learning_rate))
        train.main([*tiny, *options])


def test_interrupted_and_resumed_bit_for_bit(tiny, tmp_path, rng):
    """On XLA: the figures and the bytes of the run that nothing stopped, by the programs that there were."""
    train.main([*tiny, "--backend=xla", "--name=whole"])
    stopped_at(tiny, rng.randint(1, 29), "--backend=xla", "--name=parts")
    before = count("UncachedCompile")
    train.main([*tiny, "--backend=xla", "--name=parts", "--resume"])
    assert count("UncachedCompile") - before <= 1  # to put what was loaded on the chips; the step is the same program
    whole, parts = tmp_path / "out/whole", tmp_path / "out/parts"
    theirs = {(line["step"], "val_loss" in line): line for line in metrics(whole)}
    assert all(theirs[line["step"], "val_loss" in line] == line for line in metrics(parts))
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (whole / "step_00000030" / name).read_bytes() == (parts / "step_00000030" / name).read_bytes()


def test_resumed_on_another_backend(tiny, tmp_path, rng):
    """From XLA to the CPU and back: the same blocks, the same losses to 1e-4."""
    train.main([*tiny, "--backend=cpu", "--name=whole"])
    first, second = sorted(rng.sample(range(1, 30), 2))
    stopped_at(tiny, first, "--backend=xla", "--name=parts")
    stopped_at(tiny, second, "--backend=cpu", "--name=parts", "--resume")
    train.main([*tiny, "--backend=xla", "--name=parts", "--resume"])
    whole, parts = ({line["step"]: line["train_loss"] for line in metrics(tmp_path / "out" / name)
                     if "train_loss" in line} for name in ("whole", "parts"))
    assert parts == pytest.approx(whole, rel=1e-4)
    state = json.loads((tmp_path / "out/parts/step_00000030/state.json").read_text())
    assert state["step"] == 30


def test_int8_is_fake(tiny, tmp_path, capsys):
    """torch._int_mm would be computed on the host. A run that began with integers goes on without."""
    options = [*tiny, "--int8_linears", "up_proj", "--model.fp32_blocks", "--max_steps=4"]
    stopped_at(options, 2, "--backend=cpu", "--int8_product=integers")
    train.main([*options, "--backend=xla", "--resume"])
    out = capsys.readouterr().out
    assert "INT8 product: integers (as --int8_product says)" in out and "INT8 product: fake (the device does not" in out
    assert "trained 4 steps" in out and not [name for name in xla_metrics.counter_names() if "_int_mm" in name]
    with pytest.raises(BadInput, match="use fake"):
        train.main([*options, "--backend=xla", "--int8_product=integers", "--name=asked"])


def test_bad_input(tiny, tmp_path, monkeypatch):
    """One line each for what XLA cannot do."""
    for options, words in ((["--dtype=fp16"], "bf16"), (["--attention=flash"], "TPU")):
        refused(run("train.py", *tiny, "--backend=xla", *options, cwd=tmp_path), words)
    refused(run("train.py", *tiny, "--backend=xla", cwd=tmp_path, env={"CPU_NUM_DEVICES": "3"}), "8 sequences", "3")
    environment = {"TORCHELASTIC_RUN_ID": "none", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    refused(run("train.py", *tiny, "--backend=xla", cwd=tmp_path, env=environment), "torchrun")
    assert os.listdir(tmp_path) == []
