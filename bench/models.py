"""The models: a config's shape with random weights, ours and the same in transformers and in llama.cpp."""

import importlib.util
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import tokenizer
from backend import Backend
from bench import ROOT
from config import Config, load
from decoding import ready
from formats import gguf, hf, peers
from model import Llama, ModelConfig

# The types of weights in which a model reads and writes, and the bytes of a weight, a share of its scale included.
BYTES = {"fp32": 4, "bf16": 2, "int8": 1, "int4": 0.5 + 4 / 32}
Model = Any  # with the face of a Llama that has a cache


@dataclass
class Contestant:
    """A model that reads or writes."""

    run: Callable[[], object]
    """Does it once."""
    precision: str
    """Type of the weights, a key of BYTES in capitals."""
    texts: int = 1
    """How many it writes at once."""
    ready_in: float | None = None
    """Seconds from the model to its first tokens, if that takes any."""


def named(name: str) -> Config:
    """The config of this name in config/, whatever the folder. Raises BadInput if there is none."""
    return load([str(ROOT / "config" / f"{name}.py")])


def transformers_llama(config: ModelConfig, device: Backend) -> Any:
    """transformers' Llama of this shape. Raises BadInput if transformers is not installed."""
    return peers.random_llama(hf.llama_config(config, 0, torch.float32)).to(device.device)


def writer(plain: Llama, dtype: str, device: Backend, threads: int | None = None) -> Model:
    """A copy of a model for this device that writes with weights of one of BYTES, on so many threads at most."""
    copy = deepcopy(plain).to(device.device)
    copy.run_with(device.attention())
    return ready(copy, dtype, threads)[0]


def llama_cpp(folder: Path, model: Llama, dtype: str) -> Callable[[list[int], int], None] | None:
    """A function (prompt, count) that has llama.cpp read a prompt, and then `count` tokens one after the other.

    It chooses no token. None if llama.cpp is not installed. Its copy of the model goes into the folder.
    """
    if importlib.util.find_spec("llama_cpp") is None or importlib.util.find_spec("gguf") is None:
        return None
    import llama_cpp  # here, as it is optional

    gguf.write_gguf(folder, model, "bench", tokenizer.load("quickstart-2048", "portable"), dtype)
    path, threads = folder / f"bench-{gguf.KINDS[dtype]}.gguf", torch.get_num_threads()
    engine = llama_cpp.Llama(str(path), n_ctx=model.config.max_position_embeddings, verbose=False, n_threads=threads,
                             n_threads_batch=threads)

    def run(prompt: list[int], count: int):
        engine.reset()
        engine.eval(prompt)
        for token in range(count):
            engine.eval([token])

    return run


def next_to_peers(seconds: dict[str, float], name: str, contestant: Contestant) -> tuple[str, ...]:
    """The contestant's speed next to transformers in FP32, which writes one text, and to llama.cpp in the same type.

    As words; "" for a peer that is not among the seconds, {name: seconds}.
    """
    rivals = ("transformers, FP32", f"llama.cpp, {contestant.precision}")
    return tuple(f"{contestant.texts * seconds[peer] / seconds[name]:.2f}" if peer in seconds else ""
                 for peer in rivals)
