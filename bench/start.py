"""How long a user waits for the first step and for the first token; and how fast batches are read."""

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

from bench import ROOT, Table, TimedOptions, alternate
from bench.machine import describe
from cli import BadInput
from config import load
from data import Batches, read_meta


@dataclass
class Options(TimedOptions):
    """Seconds from a command to what its user waits for, next to importing torch; and the data's share of a step."""


def until(command: list[str], sign: str, folder: str) -> float:
    """Seconds from starting a command in a folder until it prints a line with this sign; then it is asked to stop.

    Raises BadInput if it ends without.
    """
    start, said = time.perf_counter(), ""
    process = subprocess.Popen([sys.executable, *command], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True)
    for line in process.stdout:
        if sign in line:
            break
        said = line.strip() or said
    else:
        raise BadInput(f"{' '.join(command)} ended without {sign!r}; its last line: {said}")
    seconds = time.perf_counter() - start
    process.terminate()
    process.communicate()
    return seconds


def measure(options: Options) -> Table:
    """Seconds to the first step and the first token, and tokens/s of the batches alone."""
    config = load([])
    read_meta(config)  # is there data?
    train = [str(ROOT / "train.py"), f"--data_dir={config.data_dir.resolve()}", "--overwrite", "--log_interval=1"]
    sample = [str(ROOT / "sample.py"), "--max_new_tokens=1"]
    commands = {"import torch": (["-c", "import torch; print('done')"], "done"),
                "train.py, first step": (train, "step      1/"),
                "sample.py, first token": (sample, " tokens, ")}
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: lambda command=command: until(*command, folder) for name, command in commands.items()}
        seconds = alternate(runs, options.rounds)
    rows = [(name, f"{time_:.2f} s", f"{time_ / seconds['import torch']:.1f} x importing torch")
            for name, time_ in seconds.items()]
    batches, numbers = Batches(config, "train"), iter(range(10**6))
    speed = config.tokens_per_step / alternate({"": lambda: batches[next(numbers) % 1000]}, 100)[""]
    rows.append(("batches of the quickstart", f"{speed:,.0f} tokens/s", "one thread; a training step takes the rest"))
    print(f"{describe()}, medians of {options.rounds}\n")
    return ("what", "time or speed", "next to"), rows
