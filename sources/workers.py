"""Documents to token ids, in a worker process for each core."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import tokenizer
from cli import BadInput, brief
from config import Source
from sources.streams import clean_text
from tokenizer import TokenizerJson

KEPT = ("documents", "marked")  # what a document may be counted as: written, though "marked" spells out a special token
LEFT_OUT = ("empty", "copies", "bad_rows", "special")  # or not: nothing in it, a copy of a held-out one, ...
FATES = (*KEPT, *LEFT_OUT)
WORKERS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # a core each


def start_worker(name: str, segmentation: str, eos_token: str | None = None):
    """Get this process ready for `encode`."""
    global vocabulary, marks
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each core already has a process
    threading.Thread(target=follow_parent, daemon=True).start()
    vocabulary = tokenizer.load(name, segmentation, eos_token)
    special = sorted(vocabulary.special_tokens, key=len, reverse=True)
    marks = re.compile("|".join(map(re.escape, special)) or r"(?!)")  # (?!) is found nowhere


def follow_parent():
    """End this process if its parent is killed: nobody would ever give it work again."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def encode(texts: list[str | None], preserve_linebreaks: bool, special: str) -> list[tuple[bytes, int, int, str]]:
    """Clean and tokenize documents. Returns (ids, bytes, dropped, fate) for each.

    The ids are bytes as in a bin, with the end-of-document id; the next two say for how many bytes of the clean text
    they stand, and how many the vocabulary could not write. The fate is one of FATES: what the document is counted as.
    If it is none of KEPT, there are no ids.

    texts       None stands for a row that cannot be used
    special     what to do with a document that spells out a special token: "text", "drop" or "refuse"

    Raises BadInput if such a document is refused, and if the vocabulary cannot encode one at all.
    """
    return [encode_one(text, preserve_linebreaks, special) for text in texts]


def encode_one(text: str | None, preserve_linebreaks: bool, special: str) -> tuple[bytes, int, int, str]:
    """`encode` for one document."""
    if text is None:
        return b"", 0, 0, "bad_rows"
    clean = clean_text(text, preserve_linebreaks)
    try:
        ids, dropped = vocabulary.encode_counted(clean)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise BadInput(f"{vocabulary.name} cannot encode the document that begins {clean[:40]!r}: "
                       f"{brief(error)}") from None
    if not len(ids):
        return b"", 0, dropped, "empty"
    spelled = marks.search(clean)
    ends = vocabulary.eos_id in ids
    if spelled or ends:
        word = spelled[0] if spelled else f"the end-of-document id {vocabulary.eos_id}"
        if special == "refuse":
            raise BadInput(f"the document that begins {clean[:40]!r} holds {word}, a special token of "
                           f"{vocabulary.name}; with special_tokens drop it is counted and left out")
        if ends or special == "drop":
            return b"", 0, 0, "special"
    data = ids.astype("<u2", copy=False).tobytes() + vocabulary.eos_id.to_bytes(2, "little")
    # A .vocab file's ids decode to the text itself, decomposed (NFD). What a tokenizer.json decodes to may be anything.
    size = (len(clean.encode("utf-8", "surrogatepass")) - dropped if isinstance(vocabulary, TokenizerJson) else
            vocabulary.count_bytes(ids))
    return data, size, dropped, "marked" if spelled else "documents"


@contextlib.contextmanager
def worker_pool(*vocabulary: str | None) -> Iterator[ProcessPoolExecutor]:
    """Processes that run `encode` with tokenizer.load(*vocabulary), one for each core.

    They end with the context, in the middle of their work if need be. Where forking is safe they are forked, since each
    fresh interpreter would import torch. We must fork before this process has threads, so they start here. The
    vocabulary's compiled loops come with the fork.
    """
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(WORKERS, context, start_worker, vocabulary)
    try:
        pool.submit(encode, ["Hello, world."], False, "text").result()
        yield pool
        pool.shutdown()
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def tokenized(chunks: Iterator, pool: ProcessPoolExecutor, source: Source) -> Iterator[tuple]:
    """Chunks of texts turned into chunks of `encode`'s results, in order. Reading and tokenizing run some way ahead."""
    pending = deque()  # of (future, before, after)
    try:
        for texts, before, after in chunks:
            pending.append((pool.submit(encode, texts, source.preserve_linebreaks, source.special_tokens),
                            before, after))
            if len(pending) > 2 * WORKERS:
                future, before, after = pending.popleft()
                yield future.result(), before, after
        while pending:
            future, before, after = pending.popleft()
            yield future.result(), before, after
    finally:
        for future, _, _ in pending:
            future.cancel()
