"""The mixture is what was asked for, blocks are used in their turn, a batch depends on its number alone."""
import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from cli import BadInput
from config import Config, Source, load
from data import Batches, curriculum, read_meta
from model import ModelConfig

OFFSET = 10_000  # the ids of a bin count upwards from here times its number, so that a token tells its place


def prepared(folder, lengths, val_lengths=None, **changes):
    """Write bins of these lengths and their meta.json as prepare.py does; return a config that reads them."""
    val_lengths = val_lengths or lengths
    meta = {"recipe": {}, "vocab_size": 65536, "eos_id": 0, "sources": {}}
    names = [f"source{number}" for number in range(len(lengths))]
    for number, name in enumerate(names):
        counts = {"train": lengths[number], "val": val_lengths[number]}
        for split, suffix in (("train", ""), ("val", "_val")):
            ids = np.arange(counts[split]) + number * OFFSET
            (folder / f"{name}{suffix}.bin").write_bytes(ids.astype("<u2").tobytes())
        meta["sources"][name] = {split: {"documents": 1, "tokens": count, "bytes": count, "dropped_bytes": 0}
                                 for split, count in counts.items()}
    (folder / "meta.json").write_text(json.dumps(meta))
    even = {name: Source("", 1 / len(names), 1 / len(names)) for name in names}
    fields = dict(data_dir=folder, sources=even, model=ModelConfig(vocab_size=65536), block_size=8,
                  tokens_per_step=64, micro_batch_size=3, max_steps=20)
    return Config(**fields | changes)


def random_run(rng, folder, **changes):
    """Bins of random lengths, and a run of 40 steps over them with a random mixture and blocks."""
    shares, block_size = random_shares(rng, rng.randint(2, 4)), rng.randint(1, 12)
    sources = {f"source{number}": Source("", float(early), float(late))
               for number, (early, late) in enumerate(shares)}
    return prepared(folder, [rng.randint(40, 400) for _ in shares], **dict(
        sources=sources, block_size=block_size, tokens_per_step=8 * block_size, max_steps=40,
        anneal_fraction=rng.random(), seed=rng.randrange(1000)) | changes)


def random_shares(rng, count):
    """(early, late) shares of so many sources: fractions that sum to 1, some of them 0."""
    def shares():
        weights = [rng.choice([0, 1, 1, 2, 7, rng.randint(1, 1000)]) for _ in range(count)]
        weights[rng.randrange(count)] += rng.randint(1, 5)
        return [Fraction(weight, sum(weights)) for weight in weights]
    return list(zip(shares(), shares()))


def steps(batches):
    """All the batches, in turn."""
    return [batches[step] for step in range(len(batches))]


# -----------------------------------------------------------------------------
# the curriculum

@pytest.mark.parametrize("case", range(60))
def test_every_prefix_holds_what_is_owed(rng, case):
    """Each source has always had what it is owed, to less than a sequence, and nothing that it is not."""
    shares, length = random_shares(rng, rng.randint(1, 6)), rng.randint(1, 1000)
    start = rng.choice([0, length, rng.randint(0, length), Fraction(rng.randint(0, 8 * length), 8)])
    early, late = ([float(pair[kind]) for pair in shares] for kind in (0, 1))
    order, taken = curriculum(early, late, float(start), length), [0] * len(shares)
    assert order.shape == (length,)
    for k, chosen in enumerate(order):
        owed = [before * min(k + 1, start) + after * max(0, k + 1 - start)  # exactly
                for before, after in shares]
        assert taken[chosen] < owed[chosen], f"{k}: {chosen} comes too early, {shares}, {start}"
        taken[chosen] += 1
        assert all(o - t < 1 + 1e-5 for o, t in zip(owed, taken)), f"{k}: one is late, {shares}, {start}"


def test_ratios_that_nearly_sum_to_1():
    """Ratios as far from a sum of 1 as Config lets pass serve a run of a million sequences."""
    order = curriculum([0.49999955, 0.49999955], [0.49999955, 0.49999955], 1e6, 1_200_000)
    assert np.bincount(order) == pytest.approx([600_000, 600_000], abs=2)


