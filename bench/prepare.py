"""prepare.py: MB of text a second from Parquet to bins, next to the tokenizer alone; its stages; and its memory."""

import json
import multiprocessing
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pyarrow
import pyarrow.parquet

import tokenizer
from bench import DOCUMENT, ROOT, Row, Table, TimedOptions, documents, megabytes
from cli import BadInput
from config import Source
from sources.streams import Notes, clean_text, open_stream, read
from sources.workers import WORKERS
from tokenizer import Tokenizer

SHARD = 25_000_000  # characters in a Parquet file, at most
Result = TypeVar("Result")


@dataclass
class Options(TimedOptions):
    """MB of clean text a second and core, from Parquet to bins, next to the tokenizer alone; and the memory."""

    vocab: str = "quickstart-2048"
    """Vocabulary: a name or a path."""
    documents: int = 2000
    """Different documents of each kind, prose and code, that the Parquet files repeat."""
    megabytes: int = 300
    """MB of text to prepare."""

    def __post_init__(self):
        """Raises ValueError, in one line, for a number that is too small."""
        super().__post_init__()
        if self.documents < 2:  # the files begin within the first, each elsewhere
            raise ValueError(f"documents is {self.documents}; it must be at least 2")


@dataclass
class Case:
    """A kind of text, and how to prepare it."""

    kind: str
    """Prose or code."""
    texts: list[str]
    """Its documents."""
    folder: Path
    """A temporary one to work in."""
    options: Options

    @property
    def keeps_linebreaks(self) -> bool:
        """Whether line breaks and indentation are kept, as code needs."""
        return self.kind == "code"


