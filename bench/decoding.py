"""Writing tokens, one text and several at once, next to transformers and llama.cpp."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import backend
from backend import Backend
from bench import Row, Table, TimedOptions, alternate
from bench.machine import describe, reading_time
from bench.models import BYTES, Contestant, Model, llama_cpp, named, next_to_peers, transformers_llama, writer
from decoding.choice import GREEDY, Sampler
from decoding.generate import generate_batch
from model import Llama

FILTERS = Sampler(temperature=0.8, top_p=0.9, repetition_penalty=1.1)


@dataclass
class Options(TimedOptions):
    """Tokens a second of greedy texts of 256 tokens after 32, one and several at once."""

    config: str = "stentor3_20m"
    """Name of the config whose shape is run."""
    samples: int = 8
    """Texts to write at once."""
    busy: bool = False
    """Measure only this: what is left of one thread's speed, in INT8, beside a process that keeps one core busy."""


@dataclass
class Task:
    """What everyone does: write `count` tokens after a prompt, in one text and in `samples` at once."""

    plain: Llama
    device: Backend
    prompt: list[int]
    count: int
    samples: int

    def writing(self, model: Model, texts: int = 1, sampler: Sampler = GREEDY) -> Callable[[], object]:
        """A function that has the model write them."""
        return lambda: list(generate_batch(model, self.prompt, texts, self.count, sampler))

    def transformers_runs(self) -> dict[str, Contestant]:
        """transformers, which writes one text in FP32."""
        peer = transformers_llama(self.plain.config, self.device).eval()
        ids = torch.tensor([self.prompt], device=self.device.device)  # (1, T)
        settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0,
                    "min_new_tokens": self.count, "max_new_tokens": self.count}
        return {"transformers, FP32": Contestant(lambda: peer.generate(ids, **settings), "FP32")}

    def our_runs(self, dtype: str) -> dict[str, Contestant]:
        """Our model with weights of a type: one text, greedy and with filters, and several."""
        precision, start = dtype.upper(), time.perf_counter()
        model = writer(self.plain, dtype, self.device)
        ready = time.perf_counter() - start
        name = f"ours, {precision}"
        return {name: Contestant(self.writing(model), precision, 1, ready),
                f"{name}, with filters": Contestant(self.writing(model, sampler=FILTERS), precision),
                f"{name}, {self.samples} at once":
                    Contestant(self.writing(model, self.samples), precision, self.samples)}

    def contestants(self, folder: Path) -> dict[str, Contestant]:
        """Everyone, in every type. llama.cpp's files go into the folder."""
        entered = self.transformers_runs()
        for dtype in BYTES:
            entered |= self.our_runs(dtype)
            if engine := llama_cpp(folder, self.plain, dtype):
                entered[f"llama.cpp, {dtype.upper()}"] = Contestant(
                    lambda engine=engine: engine(self.prompt, self.count), dtype.upper())
        return entered


def rows_of(task: Task, entered: dict[str, Contestant], seconds: dict[str, float]) -> list[Row]:
    """Tokens/s of each, and next to the peers, to one text at a time and to reading the weights."""
    weights = sum(m.weight.numel() for m in task.plain.modules() if isinstance(m, torch.nn.Linear)) / 1e6
    limits = {dtype.upper(): reading_time(weights * size) for dtype, size in BYTES.items()}
    rows = []
    for name, contestant in entered.items():
        time_, texts = seconds[name], contestant.texts
        alone = seconds[name.removesuffix(f", {texts} at once")]
        rows.append((name, f"{texts * task.count / time_:,.0f}", *next_to_peers(seconds, name, contestant),
                     f"{texts * alone / time_:.1f}" if texts > 1 else "",
                     f"{limits[contestant.precision] * task.count / time_:.0%}" if texts == 1 else "",
                     f"{contestant.ready_in:.1f} s" if contestant.ready_in is not None else ""))
    return rows


def beside_another(task: Task, rounds: int) -> Table:
    """Tokens/s of one text in INT8: on one thread, and as it comes, alone and beside a process that burns a core."""
    models = {"one thread": writer(task.plain, "int8", task.device, threads=1),
              "threads as measured": writer(task.plain, "int8", task.device)}
    runs = {name: task.writing(model) for name, model in models.items()}
    quiet = alternate(runs, rounds)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as burner:
        busy = alternate(runs, rounds)
        burner.kill()
    return ("what", "alone, tokens/s", "beside another process", "x one thread alone"), [
        (name, f"{task.count / quiet[name]:,.0f}", f"{task.count / busy[name]:,.0f}",
         f"{quiet['one thread'] / busy[name]:.2f}") for name in runs]


def measure(options: Options) -> Table:
    """Tokens/s of each, and what they are next to."""
    config = named(options.config).model
    prompt = torch.randint(config.vocab_size, (32,)).tolist()
    count = min(256, config.max_position_embeddings - len(prompt))
    torch.manual_seed(0)
    plain = Llama(config).eval()
    plain.lm_head.weight.data *= 12  # logits as far apart as a trained model's, which filters take less time for
    task = Task(plain, backend.pick(dtype="fp32", tpu=False), prompt, count, options.samples)
    print(f"{options.config}'s shape, random weights, {describe()}, torch {torch.__version__}; {count} greedy tokens "
          f"after {len(prompt)}, reading these included, medians of {options.rounds}\n")
    if options.busy:
        return beside_another(task, options.rounds)
    with tempfile.TemporaryDirectory() as folder:
        entered = task.contestants(Path(folder))
        seconds = alternate({name: contestant.run for name, contestant in entered.items()}, options.rounds, settle=True)
    return ("what", "tokens/s", "x transformers, FP32", "x llama.cpp, same type", "x one at a time",
            "of the reading speed", "ready in"), rows_of(task, entered, seconds)
