"""Text to bins: python prepare.py [config/NAME.py] [--field=value ...]

Each source of the config is read as a stream, cleaned, tokenized on all cores and written to two files in the data
directory: the held-out documents, which are the first of the stream, and the training documents, as many as the run
needs. A bin is nothing but uint16 token ids, the documents joined, each followed by the end-of-document id.

    data/NAME/<source>.bin   data/NAME/<source>_val.bin   data/NAME/<source>_quiz.jsonl   data/NAME/meta.json

Every few seconds the bins go to the disk, and after them progress.json, which says how long they are and where in its
stream each source stands. Stop it at any moment: the same command goes on from there, and the bins come out the same to
the last byte. Once they are complete, progress.json becomes meta.json.
"""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

import checkpoint
import tokenizer
from cli import BadInput, StopRequest, is_count, is_number, is_positive, parse_json, script
from config import Config, Source, load
from data import tokens_needed
from run import duration
from sources.embedded import QUIZZES
from sources.files import is_local, kind_of
from sources.streams import Notes, embedded_documents, is_embedded, is_remote, open_stream, read_patiently
from sources.workers import KEPT, LEFT_OUT, tokenized, worker_pool
from tokenizer import Tokenizer

VERSION = 2  # of the bins: raise it if the same config gives other ids than before
COUNTS = dict.fromkeys(("documents", "tokens", "bytes", "dropped_bytes"), is_count)
COUNTS |= dict.fromkeys(("marked?", *(f"{fate}?" for fate in LEFT_OUT)), is_count)
PROGRESS = {  # what progress.json and meta.json must hold
    "recipe": dict, "tokenizer": str, "vocab_size": is_positive, "eos_id": is_count,
    "seconds": is_number, "sources": {str: {
        "files": list, "stamps?": list, "position": lambda value: isinstance(value, list) and len(value) == 2
        and is_count(value[1]), "read": is_count, "exhausted": bool, "train": COUNTS, "val": COUNTS}}}
SAVE_SECONDS = 2  # between two saves: the most that a kill can cost


def recipe(config: Config, vocabulary: Tokenizer) -> dict:
    """Everything that decides what is in the bins, to tell whether a prepared directory is the right one.

    bad_rows is not: where a source refuses them, no bin is made that skipping would have made otherwise.
    """
    fields = ("dataset", "subset", "data_files", "split", "column", "sample_by", "preserve_linebreaks", "held_out")
    sources = {name: {field: getattr(source, field) for field in fields} for name, source in config.sources.items()}
    for name, source in config.sources.items():
        if source.special_tokens != "text":  # so that the recipes of before this field stay the same
            sources[name]["special_tokens"] = source.special_tokens
    made = {"version": VERSION, "tokenizer": {"sha256": vocabulary.sha256}, "sources": sources}
    if vocabulary.delimiters:  # not the usual ones
        made["tokenizer"]["eos_token"] = vocabulary.eos_token
    return json.loads(json.dumps(made))  # as it reads back from a file: tuples become lists


def take(documents: list[tuple[bytes, int, int, str]], counts: dict, unwanted: set[bytes], left: float,
         most: float) -> tuple[bytes, dict, int, bool]:
    """Go through a chunk of documents until there are enough.

    documents    as `workers.encode` returns them
    left         how many documents may still be looked at
    most         tokens at which the bin is full

    Returns what to write, the new counts, how many documents were looked at, and whether there are enough. Every
    document is counted: as written, or as left out for one of the reasons in LEFT_OUT.
    """
    counts, data = counts.copy(), []
    for number, (document, size, dropped, fate) in enumerate(documents, 1):
        if document and document in unwanted:
            fate = "copies"
        counts["documents" if fate in KEPT else fate] += 1
        if fate in KEPT:
            data.append(document)
            counts["marked"] += fate == "marked"
            counts["tokens"] += len(document) // 2
            counts["bytes"] += size
            counts["dropped_bytes"] += dropped
        if number >= left or counts["tokens"] >= most:
            return b"".join(data), counts, number, True
    return b"".join(data), counts, len(documents), False


def progress_bar(name: str, counts: dict, goal: float, split: str) -> tqdm:
    """A bar of tokens, only on a terminal and only for training text."""
    return tqdm(desc=f"  {name}", total=goal if goal < float("inf") else None, initial=counts["tokens"],
                unit=" tokens", unit_scale=True, mininterval=1, leave=False,
                disable=None if split == "train" else True)  # None: on a terminal only