def make_shards(folder: Path, size: float, texts: list[str]) -> list[Path]:
    """Parquet files that hold `size` MB of text, the texts over and over, each time cut elsewhere."""
    paths, written, text = [], 0, "".join(texts)
    while written < size * 1e6:
        starts = range(7 * len(paths) % DOCUMENT, len(text) - DOCUMENT, DOCUMENT)
        cut = [text[start:start + DOCUMENT] for start in starts][:SHARD // DOCUMENT]
        paths.append(folder / f"{len(paths):04}.parquet")
        pyarrow.parquet.write_table(pyarrow.table({"text": cut}), paths[-1], row_group_size=1000, compression="zstd")
        written += DOCUMENT * len(cut)
    return paths


def on_every_core(work: Callable[[], object]) -> float:
    """Run work() in a process for each core, all at once: seconds until the last has ended."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work) for _ in range(WORKERS)]
    start = time.perf_counter()
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return time.perf_counter() - start


def resident(group: int) -> int:
    """Resident bytes of all processes of a process group, from /proc."""
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[2]) == group:
            total += int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    return total


def run_command(case: Case, shards: list[Path]) -> tuple[float, int, dict]:
    """prepare.py on shards, as its user runs it: (seconds in all, peak resident bytes, meta.json).

    Raises BadInput if it fails.
    """
    preset, data = case.folder / "preset.py", case.folder / "data"
    source = f"Source('parquet', data_files={tuple(map(str, shards))}, preserve_linebreaks={case.keeps_linebreaks})"
    preset.write_text(f"from config import Config, Source\nconfig = Config(tokenizer={case.options.vocab!r}, "
                      f"max_steps=10**6, sources={{'text': {source}}})\n")
    shutil.rmtree(data, ignore_errors=True)
    command = [sys.executable, str(ROOT / "prepare.py"), str(preset), "--data_dir", str(data)]
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None:
        peak = max(peak, resident(process.pid))
        time.sleep(0.1)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise BadInput("prepare.py has failed; what it says is above")
    return seconds, peak, json.loads((data / "meta.json").read_text())


def speeds(case: Case, shards: list[Path], vocabulary: Tokenizer) -> list[Row]:
    """MB/s a core of the tokenizer alone, of prepare.py by its own clock, and of the whole command."""
    clean = [clean_text(text, case.keeps_linebreaks) for text in case.texts]
    size = megabytes(clean)
    vocabulary.encode(clean[0])  # compiled before the processes are forked
    alone, whole, in_all = [], [], []
    for _ in range(case.options.rounds):
        seconds = on_every_core(lambda: [vocabulary.encode_counted(text) for text in clean])
        alone.append(size / seconds)  # each core has tokenized all of it
        seconds, _, meta = run_command(case, shards)
        counts = meta["sources"]["text"]
        prepared = (counts["train"]["bytes"] + counts["val"]["bytes"]) / 1e6  # MB
        whole.append(prepared / meta["seconds"] / WORKERS)
        in_all.append(prepared / seconds / WORKERS)
    medians = {"tokenizer alone": statistics.median(alone), "Parquet to bins": statistics.median(whole),
               "the same, start of the program included": statistics.median(in_all)}
    return [(case.kind, what, f"{speed:.2f}", f"{speed / medians['tokenizer alone']:.2f}")
            for what, speed in medians.items()]


def stages(case: Case, shard: Path, vocabulary: Tokenizer) -> list[Row]:
    """MB/s of each stage of prepare.py, and its share of the CPU time: on a shard, one after the other, in this
    process."""
    seconds, eos = {}, vocabulary.eos_id.to_bytes(2, "little")
    source = Source("parquet", data_files=(str(shard),))

    def stage(name: str, work: Callable[[], Result]) -> Result:
        start = time.process_time()
        result = work()
        seconds[name] = time.process_time() - start
        return result

    def chunks() -> list[list[str]]:
        notes = Notes("shard")
        notes.say = lambda words: None
        stream = open_stream(source, None, {"files": []}, notes)
        return [texts for texts, _, _ in read(stream, source, [None, 0], notes)]

    chunks()  # imports are not counted
    texts = stage("read Parquet", chunks)
    texts = stage("send to a worker", lambda: pickle.loads(pickle.dumps(texts)))
    clean = stage("clean", lambda: [clean_text(text, case.keeps_linebreaks) for chunk in texts for text in chunk])
    encoded = stage("tokenize", lambda: [vocabulary.encode_counted(text) for text in clean])
    stage("count bytes", lambda: [vocabulary.count_bytes(ids) for ids, _ in encoded])
    joined = stage("join", lambda: [ids.tobytes() + eos for ids, _ in encoded if vocabulary.eos_id not in ids])
    joined = stage("send back", lambda: pickle.loads(pickle.dumps(joined)))
    with tempfile.TemporaryFile() as file:
        stage("write", lambda: [file.write(document) for document in joined])
    size, total = megabytes(clean), sum(seconds.values())
    return [(case.kind, f"  {name}", f"{size / time_:.0f}", f"{time_ / total:.1%} of CPU")
            for name, time_ in seconds.items()]


def measure(options: Options) -> Table:
    """MB/s a core of the whole and of its stages, for each kind of text; and the peak memory of 100 MB and of 1 GB."""
    vocabulary, rows, peaks = tokenizer.load(options.vocab), [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = [Case(kind, texts, folder, options) for kind, texts in documents(options.documents).items()]
        for case in cases:
            shards = make_shards(folder, options.megabytes, case.texts)
            rows += speeds(case, shards, vocabulary)
            rows += stages(case, shards[0], vocabulary)
            for path in shards:
                path.unlink()
        prose = cases[0]
        for size in (100, 1000):
            _, peak, _ = run_command(prose, make_shards(folder, size, prose.texts))
            peaks.append(peak / 1e6)
    print(f"{vocabulary.name}, {options.megabytes} MB of Parquet, {WORKERS} cores, medians of {options.rounds}; peak "
          f"resident memory {peaks[0]:.0f} MB for 100 MB of text, {peaks[1]:.0f} MB for 1 GB\n")
    return ("text", "what", "MB/s a core", "x tokenizer"), rows
