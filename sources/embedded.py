"""The embedded text: what every Python installation carries, so that a first run needs no download.

Three sources stand in for the web, code and math of the Stentor recipe: the documentation and the source code of the
installed Python, and arithmetic drawn from a seeded generator. Each yields (held_out, text). The file that a text came
from decides whether it is held out, by one rule for all three. So a docstring that is held out as prose is not trained
on as code.
"""

import ast
import hashlib
import importlib.util
import inspect
import random
import signal
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from pathlib import Path

HELD_OUT = 0.02  # share of the library files and of the arithmetic documents: some 50,000 tokens a source


def held_out(origin: str, share: float = HELD_OUT) -> bool:
    """Whether the text of this file (or this sum) is kept from training. A hash decides, the same on any machine."""
    return int.from_bytes(hashlib.sha256(origin.encode()).digest()[:4], "big") < share * 2**32


def python_files(package: str) -> list[tuple[str, Path]]:
    """(origin, path) of the Python files of a package ("" is the standard library), in hashed order.

    It leaves out tests, and tables that a program wrote.
    """
    left_out = {"test", "tests", "testing", "idlelib", "lib2to3", "turtledemo", "encodings", "pydoc_data", "_vendor",
                "site-packages", "dist-packages", "__pycache__", "entities.py", "_emoji_codes.py", "pyparsing.py"}
    root = Path(importlib.util.find_spec(package).origin).parent if package else Path(sysconfig.get_path("stdlib"))
    files = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if not left_out.intersection(parts) and not any(part.startswith("test") for part in parts):
            files.append(("/".join((package or "stdlib", *parts)), path))
    return sorted(files, key=lambda file: hashlib.sha256(file[0].encode()).digest())


def docstrings(path: Path) -> list[str]:
    """The documentation in a Python file, read from its syntax tree without importing it.

    Besides real docstrings, it takes the strings that numpy and torch attach to their compiled functions with
    add_newdoc and add_docstr. Files that do not parse (templates) give none.
    """
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            found.append(ast.get_docstring(node) or "")
        elif isinstance(node, ast.Call) and called(node).endswith(("add_newdoc", "add_docstr")):
            strings = (n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str))
            found.append(inspect.cleandoc(max(strings, key=len, default="")))
    return found


def called(node: ast.Call) -> str:
    """The last name of the function in a call: "c" of a.b.c(...)."""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def prose(docstring: str) -> str:
    """A docstring without its doctest paragraphs and the rules under its headings; "" if little is left."""
    paragraphs = [p for p in docstring.split("\n\n") if ">>>" not in p]
    lines = "\n\n".join(paragraphs).splitlines()
    text = "\n".join(line for line in lines if line.strip("-=~^* "))
    return text if len(text) >= 200 else ""


def docs() -> Iterator[tuple[bool, str]]:
    """Docstrings of the standard library, numpy and torch, and the language reference that pydoc carries."""
    files = list(chain.from_iterable(python_files(package) for package in ("", "numpy", "torch")))
    # Workers leave Ctrl-C to this process, which stops them.
    with ProcessPoolExecutor(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        for (origin, _), found in zip(files, pool.map(docstrings, (path for _, path in files), chunksize=32)):
            yield from ((held_out(origin), prose(text)) for text in found)
    if importlib.util.find_spec("pydoc_data"):  # some distributions package it separately
        from pydoc_data.topics import topics
        yield from ((held_out(f"topics/{name}"), prose(text)) for name, text in topics.items())


def code() -> Iterator[tuple[bool, str]]:
    """The standard library's source, a document for each file."""
    for origin, path in python_files(""):
        yield held_out(origin), path.read_text(encoding="utf-8", errors="replace")


PHRASINGS = {  # the first, which quizzes use, comes three times as often as any other
    "+": ("{a} + {b} = {c}",) * 3 + ("{a} plus {b} is {c}.", "What is {a} + {b}? It is {c}.",
                                     "If you have {a} apples and get {b} more, you have {c} apples."),
    "-": ("{a} - {b} = {c}",) * 3 + ("{a} minus {b} is {c}.", "What is {a} - {b}? It is {c}.",
                                     "If you have {a} apples and eat {b} of them, {c} are left."),
    "*": ("{a} * {b} = {c}",) * 3 + ("{a} times {b} is {c}.", "What is {a} * {b}? It is {c}."),
}
NUMBERS = range(13)
HELD_OUT_SUMS = [(a, b) for a in NUMBERS for b in NUMBERS if held_out(f"{a} + {b}", share=0.12)]
TRAINING_SUMS = [(a, b) for a in NUMBERS for b in NUMBERS if (a, b) not in HELD_OUT_SUMS]


def problem(rng: random.Random, pair: tuple[int, int], sign: str) -> str:
    """One problem made from a pair of numbers, with its answer, in one of the phrasings."""
    a, b = pair
    if sign == "-":
        a, b = a + b, a
    if sign == "*":
        a, b = a % 10, b % 10
    c = {"+": a + b, "-": a - b, "*": a * b}[sign]
    return rng.choice(PHRASINGS[sign]).format(a=a, b=b, c=c)


def arithmetic() -> Iterator[tuple[bool, str]]:
    """Short documents of additions, subtractions and multiplications of small numbers, all of them right.

    A held-out document holds additions that no training document has in any phrasing. (Training may see their mirror
    image, b + a. A model that answers right has then learnt that the order does not matter, or how to add.)
    """
    rng = random.Random(1)  # the text's seed, not the run's: the bins must not change with config.seed
    for _ in range(50_000):
        held = rng.random() < HELD_OUT
        pairs, signs = (HELD_OUT_SUMS, "+") if held else (TRAINING_SUMS, "+++-*")
        yield held, "\n".join(problem(rng, rng.choice(pairs), rng.choice(signs)) for _ in range(rng.randint(3, 10)))


def arithmetic_quiz() -> list[dict]:
    """The held-out additions as {"prompt", "answer"}, for sample.py --quiz."""
    return [{"prompt": f"{a} + {b} =", "answer": str(a + b)} for a, b in HELD_OUT_SUMS]


SOURCES = {"library:docs": docs, "library:code": code, "library:arithmetic": arithmetic}
QUIZZES = {"library:arithmetic": arithmetic_quiz}
