"""Text to bins: python prepare.py [config/NAME.py] [--field=value ...]

Each source of the config is read as a stream, cleaned, tokenized on all cores and written to two files in the data
directory: the held-out documents, which are the first of the stream, and the training documents, as many as the run
needs. A bin is nothing but uint16 token ids, the documents joined, each followed by the end-of-document id.

    data/NAME/<source>.bin   data/NAME/<source>_val.bin   data/NAME/<source>_quiz.jsonl   data/NAME/meta.json

Every few seconds the bins are brought to the disk, and then progress.json, which says how long they are and where in
its stream each source stands. Stopped at any moment, the same command goes on from there, and the bins come out the
same to the last byte. Once they are complete, progress.json becomes meta.json.

A source is whatever the `datasets` library can stream: the hub, local files, the text in library.py. Of its features
this uses streaming (huggingface.co/docs/datasets/stream), the selection of columns (there, "Column"; a Parquet file's
other columns, such as embeddings of a few kB a document, are not even downloaded) and the state of a stream (there,
"Save a dataset checkpoint and resume iteration"). It does without the shuffle buffer, whose content such a state does
not hold, and which mixes only neighbours: training draws the blocks of a whole bin in random order (data.py).
"""

import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import signal
import sys
import threading
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

import checkpoint
import library
import tokenizer
from config import BadInput, Config, Source, load, script
from data import tokens_needed

VERSION = 2  # of the bins: raise it when the same config would give other ids
CHUNK = 500_000  # characters that a worker gets at a time: a tenth of a second's work
SAVE_SECONDS = 2  # between two saves: what a kill can cost
WORKERS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # a core each
WAITS = (2, 10, 30, 120)  # seconds before each new attempt after a network error


def clean_text(text: str, preserve_linebreaks: bool = False) -> str:
    """The Stentor3 card's cleaning (Data Pipeline, Text Preprocessing).

    NFKC; then either trailing white space off every line (code), or all white space to single spaces (prose). What
    ends a line is whatever str.splitlines and str.split hold for one, so no "\\r" is left, and its token is free to
    mean "end of document".
    """
    if not text.isascii():  # ASCII is NFKC
        text = unicodedata.normalize("NFKC", text)
    if preserve_linebreaks:
        return "\n".join(line.rstrip() for line in text.splitlines()).strip()
    return " ".join(text.split())


# ---------------------------------------------------------------------------------------------------------------
# Reading. A position in a stream is [state, used]: a state_dict of the dataset, and how many documents after it.


def is_embedded(source: Source) -> bool:
    """Whether the text is that of library.py."""
    return source.dataset.startswith("library:")


def is_remote(source: Source) -> bool:
    """Whether the text is on the hub."""
    return not is_embedded(source) and "/" in source.dataset and not Path(source.dataset).exists()


def embedded(source: Source) -> tuple[list[str], int]:
    """The documents of an embedded source, no two alike, the held-out ones first, and how many those are.

    What stands in a training file too is not held out: that file's code, or its prose, would give it away.
    """
    if source.dataset not in library.SOURCES:
        raise BadInput(f"unknown embedded text {source.dataset!r}; there are {', '.join(library.SOURCES)}")
    texts = {True: {}, False: {}}  # by whether they are held out; dicts, as sets that keep their order
    for held_out, text in library.SOURCES[source.dataset]():
        texts[held_out][clean_text(text, source.preserve_linebreaks)] = None
    held_out = [text for text in texts[True] if text not in texts[False]]
    return [*held_out, *texts[False]], len(held_out)


