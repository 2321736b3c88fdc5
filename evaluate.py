"""How good is a model? In figures that mean the same for every vocabulary.

    python evaluate.py [--checkpoint out/NAME]          held-out text of its training sources
    python evaluate.py --text FILE...                   any text
    python evaluate.py --hf EleutherAI/pythia-14m       beside it any model of transformers, on the same text
    python evaluate.py --benchmarks                     the Stentor cards' benchmarks, through lm-eval (benchmarks.py)
    python evaluate.py --compare out/A out/B ...        runs side by side, from what they have logged

A loss is nats per token, and a token is what the vocabulary makes it: of twice as many tokens that are half as long,
each is easier to guess, and the model no better. The whole loss divided by the bytes of the text, in bits per byte, is
what it costs to write that text down, whatever the tokens are. All sums are in float64, over the losses of tokens in
FP32, in whatever precision the model runs.
"""

import json
import math
import sys
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
import decode
from config import BadInput, Source, brief, parse, script
from model import Llama, ModelConfig
from prepare import clean_text
from train import mixed, read_metrics
from vocabulary import Tokenizer

LONGEST = 4096  # tokens that a model of transformers sees at once: some could see more than memory holds
AT_ONCE = 2**27  # logits in one forward pass, half a GB of them in FP32


@dataclass
class Options:
    """Evaluate a model."""

    checkpoint: Path | None = None
    """A run (out/NAME) or one of its step directories; the newest run under out/ if None."""
    which: Literal["best", "latest"] = "best"
    """Which of a run's checkpoints."""
    text: tuple[Path, ...] = ()
    """Files of text to evaluate on, in UTF-8, instead of the held-out documents of the run's data."""
    hf: str | None = None
    """Another model to evaluate on the same text: a folder, or OWNER/NAME on the hub, that transformers loads."""
    trust_remote_code: bool = False
    """Let --hf run the code that comes with it, as the exact tokenizer of an export needs."""
    data_dir: Path | None = None
    """Directory of the held-out bins; that of the run if None."""
    max_blocks: int | None = None
    """Evaluate on the first documents of each source, as many as fill so many blocks; on all if None."""
    block_size: int | None = None
    """Tokens that a model sees at once; its whole context if None."""
    stride: int | None = None
    """Tokens between two windows; block_size, where a window sees nothing of the one before, if None. Fewer give each
    token more context, and so lower figures, in more time."""
    batch_size: int = 8
    """Windows in one forward pass."""
    benchmarks: bool = False
    """Run lm-eval instead (pip install 'lm_eval[hf]'; its tasks come from the hub)."""
    tasks: tuple[str, ...] = ()
    """With --benchmarks: these tasks of lm-eval, without examples in the prompt, instead of the cards' suite."""
    include_path: Path | None = None
    """With --benchmarks: a folder of task files of your own."""
    limit: int | None = None
    """With --benchmarks: only the first so many questions of each task."""
    compare: tuple[Path, ...] = ()
    """Runs to put side by side instead."""
    picture: Path = Path("out/compare.png")
    """Where --compare draws them."""
    backend: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to run on."""
    dtype: Literal["float32", "bfloat16", "float16", "int8"] = "float32"
    """Precision of the matrix products; int8 keeps the weights of our model in INT8, as sample.py --dtype int8 does."""
    int8_activations: bool = False
    """With int8, round what the weights are multiplied with too."""

    def __post_init__(self):
        """Raises ValueError, in one line, for values out of range, and for options that exclude each other."""
        for name in ("max_blocks", "block_size", "stride", "batch_size", "limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if (self.tasks or self.limit or self.include_path) and not self.benchmarks:
            raise ValueError("tasks, limit and include_path are for benchmarks: add --benchmarks")
        if self.dtype == "int8" and (self.hf or self.benchmarks):
            raise ValueError("dtype int8 is for our own models and texts: leave out --hf and --benchmarks")
        if self.int8_activations and self.dtype != "int8":
            raise ValueError("int8_activations is for --dtype int8")


# ---------------------------------------------------------------------------------------------------------------
# The loss of every token


def windows(count: int, block_size: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Where to look at tokens 0 to count - 1, so that each but token 0 is predicted once: (start, stop, counted).

    The model is given tokens start to stop - 1, and its last `counted` predictions, of tokens up to `stop`, count.
    """
    done = 0  # the last token that has been predicted
    while done < count - 1:
        stop = min(done + (stride if done else block_size), count - 1)
        yield (max(0, stop - block_size) if stride < block_size else done), stop, stop - done
        done = stop


