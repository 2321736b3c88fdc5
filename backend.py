"""The device: what differs between one and another.

train.py asks a Backend for what differs between devices and is otherwise the same plain loop everywhere. Several GPUs
are several processes of that loop, which torchrun starts:

    torchrun --standalone --nproc_per_node=2 train.py config/stentor2_30m.py

The chips of a TPU are driven by one process (`XlaBackend`).
"""

import functools
import importlib.util
import logging
import os
import re
import sys
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch.nn.parallel import DistributedDataParallel

from config import BadInput
from model import causal_attention, chunked_attention, expand_heads

# Dense half-precision peaks in FLOP/s, from the makers' data sheets; the first that stands in the device's name.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12,
              "A10G": 70e12, "V100": 125e12, "T4": 65e12, "P100": 18.7e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
              "v5litepod": 197e12, "v6e": 918e12, "v4": 275e12}


TORCH_XLA = "pip install torch==2.9.0 'torch_xla[tpu]==2.9.0'"


@dataclass
class Backend:
    """A device, the precision of its matrix products, and this process's place among the `world_size` of a run."""

    device: torch.device
    dtype: torch.dtype
    name: str
    rank: int = 0
    world_size: int = 1
    chips: int = 1  # that this process drives, each with its share of every batch
    compiles_steps = False  # True where steps are compiled without torch.compile too
    multiplies_integers = True  # False where torch._int_mm would be computed elsewhere

    @property
    def peak_flops(self) -> float | None:
        """Peak FLOP/s of all devices at half precision, None where unknown or where the run is in FP32."""
        known = [peak for part, peak in PEAK_FLOPS.items() if part in self.name]
        return known[0] * self.world_size * self.chips if known and self.dtype != torch.float32 else None

    @property
    def idle_gpus(self) -> int:
        """GPUs of this machine that the run leaves alone, as torchrun has not started a process for each."""
        return torch.cuda.device_count() - 1 if self.device.type == "cuda" and self.world_size == 1 else 0

    def autocast(self):
        """The context of a forward pass: matrix products in self.dtype, parameters FP32 as ever."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """What keeps FP16's gradients from vanishing: the loss is scaled up, and gradients down again before a step.

        A step whose gradients overflow is skipped, and the scale halved (Micikevicius et al. 2018, Mixed Precision
        Training). For other types, whose exponents reach as far as FP32's, it does nothing.
        """
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def number(self, value: float):
        """A number that changes from step to step, in the form that this device's optimizer takes."""
        return value

    def adamw(self, groups: list[dict], **options) -> torch.optim.AdamW:
        """AdamW, all parameters in one kernel."""
        return torch.optim.AdamW(groups, fused=True, **options)

    def attention(self, choice: str):
        """The function that "auto", "sdpa" or "chunked" names. Raises BadInput for "flash", which is a TPU's."""
        if choice == "flash":
            raise BadInput("--attention flash is a kernel for TPUs; elsewhere sdpa finds such a kernel by itself")
        return chunked_attention if choice == "chunked" else causal_attention

    def recompute(self, choice: bool | None):
        """What runs a block again in the backward pass (`Llama.run_with`), or None; if not asked for, not."""
        return functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False) if choice else None

    def end_step(self):
        """Mark the end of a step, or of the preparation before the first. Only XLA acts on it."""

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device, without waiting for the copy."""
        return tensor.to(self.device, non_blocking=True)

    def compile(self, model, batch, held_out):
        """The model compiled, or the model itself and a line that says why, where compiling fails.

        Compilation is lazy and so are its failures (a Kaggle T4 pair lacks a library, a laptop a C++ compiler): a step
        on `batch` and an evaluation on `held_out`, (input_ids, targets) each, bring them out here, where falling back
        costs nothing. Where it fails in one process, all of them go on without.
        """
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

    # What the processes of a run do together. Each call must be made by all of them, and waits for the last.

    def parallel(self, model, optimizer):
        """The model as one of world_size copies, which begin alike and average their gradients in `backward`."""
        return DistributedDataParallel(model) if self.world_size > 1 else model

    def accumulating(self, model, last: bool):
        """The context of a forward and backward pass of a step: only in its last do gradients travel."""
        return nullcontext() if last or self.world_size == 1 else model.no_sync()

    def mean(self, value: torch.Tensor) -> float:
        """The mean over all processes of a number that is on the device. Waits for the device."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return float(value) / self.world_size

    def total(self, *values: float) -> list[float]:
        """The sums over all processes, in float64."""
        return self._on_cpu(values, dist.ReduceOp.SUM)

    def agreed(self, value: float) -> float:
        """The largest over all processes, so that all go the same way where one has reason to.

        Does not wait for the device.
        """
        return self._on_cpu([value], dist.ReduceOp.MAX)[0]

    def _on_cpu(self, values, operation) -> list[float]:
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, operation)
        return tensor.tolist()


