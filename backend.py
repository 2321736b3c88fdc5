"""Devices, and how they differ.

train.py asks a Backend for everything that depends on the device. The rest of it is the same plain loop everywhere. On
several GPUs torchrun starts one process of that loop for each:

    torchrun --standalone --nproc_per_node=2 train.py config/stentor2_30m.py

One process drives all chips of a TPU (`XlaBackend`).
"""

import functools
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch.nn.parallel import DistributedDataParallel

from cli import BadInput, brief
from model import causal_attention

# Dense half-precision peaks in FLOP/s, from the makers' data sheets. The first key found in the device's name counts.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12,
              "A10G": 70e12, "V100": 125e12, "T4": 65e12, "P100": 18.7e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
              "v5litepod": 197e12, "v6e": 918e12, "v4": 275e12}

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # as --dtype spells them
SHORT = 512  # positions up to which a CPU's backward pass is slower in BF16 than in FP32: 2.5 times as slow at 128
TORCH_XLA = "pip install torch==2.9.0 'torch_xla[tpu]==2.9.0'"


# ---------------------------------------------------------------------------------------------------------------
# Which attention kernel a device has


def expand_heads(x, heads: int):
    """Repeat each key or value head for the query heads that share it: (B, K, S, D) -> (B, heads, S, D)."""
    return x.repeat_interleave(heads // x.size(1), dim=1)  # (B, heads, S, D)


def takes_grouped_heads(capability: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether a GPU of this compute capability has a fast attention kernel for grouped key and value heads.

    Flash attention is such a kernel; it needs 8.0 or higher, and 16 bits. Otherwise (a T4, an FP32 block) there is the
    memory-efficient kernel, which needs equal heads. With unequal heads PyTorch would write out all scores.
    """
    return capability >= (8, 0) and dtype != torch.float32


def wants_equal_heads(q) -> bool:
    """Whether keys and values must be repeated for these queries. Only some GPUs ask for that."""
    return q.is_cuda and not takes_grouped_heads(torch.cuda.get_device_capability(q.device), q.dtype)


def fitting_attention(q, k, v, mask=None):
    """model.causal_attention, with the kernel of PyTorch's that suits the device best."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.size(2) <= SHORT and torch.is_grad_enabled():
        with torch.autocast("cpu", enabled=False):
            return causal_attention(q.float(), k.float(), v.float(), mask).to(q.dtype)
    if wants_equal_heads(q):
        k, v = expand_heads(k, q.size(1)), expand_heads(v, q.size(1))
    return causal_attention(q, k, v, mask)


def chunked_attention(q, k, v, mask=None, length: int = 512):
    """Attention of whole sequences, `length` queries at a time; each chunk reads the keys up to its last query.

    It is for devices whose only kernel writes out all scores. Above the diagonal it computes only what lies within a
    chunk. If blocks are recomputed too (`Llama.run_with`), only (length, T) scores of a head are in memory at once.
    With a mask, or after a prefix, all queries go at once.
    """
    if mask is not None or q.size(2) != k.size(2):
        return fitting_attention(q, k, v, mask)
    ends = [min(start + length, q.size(2)) for start in range(0, q.size(2), length)]
    return torch.cat([fitting_attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end])
                      for start, end in zip([0, *ends], ends)], dim=2)  # (B, H, T, D)


# ---------------------------------------------------------------------------------------------------------------
# The devices


