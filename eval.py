"""How good is a model? This measures it in figures that mean the same for every vocabulary.

    python eval.py [--checkpoint out/NAME]          held-out text of its training sources
    python eval.py --text FILE...                   any text
    python eval.py --hf EleutherAI/pythia-14m       also any model of transformers, on the same text
    python eval.py --benchmarks                     the Stentor cards' benchmarks, through lm-eval (suite.py)
    python eval.py --compare out/A out/B ...        runs side by side, from their logs

A loss is in nats per token, and the vocabulary decides what a token is. If tokens are half as long, there are twice as
many and each is easier to guess, but the model is no better. So we divide the whole loss by the bytes of the text. Bits
per byte is what it costs to write the text down, whatever the tokens are. Token losses are FP32 and sums float64,
whatever precision the model runs in.
"""

import math
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

import backend
import checkpoint
import suite
from cli import BadInput, brief, parse, parse_json, script
from config import Source
from data import META
from decoding.narrow import narrow
from formats import peers
from model import Llama
from run import draw_runs, mixed, read_run
from sources.streams import clean_text
from tokenizer import Tokenizer

LONGEST = 4096  # tokens that a model of transformers sees at once; some could see more than fits into memory
AT_ONCE = 2**27  # logits in one forward pass: half a GB in FP32


