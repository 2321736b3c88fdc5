"""Streams of documents: cleaned, read from any place in them, patient with the network.

A source is files on this machine, which we list and read ourselves (files.py, readers.py), the text in embedded.py, or
whatever the `datasets` library can stream from the hub. Of the library we use streaming
(huggingface.co/docs/datasets/stream), the selection of columns (there, "Column"), and the state of a stream (there,
"Save a dataset checkpoint and resume iteration"). A Parquet file's other columns, such as embeddings of a few kB a
document, are then not even downloaded. We do without the shuffle buffer. The state of a stream does not hold its
content, and it mixes only neighbours. Instead, training draws the blocks of a whole bin in random order (data.py).

A position in a stream is [state, used]: what the stream needs to go on from some place, and how many documents after it
are used already.
"""

import os
import re
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cli import BadInput, brief
from config import Source
from sources import embedded
from sources.files import READERS, File, Listing, as_file, below, find_files, is_local, some
from sources.readers import BadRow, rows
from tokenizer.hub import Patience, is_network_error, status_of

CHUNK = 500_000  # characters that a worker gets at a time: a tenth of a second's work
BAD_IN_A_ROW = 100  # rows that cannot be used are no odd ones any more


def clean_text(text: str, preserve_linebreaks: bool = False) -> str:
    """The Stentor3 card's cleaning (Data Pipeline, Text Preprocessing).

    First comes NFKC. Then code loses the white space at the end of every line, and in prose all white space becomes
    single spaces. str.splitlines and str.split say what ends a line, so no "\\r" is left, and its token is free to mean
    "end of document".
    """
    if not text.isascii():  # ASCII is NFKC
        text = unicodedata.normalize("NFKC", text)
    if preserve_linebreaks:
        return "\n".join(line.rstrip() for line in text.splitlines()).strip()
    return " ".join(text.split())


def is_embedded(source: Source) -> bool:
    """Whether the text comes from embedded.py."""
    return source.dataset.startswith("library:")


def is_remote(source: Source) -> bool:
    """Whether the text is on the hub, or elsewhere on the network."""
    return not is_embedded(source) and not is_local(source)


def embedded_documents(source: Source) -> tuple[list[str], int]:
    """The documents of an embedded source, no two alike and the held-out ones first, and how many are held out.

    A text that is also in a training file is not held out: that file's code, or its prose, would give it away. Raises
    BadInput if there is no such source.
    """
    if source.dataset not in embedded.SOURCES:
        raise BadInput(f"unknown embedded text {source.dataset!r}; there are {', '.join(embedded.SOURCES)}")
    texts = {True: {}, False: {}}  # keyed by held_out; the dicts are sets that keep their order
    for held_out, text in embedded.SOURCES[source.dataset]():
        texts[held_out][clean_text(text, source.preserve_linebreaks)] = None
    held_out = [text for text in texts[True] if text not in texts[False]]
    return [*held_out, *texts[False]], len(held_out)


# ---------------------------------------------------------------------------------------------------------------
# Three kinds of stream. Each has rows(state), which yields (row, whether a reader can start after it), and state(), the
# place after the row that came last.


class TextStream:
    """Documents in memory."""

    def __init__(self, texts: list[str]):
        self.texts, self.row = texts, 0

    def rows(self, state: dict | None) -> Iterator[tuple[str, bool]]:
        """The documents from a place on."""
        self.row = state["row"] if state else 0
        for text in self.texts[self.row:]:
            self.row += 1
            yield text, True

    def state(self) -> dict:
        """The place after the last one."""
        return {"row": self.row}


class FileStream:
    """Files that we read ourselves."""

    def __init__(self, source: Source, files: list[File]):
        self.source, self.files, self.place = source, files, {"file": 0, "at": 0, "line": 0}

    def rows(self, state: dict | None) -> Iterator[tuple[str | BadRow, bool]]:
        """The rows from a place on, file after file."""
        self.place = state or {"file": 0, "at": 0, "line": 0}
        if any(type(self.place.get(key)) is not int or self.place[key] < 0 for key in ("file", "at", "line")):
            raise BadInput(f"its position is damaged ({self.place}); prepare it anew in another --data_dir")
        for number in range(self.place["file"], len(self.files)):
            start = self.place["at"], self.place["line"]
            for row, at, line in rows(self.files[number], self.source.column, self.source.sample_by, *start):
                if at is not None:
                    self.place = {"file": number, "at": at, "line": line}
                yield row, at is not None
            self.place = {"file": number + 1, "at": 0, "line": 0}

    def state(self) -> dict:
        """The place after the last one."""
        return self.place