def open_dataset(source: Source, texts: list[str] | None, files: list[str]):
    """A source as a datasets.IterableDataset with one column; `texts` are those of an embedded source.

    `files` are the names that the source's files had at first, and are filled in then: a position counts files, and
    means nothing among others. Raises BadInput where they have changed, and where there is no such column.
    """
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # we say ourselves what is the matter, and have our own bars
    import datasets  # only now, when the workers are forked: it starts threads

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    if texts is not None:
        return datasets.Dataset.from_dict({source.column: texts}).to_iterable_dataset()
    builder = datasets.load_dataset_builder(source.dataset, source.subset, data_files=list(source.data_files) or None)
    if hasattr(builder.config, "columns"):  # Parquet: read, and download, this column alone
        builder.config.columns = [source.column]
    if hasattr(builder.config, "sample_by"):
        builder.config.sample_by = source.sample_by
    names = [re.sub("@[0-9a-f]{40}", "", str(file))  # of the hub, without the commit: most change no text
             for file in (builder.config.data_files or {}).get(source.split, [])]
    if files and files != names:
        raise BadInput("its files are others than when this preparation began; prepare it anew in another --data_dir")
    files[:] = names
    dataset = builder.as_streaming_dataset(split=source.split)
    if dataset.features is not None and source.column not in dataset.features:
        raise BadInput(f"there is no column {source.column!r}; name the one that holds the text (column)")
    return dataset.select_columns([source.column])


def read(dataset, column: str, position: list) -> Iterator[tuple[list[str], list, list]]:
    """The documents from a position on, in chunks: (texts, position before, position after)."""
    state, used = position
    if state is not None:
        dataset.load_state_dict(state)
    chunk, size = [], 0
    for batch in dataset.iter(batch_size=32):  # a third of the time that single rows take
        texts = [text if text is not None else "" for text in batch[column]]
        strange = next((text for text in texts if not isinstance(text, str)), None)
        if strange is not None:
            raise BadInput(f"the column {column!r} holds {type(strange).__name__}, not text")
        chunk += texts[used:]
        size += sum(map(len, texts[used:]))
        used = max(0, used - len(texts))
        if size >= CHUNK:
            after = [dataset.state_dict(), 0]
            yield chunk, position, after
            chunk, size, position = [], 0, after
    if chunk:
        yield chunk, position, [dataset.state_dict(), 0]


def is_network_error(error: BaseException | None) -> bool:
    """Whether trying again later may help: a lost connection, a server in trouble; not a wrong name or address.

    So it is where the error itself says so, or the one that it came of: the libraries in between give it other names.
    """
    if error is None:
        return False
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", getattr(error, "status", None))  # httpx's and requests'; aiohttp's
    if isinstance(status, int) and 400 <= status < 500:
        return status in (408, 429)
    libraries = ("httpx", "httpcore", "aiohttp", "requests", "urllib3", "asyncio")  # that were in use over the years
    return (isinstance(error, (ConnectionError, TimeoutError))
            or any(base.__module__.startswith(libraries) for base in type(error).__mro__)
            or is_network_error(error.__cause__ or error.__context__))


def patiently(name: str, source: Source, open_: Callable, position: list, online: bool,
              check_ctrl_c: Callable) -> Iterator[tuple]:
    """`read`, and after a network error `read` again from where it had come to.

    Each of WAITS is waited for in turn, from the first again once something has arrived. Raises BadInput, in one line,
    when they are used up, at once where there has not been a network yet (`online` says whether this process has had
    one), and for whatever else keeps a source from being read.
    """
    attempt = 0
    while True:
        try:
            for chunk in read(open_(), source.column, position):
                online, attempt, position = True, 0, chunk[2]
                yield chunk
            return
        except BadInput as error:
            raise BadInput(f"source {name}, {source.dataset}: {error}") from None
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            if not is_network_error(error):
                raise BadInput(f"source {name}, {source.dataset}, cannot be read: {reason}") from error
            if not online or attempt == len(WAITS):
                raise BadInput(f"source {name}, {source.dataset}, cannot be reached: {reason}. Run the same "
                               f"command again when there is a network; the quickstart, python prepare.py, needs "
                               f"none") from error
            tqdm.write(f"  {name}: {reason}; trying again in {WAITS[attempt]} s")
            for _ in range(WAITS[attempt]):
                time.sleep(1)
                check_ctrl_c()
            attempt += 1


# ---------------------------------------------------------------------------------------------------------------
# Tokenizing, in a worker process for each core