@dataclass
class Backend:
    """A device, the precision of its matrix products, and which of the run's `world_size` processes this is."""

    device: torch.device
    dtype: torch.dtype
    name: str
    rank: int = 0
    world_size: int = 1
    chips: int = 1  # chips that this process drives; each gets its share of every batch
    compiles_steps = False  # True if the device compiles steps even without torch.compile
    multiplies_integers = True  # False if torch._int_mm would not run on the device

    @property
    def peak_flops(self) -> float | None:
        """Peak FLOP/s of all devices at half precision. None if unknown, or if the run is in FP32."""
        known = [peak for part, peak in PEAK_FLOPS.items() if part in self.name]
        return known[0] * self.world_size * self.chips if known and self.dtype != torch.float32 else None

    @property
    def idle_gpus(self) -> int:
        """GPUs of this machine that the run does not use, because it was started without torchrun."""
        return torch.cuda.device_count() - 1 if self.device.type == "cuda" and self.world_size == 1 else 0

    def autocast(self) -> AbstractContextManager:
        """The context of a forward pass: matrix products in self.dtype; the parameters stay FP32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """Keeps FP16's gradients from vanishing: scales the loss up, and the gradients down again before a step.

        If gradients overflow, it skips the step and halves the scale (Micikevicius et al. 2018, Mixed Precision
        Training). For other types it does nothing: their exponents reach as far as FP32's.
        """
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def number(self, value: float) -> float | torch.Tensor:
        """A number that changes from step to step, in the form that this device's optimizer takes."""
        return value

    def adamw(self, groups: list[dict], **options) -> torch.optim.AdamW:
        """AdamW, all parameters in one kernel."""
        return torch.optim.AdamW(groups, fused=True, **options)

    def attention(self, choice: str = "auto") -> Callable:
        """The function that "auto", "sdpa" or "chunked" names (`Llama.run_with`). Raises BadInput for "flash"."""
        if choice == "flash":
            raise BadInput("--attention flash is a kernel for TPUs; elsewhere sdpa finds such a kernel by itself")
        return chunked_attention if choice == "chunked" else fitting_attention

    def recompute(self, choice: bool | None) -> Callable | None:
        """The function that runs blocks again in the backward pass (`Llama.run_with`), or None. The default is None."""
        return functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False) if choice else None

    def end_step(self):
        """Mark the end of a step, or of the setup before the first one. Only XLA needs to know."""

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device. Does not wait for the copy."""
        return tensor.to(self.device, non_blocking=True)

    def compile(self, model: torch.nn.Module, batch: tuple, held_out: tuple) -> torch.nn.Module:
        """The compiled model. If compiling fails, the model itself, and a printed line that says why.

        torch.compile is lazy, so its failures come late (Kaggle's T4s lack a library, a laptop may lack a C++
        compiler). So I try one step on `batch` and one evaluation on `held_out`, (input_ids, targets) each, here, where
        falling back costs nothing. If it fails in one process, all go on without it.

        The backward pass is traced without autocast, as eager mode runs it. From torch 2.9 on the default is to trace
        it under the forward pass's, which would cast the products of FP32 blocks down.
        """
        from torch._functorch import config as tracing  # here, as only torch.compile needs it
        if hasattr(tracing, "backward_pass_autocast"):
            tracing.backward_pass_autocast = "off"
        compiled, reason = torch.compile(model), ""
        try:
            with self.autocast():
                compiled(*map(self.put, batch))[1].backward()
            with torch.no_grad(), self.autocast():
                compiled(*map(self.put, held_out))
        except Exception as error:  # whatever the compiler, the linker or the driver may raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        model.zero_grad(set_to_none=True)
        if not self.agreed(bool(reason)):
            return compiled
        print(f"torch.compile failed, going on without it: {reason or 'in another process'}", flush=True)
        return model

    # What the processes of a run do together. All of them must make each call, and it waits for the last one.

    def parallel(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> torch.nn.Module:
        """The model as one of world_size copies, which start equal and average their gradients in `backward`."""
        return DistributedDataParallel(model) if self.world_size > 1 else model

    def accumulating(self, model: torch.nn.Module, last: bool) -> AbstractContextManager:
        """The context of one micro-batch. Processes exchange gradients only in the last one of a step."""
        return nullcontext() if last or self.world_size == 1 else model.no_sync()

    def mean(self, value: torch.Tensor) -> float:
        """The mean of a number on the device over all processes. Waits for the device."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return float(value) / self.world_size

    def total(self, *values: float) -> list[float]:
        """The sums over all processes, in float64."""
        return self._on_cpu(values, dist.ReduceOp.SUM)

    def agreed(self, value: float) -> float:
        """The largest value over all processes, so that if one of them has to act, they all do.

        Does not wait for the device.
        """
        return self._on_cpu([value], dist.ReduceOp.MAX)[0]

    def _on_cpu(self, values: Iterable[float], operation: "dist.ReduceOp") -> list[float]:
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, operation)
        return tensor.tolist()


