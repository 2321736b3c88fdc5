"""run.py: the figures of held-out text, and what a resumed run says of its changes."""
import json
import math
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import backend
import checkpoint
import tokenizer
import train
from cli import BadInput
from config import Config, Source, load
from data import Batches, read_meta
from model import Llama, ModelConfig
from run import as_json, changes, held_out_losses, mixed, read_metrics
from tests.test_train import TINY


def test_evaluation_against_float64(quickstart_data, rng):
    """Loss and bits per byte of held-out text, worked out from the logits of one block after the other."""
    model_config = ModelConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, max_position_embeddings=64)
    blocks = rng.randint(1, 9)
    config = load(["--data_dir", str(quickstart_data), "--block_size=64", "--tokens_per_step=640",
                   "--micro_batch_size=4", f"--eval_blocks={blocks}"])
    config.model = model_config
    model = Llama(model_config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)  # so that the losses differ from one token to the next
    held_out = {name: Batches(config, "val", name) for name in config.sources}
    losses = held_out_losses(model, held_out, backend.pick("cpu", "fp32"))
    meta = read_meta(config)
    bits, length = 0.0, 0.0
    for name, source in config.sources.items():
        ids = torch.from_numpy(np.fromfile(quickstart_data / f"{name}_val.bin", np.uint16).astype(np.int64))
        nats = []
        for block in range(blocks):
            tokens = ids[block * 64:block * 64 + 65]
            with torch.no_grad():
                logits = model(tokens[None, :-1])[0][0].double()
            nats += (logits.logsumexp(-1) - logits[torch.arange(64), tokens[1:]]).tolist()
        assert losses[name] == pytest.approx(np.mean(nats), rel=1e-5)
        bits += source.ratio * np.mean(nats) / np.log(2)
        length += source.ratio * meta["sources"][name]["val"]["bytes"] / meta["sources"][name]["val"]["tokens"]
    figures = mixed(losses, config.sources, meta)
    assert figures["bits_per_byte"] == pytest.approx(bits / length, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))


def test_changes_of_a_resumed_run():
    """Each setting that differs, but for those that are about the resuming itself."""
    before = as_json(Config())
    assert changes(before, Config(resume=True, overwrite=True, max_minutes=3.0)) == []
    assert changes(before, Config(seed=7, betas=(0.8, 0.9))) == ["betas [0.9, 0.95] -> [0.8, 0.9]", "seed 42 -> 7"]
    del before["recompute"]  # a checkpoint from before the option
    assert changes(before, Config()) == [] and changes(before, Config(recompute=True)) == ["recompute None -> True"]


def test_a_field_that_an_older_checkpoint_lacks_is_no_change():
    """Whatever the run, its model and its sources have gained or lost since: where they lack a field, it is default."""
    def config(**options):
        return Config(sources={"web": Source("some/web", 0.75), "code": Source("some/code", 0.25, **options)})

    before = as_json(config(held_out=7))
    for settings, gained in ((before, "eos_token"), (before["model"], "fp32_norms"),
                             (before["sources"]["web"], "bad_rows"), (before["sources"]["code"], "bad_rows"),
                             (before["sources"]["code"], "special_tokens")):
        del settings[gained]
        settings["lost"] = "a field of earlier"
    assert changes(before, config(held_out=7)) == []
    for options in ({"held_out": 8}, {"held_out": 7, "bad_rows": "refuse"}):
        [change] = changes(before, config(**options))
        assert change.startswith("sources {'web': ")


@pytest.mark.parametrize("old, new", [("float32", "fp32"), ("bfloat16", "bf16"), ("float16", "fp16")])
def test_an_older_spelling_of_a_precision_is_no_change(old, new):
    before = as_json(Config(dtype=new)) | {"dtype": old}  # as checkpoints have it that were saved before
    assert changes(before, Config(dtype=new)) == []
    assert changes(before, Config(dtype="auto")) == [f"dtype {new} -> auto"]