@dataclass
class Options:
    """Evaluate a model."""

    checkpoint: Path | None = None
    """A run (out/NAME) or one of its step directories; the newest run under out/ if None."""
    which: Literal["best", "latest"] = "best"
    """Which of a run's checkpoints."""
    text: tuple[Path, ...] = ()
    """UTF-8 text files to evaluate on, instead of the held-out documents of the run's data."""
    hf: str | None = None
    """Another model to evaluate on the same text: a folder, or OWNER/NAME on the hub, that transformers can load."""
    trust_remote_code: bool = False
    """Let the --hf model run its own code. The exact tokenizer of our exports needs that."""
    data_dir: Path | None = None
    """Directory of the held-out bins; that of the run if None."""
    max_blocks: int | None = None
    """Evaluate only on the first documents of each source, enough to fill so many blocks; on all if None."""
    block_size: int | None = None
    """Tokens that a model sees at once; its whole context if None."""
    stride: int | None = None
    """Tokens from the start of one window to the next. If None, block_size: then windows do not overlap. A smaller
    stride gives each token more context, so the figures are lower, and it takes longer."""
    batch_size: int = 8
    """Windows in one forward pass."""
    benchmarks: bool = False
    """Run lm-eval instead (pip install 'lm_eval[hf]'; its tasks come from the hub)."""
    tasks: tuple[str, ...] = ()
    """With --benchmarks: these tasks of lm-eval, without examples in the prompt, instead of the cards' suite."""
    include_path: Path | None = None
    """With --benchmarks: a folder with your own task files."""
    limit: int | None = None
    """With --benchmarks: ask only the first so many questions of each task."""
    compare: tuple[Path, ...] = ()
    """Put these runs side by side instead."""
    picture: Path = Path("out/compare.png")
    """Where --compare saves its picture."""
    backend: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to run on."""
    dtype: Literal["fp32", "bf16", "fp16", "int8", "int4"] = "fp32"
    """Precision of the matrix products. int8 and int4 round our model's weights, as sample.py does with this option."""

    def __post_init__(self):
        """Raises ValueError, in one line, for values out of range and options that exclude each other."""
        for name in ("max_blocks", "block_size", "stride", "batch_size", "limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if (self.tasks or self.limit or self.include_path) and not self.benchmarks:
            raise ValueError("tasks, limit and include_path are for benchmarks: add --benchmarks")
        if self.dtype in ("int8", "int4") and (self.hf or self.benchmarks):
            raise ValueError(f"dtype {self.dtype} is for our own models and texts: leave out --hf and --benchmarks")


# ---------------------------------------------------------------------------------------------------------------
# The loss of every token


def windows(count: int, block_size: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Windows (start, stop, counted) over tokens 0 to count - 1 that predict each token once, except token 0.

    The model reads tokens start to stop - 1. Its last `counted` predictions count; the last of them is of token `stop`.
    """
    done = 0  # the last token predicted so far
    while done < count - 1:
        stop = min(done + (stride if done else block_size), count - 1)
        yield (max(0, stop - block_size) if stride < block_size else done), stop, stop - done
        done = stop


@torch.no_grad()
def token_losses(logits_of: Callable, ids: np.ndarray, block_size: int, stride: int, batch_size: int,
                 device: torch.device) -> np.ndarray:
    """The loss of each of ids[1:], in nats: (n - 1,) float64. ids (n,) are integers; nothing predicts the first one.

    logits_of    input_ids (B, T) -> logits (B, T, V), a causal model
    """
    ids = torch.from_numpy(ids.astype(np.int64))
    losses, batch = [], []
    for window in [*windows(len(ids), block_size, stride), None]:
        # Windows of equal length go in one batch. The first and the last window may have another length.
        if batch and (window is None or len(batch) == batch_size or window[1] - window[0] != batch[0][1] - batch[0][0]):
            inputs = torch.stack([ids[start:stop] for start, stop, _ in batch]).to(device)  # (B, T)
            targets = torch.stack([ids[start + 1:stop + 1] for start, stop, _ in batch]).to(device)  # (B, T)
            logits = logits_of(inputs).float()
            # (B, T, V) and (B, T) -> (B*T, V) and (B*T) -> (B, T)
            nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
            losses += [row[-counted:].double().cpu() for row, (_, _, counted) in zip(nats, batch)]
            batch = []
        batch.append(window)
    return torch.cat(losses).numpy() if losses else np.empty(0)


def figures(losses: np.ndarray, size: int, block_size: int) -> dict[str, float]:
    """The figures of `size` bytes of text whose tokens have these losses (n,): loss (nats a token), perplexity,
    bits_per_byte, and the standard errors of loss and bits_per_byte.

    Neighbouring tokens are alike, so the errors are those of a mean over blocks. With fewer than two blocks they are
    NaN.
    """
    loss, blocks = losses.mean(), len(losses) // block_size
    # (n,) -> (blocks, block_size) -> (blocks,)
    means = losses[:blocks * block_size].reshape(blocks, block_size).mean(1) if blocks else np.empty(0)
    error = means.std(ddof=1) / math.sqrt(blocks) if blocks > 1 else math.nan
    per_byte = len(losses) / size / math.log(2)  # bits per byte in one nat per token
    return {"tokens": len(losses), "bytes": size, "loss": loss, "loss_stderr": error,
            "perplexity": math.exp(min(loss, 700)), "bits_per_byte": loss * per_byte,
            "bits_per_byte_stderr": error * per_byte}


# ---------------------------------------------------------------------------------------------------------------
# The text, and the two kinds of models


@dataclass
class Document:
    """A text. If it comes from a bin, also its ids there, and how many bytes they decode to."""

    text: str
    ids: np.ndarray | None = None
    size: int | None = None


@dataclass
class Subject:
    """A model to evaluate, ours or one of transformers, with its tokenizer."""

    name: str
    model: Llama | peers.Peer
    vocabulary: Tokenizer
    ours: bool

    def encode(self, document: Document) -> tuple[np.ndarray, int]:
        """A document's ids (n,), and how many bytes of its text they stand for.

        What our vocabulary cannot write does not count as text. Another model has to predict all of it.
        """
        if self.ours and document.ids is not None:
            return document.ids, document.size
        ids, dropped = self.vocabulary.encode_counted(document.text)
        return ids, len(document.text.encode()) - dropped if document.size is None else document.size

    def window(self, options: Options) -> tuple[int, int]:
        """How many tokens the model sees at once, and how far it moves from one window to the next."""
        context = self.model.config.max_position_embeddings
        block_size = min(options.block_size or context, context)
        return block_size, min(options.stride or block_size, block_size)


def open_peer(name: str, trust_remote_code: bool, device: backend.Backend) -> Subject:
    """A causal model of transformers, with its context cut to LONGEST.

    Raises BadInput if it cannot be loaded or is not causal.
    """
    vocabulary = peers.PeerTokenizer(name, peers.load_tokenizer(name, trust_remote_code))
    model = peers.load_model(name, trust_remote_code).to(device.device)
    peers.check_causal(name, model, vocabulary.eos_id)
    return Subject(name, peers.Peer(model, peers.context_of(model.config, LONGEST)), vocabulary, ours=False)


def held_out(data_dir: Path, names: list[str], vocabulary: Tokenizer) -> dict[str, list[Document]]:
    """The held-out documents of each source. Raises BadInput if there are none, or damaged ones, or of another
    vocabulary.
    """
    try:
        meta = parse_json((data_dir / "meta.json").read_bytes(), META)
        bins = {name: np.fromfile(data_dir / f"{name}_val.bin", "<u2") for name in names or meta["sources"]}
    except FileNotFoundError as error:
        raise BadInput(f"there is no {error.filename}; prepare the data of the run again (prepare.py), say where it is "
                       f"(--data_dir), or evaluate on another text (--text)") from None
    except ValueError as error:
        raise BadInput(f"{data_dir / 'meta.json'} is damaged: {error}") from error
    if meta["recipe"].get("tokenizer", {}).get("sha256") != vocabulary.sha256:
        raise BadInput(f"{data_dir} was prepared with another vocabulary than the model's, {vocabulary.name}")
    documents = {}
    for name, ids in bins.items():
        check_bin(data_dir / f"{name}_val.bin", ids, meta["sources"].get(name), vocabulary,
                  meta.get("eos_id", vocabulary.eos_id))
        ends = np.flatnonzero(ids == meta.get("eos_id", vocabulary.eos_id))
        # The vocabulary may have split accents from their letters (NFD). Other models are not used to that.
        documents[name] = [Document(unicodedata.normalize("NFC", vocabulary.decode(part)), part[:-1],
                                    vocabulary.count_bytes(part)) for part in np.split(ids, ends + 1) if len(part)]
        set_sizes(documents[name], meta["sources"].get(name, {}).get("val", {}).get("bytes", 0))
    return documents


def set_sizes(documents: list[Document], total: int):
    """Make the sizes of documents sum up to the bytes that prepare.py has counted on the text itself.

    What the ids decode to may have another length, if the tokenizer adds spaces, say. Then we spread the difference.
    """
    decoded = np.cumsum([document.size for document in documents])
    if not total or not decoded[-1] or total == decoded[-1]:
        return
    reached = np.rint(decoded * (total / decoded[-1])).astype(int).tolist()
    for document, start, stop in zip(documents, [0, *reached], reached):
        document.size = stop - start


def check_bin(path: Path, ids: np.ndarray, counts: dict | None, vocabulary: Tokenizer, eos_id: int):
    """Raise BadInput if a held-out bin is empty, or not what meta.json counts, or holds what is no document."""
    if not len(ids):
        raise BadInput(f"{path} is empty: there is nothing to evaluate on")
    size, tokens = path.stat().st_size, counts["val"]["tokens"] if counts else 0
    wrong = (f"it holds {size} bytes and meta.json says {2 * tokens}" if size != 2 * tokens else
             f"it holds the id {ids.max()}, beyond the vocabulary" if ids.max() >= vocabulary.vocab_size else
             "its last document has no end" if ids[-1] != eos_id else None)
    if wrong:
        raise BadInput(f"{path} is damaged: {wrong}; delete {path.parent} and run prepare.py again")


def read_text(path: Path) -> Document:
    """A file, cleaned as training text is, with its line breaks. Raises BadInput if it is empty or not text."""
    try:
        text = clean_text(path.read_text(encoding="utf-8"), preserve_linebreaks=True)
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not text in UTF-8: {error}") from error
    if not text:
        raise BadInput(f"{path} is empty: there is nothing to evaluate on")
    return Document(text)


def evaluate(subject: Subject, documents: list[Document], options: Options,
             device: backend.Backend, name: str = "the text") -> dict[str, float]:
    """The figures of a model on documents, joined as in training: each follows the end of another.

    The end of a document counts as a token but not as a byte. "lossy" is how many documents do not come back whole from
    their tokens. Raises BadInput if the vocabulary can write nothing of them; `name` is what the error calls them.
    """
    block_size, stride = subject.window(options)
    batch_size = max(1, min(options.batch_size, AT_ONCE // (block_size * subject.model.config.vocab_size)))
    encoded = [subject.encode(document) for document in documents]
    size = sum(size for _, size in encoded)
    if not size:
        raise BadInput(f"{name} holds nothing that the vocabulary of {subject.name} can write")
    end = [subject.vocabulary.bos_id]  # eos_id, unless the model's documents begin with a token of their own
    ids = np.concatenate([end, *(part for ids, _ in encoded for part in (ids, end))])
    with device.autocast():
        losses = token_losses(lambda input_ids: subject.model(input_ids)[0], ids, block_size, stride, batch_size,
                              device.device)
    lossy = sum(not comes_back(subject, document, ids) for document, (ids, _) in zip(documents, encoded))
    return figures(losses, size, block_size) | {"lossy": lossy}


def comes_back(subject: Subject, document: Document, ids: np.ndarray) -> bool:
    """Whether a document's ids hold all of its text, apart from white space. Split accents count as equal."""
    one, other = (unicodedata.normalize("NFC", text) for text in (document.text, subject.vocabulary.decode(ids)))
    return "".join(one.split()) == "".join(other.split())


def first_blocks(documents: list[Document], subject: Subject, count: int) -> list[Document]:
    """The first documents, enough to fill `count` of the model's blocks. They are whole, and every model gets them."""
    left, chosen = count * subject.model.config.max_position_embeddings, []
    while left > 0 and len(chosen) < len(documents):
        chosen.append(documents[len(chosen)])
        left -= len(subject.encode(chosen[-1])[0]) + 1
    return chosen


def mixture(rows: dict[str, dict], sources: dict[str, dict]) -> dict[str, float]:
    """The figures of one text in which the sources are mixed by their ratios, as in train.py's log."""
    try:
        mixed_sources = {name: Source(**fields) for name, fields in sources.items()}
        ratios = [source.ratio for source in mixed_sources.values()]
        if not (min(ratios) >= 0 and 0 < sum(ratios) < math.inf):
            raise ValueError("its ratios are no shares")
    except (TypeError, ValueError) as error:
        raise BadInput(f"the checkpoint's state.json does not describe its sources: {brief(error)}") from error
    mix = mixed({name: row["loss"] for name, row in rows.items()}, mixed_sources,
                {"sources": {name: {"val": row} for name, row in rows.items()}})
    error = math.sqrt(sum((mixed_sources[name].ratio * row["loss_stderr"]) ** 2 for name, row in rows.items()))
    return {"tokens": sum(row["tokens"] for row in rows.values()), "bytes": sum(row["bytes"] for row in rows.values()),
            **mix, "loss_stderr": error, "bits_per_byte_stderr": error * mix["bits_per_byte"] / mix["loss"]}


def show(name: str, rows: dict[str, dict]):
    """Print a model's figures."""
    print(f"{name}\n  {'text':24} {'tokens':>10} {'bytes':>11} {'loss':>18} {'perplexity':>11} {'bits per byte':>18}")
    for text, row in rows.items():
        print(f"  {text:24} {row['tokens']:10,} {row['bytes']:11,} {row['loss']:8.4f} +- {row['loss_stderr']:6.4f} "
              f"{row['perplexity']:11.2f} {row['bits_per_byte']:8.4f} +- {row['bits_per_byte_stderr']:6.4f}")


def report(subject: Subject, documents: dict[str, list[Document]], sources: dict[str, dict], options: Options,
           device: backend.Backend):
    """Evaluate a model on texts and print its figures. If the texts are the sources of its run, mix them too."""
    rows = {name: evaluate(subject, texts, options, device, name) for name, texts in documents.items()}
    lossy = sum(row["lossy"] for row in rows.values())
    if len(rows) > 1 and rows.keys() == sources.keys():
        rows["mixed as in training"] = mixture(rows, sources)
    show(subject.name, rows)
    block_size, stride = subject.window(options)
    if stride < block_size:
        print(f"  windows of {block_size:,} tokens move by {stride:,}: lower figures than in training, where they "
              f"do not overlap")
    if lossy:
        print(f"  {lossy:,} of {sum(map(len, documents.values())):,} documents do not come back whole from its "
              f"tokenizer: what is lost costs it nothing")


# ---------------------------------------------------------------------------------------------------------------
# Runs side by side


def compare(runs: list[Path], picture: Path):
    """Print one table of the runs and draw one picture: bits per byte over tokens and over FLOPs.

    Each run's figures are of its own held-out text, so they compare only runs on the same data.
    """
    logged = [read_run(run) for run in runs]
    print(f"{'run':24} {'parameters':>12} {'tokens':>15} {'FLOPs':>9} {'bits per byte':>14} {'best':>7}")
    for run in logged:
        print(f"{run['name']:24} {run['parameters']:12,} {run['tokens'][-1]:15,} {run['flops'][-1]:9.2e} "
              f"{run['bits_per_byte'][-1]:14.4f} {min(run['bits_per_byte']):7.4f}")
    draw_runs(logged, picture)
    print(f"{picture} shows them")


def main(argv: list[str]) -> int | None:
    options = parse(Options, argv)
    if options.compare:
        return compare(options.compare, options.picture)
    rounded = options.dtype in ("int8", "int4")
    device = backend.pick(options.backend, "fp32" if rounded else options.dtype, tpu=False)
    trained = checkpoint.open_trained(options.checkpoint, options.which, device)
    if options.benchmarks:
        return suite.run(trained, options, device)
    if rounded:
        narrow(trained.model, options.dtype)

    config = trained.state["config"]
    if options.text:
        documents = {str(path): [read_text(path)] for path in options.text}
    else:
        data_dir = options.data_dir or Path(config.get("data_dir", "data"))
        names = [] if options.data_dir else list(config.get("sources", {}))
        documents = held_out(data_dir, names, trained.vocabulary)
    ours = Subject(str(trained.step_dir), trained.model, trained.vocabulary, ours=True)
    if options.max_blocks:
        documents = {name: first_blocks(texts, ours, options.max_blocks) for name, texts in documents.items()}
    subjects = [ours, *([open_peer(options.hf, options.trust_remote_code, device)] if options.hf else [])]
    for subject in subjects:
        report(subject, documents, config.get("sources", {}), options, device)


if __name__ == "__main__":
    script(main)
