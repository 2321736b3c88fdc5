"""backend.py: what it decides for devices that are not here, from what torch says of them; and attention, which is the
same function by each of its kernels."""
import sys
from collections import Counter
from functools import partial

import pytest
import torch

import backend
from backend import chunked_attention, expand_heads, fitting_attention, takes_grouped_heads
from bench.t4 import choices
from cli import BadInput
from model import Llama, ModelConfig, causal_attention


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
    assert backend.pick(dtype="fp32").peak_flops is None
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
    device = backend.pick("cpu", "fp32")
    assert device.attention("auto") is device.attention("sdpa") is fitting_attention
    assert device.attention("chunked") is chunked_attention
    with pytest.raises(BadInput, match="TPU"):
        device.attention("flash")
    assert device.recompute(None) is device.recompute(False) is None and device.recompute(True)


def test_who_takes_grouped_heads():
    """Not a T4, and no GPU in an FP32 block."""
    assert takes_grouped_heads((8, 0), torch.float16) and takes_grouped_heads((9, 0), torch.bfloat16)
    assert not takes_grouped_heads((7, 5), torch.float16) and not takes_grouped_heads((9, 0), torch.float32)


def test_expanded_heads_attend_alike(rng):
    """Keys and values repeated for every query head, as old GPUs get them, give what grouped attention does."""
    K, group, S, T = rng.randint(1, 4), rng.randint(1, 5), rng.randint(1, 30), rng.randint(1, 30)
    S = max(S, T)
    q, k, v = torch.randn(2, K * group, T, 8), torch.randn(2, K, S, 8), torch.randn(2, K, S, 8)
    expanded = [expand_heads(x, K * group) for x in (k, v)]
    assert all(x.shape == (2, K * group, S, 8) for x in expanded)
    assert torch.allclose(causal_attention(q, k, v), causal_attention(q, *expanded), atol=1e-6)
    assert torch.equal(fitting_attention(q, k, v), causal_attention(q, k, v))
    for head in range(K * group):
        assert torch.equal(expanded[0][:, head], k[:, head // group])


def test_a_gpu_that_wants_equal_heads(rng, monkeypatch):
    """The path of a T4, taken here: what PyTorch gets has as many key and value heads as query heads."""
    inputs = [torch.randn(2, heads, 7, 8) for heads in (6, 2, 2)]
    grouped = causal_attention(*inputs)
    attend, seen = torch.nn.functional.scaled_dot_product_attention, []

    def recording(q, k, v, **options):
        seen.append((q.size(1), k.size(1), v.size(1), options["enable_gqa"]))
        return attend(q, k, v, **options)

    monkeypatch.setattr(backend, "wants_equal_heads", lambda q: True)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recording)
    assert torch.allclose(fitting_attention(*inputs), grouped, atol=1e-6)
    assert seen == [(6, 6, 6, False)]


@pytest.mark.parametrize("autocast", [False, True])
def test_short_bfloat16_attention(rng, autocast):
    """Where it is trained on a CPU it is computed in FP32, forward and backward, under autocast too: outputs and
    gradients are the FP32 ones, rounded."""
    T = rng.randint(1, 40)
    inputs = [torch.randn(2, heads, T, 8).bfloat16() for heads in (4, 2, 2)]
    exact = [x.float().requires_grad_() for x in inputs]
    ours = [x.clone().requires_grad_() for x in inputs]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = fitting_attention(*ours)
    wanted = causal_attention(*exact)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    wanted.backward(gradient.float())
    assert y.dtype == torch.bfloat16 and torch.equal(y, wanted.bfloat16())
    assert all(torch.equal(x.grad, z.grad.bfloat16()) for x, z in zip(ours, exact))


def test_chunked_attention(rng):
    """Outputs and gradients as in one piece, whatever the length of a chunk."""
    K, group, T = rng.randint(1, 3), rng.randint(1, 3), rng.randint(1, 40)
    inputs = [torch.randn(2, heads, T, 8, requires_grad=True) for heads in (K * group, K, K)]
    whole, chunked = causal_attention(*inputs), chunked_attention(*inputs, length=rng.randint(1, T + 5))
    assert torch.allclose(chunked, whole, atol=1e-6)
    weights = torch.randn_like(whole)
    for ours, theirs in zip(*(torch.autograd.grad((y * weights).sum(), inputs) for y in (chunked, whole))):
        assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("equal_heads", [False, True])
@pytest.mark.parametrize("attention", [fitting_attention, chunked_attention])
def test_attention_after_a_prefix(rng, monkeypatch, attention, equal_heads, masked):
    """As decoding asks for it, in float64 by hand: the last T of S positions, or whoever a mask says."""
    monkeypatch.setattr(backend, "wants_equal_heads", lambda q: equal_heads)
    T, prefix = rng.randint(1, 9), rng.randint(1, 20)
    S = T + prefix
    q, k, v = (torch.randn(2, heads, length, 8, dtype=torch.float64) for heads, length in ((6, T), (2, S), (2, S)))
    seen = torch.ones(T, S, dtype=torch.bool).tril(prefix)
    if masked:
        seen &= torch.rand(T, S) < 0.7
        seen[:, 0] = True
    scores = torch.einsum("bkgtd,bksd->bkgts", q.view(2, 2, 3, T, 8), k) / 8 ** 0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    exact = torch.einsum("bkgts,bksd->bkgtd", weights, v).reshape(2, 6, T, 8)
    assert torch.allclose(attention(q, k, v, seen if masked else None), exact, atol=1e-12)


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
        del model  # before its group: the last to hold a group waits for threads that may wait for Python
    finally:
        torch.distributed.destroy_process_group()


def test_the_bench_tells_what_a_gpu_will_choose():
    """python -m bench t4, for a GPU that nobody here has."""
    t4, h200 = (dict(choices(capability)) for capability in ((7, 5), (9, 0)))
    assert t4["matrix products"] == "float16, with a GradScaler" and h200["matrix products"] == "bfloat16"
    assert "memory-efficient" in t4["attention of the inner blocks"]
    assert "flash" in h200["attention of the inner blocks"]
    assert "memory-efficient" in t4["attention of the FP32 blocks"] == h200["attention of the FP32 blocks"]
    assert "_int_mm" in t4["INT8 products"] and "fake" in dict(choices((6, 0)))["INT8 products"]


def test_a_compiled_backward_pass_keeps_fp32_blocks(monkeypatch):
    """Its products, counted by type in the program: those of an FP32 block are FP32, as in eager mode."""
    tracing = pytest.importorskip("torch._functorch.config")
    if not hasattr(tracing, "backward_pass_autocast"):
        pytest.skip("torch before 2.9 has no such setting")
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    monkeypatch.setattr(tracing, "backward_pass_autocast", "same_as_forward")  # torch's default
    products, programs, compile_ = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default), [], torch.compile

    def pass_on(graph, inputs):
        return make_boxed_func(graph.forward)

    def note(graph, inputs):
        programs.append(Counter(node.args[0].meta["val"].dtype for node in graph.graph.nodes
                                if node.target in products))
        return pass_on(graph, inputs)

    monkeypatch.setattr(torch, "compile", partial(compile_, backend=aot_autograd(
        fw_compiler=pass_on, inference_compiler=pass_on, bw_compiler=note)))
    torch._dynamo.reset()
    model = Llama(ModelConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                              num_attention_heads=2, max_position_embeddings=8, fp32_blocks=(0,)))
    device, ids = backend.pick("cpu", "bf16"), torch.randint(64, (2, 8))
    model.run_with(device.attention())
    assert device.compile(model, (ids, ids), (ids, ids)) is not model
    # Seven linears in a block, each with a gradient of its input and one of its weight; and the head.
    assert programs == [{torch.float32: 14, torch.bfloat16: 16}]