def start_worker(name: str, segmentation: str):
    """Make this process ready for `encode`."""
    global vocabulary
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core already
    threading.Thread(target=follow_parent, daemon=True).start()
    vocabulary = tokenizer.load(name, segmentation)


def follow_parent():
    """End this process when its parent has been killed: nobody would ever give it work again."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def encode(texts: list[str], preserve_linebreaks: bool) -> list[tuple[bytes, int, int]]:
    """Clean and tokenize documents: for each its ids with the end-of-document id as a bin has them, how many bytes
    they decode to, and how many the vocabulary could not write. A document that is empty when clean is b""."""
    eos, encoded = vocabulary.eos_id.to_bytes(2, "little"), []
    for text in texts:
        ids, dropped = vocabulary.encode_counted(clean_text(text, preserve_linebreaks))
        if vocabulary.eos_id in ids:
            raise BadInput(f"the document that begins {text[:40]!r} holds the end-of-document id {vocabulary.eos_id}: "
                           f"the vocabulary {vocabulary.name} cannot be used with this text")
        data = ids.astype("<u2", copy=False).tobytes() + eos if len(ids) else b""
        encoded.append((data, vocabulary.count_bytes(ids), dropped))
    return encoded


@contextlib.contextmanager
def worker_pool(*vocabulary: str) -> Iterator[ProcessPoolExecutor]:
    """Processes that run `encode` with tokenizer.load(*vocabulary), one for each core; ended with the context, in the
    middle of their work if need be.

    Forked where forking is safe: a fresh interpreter would import torch for each. That must be before this process has
    threads, so they are started here; the vocabulary's compiled loops come with the fork.
    """
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(WORKERS, context, start_worker, vocabulary)
    try:
        pool.submit(encode, ["Hello, world."], False).result()
        yield pool
        pool.shutdown()
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def tokenized(chunks: Iterator, pool: ProcessPoolExecutor, preserve_linebreaks: bool) -> Iterator[tuple]:
    """Chunks of texts as chunks of what `encode` returns, in order, read and tokenized some way ahead."""
    pending = deque()  # of (future, before, after)
    try:
        for texts, before, after in chunks:
            pending.append((pool.submit(encode, texts, preserve_linebreaks), before, after))
            if len(pending) > 2 * WORKERS:
                future, before, after = pending.popleft()
                yield future.result(), before, after
        while pending:
            future, before, after = pending.popleft()
            yield future.result(), before, after
    finally:
        for future, _, _ in pending:
            future.cancel()


# ---------------------------------------------------------------------------------------------------------------
# Writing


def recipe(config: Config, vocabulary) -> dict:
    """What decides the bins' content, to tell whether a prepared directory is the one that is asked for."""
    fields = ("dataset", "subset", "data_files", "split", "column", "sample_by", "preserve_linebreaks", "held_out")
    sources = {name: {field: getattr(source, field) for field in fields} for name, source in config.sources.items()}
    made = {"version": VERSION, "tokenizer": {"sha256": vocabulary.sha256}, "sources": sources}
    return json.loads(json.dumps(made))  # as it is when read again: tuples become lists