class Preparation:
    """The data directory while it fills up: the bins, and progress.json, which is never ahead of them.

    progress["sources"][name] holds the counts of each split; `position`, where the stream stands; `read`, how many
    documents have been read from it; and `exhausted`, whether those were all.
    """

    def __init__(self, data_dir: Path, progress: dict, stop: StopRequest):
        """Cut the bins to the length that `progress` gives. What came after the last save will come again.

        Raises BadInput if a bin is shorter than that.
        """
        self.data_dir, self.progress, self.stop = data_dir, progress, stop
        self.started, self.earlier_seconds = time.monotonic(), progress["seconds"]
        for name, source in progress["sources"].items():
            for split in ("train", "val"):
                source[split] = dict.fromkeys(("marked", *LEFT_OUT), 0) | source[split]  # earlier versions had fewer
                path, size = self.path(name, split), 2 * source[split]["tokens"]
                path.touch()
                if path.stat().st_size < size:
                    raise BadInput(f"{path} is shorter than progress.json says; delete {data_dir} and prepare it again")
                os.truncate(path, size)

    def path(self, name: str, split: str) -> Path:
        """The bin of a source's split."""
        return self.data_dir / (f"{name}.bin" if split == "train" else f"{name}_val.bin")

    def held_out_documents(self) -> set[bytes]:
        """Every document of the held-out bins, as its bytes in the bin."""
        documents = set()
        for name in self.progress["sources"]:
            ids = np.fromfile(self.path(name, "val"), "<u2")
            ends = np.flatnonzero(ids == self.progress["eos_id"]) + 1
            documents.update(document.tobytes() for document in np.split(ids, ends))
        return documents

    def save(self):
        """Bring progress.json up to date with the bins on the disk."""
        self.progress["seconds"] = self.earlier_seconds + time.monotonic() - self.started
        checkpoint.replace(self.data_dir / "progress.json", (json.dumps(self.progress, indent=2) + "\n").encode())

    def write(self, name: str, split: str, chunks: Iterator, goal: float, unwanted: set[bytes]):
        """Append a source's documents to the bin of a split until there are enough.

        For "val", `goal` counts documents read from the stream; for "train", tokens. Documents in `unwanted` are left
        out: we must not train on a copy of a held-out document.
        """
        source = self.progress["sources"][name]
        with self.path(name, split).open("ab") as file, progress_bar(name, source[split], goal, split) as bar:
            saved = time.monotonic()
            try:
                for documents, before, after in chunks:
                    self.stop.check()
                    left = goal - source["read"] if split == "val" else float("inf")
                    most = float("inf") if split == "val" else goal
                    data, counts, looked_at, enough = take(documents, source[split], unwanted, left, most)
                    file.write(data)
                    bar.update(counts["tokens"] - source[split]["tokens"])
                    position = [before[0], before[1] + looked_at] if enough else after
                    # In one go, whenever Ctrl-C comes: what `finally` saves belongs together.
                    source.update({split: counts, "position": position, "read": source["read"] + looked_at})
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
        """Write a bin to the disk, and then the progress that describes it."""
        file.flush()
        os.fsync(file.fileno())
        self.save()


def earlier_progress(data_dir: Path, wanted: dict) -> dict | None:
    """What meta.json or progress.json says. None if there is neither, or one of another recipe without training tokens.

    Raises BadInput if the data is damaged, or of another recipe.
    """
    path = next((data_dir / name for name in ("meta.json", "progress.json") if (data_dir / name).exists()), None)
    if path is None:
        return None
    try:
        progress = parse_json(path.read_bytes(), PROGRESS)
        if progress["recipe"] == wanted and progress["sources"].keys() == wanted["sources"].keys():
            return progress
        if not any(counts["train"]["tokens"] for counts in progress["sources"].values()):
            return None
    except (ValueError, KeyError, TypeError):
        pass
    raise BadInput(f"{data_dir} holds bins of another recipe, or damaged ones; choose another --data_dir, or delete it")