def test_a_shorter_run_begins_as_the_longer(rng):
    """A smaller max_steps changes nothing but near the anneal and after, so a fitted run is no other run."""
    shares, length = random_shares(rng, rng.randint(2, 5)), rng.randint(300, 3000)
    early, late = ([float(pair[kind]) for pair in shares] for kind in (0, 1))
    start = rng.randint(100, length)
    margin = int(1 / min(share for share in early if share)) + 2  # what is due by then, is before the anneal
    longer = curriculum(early, late, length * 2, length * 2 + 10)
    assert (curriculum(early, late, start, length)[:start][:-margin] == longer[:start][:-margin]).all()


# -----------------------------------------------------------------------------
# the training split

def test_every_token_once_an_epoch(rng, tmp_path):
    """In each epoch every block comes once, every token but the first is a target once; in a new order."""
    block_size, blocks = rng.randint(1, 12), rng.randint(24, 60)
    tokens = blocks * block_size + 1 + rng.randrange(block_size)  # the last few may not make a block
    batches = Batches(prepared(tmp_path, [tokens], block_size=block_size, tokens_per_step=4 * block_size,
                               max_steps=blocks), "train")
    assert len(batches) == blocks  # steps of four sequences: four epochs
    input_ids, targets = map(torch.cat, zip(*steps(batches)))
    assert torch.equal(targets, input_ids + 1)
    assert input_ids.dtype == targets.dtype == torch.int64 and targets.shape == (4 * blocks, block_size)
    orders = (input_ids[:, 0] // block_size).view(4, blocks).tolist()
    assert all(sorted(order) == list(range(blocks)) for order in orders)
    assert len(set(map(tuple, [*orders, range(blocks)]))) == 5  # none repeats another, and none is the file's
    for epoch in targets.view(4, -1):
        assert epoch.sort().values.tolist() == list(range(1, blocks * block_size + 1))


def test_sources_keep_their_own_epochs(rng, tmp_path):
    """In a mixture, too, no source repeats a block before all its blocks were used."""
    config = random_run(rng, tmp_path)
    batches = Batches(config, "train")
    first = torch.cat([input_ids[:, 0] for input_ids, _ in steps(batches)]).tolist()
    for number, bin in enumerate(batches.bins):
        here = [(token % OFFSET) // config.block_size for token in first if token // OFFSET == number]
        assert len(here) == (batches.order == number).sum()
        for epoch in range(0, len(here), bin.blocks):
            assert len(set(here[epoch:epoch + bin.blocks])) == len(here[epoch:epoch + bin.blocks])


def test_ranks_share_a_step(rng, tmp_path):
    """One, two and four ranks read the same sequences in the same step."""
    config = random_run(rng, tmp_path)
    for world_size in (2, 4):
        ranks = [Batches(config, "train", rank=rank, world_size=world_size) for rank in range(world_size)]
        for step, whole in enumerate(steps(Batches(config, "train"))):
            parts = [torch.cat(tensors) for tensors in zip(*(rank[step] for rank in ranks))]
            assert all(torch.equal(part, tensor) for part, tensor in zip(parts, whole))


def test_a_step_depends_on_its_number_alone(rng, tmp_path):
    """Read at random, twice, or by an object made anew, a step is what it is in turn; the seed matters."""
    config = random_run(rng, tmp_path)
    in_turn, again = steps(Batches(config, "train")), Batches(config, "train")
    for step in rng.choices(range(40), k=120):
        assert all(map(torch.equal, again[step], in_turn[step]))
        anew = Batches(config, "train")[step] if step % 10 == 0 else again[step]
        assert all(map(torch.equal, anew, in_turn[step]))
    other = steps(Batches(replace(config, seed=config.seed + 1), "train"))
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(in_turn, other))


# -----------------------------------------------------------------------------
# the held-out split

@pytest.mark.parametrize("eval_blocks", [None, 1, 4, 1000])
def test_held_out(rng, tmp_path, eval_blocks):
    """Held-out blocks come in order, each once, up to eval_blocks; rows that only pad do not count."""
    tokens, block_size, rows = rng.randint(100, 300), rng.randint(1, 12), rng.randint(1, 9)
    config = prepared(tmp_path, [50, 50], [20, tokens], block_size=block_size, tokens_per_step=8 * block_size,
                      micro_batch_size=rows, eval_blocks=eval_blocks)
    batches = Batches(config, "val", "source1")
    blocks = min((tokens - 1) // block_size, eval_blocks or 10**9)
    assert len(batches) == -(-blocks // rows)
    input_ids, targets = map(torch.cat, zip(*steps(batches)))
    assert targets.shape == (len(batches) * rows, block_size)
    assert targets[:blocks].flatten().tolist() == list(range(OFFSET + 1, OFFSET + 1 + blocks * block_size))
    assert torch.equal(targets[:blocks], input_ids[:blocks] + 1)
    assert (targets[blocks:] == -100).all()


# -----------------------------------------------------------------------------
# refusals

def damage_meta(change):
    def damage(folder, config):
        meta = json.loads((folder / "meta.json").read_text())
        change(meta)
        (folder / "meta.json").write_text(json.dumps(meta))
    return damage


def in_meta(text):
    return lambda folder, config: (folder / "meta.json").write_text(text)


@pytest.mark.parametrize("damage, word", [
    (lambda folder, config: setattr(config, "data_dir", folder / "nothing"), "prepare.py"),
    (lambda folder, config: (folder / "source1.bin").unlink(), "source1.bin is missing"),
    (lambda folder, config: (folder / "source0.bin").write_bytes(bytes(98)), "source0.bin holds 98 bytes"),
    (lambda folder, config: (folder / "source0.bin").write_bytes(bytes(101)), "source0.bin holds 101 bytes"),
    (lambda folder, config: (folder / "source1.bin").write_bytes(b"\x60\xea" * 50), "60000"),
    (lambda folder, config: setattr(config, "block_size", 50), "shorter than one block"),
    (lambda folder, config: config.sources.update(poetry=Source("", 0, 0)), "no source poetry"),
    (lambda folder, config: setattr(config.model, "vocab_size", 50_000), "--model.vocab_size 60000"),
    (in_meta(""), "damaged"), (in_meta("[1, 2]"), "damaged"), (in_meta("\0"), "damaged"),
    (in_meta("{}"), "damaged"),
    (damage_meta(lambda meta: meta.pop("vocab_size")), "damaged"),
    (damage_meta(lambda meta: meta.pop("sources")), "damaged"),
    (damage_meta(lambda meta: meta.update(vocab_size="many")), "damaged"),
    (damage_meta(lambda meta: meta.update(eos_id=[])), "damaged"),
    (damage_meta(lambda meta: meta["sources"].update(source0={})), "damaged"),
])
def test_refusals(tmp_path, damage, word):
    """What the user can put right is said in one line of BadInput."""
    config = prepared(tmp_path, [50, 50])
    config.model.vocab_size = 60_000
    damage_meta(lambda meta: meta.update(vocab_size=60_000))(tmp_path, config)
    Batches(config, "train")
    damage(tmp_path, config)
    with pytest.raises(BadInput, match=word) as refusal:
        Batches(config, "train")
    assert "\n" not in str(refusal.value)


def test_refuses_sequences_that_do_not_divide(tmp_path):
    """Eight sequences a step cannot be shared between three devices."""
    with pytest.raises(BadInput, match="8 sequences a step do not divide over 3"):
        Batches(prepared(tmp_path, [50]), "train", rank=0, world_size=3)


def test_refuses_a_short_held_out_split(tmp_path):
    """A held-out bin too short for a block is refused, though the training bin is long enough."""
    config = prepared(tmp_path, [50], [8])
    assert read_meta(config)["sources"]["source0"]["val"]["tokens"] == 8 and Batches(config, "train")
    with pytest.raises(BadInput, match="source0_val.bin is shorter than one block.*--sources.source0.held_out"):
        Batches(config, "val", "source0")


def test_batches_end(quickstart_data):
    """A loop over batches comes to an end, and a step past it is an IndexError."""
    for split, source in (("train", None), ("val", "code")):
        config = load(["--data_dir", str(quickstart_data), "--max_steps=3", "--eval_blocks=40"])
        batches = Batches(config, split, source)
        assert len(list(batches)) == len(batches) == 3
        for step in (-1, 3):
            with pytest.raises(IndexError):
                batches[step]
