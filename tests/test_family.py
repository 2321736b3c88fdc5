"""The eight published models: every figure of the cards that a config must meet, and a short run of each."""
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import model
import prepare
import sample
import sizing
import train
from config import Config, Source, load
from data import Batches, curriculum, tokens_needed
from tests.commands import ROOT, metrics

MILLION = 1e6
FAMILY = {  # name: parameters in millions, embedding share in %, tokens, context; the table of Stentor3-20M's card
    "stentor3_20m": (20.3, 12.9, 8500 * MILLION, 4096),
    "stentor3_50m": (49.4, 8.5, 8300 * MILLION, 4096),
    "stentor2_12m_preview": (12.3, 16.8, 240 * MILLION, 1024),
    "stentor2_12m": (12.3, 16.8, 480 * MILLION, 1024),
    "stentor2_30m": (30.4, 13.6, 800 * MILLION, 1024),
    "stentor_12m": (12.0, 52.2, 200 * MILLION, 512),
    "stentor_30m": (30.4, 27.6, 600 * MILLION, 512),
    "portimbria_150m": (151.0, 16.7, 6000 * MILLION, 4096),
}


def preset(name, *options) -> Config:
    return load([str(ROOT / "config" / f"{name}.py"), *options])


def test_every_run_of_the_family_is_here():
    assert set(FAMILY) | {"quickstart", "__init__"} <= {path.stem for path in (ROOT / "config").glob("*.py")}


@pytest.mark.parametrize("name", FAMILY)
def test_shape(name):
    """The shapes come to the published totals, shares, contexts and tokens, to the last digit that is published."""
    config, (millions, share, tokens, context) = preset(name), FAMILY[name]
    with torch.device("meta"):
        llama = model.Llama(config.model)
    count = sizing.count_parameters(llama)
    assert sum(count.values()) == llama.num_parameters() == sum(p.numel() for p in llama.parameters())
    assert round(llama.num_parameters() / MILLION, 1) == millions
    assert round(100 * (count["embedding"] + count["head"]) / llama.num_parameters(), 1) == share
    assert config.model.max_position_embeddings == config.block_size == context
    assert config.max_steps * config.tokens_per_step == pytest.approx(tokens, rel=1e-4)


def test_published_totals():
    """Where a card gives the total itself, and those that its rounded figures leave no doubt about."""
    totals = {"stentor3_20m": 20_324_160, "stentor3_50m": 49_430_016, "stentor_30m": 30_419_712,
              "portimbria_150m": 151_026_432, "stentor_12m": 12_047_040, "stentor2_12m": 12_294_400,
              "stentor2_12m_preview": 12_294_400, "stentor2_30m": 30_353_920}
    for name, total in totals.items():
        with torch.device("meta"):
            assert model.Llama(preset(name).model).num_parameters() == total


@pytest.mark.parametrize("name, changes, millions", [
    ("stentor2_12m", {"intermediate_size": 512}, 12.3), ("stentor_12m", {"num_hidden_layers": 9}, 12.0)])
def test_the_table_contradicts_itself(name, changes, millions):
    """The family table's own shapes do not make the totals that it states: why ours differ from it."""
    with torch.device("meta"):
        assert round(model.Llama(replace(preset(name).model, **changes)).num_parameters() / MILLION, 1) != millions


def test_two_ways_to_have_as_many_parameters():
    """10 query and 2 key/value heads of 32, or 5 and 1 of 64: the total cannot tell, the card's cache formula does."""
    ours = preset("stentor3_20m").model
    theirs = replace(ours, num_attention_heads=5, num_key_value_heads=1, head_dim=64)
    with torch.device("meta"):
        assert model.Llama(ours).num_parameters() == model.Llama(theirs).num_parameters()
    assert (ours.num_attention_heads, ours.num_key_value_heads, ours.head_dim) == (10, 2, 32)


def test_stentor3_run():
    """The run of Stentor3-20M, by its card."""
    config = preset("stentor3_20m")
    assert config.max_steps * config.tokens_per_step == 8_500_019_200
    assert (config.warmup_steps, config.max_steps, config.eval_interval, config.seed) == (1621, 32_425, 1000, 42)
    assert (config.betas, config.eps, config.weight_decay, config.max_grad_norm) == ((0.9, 0.95), 1e-8, 0.01, 1.0)
    assert config.tokens_per_step == 8 * config.micro_batch_size * config.block_size  # 8 chips, no accumulation
    rates = {1: 8e-4 / 1621, 1621: 8e-4, 17_023: 4e-4, 32_425: 0}
    assert {step: train.learning_rate(step, config) for step in rates} == pytest.approx(rates, abs=1e-12)
    assert train.learning_rate(32_425, config) > 0
    assert [source.held_out for source in config.sources.values()] == [5000, 1000, 667]


def test_preview_run():
    """The run of Stentor2-12M-Preview: its tokens, to half a step, and its evaluations."""
    config = preset("stentor2_12m_preview")
    assert (config.max_steps, config.tokens_per_step, config.eval_interval) == (14_649, 16_384, 375)
    assert 0 <= config.max_steps * config.tokens_per_step - 240_001_024 < config.tokens_per_step


@pytest.fixture(scope="module")
def stentor3_order():
    config = preset("stentor3_20m")
    length = config.max_steps * config.sequences_per_step
    shares = np.array([(source.ratio, source.anneal_ratio) for source in config.sources.values()]).T
    return config, shares, (1 - config.anneal_fraction) * length, curriculum(*shares.tolist(), 0.85 * length, length)


