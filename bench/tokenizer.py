"""The tokenizer: MB of text a second, next to the peers that run here."""

import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import tokenizer
from bench import DOCUMENT, Row, Table, TimedOptions, alternate, documents, megabytes
from cli import BadInput
from tokenizer.reference import reference_encode
from tokenizer.tokenmonster import COMPILED, Tokenizer, TokenMonster

Run = tuple[Callable[[], object], float]  # a function, and how many MB of text it goes through


@dataclass
class Options(TimedOptions):
    """MB of text a second on documents of 5 KB, and the ratio to each peer."""

    vocab: str = "quickstart-2048"
    """Vocabulary: a name or a path."""
    documents: int = 200
    """Documents of each kind, prose and code."""


def tokenmonster_without_numba() -> ModuleType:
    """A second copy of tokenizer/tokenmonster.py, imported where numba cannot be: plain Python's loops."""
    present = sys.modules.get("numba")
    sys.modules["numba"] = None  # makes `import numba` raise ImportError
    try:
        spec = importlib.util.spec_from_file_location("tokenmonster_without_numba", inspect.getfile(TokenMonster))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        del sys.modules["numba"]
        if present is not None:
            sys.modules["numba"] = present
    return module


def tokenmonster_package(path: Path) -> Any:
    """The reference's vocabulary; None, and a line that says why, if it does not run."""
    try:
        reference_encode(path, ["probe"], timeout=60)  # in a process that can be ended if it hangs
    except BadInput as error:
        print(f"no comparison with the reference: {error}", file=sys.stderr)
        return None
    import tokenmonster  # here, as it is optional
    return tokenmonster.load(str(path.resolve()))


def byte_pair_encoding(texts: list[str], vocab_size: int) -> Any:
    """A BPE of the `tokenizers` library, of our size and trained on the very texts; None if it is not installed."""
    try:
        import tokenizers  # here, as it is optional
    except ImportError:
        print("no comparison with the tokenizers library, which is not installed", file=sys.stderr)
        return None
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    return bpe


def our_runs(ours: Tokenizer, plain: TokenMonster | None, texts: list[str]) -> dict[str, Run]:
    """What we do with texts; `plain` is the same vocabulary without numba."""
    size, ids = megabytes(texts), ours.encode_batch(texts)
    compiled = "compiled" if COMPILED else "plain Python, as numba is not here"
    runs = {f"encode, {compiled}": (lambda: [ours.encode(text) for text in texts], size)}
    if plain is not None:
        few = texts[:max(1, len(texts) // 20)]  # plain Python is slow
        runs["encode, plain Python"] = (lambda: [plain.encode(text) for text in few], megabytes(few))
    runs[f"encode_batch, {os.cpu_count()} cores"] = (lambda: ours.encode_batch(texts), size)
    runs["decode"] = (lambda: [ours.decode(row) for row in ids], size)
    return runs


def peer_runs(ours: Tokenizer, reference: Any, bpe: Any, texts: list[str]) -> dict[str, Run]:
    """What the peers that are not None do with texts: "NAME: encode" and "NAME: decode" of each."""
    runs, size = {}, megabytes(texts)
    if reference is not None:
        ids = ours.encode_batch(texts)
        runs["tokenmonster package: encode"] = (lambda: [reference.tokenize(text) for text in texts], size)
        runs["tokenmonster package: decode"] = (lambda: [reference.decode(row) for row in ids], size)
    if bpe is not None:
        bpe_ids = [bpe.encode(text).ids for text in texts]
        runs["tokenizers, BPE: encode"] = (lambda: [bpe.encode(text) for text in texts], size)
        runs["tokenizers, BPE: decode"] = (lambda: [bpe.decode(row) for row in bpe_ids], size)
    return runs


def rows_of(kind: str, runs: dict[str, Run], peers: list[str], rounds: int) -> list[Row]:
    """The rows of a kind of text: MB/s of each run, and next to what each peer takes for the same direction."""
    seconds = alternate({name: run for name, (run, _) in runs.items()}, rounds)
    speed = {name: size / seconds[name] for name, (_, size) in runs.items()}
    rows = []
    for name in runs:
        direction = "decode" if "decode" in name else "encode"
        ratios = [f"{speed[name] / speed[f'{peer}: {direction}']:.2f}" for peer in peers]
        rows.append((kind, name, f"{speed[name]:.2f}", *ratios))
    return rows


def measure(options: Options) -> Table:
    """MB/s of each direction on each kind of text, and the ratio to each peer."""
    path, ours, plain = tokenizer.find(options.vocab), tokenizer.load(options.vocab), None
    if isinstance(ours, TokenMonster):
        plain = tokenmonster_without_numba().TokenMonster(path.read_bytes(), ours.name, ours.eos_id)
    kinds = documents(options.documents)
    reference = tokenmonster_package(path)
    bpe = byte_pair_encoding([text for texts in kinds.values() for text in texts], ours.vocab_size)
    peers, rows = [], []
    for kind, texts in kinds.items():
        theirs = peer_runs(ours, reference, bpe, texts)
        peers = [name.removesuffix(": encode") for name in theirs if name.endswith(": encode")]
        rows += rows_of(kind, our_runs(ours, plain, texts) | theirs, peers, options.rounds)
    print(f"{ours.name}, {options.documents} documents of {DOCUMENT} characters, one thread unless it says "
          f"otherwise, medians of {options.rounds}\n")
    return ("text", "what", "MB/s", *(f"x {peer}" for peer in peers)), rows
