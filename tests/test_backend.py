"""backend.py: what it decides for devices that are not here, from what torch says of them."""
import sys

import pytest
import torch

import backend
import bench
from config import BadInput
from model import causal_attention, chunked_attention


@pytest.fixture
def gpus(monkeypatch):
    """Makes torch tell of so many GPUs of a compute capability. Nothing can be put on them."""
    def pretend(count, name, capability):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)  # what torch says of a T4
    return pretend


@pytest.mark.parametrize("name, capability, dtype, peak", [
    ("Tesla T4", (7, 5), torch.float16, 65e12), ("Tesla P100-PCIE-16GB", (6, 0), torch.float16, 18.7e12),
    ("NVIDIA A100-SXM4-40GB", (8, 0), torch.bfloat16, 312e12), ("NVIDIA H200", (9, 0), torch.bfloat16, 989e12),
    ("NVIDIA L4", (8, 9), torch.bfloat16, 121e12), ("NVIDIA GeForce GTX 9999", (8, 6), torch.bfloat16, None)])
def test_precision_is_decided_by_the_capability(gpus, name, capability, dtype, peak):
    gpus(1, name, capability)
    device = backend.pick()
    assert (device.device, device.dtype, device.peak_flops) == (torch.device("cuda", 0), dtype, peak)
    assert backend.pick(dtype="float32").peak_flops is None
    assert backend.pick("cpu").device.type == "cpu"


def test_idle_gpus_are_counted(gpus):
    gpus(2, "Tesla T4", (7, 5))
    assert backend.pick().idle_gpus == 1 and backend.pick("cpu").idle_gpus == 0


def test_more_processes_than_gpus(gpus, monkeypatch):
    """Found before the processes look for each other."""
    gpus(1, "Tesla T4", (7, 5))
    for key, value in {"TORCHELASTIC_RUN_ID": "none", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(BadInput, match="--nproc_per_node=1"):
        backend.pick()


def test_a_tpu_is_found(monkeypatch):
    """By training, and not by what would compile a program for each token; a torch_xla that is broken is one line."""
    monkeypatch.setattr(backend, "has_tpu", lambda: True)
    monkeypatch.setattr(backend, "XlaBackend", lambda dtype: f"TPU, {dtype}")
    assert backend.pick() == "TPU, auto" and backend.pick("cpu").device.type == "cpu"
    assert backend.pick(tpu=False).device.type != "xla"
    monkeypatch.undo()
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "torch_xla", None)  # makes importing it fail
    with pytest.raises(BadInput, match="pip install"):
        backend.pick()


def test_no_gpu(gpus):
    gpus(0, "", (0, 0))
    with pytest.raises(BadInput, match="--backend cpu"):
        backend.pick("cuda")


def test_attention_and_recomputation_of_a_choice():
    device = backend.pick("cpu", "float32")
    assert device.attention("auto") is device.attention("sdpa") is causal_attention
    assert device.attention("chunked") is chunked_attention
    with pytest.raises(BadInput, match="TPU"):
        device.attention("flash")
    assert device.recompute(None) is device.recompute(False) is None and device.recompute(True)


def test_only_the_last_pass_of_a_step_sends(monkeypatch, tmp_path):
    """A group of one process: DDP's own hook sees no gradient but in the last pass, and then all that are summed."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        device = backend.Backend(torch.device("cpu"), torch.float32, "CPU", world_size=2)  # two, so that it is wrapped
        model = device.parallel(torch.nn.Linear(3, 1, bias=False), None)
        sent = []

        def hook(_, bucket):
            sent.append(bucket.buffer().clone())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        model.register_comm_hook(None, hook)
        inputs = torch.randn(4, 3)
        for number, x in enumerate(inputs, 1):
            with device.accumulating(model, last=number == 4):
                model(x).sum().backward()
            assert len(sent) == (number == 4)
        assert torch.allclose(sent[0], inputs.sum(0))
    finally:
        torch.distributed.destroy_process_group()


def test_the_bench_tells_what_a_gpu_will_choose():
    """python bench.py t4, for a GPU that nobody here has."""
    t4, h200 = (dict(bench.choices(capability)) for capability in ((7, 5), (9, 0)))
    assert t4["matrix products"] == "float16, with a GradScaler" and h200["matrix products"] == "bfloat16"
    assert "memory-efficient" in t4["attention of the inner blocks"]
    assert "flash" in h200["attention of the inner blocks"]
    assert "memory-efficient" in t4["attention of the FP32 blocks"] == h200["attention of the FP32 blocks"]
    assert "_int_mm" in t4["INT8 products"] and "fake" in dict(bench.choices((6, 0)))["INT8 products"]
