"""Bins to batches.

Which tokens a step sees is a pure function of the step. The run's sequences are numbered 0, 1, 2, ... over all devices
and accumulation steps. `curriculum` gives each number its source, and how many sequences of that source come before it
gives its block. So resuming needs nothing but the step, and one device reads what eight would.
"""

from functools import lru_cache
from math import ceil
from pathlib import Path

import numpy as np
import torch

from cli import BadInput, is_count, is_positive, parse_json
from config import Config

# What meta.json and progress.json must hold for training. prepare.py asks for more.
META = {"recipe": {"tokenizer?": {"sha256": str}}, "vocab_size": is_positive, "eos_id?": is_count,
        "sources": {str: {"train": {"tokens": is_count}, "val": {"tokens": is_count, "bytes": is_positive},
                          "commit?": lambda value: value is None or isinstance(value, str)}}}


def curriculum(early: list[float], late: list[float], anneal_start: float, length: int) -> np.ndarray:
    """The source of each sequence of a run: `length` numbers (uint8) that index `early` and `late`.

    Source s is owed early[s] of every sequence before anneal_start and late[s] of every one after. After any prefix
    each source has had what it is owed, to within one sequence. This is the chairman assignment problem (Tijdeman
    1980). Sequence j of a source may not come before the source is owed more than j, and must come before it is owed
    more than j + 1. Of the sources that may come next, we take the one that must come soonest. That keeps every such
    promise.
    """
    may, must = [], []  # for each source and j: the first place for its sequence j, and the end of the last one
    for before, after in zip(np.array(early) / sum(early), np.array(late) / sum(late)):
        before, after = max(before, 1e-9 / length), max(after, 1e-9 / length)  # barely above 0, so that `owed` rises
        owed = np.cumsum([0, before * anneal_start, after * (length - anneal_start), 2])  # 2 more, past the end
        times = [0, anneal_start, length, length + 2 / after]
        sequences = np.arange(ceil(owed[-2]) + 1)
        # A millionth of a sequence makes up for rounding, and for the "barely above 0".
        may.append(np.floor(np.interp(sequences + 1e-6, owed, times)).astype(int).tolist())
        must.append(np.ceil(np.interp(sequences + 1 - 1e-6, owed, times)).tolist())

    taken = [0] * len(early)
    order = np.empty(length, np.uint8)
    for k in range(length):
        _, _, source = min((may[s][taken[s]] > k, must[s][taken[s]], s) for s in range(len(early)))
        order[k] = source
        taken[source] += 1
    return order


def tokens_needed(config: Config) -> dict[str, int]:
    """Tokens that the bin of each source must hold so that the run uses no block of it twice.

    That is the curriculum's integral over the run, rounded up to whole sequences, which is the most that `curriculum`
    takes from a source; and one token more, in which the last block ends. It is 0 for a source that the run does not
    use.
    """
    length = config.max_steps * config.sequences_per_step
    shares = np.array([(source.ratio, source.anneal_ratio) for source in config.sources.values()]).T
    early, late = shares / shares.sum(axis=1, keepdims=True)
    owed = length * ((1 - config.anneal_fraction) * early + config.anneal_fraction * late)
    blocks = [ceil(sequences - 1e-6) for sequences in owed]
    return {name: count * config.block_size + 1 if count else 0 for name, count in zip(config.sources, blocks)}


class Bin:
    """A file of uint16 token ids, read in blocks of block_size + 1 tokens that begin block_size apart.

    Neighbours share one token, a target in the first and an input in the second, so every token is predicted once. We
    read blocks with plain file reads, because the pages of a memory map would count as resident for ever.
    """

    def __init__(self, path: Path, tokens: int, vocab_size: int, block_size: int, first: int | None = None):
        """Use the first `first` tokens, or all if None.

        Raises BadInput if the file is missing, is not `tokens` long, or holds ids that are not in the vocabulary.
        """
        self.path, self.block_size = path, block_size
        if not path.is_file():
            raise BadInput(f"{path} is missing; delete {path.parent} and run prepare.py again")
        if path.stat().st_size != 2 * tokens:
            raise BadInput(f"{path} holds {path.stat().st_size} bytes and meta.json says {2 * tokens}; "
                           f"delete {path.parent} and run prepare.py again")
        self.file = path.open("rb")
        largest = 0
        for _ in range(0, tokens, 1 << 24):  # 32 MB at a time, at the speed of the disk
            largest = max(largest, int(np.fromfile(self.file, np.uint16, 1 << 24).max()))
        if largest >= vocab_size:
            raise BadInput(f"{path} holds the id {largest}, beyond the vocabulary of {vocab_size}; "
                           f"delete {path.parent} and run prepare.py again")
        self.blocks = max(0, min(tokens, first or tokens) - 1) // block_size

    def read(self, block: int) -> np.ndarray:
        """The tokens of a block, (block_size + 1,) uint16."""
        self.file.seek(2 * block * self.block_size)
        return np.fromfile(self.file, np.uint16, self.block_size + 1)


