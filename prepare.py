"""Text to bins: python prepare.py [config/NAME.py] [--field=value ...]

Each source of the config is read, cleaned, tokenized and written to two files in the data directory: the training
documents, and the held-out ones that training never sees. A bin is nothing but uint16 token ids, the documents
joined, each followed by the end-of-document id. meta.json, written last, says what they hold; where it stands, the
directory is complete.

    data/NAME/<source>.bin   data/NAME/<source>_val.bin   data/NAME/<source>_quiz.jsonl   data/NAME/meta.json

The embedded sources need no download: they are the documentation and the source code that the installed Python
carries, and arithmetic drawn from a seeded generator.
"""

import ast
import hashlib
import importlib.util
import inspect
import json
import os
import random
import signal
import sysconfig
import time
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np

import checkpoint
import tokenizer
from config import BadInput, Config, Source, load, script

VERSION = 1  # of the bins: raise it when the same config would give other ids
HELD_OUT = 0.02  # of the library files and of the arithmetic documents: some 50,000 tokens a source


def clean_text(text: str, preserve_linebreaks: bool = False) -> str:
    """The Stentor3 card's cleaning (Data Pipeline, Text Preprocessing).

    NFKC, line endings to "\\n"; then either trailing white space off every line (code), or all white space to
    single spaces (prose). No "\\r" is left, so its token is free to mean "end of document".
    """
    text = unicodedata.normalize("NFKC", text).replace("\r\n", "\n").replace("\r", "\n")
    if preserve_linebreaks:
        return "\n".join(line.rstrip() for line in text.splitlines()).strip()
    return " ".join(text.split())


# ---------------------------------------------------------------------------------------------------------------
# The embedded sources. Each yields (held_out, text). All decide by the file that a text came from whether it is
# held out, and by the same rule: a docstring that is held out as prose is not trained on as code.


def held_out(origin: str, share: float = HELD_OUT) -> bool:
    """Whether the text of this file (or this sum) is kept from training: a hash decides, the same on any machine."""
    return int.from_bytes(hashlib.sha256(origin.encode()).digest()[:4], "big") < share * 2**32


def library_files(package: str) -> list[tuple[str, Path]]:
    """(origin, path) of the Python files of a package ("" is the standard library), in hashed order.

    Tests are left out, and so are tables that a program wrote.
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
    """The documentation in a Python file, read off its syntax tree without importing it.

    Besides docstrings proper, these are the strings that numpy and torch attach to their compiled functions with
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
    """The last name of what a call calls: "c" of a.b.c(...)."""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def prose(docstring: str) -> str:
    """A docstring without its paragraphs of doctest and the rules under its headings; "" if little is left."""
    paragraphs = [p for p in docstring.split("\n\n") if ">>>" not in p]
    lines = "\n\n".join(paragraphs).splitlines()
    text = "\n".join(line for line in lines if line.strip("-=~^* "))
    return text if len(text) >= 200 else ""