class XlaBackend(Backend):
    """The chips of a TPU, or XLA's own CPU client, through PJRT.

    Operations are recorded, not run; `end_step` compiles what has been recorded into one program, and runs it. The
    program is compiled once, as long as every step records the same: so nothing may be asked of a tensor in between.
    One process records for all chips (SPMD): the sequences of a batch are marked as lying on different ones, and
    the compiler adds the exchange of gradients. This class, and `has_tpu`, is what a successor of PyTorch/XLA replaces.
    """

    compiles_steps = True
    multiplies_integers = False

    def __init__(self, dtype: str):
        """Raises BadInput where torch_xla is missing, under torchrun, and for float16."""
        try:
            import torch_xla
            import torch_xla.backends
            import torch_xla.distributed.spmd as spmd
            import torch_xla.runtime as runtime
        except ImportError as error:
            raise BadInput(f"--backend xla needs torch_xla: {TORCH_XLA} ({error})") from error
        if dist.is_torchelastic_launched():
            raise BadInput("--backend xla: one process drives all chips; start it with python, not torchrun")
        if dtype == "float16":
            raise BadInput("--backend xla: XLA has no loss scaler for float16; a TPU's type is bfloat16")
        if not runtime.is_spmd():
            runtime.use_spmd()
        # An FP32 block is to be FP32: unless told so, a TPU rounds FP32 factors to bfloat16. (It warns at every call.)
        logging.getLogger("torch_xla.backends").setLevel(logging.ERROR)
        torch_xla.backends.set_mat_mul_precision("highest")
        kind, chips = runtime.device_type(), runtime.global_runtime_device_count()
        name = os.environ.get("TPU_ACCELERATOR_TYPE", "TPU").partition("-")[0] if kind == "TPU" else f"XLA on {kind}"
        best = torch.bfloat16 if kind == "TPU" else torch.float32
        super().__init__(torch_xla.device(), best if dtype == "auto" else getattr(torch, dtype),
                         f"{chips} x {name}" if chips > 1 else name, chips=chips)
        self.on_tpu, self.sync, self.mark_sharding = kind == "TPU", torch_xla.sync, spmd.mark_sharding
        self.mesh = spmd.Mesh(range(chips), (chips,), ("data",))

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor (B, ...) on the chips, B / chips rows on each."""
        tensor = tensor.to(self.device)
        self.mark_sharding(tensor, self.mesh, ("data", *[None] * (tensor.dim() - 1)))
        return tensor

    def parallel(self, model, optimizer):
        """The model, marked with the optimizer's state as being whole on every chip: as the first step's program leaves
        them, so that the second is the same program."""
        for p in model.parameters():
            for tensor in (p, *optimizer.state[p].values()):
                self.mark_sharding(tensor, self.mesh, (None,) * tensor.dim())
        return model

    def number(self, value: float) -> torch.Tensor:
        """A number that changes from step to step, on the device and of one dimension. A Python number, or a tensor of
        none, is shared with others of the program that it happens to equal, and 1 is compiled in, as a learning rate's
        1 - rate * decay may be: each makes another program (pytorch/xla issue 3604)."""
        return torch.tensor([value], device=self.device)

    def adamw(self, groups: list[dict], **options) -> torch.optim.AdamW:
        """AdamW whose step count is on the device too, and whose state is there before the first step, so that no
        step's program differs from another's: as a Python number the count would be a constant in each."""
        optimizer = torch.optim.AdamW(groups, capturable=True, **options)
        for group in optimizer.param_groups:
            for p in group["params"]:
                optimizer.state[p] = {"step": torch.zeros((), device=self.device),
                                      "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        return optimizer

    def attention(self, choice: str):
        """The function that "sdpa", "chunked" or "flash" names; "auto" is flash on a TPU that has jax, else chunked.

        All of a 4,096-token sequence's scores at once do not fit on a v5e chip (BENCHMARKS.md).
        """
        has_flash = self.on_tpu and importlib.util.find_spec("jax") is not None
        if choice == "flash" and not has_flash:
            raise BadInput("--attention flash is a kernel for TPUs that needs jax (pip install jax==0.7.1 "
                           "jaxlib==0.7.1); --attention chunked needs neither")
        if choice == "auto":
            choice = "flash" if has_flash else "chunked"
        if choice == "flash":
            import jax._src.tpu_custom_call as tpu_custom_call
            # jax 0.7.1 writes kernels in a format that is newer than libtpu 0.0.21 reads (pytorch/xla issue 9614).
            tpu_custom_call.get_ir_version = lambda context: 7
        attention = {"sdpa": causal_attention, "chunked": chunked_attention, "flash": self._flash_attention}[choice]

        def with_equal_heads(q, k, v):  # XLA has no grouped product
            return attention(q, expand_heads(k, q.size(1)), expand_heads(v, q.size(1)))

        return with_equal_heads

    def _flash_attention(self, q, k, v):
        """The TPU kernel, which takes bfloat16 in whole tiles of 128; an FP32 block's products stay FP32, in chunks."""
        if q.dtype == torch.float32 or q.size(2) % 128:
            return chunked_attention(q, k, v)
        from torch_xla.experimental.custom_kernel import flash_attention
        return flash_attention(q, k, v, causal=True, sm_scale=q.size(-1) ** -0.5,
                               partition_spec=("data", None, None, None), mesh=self.mesh)

    def recompute(self, choice: bool | None):
        """As Backend.recompute, but done if not asked for: a chip has 16 GB. torch's own checkpoint would save
        nothing, as the compiler sees the same operations twice and keeps the first (pytorch/xla issue 3455)."""
        from torch_xla.utils.checkpoint import checkpoint
        return None if choice is False else checkpoint

    def end_step(self):
        """Compile, the first time, and run what has been recorded."""
        self.sync()

    def compile(self, model, batch, held_out):
        """The model: XLA compiles whole steps anyway."""
        return model