class XlaBackend(Backend):
    """The chips of a TPU, or XLA's own CPU client, through PJRT.

    XLA records operations; `end_step` compiles the record into one program and runs that. It compiles only once if
    every step records the same, so no step may look at a tensor's value halfway. One process records for all chips
    (SPMD): we mark the sequences of a batch as lying on different chips, and the compiler adds the exchange of
    gradients. A successor of PyTorch/XLA would replace this class and `has_tpu`.
    """

    compiles_steps = True
    multiplies_integers = False

    def __init__(self, dtype: str):
        """Raises BadInput if torch_xla is missing, under torchrun, and for fp16."""
        try:
            import torch_xla
            import torch_xla.backends
            import torch_xla.distributed.spmd as spmd
            import torch_xla.runtime as runtime
        except ImportError as error:
            raise BadInput(f"--backend xla needs torch_xla: {TORCH_XLA} ({error})") from error
        if dist.is_torchelastic_launched():
            raise BadInput("--backend xla: one process drives all chips; start it with python, not torchrun")
        if dtype == "fp16":
            raise BadInput("--backend xla: XLA has no loss scaler for fp16; a TPU's type is bf16")
        if not runtime.is_spmd():
            runtime.use_spmd()
        # FP32 blocks must stay FP32: by default a TPU rounds their factors to bfloat16. (It warns at every call.)
        logging.getLogger("torch_xla.backends").setLevel(logging.ERROR)
        torch_xla.backends.set_mat_mul_precision("highest")
        kind, chips = runtime.device_type(), runtime.global_runtime_device_count()
        name = os.environ.get("TPU_ACCELERATOR_TYPE", "TPU").partition("-")[0] if kind == "TPU" else f"XLA on {kind}"
        best = torch.bfloat16 if kind == "TPU" else torch.float32
        super().__init__(torch_xla.device(), best if dtype == "auto" else PRECISIONS[dtype],
                         f"{chips} x {name}" if chips > 1 else name, chips=chips)
        self.on_tpu, self.sync, self.mark_sharding = kind == "TPU", torch_xla.sync, spmd.mark_sharding
        self.mesh = spmd.Mesh(range(chips), (chips,), ("data",))

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor (B, ...) on the chips: each gets B / chips rows."""
        tensor = tensor.to(self.device)
        self.mark_sharding(tensor, self.mesh, ("data", *[None] * (tensor.dim() - 1)))
        return tensor

    def parallel(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> torch.nn.Module:
        """Mark the model and the optimizer's state as whole on every chip. The first step's program leaves them like
        that, so now the second step needs no other program."""
        for p in model.parameters():
            for tensor in (p, *optimizer.state[p].values()):
                self.mark_sharding(tensor, self.mesh, (None,) * tensor.dim())
        return model

    def number(self, value: float) -> torch.Tensor:
        """A number that changes from step to step, as a tensor with one dimension on the device. XLA would share a
        Python number, or a tensor without dimensions, with any equal number in the program; and it compiles a 1 in,
        which 1 - rate * decay may be. Either makes another program (pytorch/xla issue 3604)."""
        return torch.tensor([value], device=self.device)

    def adamw(self, groups: list[dict], **options) -> torch.optim.AdamW:
        """AdamW with its step count on the device, and its state made before the first step: then all steps are the
        same program. As a Python number the count would be another constant in each."""
        optimizer = torch.optim.AdamW(groups, capturable=True, **options)
        for group in optimizer.param_groups:
            for p in group["params"]:
                optimizer.state[p] = {"step": torch.zeros((), device=self.device),
                                      "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        return optimizer

    def attention(self, choice: str = "auto") -> Callable:
        """The function that "sdpa", "chunked" or "flash" names; "auto" is flash on a TPU that has jax, else chunked.

        The scores of a 4,096-token sequence do not fit on a v5e chip all at once (BENCHMARKS.md).
        """
        has_flash = self.on_tpu and importlib.util.find_spec("jax") is not None
        if choice == "flash" and not has_flash:
            raise BadInput("--attention flash is a kernel for TPUs that needs jax (pip install jax==0.7.1 "
                           "jaxlib==0.7.1); --attention chunked needs neither")
        if choice == "auto":
            choice = "flash" if has_flash else "chunked"
        if choice == "flash":
            import jax._src.tpu_custom_call as tpu_custom_call
            # jax 0.7.1 writes kernels in a format too new for libtpu 0.0.21 (pytorch/xla issue 9614).
            tpu_custom_call.get_ir_version = lambda context: 7
        attention = {"sdpa": causal_attention, "chunked": chunked_attention, "flash": self._flash_attention}[choice]

        def with_equal_heads(q, k, v, mask=None):  # XLA has no kernel for grouped heads
            return attention(q, expand_heads(k, q.size(1)), expand_heads(v, q.size(1)), mask)

        return with_equal_heads

    def _flash_attention(self, q, k, v, mask=None):
        """The TPU kernel. It takes bfloat16 in whole tiles of 128; an FP32 block goes in chunks, in FP32."""
        if mask is not None or q.dtype == torch.float32 or q.size(2) % 128:
            return chunked_attention(q, k, v, mask)
        from torch_xla.experimental.custom_kernel import flash_attention
        return flash_attention(q, k, v, causal=True, sm_scale=q.size(-1) ** -0.5,
                               partition_spec=("data", None, None, None), mesh=self.mesh)

    def recompute(self, choice: bool | None) -> Callable | None:
        """As Backend.recompute, but on by default, since a chip has only 16 GB. torch's own checkpoint would save
        nothing: the compiler sees the same operations twice and keeps the first (pytorch/xla issue 3455)."""
        from torch_xla.utils.checkpoint import checkpoint
        return None if choice is False else checkpoint

    def end_step(self):
        """Run what has been recorded; the first time, compile it."""
        self.sync()

    def compile(self, model: torch.nn.Module, batch: tuple, held_out: tuple) -> torch.nn.Module:
        """The model itself: XLA compiles whole steps anyway."""
        return model


def half_precision(capability: tuple[int, int]) -> torch.dtype:
    """The 16-bit type for a GPU of this compute capability: bfloat16 from 8.0 on (Ampere).

    torch.cuda.is_bf16_supported() does not help: it says yes on a T4 (7.5), which emulates bfloat16, slowly.
    """
    return torch.bfloat16 if capability >= (8, 0) else torch.float16


def has_tpu() -> bool:
    """Whether torch_xla is installed and sees a TPU. Raises BadInput if it is installed and cannot be imported."""
    if importlib.util.find_spec("torch_xla") is None:
        return False
    try:
        import torch_xla.runtime
    except ImportError as error:
        raise BadInput(f"torch_xla is installed and does not fit this torch ({error}): name another --backend, or "
                       f"{TORCH_XLA}") from error
    return torch_xla.runtime.device_type() == "TPU"


def pick(backend: str = "auto", dtype: str = "auto", tpu: bool = True) -> Backend:
    """The backend "cpu", "cuda", "xla" or "auto", in "fp32", "bf16", "fp16" or "auto".

    The auto backend is a TPU if torch_xla finds one and `tpu` allows it, or else a GPU if torch finds one. (`tpu` is
    False for everything but training, which XLA would compile over and over.) The auto dtype is bf16 on a TPU, 16 bits
    on a GPU (`half_precision`), bf16 on a CPU that has it, and fp32 otherwise. Under torchrun this process joins the
    others. Raises BadInput if the device is missing.
    """
    if backend == "xla" or backend == "auto" and tpu and has_tpu():
        return XlaBackend(dtype)
    under_torchrun = dist.is_torchelastic_launched()
    rank, local_rank, world_size = ((int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
                                    if under_torchrun else (0, 0, 1))
    gpus = torch.cuda.device_count()
    if backend == "cuda" and not gpus:
        raise BadInput("--backend cuda: torch sees no CUDA GPU here; use --backend cpu")
    if gpus and backend != "cpu":
        if local_rank >= gpus:
            raise BadInput(f"torchrun started more processes than there are GPUs; use --nproc_per_node={gpus}")
        device = torch.device("cuda", local_rank if under_torchrun else torch.cuda.current_device())
        torch.cuda.set_device(device)
        name, best = torch.cuda.get_device_name(device), half_precision(torch.cuda.get_device_capability(device))
    else:
        # torch before 2.10 cannot say what the CPU has. Then the run is in FP32 unless --dtype says otherwise.
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        has_bf16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
        device, name, best = torch.device("cpu"), "CPU", torch.bfloat16 if has_bf16 else torch.float32
    if under_torchrun and not dist.is_initialized():
        # NCCL carries the gradients. gloo carries messages between processes, and does not wait for the GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return Backend(device, best if dtype == "auto" else PRECISIONS[dtype],
                   f"{world_size} x {name}" if world_size > 1 else name, rank, world_size)


def one_of_several(main: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """Decorate a script's main(argv) for several processes: only rank 0 prints, and losing another process is one line.
    If one dies, torchrun ends the others; the errors caught here come before that, in the middle of an exchange."""
    @functools.wraps(main)
    def process(argv: list[str]) -> int:
        if dist.is_torchelastic_launched() and os.environ["RANK"] != "0":
            sys.stdout = open(os.devnull, "w")
        try:
            code = main(argv)
        except RuntimeError as error:
            if re.search("allocate memory|out of memory", str(error)):
                raise BadInput(f"there is not enough memory: choose a smaller --micro_batch_size or a smaller model; "
                               f"checkpoints are kept ({brief(error)})") from error
            if not dist.is_initialized() or not re.search("peer|gloo|NCCL", str(error), re.IGNORECASE):
                raise
            reason = str(error).strip().splitlines()[0][:200]
            raise BadInput(f"lost touch with another process of the run (if it died, torchrun says so below); the "
                           f"checkpoints are kept: go on with the same command and --resume. {reason}") from error
        if dist.is_initialized():
            dist.destroy_process_group()
        return code

    return process