@torch.no_grad()
def token_losses(logits_of: Callable, ids: np.ndarray, block_size: int, stride: int, batch_size: int,
                 device: torch.device) -> np.ndarray:
    """The loss of each of ids[1:], in nats: (n - 1,) float64. ids (n,) are integers, the first only a beginning.

    logits_of    input_ids (B, T) -> logits (B, T, V), a causal model
    """
    ids = torch.from_numpy(ids.astype(np.int64))
    losses, batch = [], []
    for window in [*windows(len(ids), block_size, stride), None]:
        # windows of one length go together; the first and the last may be others
        if batch and (window is None or len(batch) == batch_size or window[1] - window[0] != batch[0][1] - batch[0][0]):
            inputs = torch.stack([ids[start:stop] for start, stop, _ in batch]).to(device)  # (B, T)
            targets = torch.stack([ids[start + 1:stop + 1] for start, stop, _ in batch]).to(device)  # (B, T)
            logits = logits_of(inputs).float()
            nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
            losses += [row[-counted:].double().cpu() for row, (_, _, counted) in zip(nats, batch)]
            batch = []
        batch.append(window)
    return torch.cat(losses).numpy() if losses else np.empty(0)


def figures(losses: np.ndarray, size: int, block_size: int) -> dict[str, float]:
    """What `size` bytes of text with these losses (n,) come to: loss (nats a token), perplexity, bits_per_byte, and the
    standard errors of loss and bits_per_byte.

    Neighbouring tokens are alike, so the errors are those of a mean over blocks; NaN for fewer than two.
    """
    loss, blocks = losses.mean(), len(losses) // block_size
    means = losses[:blocks * block_size].reshape(blocks, block_size).mean(1) if blocks else np.empty(0)
    error = means.std(ddof=1) / math.sqrt(blocks) if blocks > 1 else math.nan
    per_byte = len(losses) / size / math.log(2)  # bits per byte for a nat per token
    return {"tokens": len(losses), "bytes": size, "loss": loss, "loss_stderr": error,
            "perplexity": math.exp(min(loss, 700)), "bits_per_byte": loss * per_byte,
            "bits_per_byte_stderr": error * per_byte}


# ---------------------------------------------------------------------------------------------------------------
# The text, and the two kinds of models


@dataclass
class Document:
    """A text; and where it is from a bin its ids there, and the bytes that they decode to."""

    text: str
    ids: np.ndarray | None = None
    size: int | None = None


@dataclass
class Subject:
    """A model to evaluate: what it is called, its logits, how it writes text, and how far it sees.

    logits    input_ids (B, T) -> (B, T, V)
    encode    a document -> its ids (n,), and how many bytes of its text they write down
    decode    ids -> text
    rows      V
    """

    name: str
    logits: Callable
    encode: Callable
    decode: Callable
    eos_id: int
    context: int
    rows: int

    def window(self, options: Options) -> tuple[int, int]:
        """Tokens that it sees at once here, and tokens from one window to the next."""
        block_size = min(options.block_size or self.context, self.context)
        return block_size, min(options.stride or block_size, block_size)


def ours(step_dir: Path, model: Llama, vocabulary: Tokenizer) -> Subject:
    """A checkpoint of ours. What its vocabulary cannot write is no part of the text."""
    def encode(document: Document) -> tuple[np.ndarray, int]:
        if document.ids is not None:
            return document.ids, document.size
        ids, dropped = vocabulary.encode_counted(document.text)
        return ids, len(document.text.encode()) - dropped

    return Subject(str(step_dir), lambda input_ids: model(input_ids)[0], encode, vocabulary.decode, vocabulary.eos_id,
                   model.config.max_position_embeddings, model.config.vocab_size)


