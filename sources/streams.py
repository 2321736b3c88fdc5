"""Streams of documents: cleaned, read from any place in them, patient with the network.

A source is whatever the `datasets` library can stream: the hub, local files, the text in embedded.py. We use three of
the library's features: streaming (huggingface.co/docs/datasets/stream), the selection of columns (there, "Column"), and
the state of a stream (there, "Save a dataset checkpoint and resume iteration"). A Parquet file's other columns, such as
embeddings of a few kB a document, are then not even downloaded. We do without the shuffle buffer. The state of a stream
does not hold its content, and it mixes only neighbours. Instead, training draws the blocks of a whole bin in random
order (data.py).

A position in a stream is [state, used]: a state_dict of the dataset, and how many documents after it are used already.
"""

import os
import re
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from cli import BadInput
from config import Source
from sources import embedded

CHUNK = 500_000  # characters that a worker gets at a time: a tenth of a second's work
WAITS = (2, 10, 30, 120)  # seconds before each new attempt after a network error


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
    """Whether the text is on the hub."""
    return not is_embedded(source) and "/" in source.dataset and not Path(source.dataset).exists()


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


def open_dataset(source: Source, texts: list[str] | None, files: list[str]):
    """A source as a datasets.IterableDataset with one column. `texts` are the documents of an embedded source.

    If `files` is empty, it is filled in with the names of the source's files. Later they must be the same: a position
    counts files, and means nothing among others. Raises BadInput if they have changed, or if there is no such column.
    """
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # we say ourselves what is wrong, and have our own progress bars
    import datasets  # only now, when the workers are forked: it starts threads

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    if texts is not None:
        return datasets.Dataset.from_dict({source.column: texts}).to_iterable_dataset()
    builder = datasets.load_dataset_builder(source.dataset, source.subset, data_files=list(source.data_files) or None)
    if hasattr(builder.config, "columns"):  # Parquet: read, and download, only this column
        builder.config.columns = [source.column]
    if hasattr(builder.config, "sample_by"):
        builder.config.sample_by = source.sample_by
    names = [re.sub("@[0-9a-f]{40}", "", str(file))  # on the hub, without the commit: most commits change no text
             for file in (builder.config.data_files or {}).get(source.split, [])]
    if files and files != names:
        raise BadInput("its files are others than when this preparation began; prepare it anew in another --data_dir")
    files[:] = names
    dataset = builder.as_streaming_dataset(split=source.split)
    if dataset.features is not None and source.column not in dataset.features:
        raise BadInput(f"there is no column {source.column!r}; name the one that holds the text (column)")
    return dataset.select_columns([source.column])


def read(dataset, column: str, position: list) -> Iterator[tuple[list[str], list, list]]:
    """The documents from a position on, in chunks: (texts, position before, position after).

    Raises BadInput if the column holds something other than text.
    """
    state, used = position
    if state is not None:
        dataset.load_state_dict(state)
    chunk, size = [], 0
    for batch in dataset.iter(batch_size=32):  # takes a third of the time of single rows
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
    """Whether trying again later may help: after a lost connection or a server in trouble, not a wrong name or address.

    The error itself may say so, or the one that caused it: the libraries in between give it other names.
    """
    if error is None:
        return False
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", getattr(error, "status", None))  # httpx's and requests'; aiohttp's
    if isinstance(status, int) and 400 <= status < 500:
        return status in (408, 429)
    libraries = ("httpx", "httpcore", "aiohttp", "requests", "urllib3", "asyncio")  # those in use over the years
    return (isinstance(error, (ConnectionError, TimeoutError))
            or any(base.__module__.startswith(libraries) for base in type(error).__mro__)
            or is_network_error(error.__cause__ or error.__context__))


def patiently(name: str, source: Source, open_: Callable, position: list, online: bool,
              check_stop: Callable[[], None]) -> Iterator[tuple[list[str], list, list]]:
    """`read`, and after a network error `read` again from the place it had reached.

    It waits for each of WAITS in turn, and starts over with the first once something arrives. Raises BadInput, in one
    line, when the waits are used up, or at once if this process has not had a network yet (`online` says whether it
    has). Anything else that keeps a source from being read is a BadInput too.
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
                check_stop()
            attempt += 1