def test_stentor3_mixture(stentor3_order):
    """Over all 2,075,200 sequences each source has had its share to within one, at every moment, anneal included."""
    config, (early, late), anneal_start, order = stentor3_order
    assert len(order) == 2_075_200
    places = np.arange(1, len(order) + 1)
    for number in range(3):
        owed = early[number] * np.minimum(places, anneal_start) + late[number] * np.maximum(0, places - anneal_start)
        assert np.abs(np.cumsum(order == number) - owed).max() <= 1 + 1e-6
    start = int(np.ceil(anneal_start))
    assert np.bincount(order[:start]) / start == pytest.approx([0.75, 0.15, 0.10], abs=1 / start)
    annealed = len(order) - start
    assert np.bincount(order[start:]) / annealed == pytest.approx([0.50, 0.30, 0.20], abs=2 / annealed)


@pytest.mark.parametrize("share", [1.0, 0.37])
def test_stentor3_blocks(tmp_path, share):
    """The whole run through Batches, blocks of one token: each once before any twice; once, where prepare.py has made
    what the run needs, and in epochs where a source holds but a part of that."""
    config = preset("stentor3_20m", f"--data_dir={tmp_path}", "--block_size=1", "--tokens_per_step=64")
    tokens = {name: int(share * needed) for name, needed in tokens_needed(config).items()}
    counts = {name: {split: {"documents": 1, "tokens": count, "bytes": count, "dropped_bytes": 0}
                     for split in ("train", "val")} for name, count in tokens.items()}
    (tmp_path / "meta.json").write_text(json.dumps({"recipe": {}, "vocab_size": 4096, "eos_id": 2, "sources": counts}))
    for name, count in tokens.items():
        np.zeros(count, np.uint16).tofile(tmp_path / f"{name}.bin")
    batches = Batches(config, "train")
    used = [[] for _ in tokens]
    for k in range(len(batches.order)):
        source, block = batches.sequence(k)
        used[source].append(block)
    for blocks, bin in zip(used, batches.bins):
        assert (len(blocks) <= bin.blocks) == (share == 1.0)
        epochs = [np.array(blocks[start:start + bin.blocks]) for start in range(0, len(blocks), bin.blocks)]
        assert all(len(np.unique(epoch)) == len(epoch) for epoch in epochs)
        assert all(len(epoch) == bin.blocks for epoch in epochs[:-1])


def test_tokens_needed(rng):
    """What the curriculum takes of a source is never more than prepare.py makes, nor less by more than a sequence."""
    for _ in range(30):
        weights = np.array([[rng.randint(1, 20) for _ in range(rng.randint(1, 5))]] * 2, float)
        rng.shuffle(weights[1])
        shares = (weights / weights.sum(axis=1, keepdims=True)).tolist()
        sources = {str(number): Source("", before, after) for number, (before, after) in enumerate(zip(*shares))}
        config = replace(preset("stentor3_20m"), block_size=rng.choice([1, 8]), tokens_per_step=8 * rng.randint(1, 9),
                         max_steps=rng.randint(1, 60), anneal_fraction=rng.random(), sources=sources)
        length = config.max_steps * config.sequences_per_step
        order = curriculum(*shares, (1 - config.anneal_fraction) * length, length)
        for number, needed in enumerate(tokens_needed(config).values()):
            blocks, remainder = divmod(needed - 1, config.block_size)
            assert remainder == 0 and 0 <= blocks - (order == number).sum() <= 1


# -----------------------------------------------------------------------------
# a short run of each

@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    """A Parquet file with both of the columns that the presets ask for."""
    rng = np.random.default_rng()
    words = [line.split() for line in (ROOT / "README.md").read_text().splitlines() if line.strip()]
    texts = ["\n".join(" ".join(words[i]) for i in rng.integers(len(words), size=20)) for _ in range(60)]
    path = tmp_path_factory.mktemp("shard") / "text.parquet"
    pq.write_table(pa.table({"text": texts, "content": texts[::-1]}), path)
    return path


@pytest.mark.parametrize("name", FAMILY)
def test_short_run(name, shard, tmp_path, monkeypatch, capsys):
    """With its own widths, cut down in depth and length, it prepares, trains, resumes and samples."""
    monkeypatch.chdir(tmp_path)
    config = preset(name)
    options = [str(ROOT / "config" / f"{name}.py"), "--data_dir=data", "--tokenizer=quickstart-2048",
               "--model.num_hidden_layers=3", "--model.vocab_size=2048", "--block_size=64", "--tokens_per_step=256",
               "--micro_batch_size=2", "--max_steps=4"]
    for source in config.sources:
        options += [f"--sources.{source}.dataset=parquet", f"--sources.{source}.data_files", str(shard),
                    f"--sources.{source}.subset=None", f"--sources.{source}.held_out=8"]
    prepare.main(options)
    options += ["--eval_interval=4", "--eval_blocks=2", "--log_interval=1", "--dtype=fp32"]
    train.main([*options, "--name=whole"])
    train.main([*options, "--name=parts", "--max_minutes=1e-9"])  # stops after its first step
    assert (tmp_path / "out/parts/latest").read_text().strip().endswith("1")
    train.main([*options, "--name=parts", "--resume"])
    whole, parts = ([m["train_loss"] for m in metrics(tmp_path / "out" / run) if "train_loss" in m]
                    for run in ("whole", "parts"))
    assert len(whole) == 4 and whole == parts
    assert f"{7 * name.startswith(('stentor2', 'stentor_'))} INT8 linears" in capsys.readouterr().out
    sample.main(["--checkpoint", "out/parts", "--prompt", "The", "--max_new_tokens=5", "--seed=1"])
    assert "[5 tokens" in capsys.readouterr().err
