"""A run's settings: one dataclass, and the command line made from it.

Every other file in config/ is a run: one Python file that binds `config` to a Config. It holds nothing but values, and
where they come from. `load` takes the defaults from such a file, and the command line has the last word:

    python train.py config/quickstart.py --block_size=128 --model.num_hidden_layers=2
"""

import copy
import math
import re
import runpy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cli import BadInput, parse
from model import ModelConfig

QUICKSTART = Path(__file__).with_name("quickstart.py")
FILE_READERS = ("text", "json", "csv", "parquet", "arrow", "pandas", "xml", "hdf5", "webdataset")  # of `datasets`
MOST_SEQUENCES = 2**28  # in a run: their order takes 9 bytes each
MOST_TOKENS = 2**26  # in a forward pass
LONG_SPELLINGS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}  # of a dtype, in older configs


@dataclass
class Source:
    """A stream of documents and its share of the training mixture."""

    dataset: str
    """Where the text is: a dataset of the Hugging Face hub ("owner/name"); a folder; text, json, csv or parquet with
    data_files; or embedded text, library:docs, library:code or library:arithmetic (sources/embedded.py)."""
    ratio: float = 1.0
    """Share of the training tokens."""
    anneal_ratio: float | None = None
    """Share of the training tokens in the anneal, the last part of the run; if None, the same as before it."""
    preserve_linebreaks: bool = False
    """Keep line breaks and indentation, as code needs; otherwise all white space becomes single spaces."""
    subset: str | None = None
    """Subset of the dataset, which the hub calls a configuration."""
    data_files: tuple[str, ...] = ()
    """Paths or patterns of the files to read, in the dataset's repository or here; if none, those that it names."""
    split: str = "train"
    """Split of the dataset to read."""
    column: str = "text"
    """Column that holds the documents."""
    sample_by: Literal["line", "paragraph", "document"] = "paragraph"
    """What a document is in files of plain text: a line, a paragraph between blank lines, or a whole file."""
    bad_rows: Literal["skip", "refuse"] = "skip"
    """What to do with a row that holds no text, or is damaged: count it and go on, or stop there."""
    special_tokens: Literal["text", "drop", "refuse"] = "text"
    """What to do with a document that spells out a special token of the vocabulary, such as </s>: take it for the text
    that it is, count the document and go on without it, or stop there."""
    held_out: int = 100
    """Documents to hold out, from the start of the stream. (Embedded text is held out by file instead.)"""

    def __post_init__(self):
        """Fill in anneal_ratio. Raises ValueError, in one line, if there is nothing to read or to hold out."""
        if self.anneal_ratio is None:
            self.anneal_ratio = self.ratio
        self.data_files = (self.data_files,) if isinstance(self.data_files, str) else tuple(self.data_files)
        if self.dataset in FILE_READERS and not self.data_files:  # `datasets` would take those of the current directory
            raise ValueError(f"the source {self.dataset} needs data_files, the files to read")
        if self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}; it must be at least 1")


