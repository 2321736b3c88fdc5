"""The device: the only file that knows which one a run is on.

train.py asks a Backend for what differs between devices and is otherwise the same plain loop everywhere.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch

from config import BadInput

# Dense half-precision peaks in FLOP/s, from the makers' data sheets; the first that stands in the device's name.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10G": 70e12,
              "V100": 125e12, "T4": 65e12, "P100": 18.7e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


@dataclass
class Backend:
    """A device, the precision of its matrix products, and this process's place among the `world_size` of a run."""

    device: torch.device
    dtype: torch.dtype
    name: str
    rank: int = 0
    world_size: int = 1

    @property
    def peak_flops(self) -> float | None:
        """Peak FLOP/s of all devices at half precision, None where unknown or where the run is in FP32."""
        known = [peak for part, peak in PEAK_FLOPS.items() if part in self.name]
        return known[0] * self.world_size if known and self.dtype != torch.float32 else None

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

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device, without waiting for the copy."""
        return tensor.to(self.device, non_blocking=True)

    def compile(self, model, input_ids, targets):
        """The model compiled, or the model itself and a line that says why, where compiling fails.

        Compilation is lazy and so are its failures (a Kaggle T4 pair lacks a library, a laptop a C++ compiler):
        one forward and backward pass on this batch brings them out here, where falling back costs nothing.
        """
        compiled = torch.compile(model)
        try:
            with self.autocast():
                compiled(input_ids, targets)[1].backward()
        except Exception as error:  # whatever the compiler, the linker or the driver may raise
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            print(f"torch.compile failed, going on without it: {reason[:200]}", flush=True)
            compiled = model
        model.zero_grad(set_to_none=True)
        return compiled


def pick(backend: str = "auto", dtype: str = "auto") -> Backend:
    """The backend "cpu", "cuda" or "auto", in "float32", "bfloat16", "float16" or "auto".

    auto is bfloat16 where the hardware has it, or else float16 on a GPU and float32 on a CPU. Raises BadInput for a
    device that is not there.
    """
    has_cuda = torch.cuda.is_available()
    if backend == "cuda" and not has_cuda:
        raise BadInput("--backend cuda: torch sees no CUDA GPU here; use --backend cpu")
    if has_cuda and backend != "cpu":
        # Asked of the capability: torch.cuda.is_bf16_supported() says yes on a T4, which emulates it, slowly.
        has_bf16, name = torch.cuda.get_device_capability() >= (8, 0), torch.cuda.get_device_name()
        device, otherwise = torch.device("cuda", torch.cuda.current_device()), "float16"
    else:
        # torch before 2.10 cannot tell what the CPU has; such a run is in FP32 unless it asks for more.
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        has_bf16, name = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"), "CPU"
        device, otherwise = torch.device("cpu"), "float32"
    if dtype == "auto":
        dtype = "bfloat16" if has_bf16 else otherwise
    return Backend(device, getattr(torch, dtype), name)