def half_precision(capability: tuple[int, int]) -> torch.dtype:
    """The 16-bit type for a GPU of this compute capability: bfloat16 from 8.0 on (Ampere).

    Asked of the capability: torch.cuda.is_bf16_supported() says yes on a T4 (7.5), which emulates it, slowly.
    """
    return torch.bfloat16 if capability >= (8, 0) else torch.float16


def has_tpu() -> bool:
    """Whether torch_xla is installed and sees a TPU. Raises BadInput where it is, and cannot be imported."""
    if importlib.util.find_spec("torch_xla") is None:
        return False
    try:
        import torch_xla.runtime
    except ImportError as error:
        raise BadInput(f"torch_xla is installed and does not fit this torch ({error}): name another --backend, or "
                       f"{TORCH_XLA}") from error
    return torch_xla.runtime.device_type() == "TPU"


def pick(backend: str = "auto", dtype: str = "auto", tpu: bool = True) -> Backend:
    """The backend "cpu", "cuda", "xla" or "auto", in "float32", "bfloat16", "float16" or "auto".

    An auto backend is a TPU where torch_xla finds one and `tpu` allows it (what is not a step of training would be
    compiled over and over), or else a GPU where torch finds one. An auto dtype is bfloat16 on a TPU, 16 bits on a GPU
    (`half_precision`), bfloat16 on a CPU that has it, or else float32. Under torchrun this process joins the others.
    Raises BadInput for a device that is not there.
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
        # torch before 2.10 cannot tell what the CPU has; such a run is in FP32 unless it asks for more.
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        has_bf16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
        device, name, best = torch.device("cpu"), "CPU", torch.bfloat16 if has_bf16 else torch.float32
    if under_torchrun and not dist.is_initialized():
        # Gradients travel by NCCL; words between the processes by gloo, which does not wait for the GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return Backend(device, best if dtype == "auto" else getattr(torch, dtype),
                   f"{world_size} x {name}" if world_size > 1 else name, rank, world_size)


def one_of_several(main):
    """Decorate a script's main(argv): of several processes rank 0 alone writes to stdout, and losing another is one
    line. torchrun ends the others when one has died; this is for what they meet before, in the middle of their talk.
    """
    @functools.wraps(main)
    def process(argv):
        if dist.is_torchelastic_launched() and os.environ["RANK"] != "0":
            sys.stdout = open(os.devnull, "w")
        try:
            code = main(argv)
        except RuntimeError as error:
            if not dist.is_initialized() or not re.search("peer|gloo|NCCL", str(error), re.IGNORECASE):
                raise
            reason = str(error).strip().splitlines()[0][:200]
            raise BadInput(f"lost touch with another process of the run (if one has died, torchrun says so below); the "
                           f"checkpoints are kept: go on with the same command and --resume. {reason}") from error
        if dist.is_initialized():
            dist.destroy_process_group()
        return code

    return process