def library_docs() -> Iterator[tuple[bool, str]]:
    """Docstrings of the standard library, numpy and torch, and the language reference that pydoc carries."""
    files = list(chain.from_iterable(library_files(package) for package in ("", "numpy", "torch")))
    # Workers leave Ctrl-C to this process, which stops them.
    with ProcessPoolExecutor(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        for (origin, _), found in zip(files, pool.map(docstrings, (path for _, path in files), chunksize=32)):
            yield from ((held_out(origin), prose(text)) for text in found)
    if importlib.util.find_spec("pydoc_data"):  # some distributions package it apart
        from pydoc_data.topics import topics
        yield from ((held_out(f"topics/{name}"), prose(text)) for name, text in topics.items())


def library_code() -> Iterator[tuple[bool, str]]:
    """The standard library's source, a document for each file."""
    for origin, path in library_files(""):
        yield held_out(origin), path.read_text(encoding="utf-8", errors="replace")


PHRASINGS = {  # the first, which quizzes ask in, three times as often as any other
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
    """One problem made of a pair of numbers, with its answer, in one of the phrasings."""
    a, b = pair
    if sign == "-":
        a, b = a + b, a
    if sign == "*":
        a, b = a % 10, b % 10
    c = {"+": a + b, "-": a - b, "*": a * b}[sign]
    return rng.choice(PHRASINGS[sign]).format(a=a, b=b, c=c)


def library_arithmetic() -> Iterator[tuple[bool, str]]:
    """Short documents of additions, subtractions and multiplications of small numbers, all of them right.

    A held-out document holds additions that no training document has in any phrasing. (Their mirror image, b + a,
    may be trained on: to be right is to have learnt that the order does not matter, or to add.)
    """
    rng = random.Random(1)  # of the text, not of the run: the bins must not change with config.seed
    for _ in range(50_000):
        held = rng.random() < HELD_OUT
        pairs, signs = (HELD_OUT_SUMS, "+") if held else (TRAINING_SUMS, "+++-*")
        yield held, "\n".join(problem(rng, rng.choice(pairs), rng.choice(signs)) for _ in range(rng.randint(3, 10)))


def arithmetic_quiz() -> list[dict]:
    """The held-out additions as {"prompt", "answer"}, for sample.py --quiz."""
    return [{"prompt": f"{a} + {b} =", "answer": str(a + b)} for a, b in HELD_OUT_SUMS]


LIBRARY = {"library:docs": library_docs, "library:code": library_code, "library:arithmetic": library_arithmetic}
QUIZZES = {"library:arithmetic": arithmetic_quiz}


def documents(source: Source) -> Iterator[tuple[bool, str]]:
    """Cleaned, non-empty documents of a source, as (held_out, text). Raises BadInput for an unknown dataset."""
    if source.dataset not in LIBRARY:
        raise BadInput(f"unknown dataset {source.dataset!r}; there are {', '.join(LIBRARY)}")
    for held, text in LIBRARY[source.dataset]():
        text = clean_text(text, source.preserve_linebreaks)
        if text:
            yield held, text


# ---------------------------------------------------------------------------------------------------------------


def recipe(config: Config, vocabulary) -> dict:
    """What decides the bins' content, to tell whether a prepared directory is the one that is asked for."""
    return {
        "version": VERSION,
        "tokenizer": {"name": config.tokenizer, "sha256": vocabulary.sha256},
        "sources": {name: {"dataset": s.dataset, "preserve_linebreaks": s.preserve_linebreaks}
                    for name, s in config.sources.items()},
    }


def chunks(items: Iterator, characters: int) -> Iterator[list]:
    """Group (held_out, text) items into lists of about so many characters of text."""
    chunk, size = [], 0
    for item in items:
        chunk.append(item)
        size += len(item[1])
        if size >= characters:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def write_source(name: str, source: Source, vocabulary, data_dir: Path, seen: set) -> dict:
    """Write a source's two bins; return its counts for meta.json.

    A document that stands in `seen` already, in whatever split or source, is left out: nothing is learnt from a
    copy, and a copy of a held-out document must not be trained on. Bytes are those of the decoded text, which is
    what bits per byte are counted over; dropped bytes are those that the vocabulary cannot write.
    """
    counts = {split: {"documents": 0, "tokens": 0, "bytes": 0, "dropped_bytes": 0} for split in ("train", "val")}
    eos = np.array([vocabulary.eos_id], np.uint16)
    started = reported = time.monotonic()
    with (data_dir / f"{name}.bin").open("wb") as train_bin, (data_dir / f"{name}_val.bin").open("wb") as val_bin:
        bins = {"train": train_bin, "val": val_bin}
        for chunk in chunks(documents(source), characters=1_000_000):
            fresh = []
            for held, text in chunk:
                digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
                if digest not in seen:
                    seen.add(digest)
                    fresh.append((held, text))
            for (held, _), (ids, dropped) in zip(fresh, vocabulary.encode_batch_counted([text for _, text in fresh])):
                if vocabulary.eos_id in ids:
                    raise BadInput(f"a document of {name} holds the end-of-document token {vocabulary.eos_id}: "
                                   f"the vocabulary {vocabulary.name} cannot be used with this text")
                split = "val" if held else "train"
                bins[split].write(np.concatenate((ids, eos)).astype(np.uint16).tobytes())
                counts[split]["documents"] += 1
                counts[split]["tokens"] += len(ids) + 1
                counts[split]["bytes"] += vocabulary.count_bytes(ids)
                counts[split]["dropped_bytes"] += dropped
            if time.monotonic() - reported > 2:
                reported = time.monotonic()
                print(f"  {name:6} {counts['train']['tokens']:12,} tokens so far", flush=True)
        for file in bins.values():
            file.flush()
            os.fsync(file.fileno())
    train, val = counts["train"], counts["val"]
    if not train["tokens"] or not val["tokens"]:
        raise BadInput(f"source {name} gave no {'training' if not train['tokens'] else 'held-out'} documents")
    print(f"  {name:6} {train['tokens']:12,} tokens of {train['documents']:,} documents, {val['tokens']:,} of "
          f"{val['documents']:,} held out; {train['bytes'] / 1e6:.1f} MB, {train['bytes'] / train['tokens']:.2f} bytes "
          f"a token, {train['dropped_bytes']:,} bytes dropped; {time.monotonic() - started:.1f} s", flush=True)
    return counts


def read_recipe(meta_path: Path) -> dict | None:
    """The recipe of prepared data, None where meta.json is damaged."""
    try:
        return json.loads(meta_path.read_text())["recipe"]
    except (ValueError, KeyError, TypeError):
        return None


def main(argv: list[str]):
    config = load(argv)
    vocabulary = tokenizer.load(config.tokenizer)
    if vocabulary.vocab_size > 65536:
        raise BadInput(f"{vocabulary.name} has {vocabulary.vocab_size:,} ids; a bin of uint16 can hold 65,536")
    wanted = recipe(config, vocabulary)
    data_dir, meta_path = config.data_dir, config.data_dir / "meta.json"
    if meta_path.exists():
        if read_recipe(meta_path) == wanted:
            print(f"{data_dir} is complete; delete it to prepare it again")
            return
        raise BadInput(f"{data_dir} holds bins of another recipe, or damaged ones; choose another --data_dir, or delete it")

    print(f"preparing {data_dir} with {vocabulary.name} ({vocabulary.vocab_size:,} ids)", flush=True)
    data_dir.mkdir(parents=True, exist_ok=True)
    seen = set()
    sources = {name: write_source(name, source, vocabulary, data_dir, seen) for name, source in config.sources.items()}
    for name, source in config.sources.items():
        if source.dataset in QUIZZES:
            lines = [json.dumps(question) + "\n" for question in QUIZZES[source.dataset]()]
            (data_dir / f"{name}_quiz.jsonl").write_text("".join(lines))

    meta = {"recipe": wanted, "vocab_size": vocabulary.vocab_size, "eos_id": vocabulary.eos_id, "sources": sources}
    checkpoint.replace(meta_path, (json.dumps(meta, indent=2) + "\n").encode())  # complete only now
    print(f"{data_dir} is complete: {sum(s['train']['tokens'] for s in sources.values()):,} training tokens")


if __name__ == "__main__":
    script(main)