class LibraryStream:
    """What the `datasets` library streams."""

    def __init__(self, dataset: Any, column: str):
        self.dataset, self.column = dataset, column

    def rows(self, state: dict | None) -> Iterator[tuple[str, bool]]:
        """The rows from a place on. Raises BadInput if the column holds something other than text."""
        if state is not None:
            self.dataset.load_state_dict(state)
        for batch in self.dataset.iter(batch_size=32):  # takes a third of the time of single rows
            texts = batch[self.column]
            for place, text in enumerate(texts, 1):
                if text is not None and not isinstance(text, str):
                    raise BadInput(f"the column {self.column!r} holds {type(text).__name__}, not text")
                yield text or "", place == len(texts)

    def state(self) -> dict:
        """The place after the last batch."""
        return self.dataset.state_dict()


# ---------------------------------------------------------------------------------------------------------------
# Opening and reading them


class Notes:
    """What there is to say about a source while it is read, each thing once."""

    def __init__(self, name: str):
        self.name, self.said = name, set()

    def say(self, words: str):
        """Print it, beside a progress bar."""
        if words not in self.said:
            self.said.add(words)
            tqdm.write(f"  {self.name:6} {words}")

    def look(self, source: Source, origin: dict):
        """Say what a source on this machine reads. Raises BadInput if that is nothing, or not what it was."""
        if not has_subsets(source):
            try:
                open_stream(source, None, origin, self)
            except BadInput as error:
                raise BadInput(f"source {self.name}, {source.dataset}: {error}") from None

    def bad_row(self, row: BadRow):
        """Name the first few rows that are left out."""
        if len([words for words in self.said if words.startswith("leaves out a row: ")]) < 3:
            self.say(f"leaves out a row: {row}")


def open_stream(source: Source, texts: list[str] | None, origin: dict,
                notes: Notes) -> TextStream | FileStream | LibraryStream:
    """A source as a stream. `texts` are the documents of an embedded source.

    origin      "files", "stamps" and "commit": the names of the source's files, what tells whether they have changed,
                and their commit on the hub. They are filled in at first. Later they must be the same: a position counts
                files, and means nothing among others.

    Raises BadInput if they have changed, or if there is no such column.
    """
    if texts is not None:
        return TextStream(texts)
    if is_local(source) and not has_subsets(source):
        listing, stream = find_files(source), None
    else:
        listing, stream = library_stream(source, origin)
    for words in listing.words(source):
        notes.say(words)
    compare(origin, listing)
    return stream or FileStream(source, listing.files)


def has_subsets(source: Source) -> bool:
    """Whether a folder's README.md says which of its files make up which subset and split."""
    readme = Path(source.dataset).expanduser() / "README.md"
    return (source.dataset not in READERS and not source.data_files and readme.is_file()
            and re.match(r"---\s*\n(.*\n)*?(configs|dataset_info):", readme.read_text(errors="replace")) is not None)


def compare(origin: dict, listing: Listing):
    """Check that the files are those of earlier sessions, or note what they are. Raises BadInput if they changed."""
    names = [re.sub("@[0-9a-f]{40}", "", file.path) for file in listing.files]  # most commits change no text
    stamps, earlier = [file.stamp for file in listing.files], origin["files"]
    again = "prepare it anew in another --data_dir"
    if earlier and earlier != names:
        odd = [name for name in [*earlier, *names] if (name in earlier) != (name in names)]
        raise BadInput(f"its files are others than when this preparation began ({some(odd) or 'in another order'}); "
                       f"{again}")
    changed = [name for name, now, then in zip(names, stamps, origin.get("stamps") or stamps) if now != then]
    if changed:
        raise BadInput(f"{some(changed)}: changed since this preparation began; {again}")
    origin.update(files=names, stamps=stamps, commit=listing.commit)


def library_stream(source: Source, origin: dict) -> tuple[Listing, LibraryStream | None]:
    """What `datasets` finds, at the commit that `origin` names; and its stream, unless we read such files ourselves."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # we say ourselves what is wrong, and have our own progress bars
    import datasets  # only now, when the workers are forked: it starts threads
    import huggingface_hub

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    commit = None
    if source.dataset not in READERS and is_remote(source):
        commit = origin["commit"] = origin.get("commit") or huggingface_hub.HfApi().dataset_info(source.dataset).sha
    patterns = [pinned(pattern, origin) for pattern in source.data_files]
    folder = source.dataset if is_remote(source) or source.dataset in READERS else str(
        Path(source.dataset).expanduser())
    builder = datasets.load_dataset_builder(folder, source.subset, data_files=patterns or None, revision=commit)
    chosen = (builder.config.data_files or {}).get(source.split, [])
    stamps = getattr(chosen, "origin_metadata", [])
    kind = builder.name if builder.name in READERS else ""
    files = [File(kind, str(path), list(stamp)) if "://" in str(path) else as_file(Path(path), kind)
             for path, stamp in zip(chosen, stamps)]
    for file in files:
        file.separator = getattr(builder.config, "sep", None) or ","
    listing = Listing(files, others(source, builder, files), commit)
    ours = kind and (kind != "parquet" or not is_remote(source)) and plain(builder)
    if ours and files:
        return listing, None
    if hasattr(builder.config, "columns"):  # Parquet: read, and download, only this column
        builder.config.columns = [source.column]
    dataset = builder.as_streaming_dataset(split=source.split)
    if dataset.features is not None and source.column not in dataset.features:
        raise BadInput(f"there is no column {source.column!r}; name the one that holds the text (column)")
    return listing, LibraryStream(dataset.select_columns([source.column]), source.column)


def pinned(pattern: str, origin: dict) -> str:
    """A pattern of files on the hub, at the commit at which the preparation began."""
    repository = re.match(r"hf://datasets/([^/@]+/[^/@]+)/", pattern)
    for stamp in origin.get("stamps") or [] if repository else []:
        if repository[1] in stamp:  # (endpoint, repository, commit)
            return pattern.replace(repository[1], f"{repository[1]}@{stamp[-1]}", 1)
    return pattern


def plain(builder: Any) -> bool:
    """Whether a data set's README asks for nothing that only `datasets` knows, such as another encoding."""
    usual = type(builder.config)()
    return all(getattr(builder.config, name, None) == getattr(usual, name, None)
               for name in ("field", "encoding", "header", "names", "column_names", "quotechar", "skiprows"))