class Preparation:
    """The data directory while it is being filled: the bins, and progress.json, which is never ahead of them.

    progress["sources"][name] holds the counts of each split and `position`, where the stream stands; `read`, how many
    documents of it have been read; `exhausted`, whether that was all.
    """

    def __init__(self, data_dir: Path, progress: dict, check_ctrl_c: Callable):
        """Cut the bins to what `progress` says: what came after the last save comes again.

        Raises BadInput for a bin that is shorter than that.
        """
        self.data_dir, self.progress, self.check_ctrl_c = data_dir, progress, check_ctrl_c
        self.started, self.earlier_seconds = time.monotonic(), progress["seconds"]
        for name, source in progress["sources"].items():
            for split in ("train", "val"):
                path, size = self.path(name, split), 2 * source[split]["tokens"]
                path.touch()
                if path.stat().st_size < size:
                    raise BadInput(f"{path} is shorter than progress.json says; delete {data_dir} and prepare it again")
                os.truncate(path, size)

    def path(self, name: str, split: str) -> Path:
        """The bin of a source's split."""
        return self.data_dir / (f"{name}.bin" if split == "train" else f"{name}_val.bin")

    def held_out_documents(self) -> set[bytes]:
        """Every document of the held-out bins, as its bytes there."""
        documents = set()
        for name in self.progress["sources"]:
            ids = np.fromfile(self.path(name, "val"), "<u2")
            ends = np.flatnonzero(ids == self.progress["eos_id"]) + 1
            documents.update(document.tobytes() for document in np.split(ids, ends))
        return documents

    def save(self):
        """Bring progress.json up to what is on the disk."""
        self.progress["seconds"] = self.earlier_seconds + time.monotonic() - self.started
        checkpoint.replace(self.data_dir / "progress.json", (json.dumps(self.progress, indent=2) + "\n").encode())

    def write(self, name: str, split: str, chunks: Iterator, goal: float, unwanted: set[bytes]):
        """Append a source's documents to the bin of a split until there are enough.

        Enough is `goal` documents read from the stream for "val", and `goal` tokens for "train". Documents in
        `unwanted` are left out: a copy of a held-out document must not be trained on.
        """
        source = self.progress["sources"][name]
        counts = source[split]
        bar = tqdm(desc=f"  {name}", total=goal if goal < float("inf") else None, initial=counts["tokens"],
                   unit=" tokens", unit_scale=True, mininterval=1, leave=False,
                   disable=None if split == "train" else True)  # None: on a terminal only
        with self.path(name, split).open("ab") as file, bar:
            saved = time.monotonic()
            try:
                for documents, before, after in chunks:
                    self.check_ctrl_c()
                    new, position, count = counts.copy(), after, 0
                    for count, (data, size, dropped) in enumerate(documents, 1):
                        if data and data not in unwanted:
                            file.write(data)
                            new["documents"] += 1
                            new["tokens"] += len(data) // 2
                            new["bytes"] += size
                            new["dropped_bytes"] += dropped
                        enough = (source["read"] + count if split == "val" else new["tokens"]) >= goal
                        if enough:
                            position = [before[0], before[1] + count]
                            break
                    bar.update(new["tokens"] - counts["tokens"])
                    counts = new  # then all at once, whenever Ctrl-C comes: what `finally` saves belongs together
                    source.update({split: new, "position": position, "read": source["read"] + count})
                    if enough:
                        break
                    if time.monotonic() - saved > SAVE_SECONDS:
                        self.sync(file)
                        saved = time.monotonic()
                else:
                    source["exhausted"] = True
            finally:  # on Ctrl-C too: counts and position are those of the last whole chunk
                self.sync(file)

    def sync(self, file):
        """Bring a bin to the disk, then the progress that speaks of it."""
        file.flush()
        os.fsync(file.fileno())
        self.save()


@contextlib.contextmanager
def heeding_ctrl_c():
    """Give a function that raises KeyboardInterrupt if Ctrl-C has been pressed: to be asked after every chunk.

    Raised just anywhere it may fall into an object's destruction or a fork, and there Python drops it. A second Ctrl-C
    does not wait to be asked for.
    """
    pressed = []

    def handler(number, frame):
        pressed.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def check():
        if pressed:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def alone(data_dir: Path):
    """Hold the directory's lock. Raises BadInput where another process does, for longer than a killed run's workers
    need to notice (`follow_parent`): forked, they share its lock."""
    if os.name == "nt":  # Windows has no flock
        yield
        return
    import fcntl

    def locked() -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass  # some network drives have no locks
        return True

    descriptor, deadline = os.open(data_dir, os.O_RDONLY), time.monotonic() + 5
    try:
        while not locked():
            if time.monotonic() > deadline:
                raise BadInput(f"another prepare.py is at work in {data_dir}; wait for it, or choose another "
                               f"--data_dir")
            time.sleep(0.1)
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing alone would leave it to workers that are on their way out
        os.close(descriptor)


