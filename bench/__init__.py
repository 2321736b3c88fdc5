"""How fast this code is, next to its peers.

    python -m bench tokenizer     # MB of text a second
    python -m bench prepare       # from Parquet to bins
    python -m bench training      # a training step, next to the plain transformers loop
    python -m bench prefill       # reading a prompt, next to transformers and (make compat) llama.cpp
    python -m bench decoding      # writing tokens, next to the same
    python -m bench start         # from a command to its first step and its first token; the batches
    python -m bench t4            # the INT8 linears; what a GPU of --capability 7.5 will choose
    python -m bench qat           # what quantization-aware training buys, by training it

Every section has --help, and --markdown for a table to paste.

A speed alone says as much about the machine as about the code. So a peer runs in the same process, the runs of all
contestants alternate (a machine that slows down slows them all), the figure is the median, and what counts is the
ratio.

A section is a file with two names: `Options`, its command line, and `measure(options)`, which returns the table. What
all of them share is here; machine.py and models.py have what needs torch.
"""

import ast
import statistics
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

ROOT = Path(__file__).parents[1]  # of the repository, where the commands are
DOCUMENT = 5000  # characters of a document

Row = tuple[str, ...]
Table = tuple[Row, list[Row]]  # the header, and the rows


@dataclass
class TableOptions:
    """What every section can be told."""

    markdown: bool = False
    """Print a Markdown table."""

    def __post_init__(self):
        """Raises ValueError, in one line, if a number is less than 1."""
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is int and value < 1:
                raise ValueError(f"{field.name} is {value}; it must be at least 1")


@dataclass
class TimedOptions(TableOptions):
    """What every section can be told that times things in turns."""

    rounds: int = 5
    """Timed runs of each contestant."""


def alternate(runs: Mapping[str, Callable[[], object]], rounds: int, settle: bool = False) -> dict[str, float]:
    """Time functions in turns, after one run of each to warm up: {name: median seconds}.

    settle    run each once more before it is timed, so that it finds caches and heap as it left them, not its neighbour
    """
    seconds = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            if settle:
                run()
            start = time.perf_counter()
            run()
            if round_ > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def show(header: Row, rows: Sequence[Row], markdown: bool):
    """Print a table. Header and rows have one length."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    start, between, end = ("| ", " | ", " |") if markdown else ("", "  ", "")
    for line in (header, tuple("-" * width for width in widths), *rows):
        print((start + between.join(cell.ljust(width) for cell, width in zip(line, widths)) + end).rstrip())


def megabytes(texts: Sequence[str]) -> float:
    """MB of texts in UTF-8."""
    return sum(len(text.encode()) for text in texts) / 1e6


def documents(count: int) -> dict[str, list[str]]:
    """English prose and Python code from this Python's own library: `count` texts of DOCUMENT characters of each."""
    code, prose = [], []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py")):
        if {"site-packages", "test", "tests", "encodings", "pydoc_data"} & set(path.parts):
            continue  # other people's code, and tables
        if min(sum(map(len, code)), sum(map(len, prose))) > count * DOCUMENT:
            break
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError):  # lib2to3 keeps some broken files
            continue
        code.append(source)
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                prose.append((ast.get_docstring(node) or "") + "\n\n")

    def cut(texts: list[str]) -> list[str]:
        text = "".join(texts)
        return [text[start:start + DOCUMENT] for start in range(0, len(text), DOCUMENT)][:count]

    return {"prose": cut(prose), "code": cut(code)}
