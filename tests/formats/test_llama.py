"""An import is the same model here, a training can begin with it, and what is no plain Llama is refused in one line.
These tests also run with transformers 4.46 (make compat)."""
import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
import sample
import train
from decoding.generate import prompt_ids
from tests.commands import refused
from tests.formats.exports import QUICK, contents, difference, greedy, load_hf, their_model, with_tokenizer

pytestmark = pytest.mark.usefixtures("offline")


def edit_weights(edit):
    """Change the tensors of the folder `theirs`: edit takes them, and changes them in place."""
    tensors = load_file("theirs/model.safetensors")
    edit(tensors)
    save_file(tensors, "theirs/model.safetensors", {"format": "pt"})


# -----------------------------------------------------------------------------
# what can be imported

@pytest.mark.parametrize("shape", [
    {"tie_word_embeddings": True}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1, "vocab_size": 2100},
], ids=["tied", "MHA", "MQA, rows to spare"])
@pytest.mark.parametrize("stored", ["one file", "shards", "bin", "bfloat16"])
def test_import(rng, command, tmp_path, shape, stored, in_process):
    """Somebody's folder becomes a run: its weights bit for bit, its logits and its tokenizer; sample.py runs."""
    model = their_model(rng, **shape)
    if stored == "bfloat16":
        model = model.bfloat16()
    folder = tmp_path / "theirs"
    model.save_pretrained(folder, max_shard_size="100KB" if stored == "shards" else "5GB")
    if stored == "bin":
        torch.save(dict(model.state_dict()), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    files = {"shards": 3 - model.config.tie_word_embeddings, "bin": 0}
    assert len(list(folder.glob("*.safetensors"))) == files.get(stored, 1)
    with_tokenizer(folder)
    code, out, err = command("--from", "theirs", "--out", "out/theirs")
    assert code == 0 and err == "" and "note:" not in out and "logits differ by" in out
    trained = checkpoint.open_trained(Path("out/theirs"), "best")
    loaded, vocabulary = trained.model, trained.vocabulary
    weights = dict(model.named_parameters())
    assert all(torch.equal(p, weights.pop(name).float()) for name, p in loaded.named_parameters()) and not weights
    assert difference(loaded, load_hf(folder)) <= 1e-4
    assert vocabulary.data == (folder / "tokenizer.json").read_bytes() and trained.state["step"] == 0
    shutil.rmtree(folder)  # the run is whole by itself
    code, out, _ = in_process(sample.main, "--prompt", "def f", "--greedy", "--max_new_tokens", 5,
                              "--repetition_penalty", 1)
    assert code == 0
    ids = greedy(loaded, prompt_ids(vocabulary, "def f"), 5, vocabulary.eos_id)
    assert out == "def f" + vocabulary.decode(ids) + "\n"


def test_there_and_back(rng, command, exported, tmp_path, in_process):
    """An exact export that is imported again has the first weights bit for bit and the first vocabulary."""
    code, out, _ = command("--from", exported / "hf", "--out", "out/back")
    assert code == 0 and "note:" not in out
    ours, again = (checkpoint.open_trained(run, "latest") for run in (exported / "out/tiny", Path("out/back")))
    assert all(torch.equal(p, q) for p, q in zip(ours.model.parameters(), again.model.parameters(), strict=True))
    assert again.state["tokenizer_sha256"] == ours.state["tokenizer_sha256"]
    said = [in_process(sample.main, "--checkpoint", run, "--prompt", "The", "--seed", 5, "--max_new_tokens", 12)[:2]
            for run in ("out/back", exported / "out/tiny")]
    assert said[0] == said[1] and said[0][0] == 0
    assert command("--out", "hf")[0] == 0  # and out once more
    assert Path("hf/model.safetensors").read_bytes() == (exported / "hf/model.safetensors").read_bytes()
    assert Path("hf/config.json").read_bytes() == (exported / "hf/config.json").read_bytes()


@pytest.mark.parametrize("which", ["all", "some", "both"])
def test_weight_master(rng, command, theirs, which):
    """The first Stentor checkpoints' weight_master are found, alone or beside their equal, and a note says so."""
    def rename(tensors):
        linears = [name for name in tensors if name.endswith("_proj.weight")]
        for name in linears if which == "all" else rng.sample(linears, 5):
            tensors[f"{name}_master"] = tensors[name] if which != "both" else tensors[name].clone()
            tensors[name] = tensors[name].half()
            if which != "both":
                del tensors[name]

    edit_weights(rename)
    code, out, _ = command("--from", "theirs", "--out", "out/theirs")
    assert code == 0 and f"note: {14 if which == 'all' else 5} weights are stored as weight_master" in out
    loaded = checkpoint.open_trained(Path("out/theirs"), "latest").model
    weights = dict(theirs.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in loaded.named_parameters())


@pytest.mark.parametrize("other", [lambda tensor: tensor + 1, lambda tensor: tensor[:-1].clone()],
                         ids=["values", "shape"])
def test_two_different_weights_of_one_name(rng, command, theirs, other):
    """A weight and a weight_master that differ are refused by the weight's name."""
    name = rng.choice(["model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"])
    edit_weights(lambda tensors: tensors.update({f"{name}_master": other(tensors[name])}))
    refused(command("--from", "theirs", "--out", "run"), name, "_master")
    assert os.listdir() == ["theirs"]


def test_import_notes(rng, command, tmp_path):
    """Another end of text than the vocabulary's, and a head beside the embedding that it is tied to, are noted."""
    model = their_model(rng, eos_token_id=[5, 6], tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "theirs")
    with_tokenizer(tmp_path / "theirs")
    edit_weights(lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}))
    code, out, _ = command("--from", "theirs", "--out", "run")
    assert code == 0 and out.count("note:") == 2 and "eos_token_id is [5, 6]" in out and "ties the head" in out
    loaded = checkpoint.open_trained(Path("run"), "latest").model
    assert difference(loaded, model) <= 1e-4