def earlier_progress(data_dir: Path, wanted: dict) -> dict | None:
    """What meta.json or progress.json says, None where there is neither, or no training token yet of another recipe.

    Raises BadInput for data of another recipe, and for damaged data.
    """
    path = next((data_dir / name for name in ("meta.json", "progress.json") if (data_dir / name).exists()), None)
    if path is None:
        return None
    try:
        progress = json.loads(path.read_text())
        if progress["recipe"] == wanted:
            return progress
        if not any(counts["train"]["tokens"] for counts in progress["sources"].values()):
            return None
    except (ValueError, KeyError, TypeError):
        pass
    raise BadInput(f"{data_dir} holds bins of another recipe, or damaged ones; choose another --data_dir, or delete it")


def first_progress(wanted: dict, vocabulary) -> dict:
    """The progress of a preparation that has not begun."""
    def nothing():
        return {"documents": 0, "tokens": 0, "bytes": 0, "dropped_bytes": 0}

    sources = {name: {"files": [], "position": [None, 0], "read": 0, "exhausted": False,
                      "train": nothing(), "val": nothing()} for name in wanted["sources"]}
    return {"recipe": wanted, "tokenizer": vocabulary.name, "vocab_size": vocabulary.vocab_size,
            "eos_id": vocabulary.eos_id, "seconds": 0.0, "sources": sources}


def announce(config: Config, progress: dict, needed: dict[str, float]):
    """Print what is about to be made. Raises BadInput where the disk cannot hold it."""
    for name, source in config.sources.items():
        there = progress["sources"][name]["train"]["tokens"]
        if needed[name] == float("inf"):
            print(f"  {name:6} all of {source.dataset}")
            continue
        origin = " ".join(filter(None, (source.dataset, source.subset, *source.data_files)))
        print(f"  {name:6} {needed[name]:14,} tokens of {origin}" + (f", {there:,} there" if there else ""))
    free, size = shutil.disk_usage(config.data_dir).free, 2 * tokens_left(progress, needed)
    if size:
        print(f"  {size / 1e9:.2f} GB of bins to write; {free / 1e9:.2f} GB free on the disk"
              + (f"; {clock(progress, needed)}" if progress["seconds"] else ""), flush=True)
    if size > free:
        raise BadInput(f"{config.data_dir} has {free / 1e9:.2f} GB free and the bins need {size / 1e9:.2f}; "
                       f"choose another --data_dir, or a shorter run (--max_steps)")


def clock(progress: dict, needed: dict[str, float]) -> str:
    """The time so far, and at the pace so far what is left of it."""
    there = sum(counts["train"]["tokens"] for counts in progress["sources"].values())
    left = tokens_left(progress, needed)
    if not left or not there:
        return f"{duration(progress['seconds'])} so far"
    seconds_left = progress["seconds"] * left / there
    return f"{duration(progress['seconds'])} so far, about {duration(seconds_left)} left"


def tokens_left(progress: dict, needed: dict[str, float]) -> int:
    """Training tokens yet to be written, where their number is known."""
    return sum(max(0, needed[name] - counts["train"]["tokens"]) for name, counts in progress["sources"].items()
               if not counts["exhausted"] and needed[name] < float("inf"))


def duration(seconds: float) -> str:
    """A length of time for people to read."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def report(name: str, progress: dict, needed: dict[str, float]):
    """Print what a source's bins hold."""
    counts = progress["sources"][name]
    train, val = counts["train"], counts["val"]
    print(f"  {name:6} {train['tokens']:14,} tokens of {train['documents']:,} documents, {val['tokens']:,} of "
          f"{val['documents']:,} held out; {train['bytes'] / 1e6:,.1f} MB, "
          f"{train['bytes'] / max(1, train['tokens']):.2f} bytes a token, {train['dropped_bytes']:,} bytes dropped"
          + ("; the source holds no more" if counts["exhausted"] and needed[name] < float("inf") else "")
          + f"; {clock(progress, needed)}", flush=True)