def others(source: Source, builder: Any, files: list[File]) -> list[str]:
    """Files of the other splits; of a folder, all the others."""
    if not is_remote(source):
        folder, read = Path(source.dataset).expanduser(), {file.path for file in files}
        paths, left_out = below(folder)
        return left_out + [str(path.relative_to(folder)) for path in paths if os.path.abspath(path) not in read]
    return [f"split {split} ({len(paths)})" for split, paths in (builder.config.data_files or {}).items()
            if split != source.split]


def read(stream: TextStream | FileStream | LibraryStream, source: Source, position: list,
         notes: Notes) -> Iterator[tuple[list[str | None], list, list]]:
    """The documents from a position on, in chunks: (texts, position before, position after).

    None stands for a row that cannot be used. Raises BadInput for such a row if the source refuses them, and if there
    are too many in a row.
    """
    state, used = position
    chunk, size, bad = [], 0, 0
    for row, whole in stream.rows(state):
        if used:
            used -= 1
        elif isinstance(row, BadRow):
            bad += 1
            if source.bad_rows == "refuse":
                raise BadInput(f"{row}; --sources.{notes.name}.bad_rows skip counts such rows and goes on")
            if bad == BAD_IN_A_ROW:
                raise BadInput(f"{BAD_IN_A_ROW} rows in a row hold no text; the last is {row}")
            notes.bad_row(row)
            chunk.append(None)
        else:
            bad = 0
            chunk.append(row)
            size += len(row)
        if whole and (size >= CHUNK or len(chunk) >= CHUNK) and not used:
            after = [stream.state(), 0]
            yield chunk, position, after
            chunk, size, position = [], 0, after
    if chunk:
        yield chunk, position, [stream.state(), 0]


# ---------------------------------------------------------------------------------------------------------------
# The network


def advice(source: Source, error: BaseException) -> str:
    """What to do about a source that a server refuses."""
    page = f"huggingface.co/datasets/{source.dataset}"
    if "gated" in f"{type(error).__name__} {error}".lower():
        return f"; accept its terms at {page} and log in: hf auth login"
    if "revision" in str(error).lower():
        return "; the commit at which this preparation began is gone; prepare it anew in another --data_dir"
    if status_of(error) in (401, 403):
        return f"; if {page} exists, it is private or gated: log in with hf auth login"
    return ""


def read_patiently(name: str, source: Source, open_: Callable, position: list, online: bool,
                   check_stop: Callable[[], None], notes: Notes) -> Iterator[tuple[list[str | None], list, list]]:
    """`read`, and after a network error `read` again from the place it had reached, as long as `Patience` lasts.

    Raises BadInput, in one line, when it is used up, or at once if this process has not had a network yet (`online`
    says whether it has). Anything else that keeps a source from being read is a BadInput too.
    """
    patience = Patience(online)
    while True:
        try:
            for chunk in read(open_(), source, position, notes):
                patience.arrived()
                position = chunk[2]
                yield chunk
            return
        except BadInput as error:
            raise BadInput(f"source {name}, {source.dataset}: {error}") from None
        except Exception as error:
            reason = brief(error) if isinstance(error, OSError) else f"{type(error).__name__}: {brief(error)}"
            if not is_network_error(error):
                raise BadInput(f"source {name}, {source.dataset}, cannot be read: {reason}{advice(source, error)}"
                               ) from error
            seconds = patience.seconds(error)
            if seconds is None:
                here = "" if source.dataset in READERS else f"there is no folder {source.dataset} here, and "
                raise BadInput(f"source {name}, {source.dataset}, cannot be reached: {here}{reason}. Run the same "
                               f"command again when there is a network; the quickstart, python prepare.py, needs "
                               f"none") from error
            tqdm.write(f"  {name}: {reason}; trying again in {seconds} s")
            for _ in range(seconds):
                time.sleep(1)
                check_stop()