def test_vocabulary_by_name(rng, command, theirs):
    """A folder without a vocabulary is imported with the one that --vocabulary names, copied beside the weights."""
    Path("theirs/tokenizer.json").unlink()
    refused(command("--from", "theirs", "--out", "run"), "theirs", "--vocabulary")
    refused(command("--from", "theirs", "--out", "run", "--vocabulary", "nowhere.vocab"), "nowhere.vocab")
    assert command("--from", "theirs", "--out", "run", "--vocabulary", "quickstart-2048")[0] == 0
    assert Path("run/quickstart-2048.vocab").read_bytes() == QUICK.data
    assert checkpoint.open_trained(Path("run"), "latest").vocabulary.sha256 == QUICK.sha256


# -----------------------------------------------------------------------------
# what cannot

def change(file, **values):
    """Other values in a JSON file; None removes one."""
    changed = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))


def setting(**values):
    return lambda: change(Path("theirs/config.json"), **values)


def content(name, data):
    return lambda: Path("theirs", name).write_text(data)


def missing(name):
    return lambda: Path("theirs", name).unlink()


def tensors(edit):
    return lambda: edit_weights(edit)


DOWN = "model.layers.1.mlp.down_proj.weight"
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10_000.0}


@pytest.mark.parametrize("spoil, words", [
    (setting(model_type="gpt2"), ["model_type", "gpt2"]), (setting(hidden_act="gelu"), ["hidden_act", "gelu"]),
    (setting(attention_bias=True), ["attention_bias"]), (setting(mlp_bias=True), ["mlp_bias"]),
    (setting(rope_scaling={"type": "linear", "factor": 2.0}), ["rope_scaling", "linear"]),
    (setting(rope_scaling={"rope_type": "llama3", "factor": 8.0}), ["rope_scaling", "llama3"]),
    (setting(rope_parameters=YARN), ["rope_parameters", "yarn"]), (setting(pretraining_tp=2), ["pretraining_tp"]),
    (setting(quantization_config={"quant_method": "gptq"}), ["quantization_config"]),
    (setting(hidden_size=None), ["hidden_size"]), (setting(vocab_size=None), ["vocab_size"]),
    (setting(num_key_value_heads=3), ["num_key_value_heads"]), (setting(hidden_size="wide"), ["config.json"]),
    (setting(hidden_size=36), ["(2048, 32)", "(2048, 36)"]), (setting(num_hidden_layers=3), ["layers.2", "absent"]),
    (setting(num_hidden_layers=1), ["layers.1", "absent"]),
    (missing("config.json"), ["config.json"]), (content("config.json", '{"model_type": "llama"'), ["config.json"]),
    (content("config.json", "[]"), ["config.json"]), (content("config.json", ""), ["config.json"]),
    (setting(rope_scaling="linear"), ["rope_scaling"]), (setting(rope_parameters=[1]), ["rope_parameters"]),
    (missing("model.safetensors"), ["no weights"]), (content("model.safetensors", "{}"), ["model.safetensors"]),
    (lambda: (missing("model.safetensors")(), content("pytorch_model.bin", "\x80")()), ["pytorch_model.bin"]),
    (missing("tokenizer.json"), ["tokenizer.json", "--vocabulary"]),
    (content("tokenizer.json", "{}"), ["tokenizer.json"]), (tensors(lambda t: t.pop(DOWN)), [DOWN, "absent"]),
    (tensors(lambda t: t.update(more=torch.ones(2))), ["more", "absent"]),
    (tensors(lambda t: t.update({DOWN: torch.ones(32, 40)})), [DOWN, "(32, 40)"]),
    (tensors(lambda t: t[DOWN].view(-1)[7:8].fill_(float("nan"))), [DOWN, "finite"]),
    (tensors(lambda t: t[DOWN].view(-1)[9:10].fill_(float("-inf"))), [DOWN, "finite"]),
])
def test_import_refusals(command, theirs, spoil, words, tmp_path):
    """What is not a whole, plain Llama is refused in one line that names what is wrong with it, and leaves nothing."""
    spoil()
    before = contents(tmp_path)
    refused(command("--from", "theirs", "--out", "run"), *words)
    assert contents(tmp_path) == before