def fill(config: Config, progress: dict, needed: dict[str, float]):
    """Write every source's bins from where `progress` says they stand, all that is held out before any of the rest."""
    texts, held_out = {}, {}
    for name, source in config.sources.items():
        texts[name], held_out[name] = embedded(source) if is_embedded(source) else (None, source.held_out)
    online = False
    with heeding_ctrl_c() as check_ctrl_c, worker_pool(config.tokenizer, config.tokenizer_segmentation) as pool:
        check_ctrl_c()
        preparation = Preparation(config.data_dir, progress, check_ctrl_c)
        for split in ("val", "train"):
            unwanted = set() if split == "val" else preparation.held_out_documents()
            for name, source in config.sources.items():
                counts = progress["sources"][name]
                have, goal = ((counts["read"], held_out[name]) if split == "val" else
                              (counts["train"]["tokens"], needed[name]))
                if have < goal and not counts["exhausted"]:
                    open_ = partial(open_dataset, source, texts[name], counts["files"])
                    chunks = patiently(name, source, open_, counts["position"], online, check_ctrl_c)
                    preparation.write(name, split, tokenized(chunks, pool, source.preserve_linebreaks), goal, unwanted)
                    online = online or is_remote(source)
                if not counts[split]["tokens"] and (goal or split == "val"):
                    kind = "held-out" if split == "val" else "training"
                    raise BadInput(f"source {name} gave no {kind} documents: it has {counts['read']:,}, of which the "
                                   f"first {held_out[name]:,} are held out (--sources.{name}.held_out)")
                if split == "train":
                    report(name, progress, needed)


def main(argv: list[str]):
    config = load(argv)
    print(f"preparing {config.data_dir} with {config.tokenizer}", flush=True)  # what follows may wait for the network
    vocabulary = tokenizer.load(config.tokenizer, config.tokenizer_segmentation)
    if vocabulary.vocab_size > 65536:
        raise BadInput(f"{vocabulary.name} has {vocabulary.vocab_size:,} ids; a bin of uint16 can hold 65,536")
    data_dir = config.data_dir
    meta_path, progress_path = data_dir / "meta.json", data_dir / "progress.json"
    wanted, needed = recipe(config, vocabulary), tokens_needed(config)
    for name, source in config.sources.items():
        if is_embedded(source):  # it is small: all of it is taken, whatever the run needs
            needed[name] = float("inf")
    data_dir.mkdir(parents=True, exist_ok=True)
    with alone(data_dir):
        progress = earlier_progress(data_dir, wanted) or first_progress(wanted, vocabulary)
        enough = all(counts["exhausted"] or counts["train"]["tokens"] >= needed[name]
                     for name, counts in progress["sources"].items())
        if enough and meta_path.exists():
            print(f"{data_dir} is complete; delete it to prepare it again")
            return
        announce(config, progress, needed)
        if meta_path.exists():  # a longer run needs more: go on where it ended
            meta_path.replace(progress_path)
        try:
            fill(config, progress, needed)
        except (KeyboardInterrupt, BadInput, OSError, BrokenProcessPool) as error:
            saved = earlier_progress(data_dir, wanted) or first_progress(wanted, vocabulary)  # as it is on the disk
            safe = sum(counts["train"]["tokens"] + counts["val"]["tokens"] for counts in saved["sources"].values())
            if safe:
                print(f"stopped: {safe:,} tokens are safe in {data_dir}, to go on from", flush=True)
            if isinstance(error, BrokenProcessPool):
                raise BadInput("a worker process has died, as happens when memory runs out; try again") from error
            raise
        for name, source in config.sources.items():
            if source.dataset in library.QUIZZES:
                lines = [json.dumps(question) + "\n" for question in library.QUIZZES[source.dataset]()]
                (data_dir / f"{name}_quiz.jsonl").write_text("".join(lines))
        progress_path.replace(meta_path)  # complete only now
        checkpoint.sync_directory(data_dir)
    total = sum(counts["train"]["tokens"] for counts in progress["sources"].values())
    print(f"{data_dir} is complete: {total:,} training tokens in {duration(progress['seconds'])}")


if __name__ == "__main__":
    try:
        script(main)
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code or 0)  # at once: Python's own way out waits for workers that Ctrl-C may have left half-made
