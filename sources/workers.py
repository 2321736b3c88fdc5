"""Documents to token ids, in a worker process for each core."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import tokenizer
from cli import BadInput
from sources.streams import clean_text

WORKERS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # a core each


def start_worker(name: str, segmentation: str):
    """Get this process ready for `encode`."""
    global vocabulary
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each core already has a process
    threading.Thread(target=follow_parent, daemon=True).start()
    vocabulary = tokenizer.load(name, segmentation)


def follow_parent():
    """End this process if its parent is killed: nobody would ever give it work again."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def encode(texts: list[str], preserve_linebreaks: bool) -> list[tuple[bytes, int, int]]:
    """Clean and tokenize documents. Returns (ids, bytes, dropped) for each.

    The ids are bytes as in a bin, with the end-of-document id; or b"" if the clean document is empty. The other two say
    how many bytes they decode to, and how many the vocabulary could not write. Raises BadInput if a document holds the
    end-of-document id.
    """
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
    """Processes that run `encode` with tokenizer.load(*vocabulary), one for each core.

    They end with the context, in the middle of their work if need be. Where forking is safe they are forked, since each
    fresh interpreter would import torch. We must fork before this process has threads, so they start here. The
    vocabulary's compiled loops come with the fork.
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
    """Chunks of texts turned into chunks of `encode`'s results, in order. Reading and tokenizing run some way ahead."""
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