def test_import_of_too_many_ids(rng, command, tmp_path):
    """A vocabulary with more ids than the model has rows is another model's."""
    their_model(rng, vocab_size=2047).save_pretrained(tmp_path / "theirs")
    with_tokenizer(tmp_path / "theirs")
    refused(command("--from", "theirs", "--out", "run"), "2,048", "2,047")
    assert os.listdir() == ["theirs"]


@pytest.mark.parametrize("name, words", [
    ("nowhere", ["no folder nowhere"]), ("./no/where", ["no folder"]), ("/nowhere/at-all", ["no folder"]),
    ("somebody/stentor-of-theirs", ["no folder", "cannot be downloaded"]),
])
def test_import_from_nowhere(command, name, words):
    """A folder that is not there, and a name on the hub without a network, are refused."""
    refused(command("--from", name, "--out", "run"), name, *words)
    assert os.listdir() == []


# -----------------------------------------------------------------------------
# training that begins with an import

TINY = ["--block_size=32", "--tokens_per_step=64", "--micro_batch_size=2", "--train_minutes=None", "--max_minutes=None",
        "--log_interval=1", "--eval_interval=1", "--eval_blocks=2", "--learning_rate=1e-9", "--backend=cpu",
        "--dtype=fp32"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder as prepare.py leaves it, of the quickstart's sources, but of ids that mean nothing."""
    folder, counts = tmp_path_factory.mktemp("data"), {"tokens": 2000, "bytes": 6000}
    for source in ("web", "code", "math"):
        for name in (source, f"{source}_val"):
            (folder / f"{name}.bin").write_bytes(torch.randint(2048, (2000,)).numpy().astype("<u2").tobytes())
    meta = {"recipe": {"tokenizer": {"sha256": QUICK.sha256}}, "vocab_size": 2048, "eos_id": QUICK.eos_id,
            "sources": {source: {"train": counts, "val": counts} for source in ("web", "code", "math")}}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def test_init_from(rng, command, tmp_path, data, in_process):
    """train.py --init_from begins with an import's shape and weights, and such a run can be resumed and exported."""
    model = their_model(rng, num_hidden_layers=1, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "theirs")
    assert command("--from", "theirs", "--out", "out/theirs", "--vocabulary", "quickstart-2048")[0] == 0
    trained = partial(in_process, train.main, "--data_dir", data, *TINY, "--init_from", "out/theirs")
    code, out, err = trained("--max_steps=1")
    assert code == 0, (out, err)
    first = checkpoint.open_trained(Path("out/quickstart"), "latest")
    loaded, ours = first.model, checkpoint.open_trained(Path("out/theirs"), "latest").model
    assert loaded.config == ours.config and first.state["step"] == 1
    assert all(torch.allclose(p, q, rtol=0, atol=1e-6)
               for p, q in zip(loaded.parameters(), ours.parameters(), strict=True))
    code, out, err = trained("--max_steps=3", "--resume")
    assert code == 0 and "resumed  at step 1" in out and "trained 3 steps" in out, (out, err)
    lines = [json.loads(line) for line in Path("out/quickstart/metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
    assert sorted(losses) == [1, 2, 3] and max(losses.values()) - min(losses.values()) < 1e-3
    assert command("--checkpoint", "out/quickstart", "--out", "hf")[0] == 0
    assert difference(loaded, load_hf("hf")) <= 1e-3


def test_an_import_is_not_lost(rng, command, tmp_path, data, in_process):
    """It has nothing to resume, and a run that begins with it may not take its place."""
    their_model(rng, num_hidden_layers=1).save_pretrained(tmp_path / "theirs")
    assert command("--from", "theirs", "--out", "out/theirs", "--vocabulary", "quickstart-2048")[0] == 0
    before, trained = contents(tmp_path), partial(in_process, train.main, "--data_dir", data, *TINY, "--name=theirs")
    refused(trained("--resume"), "was imported", "--init_from")
    refused(trained("--init_from", "out/theirs", "--overwrite"), "--name")
    assert contents(tmp_path) == before


def test_init_from_refusals(rng, command, theirs, data, in_process):
    """A beginning that is not there, one of another vocabulary and one of a shorter context are refused in one line."""
    trained = partial(in_process, train.main, "--data_dir", data, *TINY, "--max_steps=1", "--init_from")
    refused(trained("out/nowhere"), "out/nowhere", "no checkpoint")
    assert command("--from", "theirs", "--out", "imported")[0] == 0  # with its tokenizer.json
    refused(trained("imported"), "another vocabulary", "quickstart-2048")
    assert command("--from", "theirs", "--out", "again", "--vocabulary", "quickstart-2048")[0] == 0
    refused(trained("again", "--block_size=128", "--tokens_per_step=256"), "again", "block_size 128")
    assert sorted(os.listdir()) == ["again", "imported", "theirs"]