def theirs(name: str, trust_remote_code: bool, device: torch.device) -> Subject:
    """A causal model of transformers, its context cut to LONGEST. Documents follow its eos, as with ours.

    Raises BadInput where it cannot be loaded, or is not causal.
    """
    try:
        import transformers
    except ImportError:
        raise BadInput("--hf needs transformers: pip install transformers") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        tokens = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        model = transformers.AutoModelForCausalLM.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # of whatever library it goes wrong in
        if "trust_remote_code" in str(error):
            raise BadInput(f"{name} comes with code of its own; --trust_remote_code lets it run") from error
        raise BadInput(f"transformers cannot load {name}: {brief(error)}") from error
    eos_id = tokens.eos_token_id if tokens.eos_token_id is not None else tokens.bos_token_id
    if eos_id is None:
        raise BadInput(f"{name} has no token to put between documents")
    model = model.float().to(device).eval()

    def encode(document: Document) -> tuple[np.ndarray, int]:
        ids = tokens(document.text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        return np.array(ids, np.int64), len(document.text.encode()) if document.size is None else document.size

    def logits(input_ids):
        return model(input_ids=input_ids).logits

    # transformers takes an encoder for a causal model too: one that has seen the answers.
    probe = torch.tensor([[eos_id] * 8, [eos_id] * 7 + [0 if eos_id else 1]], device=device)
    with torch.no_grad():
        one, other = logits(probe)[:, :-1]
    if not torch.allclose(one, other, atol=1e-3, rtol=1e-3):
        raise BadInput(f"{name} is not a causal model: what it expects depends on the tokens that follow")
    return Subject(name, logits, encode, lambda ids: tokens.decode(ids, clean_up_tokenization_spaces=False), eos_id,
                   min(getattr(model.config, "max_position_embeddings", 1024), LONGEST), one.size(-1))


def held_out(data_dir: Path, names: list[str], vocabulary: Tokenizer) -> dict[str, list[Document]]:
    """The held-out documents of each source. Raises BadInput where there are none, or of another vocabulary."""
    try:
        meta = json.loads((data_dir / "meta.json").read_text())
        sha256 = meta["recipe"]["tokenizer"]["sha256"]
        bins = {name: np.fromfile(data_dir / f"{name}_val.bin", "<u2") for name in names or meta["sources"]}
    except FileNotFoundError as error:
        raise BadInput(f"there is no {error.filename}; prepare the data of the run again (prepare.py), say where it is "
                       f"(--data_dir), or evaluate on any text (--text)") from None
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{data_dir / 'meta.json'} is damaged: {error!r}") from error
    if sha256 != vocabulary.sha256:
        raise BadInput(f"{data_dir} was prepared with another vocabulary than the model's, {vocabulary.name}")
    documents = {}
    for name, ids in bins.items():
        ends = np.flatnonzero(ids == vocabulary.eos_id)
        # The vocabulary may have taken letters and their accents apart (NFD); to others they are strange that way.
        documents[name] = [Document(unicodedata.normalize("NFC", vocabulary.decode(part)), part[:-1],
                                    vocabulary.count_bytes(part)) for part in np.split(ids, ends + 1) if len(part)]
        if not documents[name]:
            raise BadInput(f"{data_dir / f'{name}_val.bin'} is empty: there is nothing to evaluate on")
    return documents


def read_text(path: Path) -> Document:
    """A file, cleaned as training text is, line breaks kept. Raises BadInput where it is no text, or empty."""
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

    The end of a document counts as a token, and as no byte. "lossy" is how many documents do not come back whole from
    their tokens. Raises BadInput where nothing of them (`name`) is left.
    """
    block_size, stride = subject.window(options)
    batch_size = max(1, min(options.batch_size, AT_ONCE // (block_size * subject.rows)))
    encoded = [subject.encode(document) for document in documents]
    size = sum(size for _, size in encoded)
    if not size:
        raise BadInput(f"{name} holds nothing that the vocabulary of {subject.name} can write")
    ids = np.concatenate([[subject.eos_id], *(part for ids, _ in encoded for part in (ids, [subject.eos_id]))])
    with device.autocast():
        losses = token_losses(subject.logits, ids, block_size, stride, batch_size, device.device)
    lossy = sum(not comes_back(subject, document, ids) for document, (ids, _) in zip(documents, encoded))
    return figures(losses, size, block_size) | {"lossy": lossy}


def comes_back(subject: Subject, document: Document, ids: np.ndarray) -> bool:
    """Whether a document's ids hold all of its text but white space; accents may stand apart from their letters."""
    one, other = (unicodedata.normalize("NFC", text) for text in (document.text, subject.decode(ids)))
    return "".join(one.split()) == "".join(other.split())


def first_blocks(documents: list[Document], subject: Subject, count: int) -> list[Document]:
    """So many of the first documents as fill `count` blocks of the model's: whole ones, the same for every model."""
    left, chosen = count * subject.context, []
    while left > 0 and len(chosen) < len(documents):
        chosen.append(documents[len(chosen)])
        left -= len(subject.encode(chosen[-1])[0]) + 1
    return chosen


def mixture(rows: dict[str, dict], sources: dict[str, dict]) -> dict[str, float]:
    """The figures of one text in which the sources are mixed by their ratios, as train.py logs them."""
    mixed_sources = {name: Source(**fields) for name, fields in sources.items()}
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


# ---------------------------------------------------------------------------------------------------------------
# Runs side by side


def read_run(run: Path) -> dict:
    """What a run has logged: its parameters, and evaluations over tokens and FLOPs. Raises BadInput without any."""
    try:
        config = json.loads((run / "config.json").read_text())
        with torch.device("meta"):  # shapes without numbers
            model = Llama(ModelConfig(**config["model"]))
        flops = model.flops_per_token(config["block_size"])
        metrics = read_metrics(run / "metrics.jsonl", sys.maxsize)
        evaluations = [entry for entry in metrics if "val_bits_per_byte" in entry]
        tokens = [entry["step"] * config["tokens_per_step"] for entry in evaluations]
    except FileNotFoundError as error:
        raise BadInput(f"{run} is no run of train.py: there is no {error.filename}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{run} is damaged: {error!r}") from error
    if not evaluations:
        raise BadInput(f"{run} has not been evaluated yet: its metrics.jsonl has no held-out loss")
    return {"name": run.name, "parameters": model.num_parameters(), "tokens": tokens,
            "flops": [count * flops for count in tokens],
            "bits_per_byte": [entry["val_bits_per_byte"] for entry in evaluations]}


def compare(runs: list[Path], picture: Path):
    """Print one table of the runs and draw one picture: bits per byte over tokens and over FLOPs.

    The figures are of each run's own held-out text: they compare runs on the same data.
    """
    from matplotlib.figure import Figure

    logged = [read_run(run) for run in runs]
    print(f"{'run':24} {'parameters':>12} {'tokens':>15} {'FLOPs':>9} {'bits per byte':>14} {'best':>7}")
    for run in logged:
        print(f"{run['name']:24} {run['parameters']:12,} {run['tokens'][-1]:15,} {run['flops'][-1]:9.2e} "
              f"{run['bits_per_byte'][-1]:14.4f} {min(run['bits_per_byte']):7.4f}")
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, unit, label in zip(figure.subplots(1, 2, sharey=True), ("tokens", "flops"), ("tokens", "FLOPs")):
        for run in logged:
            axes.plot(run[unit], run["bits_per_byte"], marker=".", label=run["name"])
        axes.set(xlabel=label, xscale="log", ylabel="held-out bits per byte")
        axes.grid(alpha=0.3)
    axes.legend()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, format="png", dpi=110)
    print(f"{picture} shows them")