def first_progress(wanted: dict, vocabulary: Tokenizer) -> dict:
    """The progress of a preparation that has not begun."""
    def nothing():
        return dict.fromkeys(("documents", "tokens", "bytes", "dropped_bytes", "marked", *LEFT_OUT), 0)

    sources = {name: {"files": [], "stamps": [], "commit": None, "position": [None, 0], "read": 0, "exhausted": False,
                      "train": nothing(), "val": nothing()} for name in wanted["sources"]}
    return {"recipe": wanted, "tokenizer": vocabulary.name, "vocab_size": vocabulary.vocab_size,
            "eos_id": vocabulary.eos_id, "seconds": 0.0, "sources": sources}


def announce(config: Config, progress: dict, needed: dict[str, float]):
    """Print what is about to be made. Raises BadInput if the disk cannot hold it."""
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
    """The time so far, and the time left at the same pace."""
    there = sum(counts["train"]["tokens"] for counts in progress["sources"].values())
    left = tokens_left(progress, needed)
    if not left or not there:
        return f"{duration(progress['seconds'])} so far"
    seconds_left = progress["seconds"] * left / there
    return f"{duration(progress['seconds'])} so far, about {duration(seconds_left)} left"


def tokens_left(progress: dict, needed: dict[str, float]) -> int:
    """Training tokens still to be written, of the sources for which that is known."""
    return sum(max(0, needed[name] - counts["train"]["tokens"]) for name, counts in progress["sources"].items()
               if not counts["exhausted"] and needed[name] < float("inf"))


def left_out(counts: dict) -> str:
    """What documents of a source were left out, and which hold what looks like a special token; "" if none."""
    words = {"empty": "empty", "copies": "copies of held-out text", "bad_rows": "rows without text, or damaged",
             "special": "with text that is a special token", "marked": "kept, with a special token spelled out"}
    found = {words[kind]: counts["train"][kind] + counts["val"][kind] for kind in words}
    return "".join(f"; {number:,} {kind}" for kind, number in found.items() if number)


def report(name: str, progress: dict, needed: dict[str, float]):
    """Print what a source's bins hold."""
    counts = progress["sources"][name]
    train, val = counts["train"], counts["val"]
    print(f"  {name:6} {train['tokens']:14,} tokens of {train['documents']:,} documents, {val['tokens']:,} of "
          f"{val['documents']:,} held out; {train['bytes'] / 1e6:,.1f} MB, "
          f"{train['bytes'] / max(1, train['tokens']):.2f} bytes a token, {train['dropped_bytes']:,} bytes dropped"
          + left_out(counts)
          + ("; the source holds no more" if counts["exhausted"] and needed[name] < float("inf") else "")
          + f"; {clock(progress, needed)}", flush=True)


def fill(config: Config, progress: dict, needed: dict[str, float]):
    """Write every source's bins, from where `progress` says they stand. All held-out text comes before any other.

    Raises BadInput if a source has no held-out or no training documents.
    """
    texts, held_out, notes = {}, {}, {name: Notes(name) for name in config.sources}
    for name, source in config.sources.items():
        texts[name], held_out[name] = embedded_documents(source) if is_embedded(source) else (None, source.held_out)
        counts = progress["sources"][name]
        wanted = counts["read"] < held_out[name] or counts["train"]["tokens"] < needed[name]
        if wanted and not counts["exhausted"] and not is_embedded(source) and is_local(source):
            notes[name].look(source, counts)  # a mistyped name is found before any work
    online = False
    with (StopRequest(signal.SIGINT) as stop,
          worker_pool(config.tokenizer, config.tokenizer_segmentation, config.eos_token) as pool):
        stop.check()
        preparation = Preparation(config.data_dir, progress, stop)
        for split in ("val", "train"):
            unwanted = set() if split == "val" else preparation.held_out_documents()
            for name, source in config.sources.items():
                counts = progress["sources"][name]
                have, goal = ((counts["read"], held_out[name]) if split == "val" else
                              (counts["train"]["tokens"], needed[name]))
                if have < goal and not counts["exhausted"]:
                    open_ = partial(open_stream, source, texts[name], counts, notes[name])
                    chunks = read_patiently(name, source, open_, start_of(name, source, counts), online, stop.check,
                                            notes[name])
                    preparation.write(name, split, tokenized(chunks, pool, source), goal, unwanted)
                    online = online or is_remote(source)
                if not counts[split]["tokens"] and (goal or split == "val"):
                    raise BadInput(nothing_left(name, source, split, counts, held_out[name]))
                if split == "train":
                    report(name, progress, needed)