def read_meta(config: Config) -> dict:
    """The meta.json of the config's data.

    Raises BadInput, and says what to do, if the data is missing, incomplete, damaged, or not the config's.
    """
    path = config.data_dir / "meta.json"
    if not path.exists() and (config.data_dir / "progress.json").exists():
        raise BadInput(f"the data in {config.data_dir} is not complete; finish it with prepare.py and the same config")
    if not path.exists():
        raise BadInput(f"there is no prepared data in {config.data_dir}; make it with prepare.py and the same config, "
                       f"or try the model on the quickstart's with --data_dir data/quickstart")
    try:
        meta = parse_json(path.read_bytes(), META)
    except ValueError as error:
        raise BadInput(f"{path} is damaged ({error}); delete {config.data_dir} and run prepare.py again") from error
    missing, vocab_size = set(config.sources) - set(meta["sources"]), meta["vocab_size"]
    if missing:
        raise BadInput(f"{config.data_dir} has no source {', '.join(sorted(missing))}; "
                       f"it has {', '.join(meta['sources'])}")
    if vocab_size > config.model.vocab_size and not config.init_from:  # with it the model is not known yet
        raise BadInput(f"the data has {vocab_size} token ids and the model {config.model.vocab_size} rows; "
                       f"set --model.vocab_size {vocab_size}")
    return meta


class Batches:
    """A split of the data as batches: [step] gives this rank's (input_ids, targets), (sequences, block_size) int64.

    The training split mixes the sources by the curriculum, sequences_per_step at a time. When a source is used up, it
    starts over with the source's blocks in a new order. The held-out split ("val") is read one source at a time, once
    and in order, in batches of micro_batch_size sequences a chip. Sequences whose targets are all -100 fill up the last
    batch, so that all batches have the same shape.
    """

    def __init__(self, config: Config, split: str, source: str | None = None, rank: int = 0, world_size: int = 1,
                 chips: int = 1, first: dict[str, int] | None = None):
        """Open the bins of a split, of one source or of all.

        `first` says how many tokens of each source's bin to use, from its start; all if None. So a resumed run keeps
        the data that it began with, even if prepare.py has added to it. `chips` is how many chips share this rank's
        sequences.

        Raises BadInput if the bins are missing, disagree with meta.json or are too short for one block.
        """
        meta = read_meta(config)
        self.names = [source] if source else list(config.sources)
        self.split, self.seed, self.block_size = split, config.seed, config.block_size
        suffix = {"train": "", "val": "_val"}[split]
        self.bins = [Bin(config.data_dir / f"{name}{suffix}.bin", meta["sources"][name][split]["tokens"],
                         config.model.vocab_size, config.block_size, (first or {}).get(name)) for name in self.names]
        needed = tokens_needed(config)
        for name, bin in zip(self.names, self.bins):
            if not bin.blocks and (needed[name] or split == "val"):
                other = f"hold out more text (--sources.{name}.held_out, and prepare it again), or " * (split == "val")
                raise BadInput(f"{bin.path} is shorter than one block of {config.block_size} tokens; "
                               f"{other}choose a smaller --block_size")
        if split == "train":
            length, self.per_step = config.max_steps * config.sequences_per_step, config.sequences_per_step
            shares = [config.sources[name] for name in self.names]
            anneal_start = (1 - config.anneal_fraction) * length
            self.order = curriculum([s.ratio for s in shares], [s.anneal_ratio for s in shares], anneal_start, length)
        else:
            length = min(self.bins[0].blocks, config.eval_blocks or self.bins[0].blocks)
            self.per_step = config.micro_batch_size * chips
            self.order = np.zeros(length, np.uint8)
        self.index = np.empty(length, np.int64)  # each sequence's number within its source
        for number in range(len(self.names)):
            here = self.order == number
            self.index[here] = np.arange(here.sum())
        if self.per_step % (world_size * chips):
            raise BadInput(f"{self.per_step} sequences a step do not divide over {world_size * chips} devices")
        self.mine = range(rank * self.per_step // world_size, (rank + 1) * self.per_step // world_size)
        # An epoch's order takes 8 bytes a block. Keep two for each source, since an epoch may end within a step.
        self.permutation = lru_cache(2 * len(self.names))(self._permutation)

    def __len__(self) -> int:
        return ceil(len(self.order) / self.per_step)

    def _permutation(self, source: int, epoch: int) -> np.ndarray:
        # RandomState's stream is frozen for good (NEP 19), so a run resumes on the same blocks with another numpy.
        return np.random.RandomState([self.seed, source, epoch]).permutation(self.bins[source].blocks)

    def sequence(self, k: int) -> tuple[int, int]:
        """The source and the block of the run's sequence number k."""
        source, index = int(self.order[k]), int(self.index[k])
        if self.split == "val":
            return source, index
        epoch, place = divmod(index, self.bins[source].blocks)
        return source, int(self.permutation(source, epoch)[place])

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        input_ids = torch.zeros(len(self.mine), self.block_size, dtype=torch.int64)
        targets = torch.full_like(input_ids, -100)
        for row, place in enumerate(self.mine):
            k = step * self.per_step + place
            if k < len(self.order):
                source, block = self.sequence(k)
                tokens = torch.from_numpy(self.bins[source].read(block).astype(np.int64))  # (block_size + 1,)
                input_ids[row], targets[row] = tokens[:-1], tokens[1:]
        return input_ids, targets