def main(argv: list[str]):
    options = parse(Options, argv)
    if options.compare:
        return compare(options.compare, options.picture)
    step_dir = checkpoint.find(options.checkpoint or checkpoint.newest_run(), options.which)
    model, state = checkpoint.load_model(step_dir)
    vocabulary = checkpoint.load_tokenizer(step_dir, state)
    device = backend.pick(options.backend, "float32" if options.dtype == "int8" else options.dtype, tpu=False)
    if options.benchmarks:
        import benchmarks
        return benchmarks.run(step_dir, model, vocabulary, options, device)
    if options.dtype == "int8":
        decode.narrow(model, "int8", options.int8_activations)

    subject, sources = ours(step_dir, model.to(device.device), vocabulary), state["config"].get("sources", {})
    if options.text:
        documents = {str(path): [read_text(path)] for path in options.text}
    else:
        data_dir = options.data_dir or Path(state["config"].get("data_dir", "data"))
        documents = held_out(data_dir, [] if options.data_dir else list(sources), vocabulary)
    if options.max_blocks:
        documents = {name: first_blocks(texts, subject, options.max_blocks) for name, texts in documents.items()}
    for subject in [subject, *([theirs(options.hf, options.trust_remote_code, device.device)] if options.hf else [])]:
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


if __name__ == "__main__":
    script(main)