def start_of(name: str, source: Source, counts: dict) -> list:
    """The position from which to read a source. Raises BadInput if it is an earlier version's, and means nothing now.

    An earlier version read all files with the `datasets` library. In files of rows we find the place by counting.
    """
    state = counts["position"][0]
    if state is None or "examples_iterable" not in state or is_remote(source):
        return counts["position"]
    if source.sample_by == "paragraph" and any(kind_of(Path(file)) not in ("json", "csv", "parquet")
                                               for file in counts["files"]):
        raise BadInput(f"source {name}: its paragraphs are now told apart in another way than when this preparation "
                       f"began; prepare it anew in another --data_dir")
    return [None, counts["read"]]


def bins_of(progress: dict) -> list[int]:
    """The length of each bin."""
    return [counts[split]["tokens"] for counts in progress["sources"].values() for split in ("train", "val")]


def nothing_left(name: str, source: Source, split: str, counts: dict, held_out: int) -> str:
    """What to say of a source without documents to hold out, or to train on."""
    kind = "held-out" if split == "val" else "training"
    words = f"source {name} gave no {kind} documents: it has {counts['read']:,}{left_out(counts)}"
    if split == "train" or not counts["read"]:
        words += f", of which the first {held_out:,} are held out (--sources.{name}.held_out)"
    if counts["read"] <= held_out and not is_embedded(source):
        words += {"paragraph": f"; empty lines separate documents of plain text (or choose --sources.{name}.sample_by)",
                  "document": "; each file of plain text is one document", "line": ""}[source.sample_by]
    return words


def main(argv: list[str]):
    config = load(argv)
    print(f"preparing {config.data_dir} with {config.tokenizer}", flush=True)  # what follows may wait for the network
    vocabulary = tokenizer.load(config.tokenizer, config.tokenizer_segmentation, config.eos_token)
    for remark in vocabulary.notes:
        print(f"  note: {remark}", flush=True)
    if vocabulary.vocab_size > 65536:
        raise BadInput(f"{vocabulary.name} has {vocabulary.vocab_size:,} ids; a bin of uint16 can hold 65,536")
    data_dir = config.data_dir
    meta_path, progress_path = data_dir / "meta.json", data_dir / "progress.json"
    wanted, needed = recipe(config, vocabulary), tokens_needed(config)
    for name, source in config.sources.items():
        if is_embedded(source):  # it is small, so we take all of it, whatever the run needs
            needed[name] = float("inf")
    with checkpoint.alone(data_dir, f"prepare.py is at work in {data_dir}; wait for it, or choose another --data_dir"):
        progress = earlier_progress(data_dir, wanted) or first_progress(wanted, vocabulary)
        enough = all(counts["exhausted"] or counts["train"]["tokens"] >= needed[name]
                     for name, counts in progress["sources"].items())
        if enough and meta_path.exists():
            print(f"{data_dir} is complete; delete it to prepare it again")
            return
        announce(config, progress, needed)
        complete = meta_path.exists()
        if complete:  # a longer run needs more: go on where it ended
            before = meta_path.read_bytes()
            meta_path.replace(progress_path)
        try:
            fill(config, progress, needed)
        except (KeyboardInterrupt, BadInput, OSError, BrokenProcessPool) as error:
            saved = earlier_progress(data_dir, wanted) or first_progress(wanted, vocabulary)  # as the disk has it
            safe = sum(counts["train"]["tokens"] + counts["val"]["tokens"] for counts in saved["sources"].values())
            if complete and bins_of(saved) == bins_of(json.loads(before)):  # nothing was added: it is still complete
                checkpoint.replace(meta_path, before)
                progress_path.unlink(missing_ok=True)
            elif safe:
                print(f"stopped: {safe:,} tokens are safe in {data_dir}; run the same command to go on", flush=True)
            if isinstance(error, BrokenProcessPool):
                raise BadInput("a worker process has died, as happens when memory runs out; try again") from error
            raise
        for name, source in config.sources.items():
            if source.dataset in QUIZZES:
                lines = [json.dumps(question) + "\n" for question in QUIZZES[source.dataset]()]
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