def test_a_run_in_bfloat16_resumes_in_bf16(in_process, quickstart_data, tmp_path, monkeypatch):
    """Of a checkpoint whose config has the older spelling nothing is announced; of another precision it is."""
    monkeypatch.chdir(tmp_path)
    options = ["--data_dir", str(quickstart_data), *TINY, "--dtype=bf16"]
    for number, extra in enumerate(([], [], ["--dtype=fp32"])):
        code, out, err = in_process(train.main, *options, "--max_minutes=1e-9", "--resume", *extra)  # a step
        assert code == 0, (out, err)
        resumed = [line for line in out.splitlines() if line.startswith("resumed")]
        assert resumed == [[], ["resumed  at step 1"],
                           ["resumed  at step 2, with changes: dtype bf16 -> fp32"]][number]
        path = checkpoint.find(tmp_path / "out/quickstart") / "state.json"
        state = json.loads(path.read_text())
        assert state["config"]["dtype"] == ("fp32" if extra else "bf16")
        state["config"]["dtype"] = "bfloat16"
        path.write_text(json.dumps(state))


FOUR_LINES = """
from config import Config, Source
config = Config(name="mine", data_dir="data", tokenizer="theirs/tokenizer.json", sources={"text": Source("text",
                data_files="my.txt")})
"""


@pytest.mark.parametrize("context, options, length", [
    (512, [], 256), (512, ["--block_size=512"], 512), (64, [], 64), (64, ["--block_size=32"], 32)])
def test_init_from_has_the_shape_of_the_checkpoint(in_process, tmp_path, rng, monkeypatch, context, options, length):
    """A config that says nothing of the model starts from one of another vocabulary and context than the default's."""
    monkeypatch.chdir(tmp_path)
    theirs = SimpleNamespace(name="theirs", sha256="0" * 64, vocab_size=3000, eos_id=0, delimiters={})
    monkeypatch.setattr(tokenizer, "load", lambda *_: theirs)
    (tmp_path / "mine.py").write_text(FOUR_LINES)
    counts = {"tokens": 20_000, "bytes": 60_000}
    (tmp_path / "data").mkdir()
    for name in ("text.bin", "text_val.bin"):
        np.array([rng.randrange(3000) for _ in range(20_000)], "<u2").tofile(tmp_path / "data" / name)
    (tmp_path / "data" / "meta.json").write_text(json.dumps({
        "recipe": {"tokenizer": {"sha256": theirs.sha256}}, "vocab_size": 3000, "eos_id": 0,
        "sources": {"text": {"train": counts, "val": counts}}}))
    model = Llama(ModelConfig(vocab_size=3008, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                              max_position_embeddings=context))
    state = {"step": 0, "imported_from": "theirs", "tokenizer_sha256": theirs.sha256,
             "config": {"tokenizer": "theirs", "model": asdict(model.config)}}
    checkpoint.save(tmp_path / "out" / "theirs", model, None, state, True, 1)
    options = ["mine.py", "--init_from", "out/theirs", "--eval_blocks=1", "--tokens_per_step=1024", *options]
    for steps, resume in ((1, []), (2, ["--resume"])):
        code, out, err = in_process(train.main, *options, *resume, f"--max_steps={steps}")
        assert code == 0 and f"sequences x {length} tokens" in out, (out, err)
    saved = checkpoint.read_state(checkpoint.find(tmp_path / "out" / "mine"))["config"]
    assert saved["model"] == asdict(model.config) | {"fp32_blocks": [0, -1]} and saved["block_size"] == length
    code, out, err = in_process(train.main, "mine.py", "--init_from", "out/theirs", "--name=other", "--block_size=1024")
    assert code == 2 and "cannot start from" in err and f"context, model.max_position_embeddings {context}" in err


def test_metrics_are_read_up_to_a_step(tmp_path):
    """A half-written last line is left out; any other that is no entry is named, in a short line."""
    path, lines = tmp_path / "metrics.jsonl", [b'{"step": %d, "train_loss": %d}\n' % (n, n) for n in range(1, 6)]
    assert read_metrics(path, 9) == []
    path.write_bytes(b"".join(lines) + b'{"step": 6, "tra')
    assert [entry["step"] for entry in read_metrics(path, 9)] == [1, 2, 3, 4, 5]
    assert [entry["step"] for entry in read_metrics(path, 3)] == [1, 2, 3]
    for bad in (b"null", b"\xff\xff", b"[" * 100_000, b"3", b'{"step": null}', b"", b'{"step": 1e400}',
                b'{"step": 2, "val_loss": "low"}', b"\xff" * 43_000):
        path.write_bytes(b"".join([lines[0], bad, b"\n", *lines[1:]]))
        with pytest.raises(BadInput, match="line 2, is damaged") as refusal:
            read_metrics(path, 9)
        assert len(str(refusal.value)) < 600
