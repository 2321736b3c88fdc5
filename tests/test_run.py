"""run.py: the figures of held-out text, and what a resumed run says of its changes."""
import json
import math

import numpy as np
import pytest
import torch

import backend
import checkpoint
import train
from config import Config, load
from data import Batches, read_meta
from model import Llama, ModelConfig
from run import as_json, changes, held_out_losses, mixed
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
