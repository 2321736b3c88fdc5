"""Compile the real training steps for a TPU v5e-8, by the TPU's own compiler, where there is no TPU: make tpu-compile

What train.py records in its first step, over eight virtual devices, goes to libtpu, which needs no chip to compile it
and to say what memory it will take. What it cannot say is how fast the program runs, or that its kernels are right.

    python -m tests.compile_for_tpu                          # the steps in BENCHMARKS.md, some minutes each
    python -m tests.compile_for_tpu config/stentor3_20m.py --attention=chunked      # any other
"""

import collections
import contextlib
import io
import os
import re
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHIP = 15.75  # GiB that a v5e chip has for a program

# Eight devices of XLA's CPU client to record on; to libtpu, a machine with a v5e-8 that nobody else knows of.
os.environ |= {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "8", "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1",
               "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch_xla  # noqa: E402
import torch_xla.experimental.custom_kernel as kernels  # noqa: E402
from jax._src import compiler  # noqa: E402
from jax._src.interpreters import mlir  # noqa: E402
from jax._src.lib import _jax, xla_client  # noqa: E402
from jax._src.lib.mlir import ir  # noqa: E402
from jax.experimental import topologies  # noqa: E402

import backend  # noqa: E402
import train  # noqa: E402

STEPS = [(f"config/stentor3_{size}.py", f"--attention={attention}", f"--recompute={recompute}")
         for size, attention, recompute in (("20m", "flash", True), ("20m", "chunked", True), ("20m", "flash", False),
                                            ("50m", "flash", True), ("50m", "chunked", True))]


class Recorded(BaseException):
    """The step is recorded; it is not to be run."""


class Recorder(backend.XlaBackend):
    """An XlaBackend that takes its CPU devices for a TPU's chips, and keeps the program of the first step."""

    def __init__(self, dtype):
        super().__init__("bf16" if dtype == "auto" else dtype)
        self.on_tpu, self.prepared = True, False

    def adamw(self, groups, **options):
        self.optimizer = super().adamw(groups, **options)
        return self.optimizer

    def end_step(self):
        if self.prepared:
            results = [tensor for group in self.optimizer.param_groups for p in group["params"]
                       for tensor in (p, *self.optimizer.state[p].values())]
            raise Recorded(torch_xla._XLAC._get_xla_tensors_hlo_proto(results))
        super().end_step()
        self.prepared = True


def trace_pallas(kernel, *arguments, static_argnums=None, static_argnames=None, use_cache=False, **options):
    """torch_xla's function of this name, lowering for a TPU whatever jax runs on."""
    import jax._src.pallas.mosaic.pallas_call_registration
    shapes = [kernels.to_jax_shape_dtype_struct(x) if torch.is_tensor(x) else x for x in arguments]
    traced = jax.jit(kernel, static_argnums=static_argnums, static_argnames=static_argnames).trace(*shapes, **options)
    payload = kernels._extract_backend_config(traced.lower(lowering_platforms=("tpu",)).compiler_ir())
    return payload, [x for x in arguments if torch.is_tensor(x)]


def record(arguments):
    """The program of train.py's first step with these arguments, as a serialized HLO module."""
    backend.XlaBackend, kernels.trace_pallas = Recorder, trace_pallas
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            train.main([*arguments, "--backend=xla", "--overwrite"])
    except Recorded as recorded:
        return recorded.args[0]
    sys.exit("compile_for_tpu.py: train.py took no step")


def compile_(program):
    """Compile an HLO module for the eight chips of a v5e-8 -> (statistics of a chip's memory, optimized HLO)."""
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    text = xla_client._xla.mlir.xla_computation_to_mlir_module(xla_client.XlaComputation(program))
    with mlir.make_ir_context():
        module = ir.Module.parse(text)
    options = compiler.get_compile_options(num_replicas=1, num_partitions=len(chips), use_spmd_partitioning=True,
                                           device_assignment=np.array([[chip.id for chip in chips]]))
    executable = compiler.backend_compile(chips[0].client, module, _jax.DeviceList(tuple(chips)), options)
    return executable.get_compiled_memory_stats(), executable.hlo_modules()[0].to_string()


def main(steps):
    print("| step | arguments GiB | temporary GiB | code GiB | of a chip | exchanges | compiled in |", flush=True)
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for arguments in steps:
        program = record(arguments)
        started = time.monotonic()
        try:
            memory, hlo = compile_(program)
        except Exception as error:  # too large for the chip, as a rule
            print(f"| {' '.join(arguments)} | {str(error).splitlines()[0][:200]} |", flush=True)
            continue
        exchanges = collections.Counter(re.findall(r" (all-[a-z]+|collective-permute)(?:-start)?\(", hlo))
        # The new weights take the place of the old (torch_xla says so when it runs the step), so results are not added.
        parts = [size / 2**30 for size in (memory.argument_size_in_bytes, memory.temp_size_in_bytes,
                                           memory.generated_code_size_in_bytes)]
        print(f"| {' '.join(arguments)} | {' | '.join(f'{part:.2f}' for part in parts)} | {sum(parts) / CHIP:.0%} | "
              f"{', '.join(f'{count} {kind}' for kind, count in exchanges.items())} | "
              f"{time.monotonic() - started:.0f} s |", flush=True)


if __name__ == "__main__":
    # The shapes are what counts: the quickstart's data serves as well as the hub's.
    data = ("--data_dir=data/quickstart", "--tokenizer=quickstart-2048")
    steps = [tuple(sys.argv[1:])] if sys.argv[1:] else STEPS
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "data").symlink_to(ROOT / "data")
        (Path(directory) / "config").symlink_to(ROOT / "config")
        os.chdir(directory)
        main([(*step, *data) for step in steps])