@dataclass
class Config:
    """A training run. Prepare its data, train it and sample from it with the same file."""

    name: str = "quickstart"
    """Name of the run: checkpoints and curves go to out/NAME."""
    data_dir: Path = Path("data/quickstart")
    """Directory of the token bins, written by prepare.py."""
    tokenizer: str = "quickstart-2048"
    """Vocabulary: a name, or the path of a .vocab or tokenizer.json file."""
    tokenizer_segmentation: Literal["exact", "portable"] = "exact"
    """How a .vocab file cuts up text: by TokenMonster's own search, or by that of a tokenizer.json made from it, which
    other programs have too (tokenizer/portable.py)."""
    eos_token: str | None = None
    """Token, or its id, that follows each document (of a tokenizer.json). If None, what config.json or
    special_tokens_map.json beside it says, or else a token of a usual name (tokenizer/delimiters.py)."""
    sources: dict[str, Source] = field(default_factory=dict)
    """The mixture: a bin for each source."""
    anneal_fraction: float = 0.15
    """Fraction of the run, at its end, in which the sources are mixed by their anneal_ratio."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the model."""
    block_size: int = 256
    """Tokens in a training sequence."""
    tokens_per_step: int = 8192
    """Tokens in an optimizer step, over all devices and accumulation steps."""
    micro_batch_size: int = 32
    """Sequences in one forward pass on one device. Fewer need less memory and give the same run."""
    max_steps: int = 1000
    """Optimizer steps in the run."""
    train_minutes: float | None = None
    """Make the run shorter than max_steps if need be, so that it takes about this many minutes (wsd only)."""
    max_minutes: float | None = None
    """Save and stop after this many minutes (of a Kaggle session, say); continue with --resume."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After the warmup: a cosine to 0, or stable and then linear to 0 (warmup, stable, decay)."""
    warmup_fraction: float = 0.05
    """Part of the run over which the rate rises linearly."""
    decay_fraction: float = 0.15
    """Part of the run over which wsd decays."""
    weight_decay: float = 0.01
    """AdamW's decay of the Linear weights."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's averaging of the gradient and of its square."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Gradients of a larger norm are scaled down to this one."""
    seed: int = 42
    """Seed of the initial weights and the order of the blocks."""

    log_interval: int = 10
    """Steps between two lines of progress."""
    eval_interval: int = 100
    """Steps between two evaluations, each followed by a checkpoint."""
    eval_blocks: int | None = None
    """Held-out blocks of each source to evaluate on; all if None."""
    keep_checkpoints: int = 2
    """Checkpoints to keep besides the best."""

    tracker: Literal["none", "wandb", "trackio"] = "none"
    """Library that also gets what goes into metrics.jsonl."""
    backend: Literal["auto", "cpu", "cuda", "xla"] = "auto"
    """Device to train on; auto takes a TPU (xla) or a GPU (cuda) if there is one."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the matrix products; auto is bf16 if the hardware has it, and fp16 on older GPUs."""
    int8_linears: tuple[str, ...] = ()
    """Linears of the inner blocks that learn to run in INT8 (quant_t4.py): any of q_proj to down_proj."""
    int8_product: Literal["auto", "integers", "fake"] = "auto"
    """How those linears multiply: integers, or the same in floating point; auto times both when a run begins."""
    attention: Literal["auto", "sdpa", "chunked", "flash"] = "auto"
    """PyTorch's own attention (sdpa), in chunks of queries, or a TPU's kernel (flash); auto is sdpa, but on XLA flash,
    or chunked if that kernel is missing."""
    recompute: bool | None = None
    """Keep only what goes into a block, and run it again in the backward pass; if None, only XLA does."""
    compile: bool = False
    """Use torch.compile, and go on without it if it fails. (XLA always compiles.)"""
    init_from: Path | None = None
    """Start from the weights, and so the shape, of a checkpoint: a run, a step of one, or an import (export.py)."""
    resume: bool = False
    """Go on from the latest checkpoint of this run, if there is one."""
    overwrite: bool = False
    """Delete an earlier run of the same name."""

    def __post_init__(self):
        """Check the values. Raises ValueError, in one line, if they cannot make a run."""
        if self.name in ("", ".", "..") or Path(self.name).name != self.name:
            raise ValueError(f"name is {self.name!r}; it must be the plain name of a directory under out/")
        for name in self.sources:
            if not re.fullmatch(r"[\w-]+", name) or name.endswith("_val"):  # sources become file names
                raise ValueError(f"a source is called {name!r}; use letters, digits, - and _, and no _val at the end")
        self.data_dir = Path(self.data_dir)  # a preset may write it as a string
        self.dtype = LONG_SPELLINGS.get(self.dtype, self.dtype)
        for name in ("block_size", "tokens_per_step", "micro_batch_size", "max_steps", "log_interval", "eval_interval",
                     "eval_blocks", "keep_checkpoints"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("learning_rate", "eps", "max_grad_norm", "train_minutes", "max_minutes"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:  # written like this, it refuses NaN too
                raise ValueError(f"{name} is {getattr(self, name)}; it must be more than 0")
            if getattr(self, name) == math.inf and name != "max_grad_norm":
                raise ValueError(f"{name} is infinite; it must be a number")
        for name in ("anneal_fraction", "warmup_fraction", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay is {self.weight_decay}; it must be a number, and not negative")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; it must lie between 0 and {2**32 - 1}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}; each must be at least 0 and less than 1")
        if self.tokens_per_step % self.block_size:
            raise ValueError(f"tokens_per_step {self.tokens_per_step} is not a multiple of "
                             f"block_size {self.block_size}")
        if self.max_steps * self.sequences_per_step > MOST_SEQUENCES:
            raise ValueError(f"max_steps {self.max_steps} of {self.sequences_per_step} sequences each are too many: "
                             f"{MOST_SEQUENCES} sequences are the most; choose fewer steps, or a larger block_size")
        if self.micro_batch_size * self.block_size > MOST_TOKENS:
            raise ValueError(f"micro_batch_size {self.micro_batch_size} is more than memory can hold; {MOST_TOKENS} "
                             f"tokens in one forward pass are the most")
        if not self.init_from:  # with it the shape is that of a checkpoint, which is read later
            self.check_context()
        for kind in ("ratio", "anneal_ratio"):
            ratios = [getattr(source, kind) for source in self.sources.values()]
            if ratios and not (all(ratio >= 0 for ratio in ratios) and abs(sum(ratios) - 1) <= 1e-6):  # refuses NaN too
                raise ValueError(f"the {kind} of the sources are {ratios}; they must not be negative, and sum to 1")
        if self.train_minutes and self.schedule != "wsd":
            raise ValueError("train_minutes needs --schedule wsd: a cosine must know its length from the start")

    def check_context(self):
        """Raise ValueError if a training sequence is longer than the model's context."""
        if self.block_size > self.model.max_position_embeddings:
            raise ValueError(f"block_size {self.block_size} is more than the model's context, "
                             f"model.max_position_embeddings {self.model.max_position_embeddings}")

    @property
    def out_dir(self) -> Path:
        """Directory of the run."""
        return Path("out") / self.name

    @property
    def sequences_per_step(self) -> int:
        """Sequences in an optimizer step, over all devices and accumulation steps."""
        return self.tokens_per_step // self.block_size

    @property
    def warmup_steps(self) -> int:
        """Steps over which the learning rate rises, at least 1."""
        return max(1, round(self.warmup_fraction * self.max_steps))


def load(argv: list[str]) -> Config:
    """The run that the command line asks for: [config/NAME.py] [--field=value ...]; the quickstart if no file.

    Raises BadInput if the file is missing or broken, a field is unknown, or a value is of the wrong type or out of
    range.
    """
    path, options = (Path(argv[0]), argv[1:]) if argv and not argv[0].startswith("-") else (QUICKSTART, argv)
    if not path.is_file():
        there = ", ".join(f"config/{p.name}" for p in sorted(QUICKSTART.parent.glob("*.py")) if p.name != "__init__.py")
        raise BadInput(f"there is no config file {path}; there are {there}")
    try:
        default = runpy.run_path(str(path))["config"]
    except Exception as error:
        raise BadInput(f"{path} is not a run: {type(error).__name__}: {error}") from error
    if not isinstance(default, Config):
        raise BadInput(f"{path} does not bind `config` to a Config")
    # What followed from a value of the preset should follow from the command line's. (We copy: presets share parts.)
    default, model = copy.copy(default), copy.copy(default.model)
    if model.head_dim * model.num_attention_heads == model.hidden_size:
        model.head_dim = None
    sources = {name: copy.copy(source) for name, source in default.sources.items()}
    for source in sources.values():
        if source.anneal_ratio == source.ratio:
            source.anneal_ratio = None
    default.model, default.sources = model, sources
    return parse(Config, options, default)
