"""Folders as others leave them: the import takes the model's own files, keeps what delimits its documents, and refuses
only what is another model; a damaged file is refused in one line. These tests also run with transformers 4.46."""
import json
import shutil
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
from cli import BadInput
from decoding.generate import prompt_ids
from formats import llama as importer
from tests.commands import refused
from tests.formats.exports import contents, their_model, with_tokenizer
from tests.tokenizer.test_foreign import added, byte_bpe, metaspace_bpe, mutated, spec

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture
def small(rng, tmp_path):
    """A function that makes the folder `theirs` with a tokenizer.json of its own."""
    def make(made, **config):
        size = max([*made["model"]["vocab"].values(), *(token["id"] for token in made["added_tokens"])]) + 1
        model = their_model(rng, **{"vocab_size": size, "bos_token_id": None, "eos_token_id": None, **config})
        model.save_pretrained(tmp_path / "theirs")
        (tmp_path / "theirs" / "tokenizer.json").write_text(json.dumps(made))
        return model

    return make


def edit(name, **values):
    path = Path("theirs", name)
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | values))


def same(model, run="run"):
    """Whether an imported run has the weights of a model."""
    loaded, weights = checkpoint.open_trained(Path(run)).model, dict(model.named_parameters())
    return all(torch.equal(p, weights[name]) for name, p in loaded.named_parameters())


# -----------------------------------------------------------------------------
# which files

def test_the_index_decides(rng, command, tmp_path):
    """Of new and old shards in one folder the index names the right ones."""
    model = their_model(rng)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    with_tokenizer(tmp_path / "theirs")
    total = len(list(Path("theirs").glob("model-*.safetensors")))
    old = {name: p.detach() + 1 for name, p in model.named_parameters()}
    for number in range(1, total + 2):
        save_file(old, f"theirs/model-{number:05d}-of-{total + 1:05d}.safetensors", {"format": "pt"})
    save_file(old, "theirs/zzz.safetensors", {"format": "pt"})
    assert command("--from", "theirs", "--out", "run")[0] == 0 and same(model)
    index = Path("theirs/model.safetensors.index.json")
    whole = json.loads(index.read_text())
    shutil.copytree("theirs", "again")
    index.unlink()
    refused(command("--from", "theirs", "--out", "other"), "index.json")
    tensor, file = rng.choice(list(whole["weight_map"].items()))
    for places, words in (({tensor: "gone.safetensors"}, ["gone.safetensors"]), ({"more": file}, ["more", file]),
                          ({tensor: "../" + file}, ["../" + file])):
        index.write_text(json.dumps({"weight_map": whole["weight_map"] | places}))
        refused(command("--from", "theirs", "--out", "other"), *words)
    assert not Path("other").exists()


def test_what_lies_beside(command, theirs):
    """An adapter, Meta's own files and a trainer's are no part of the model; an adapter alone says what to do."""
    other = {"layers.0.weight": torch.ones(3, 3)}
    for name in ("adapter_model.safetensors", "consolidated.00.safetensors", "optimizer.safetensors"):
        save_file(other, f"theirs/{name}", {"format": "pt"})
    torch.save(other, "theirs/training_args.bin")
    Path("theirs/model.safetensors").rename("theirs/weights.safetensors")
    code, out, _ = command("--from", "theirs", "--out", "run")
    if code:  # transformers does not take a file of another name
        assert "cannot load" in out or code == 2
    weights = load_file("theirs/weights.safetensors")
    Path("theirs/weights.safetensors").unlink()
    torch.save(weights, "theirs/pytorch_model.bin")
    assert command("--from", "theirs", "--out", "bin")[0] == 0 and same(theirs, "bin")
    Path("theirs/pytorch_model.bin").unlink()
    refused(command("--from", "theirs", "--out", "other"), "only an adapter", "merge")


@pytest.mark.parametrize("wrapper, prefix", [("model", ""), ("model", "_orig_mod."), ("state_dict", "module."),
                                             (None, "_orig_mod."), (None, "module._orig_mod.")])
def test_what_a_training_script_saves(command, theirs, wrapper, prefix):
    """{"model": ..., "iter_num": 5}, and the names that torch.compile and several devices give, are unwrapped."""
    weights = {prefix + name: tensor for name, tensor in load_file("theirs/model.safetensors").items()}
    Path("theirs/model.safetensors").unlink()
    torch.save({wrapper: weights, "iter_num": 5} if wrapper else weights, "theirs/pytorch_model.bin")
    code, out, err = command("--from", "theirs", "--out", "run")
    assert code == 0 and same(theirs), err
    assert out.count("note:") == bool(wrapper) + sum(map(bool, prefix.split(".")))


@pytest.mark.parametrize("content", [[1, 2], {"weights": 3, "iter_num": 5}, {"model": {"a": 1}}, torch.ones(2)])
def test_a_bin_of_something_else(command, theirs, content):
    """What holds no weights is refused with what it holds."""
    Path("theirs/model.safetensors").unlink()
    torch.save(content, "theirs/pytorch_model.bin")
    refused(command("--from", "theirs", "--out", "run"), "pytorch_model.bin")


def test_a_layer_count_out_of_range(command, theirs, tmp_path):
    """A config.json cannot ask for more memory than there is."""
    before = contents(tmp_path)
    for changes, word in (({"num_hidden_layers": 10**9}, "num_hidden_layers"),
                          ({"num_hidden_layers": 900}, "num_hidden_layers is 900 there, and 2"),
                          ({"hidden_size": 10**9}, "hidden_size"), ({"vocab_size": 4_000_000}, "vocab_size"),
                          ({"intermediate_size": 1_000_000, "num_hidden_layers": 1000}, "intermediate_size")):
        config = Path("theirs/config.json").read_text()
        edit("config.json", **changes)
        refused(command("--from", "theirs", "--out", "run"), word)
        Path("theirs/config.json").write_text(config)
    assert contents(tmp_path) == before


def test_padding_without_a_row(command, theirs, tmp_path):
    """A pad id beyond the rows, in config.json or in the tokenizer, does not make it another model."""
    tokenizer = json.loads(Path("theirs/tokenizer.json").read_text())
    tokenizer["added_tokens"].append(added(2048, "<pad>"))
    Path("theirs/tokenizer.json").write_text(json.dumps(tokenizer))
    edit("config.json", pad_token_id=2048)
    code, out, err = command("--from", "theirs", "--out", "run")
    assert code == 0 and same(theirs) and "logits differ by" in out and "beyond the 2,048 rows" in out, err
    trained = checkpoint.open_trained(Path("run"))
    assert trained.vocabulary.vocab_size == 2048
    assert command("--checkpoint", "run", "--out", "hf")[0] == 0


# -----------------------------------------------------------------------------
# what delimits documents

def test_documents_that_begin_with_a_token(rng, command, small):
    """A bos of config.json begins prompts; there and back, begin, end and padding stay what they were."""
    model = small(byte_bpe(("<s>", "</s>", "<pad>")), bos_token_id=0, eos_token_id=1, pad_token_id=2)
    code, out, err = command("--from", "theirs", "--out", "run")
    assert code == 0 and "begin with <s>" in out and "--eos_token" in out, err
    vocabulary = checkpoint.open_trained(Path("run")).vocabulary
    assert prompt_ids(vocabulary, "the quick")[0] == 0 and vocabulary.eos_id == 1 and set(vocabulary.ends) == {0, 1}
    assert command("--checkpoint", "run", "--out", "hf")[0] == 0
    for name in ("config.json", "generation_config.json"):
        said = json.loads(Path("hf", name).read_text())
        assert [said[f"{kind}_token_id"] for kind in ("bos", "eos", "pad")] == [0, 1, 2]
    said = json.loads(Path("hf/tokenizer_config.json").read_text())
    assert [said[f"{kind}_token"] for kind in ("bos", "eos", "pad")] == ["<s>", "</s>", "<pad>"]
    assert command("--from", "hf", "--out", "back")[0] == 0
    assert prompt_ids(checkpoint.open_trained(Path("back")).vocabulary, "")[0] == 0 and same(model, "back")
    assert command("--from", "theirs", "--out", "alone", "--eos_token", "<s>")[0] == 0
    vocabulary = checkpoint.open_trained(Path("alone")).vocabulary
    assert (vocabulary.eos_id, vocabulary.bos_id) == (0, 0)
    assert importer.tokenizer.load("run/tokenizer.json").eos_token == "<s>"  # for text that is prepared for this model


def test_a_hub_in_trouble(capsys, tmp_path, monkeypatch):
    """An import waits for a server that drops the call, and gives up at once where there is none."""
    calls = iter([ConnectionResetError("reset"), TimeoutError("no answer"), None])

    def snapshot_download(name, **patterns):
        if error := next(calls):
            raise error
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert importer.find_folder("owner/model") == tmp_path
    assert capsys.readouterr().err.splitlines() == ["owner/model: reset; trying again in 2 s",
                                                    "owner/model: no answer; trying again in 10 s"]
    calls = iter([OSError("no route to host")])
    with pytest.raises(BadInput, match="there is no folder owner/model, and it cannot be downloaded"):
        importer.find_folder("owner/model")


@pytest.mark.parametrize("config, eos", [({"eos_token_id": 2}, 2), ({"eos_token_id": [2, 0]}, 2), ({}, 1),
                                         ({"eos_token_id": 3, "bos_token_id": 3}, 3)])
def test_the_end_that_config_json_names(rng, command, small, config, eos):
    """config.json has the say before a usual name, and special_tokens_map.json before that; it is told."""
    small(byte_bpe(("<s>", "</s>", "<|im_end|>", "<|end|>")), **config)
    code, out, err = command("--from", "theirs", "--out", "run")
    vocabulary = checkpoint.open_trained(Path("run")).vocabulary
    assert code == 0 and vocabulary.eos_id == vocabulary.bos_id == eos, err
    assert (vocabulary.eos_token in out) == (eos != 1)
    edit("special_tokens_map.json", eos_token={"content": "<|end|>"})
    assert command("--from", "theirs", "--out", "again")[0] == 0
    assert checkpoint.open_trained(Path("again")).vocabulary.eos_id == (eos if config else 3)
    assert command("--checkpoint", "run", "--out", "int8", "--format", "int8")[0] == 0
    assert checkpoint.open_trained(Path("int8")).vocabulary.eos_id == eos


def test_an_end_that_only_the_user_knows(command, small, tmp_path):
    """Tokenizers whose end has another name, or none at all, are imported with --eos_token."""
    small(byte_bpe(("<fin>",)))
    refused(command("--from", "theirs", "--out", "run"), "--eos_token", "<fin>")
    refused(command("--from", "theirs", "--out", "run", "--eos_token", "777777"), "777777")
    assert command("--from", "theirs", "--out", "run", "--eos_token", "<fin>")[0] == 0
    assert checkpoint.open_trained(Path("run")).vocabulary.eos_token == "<fin>"
    refused(command("--checkpoint", "run", "--out", "hf", "--eos_token", "<fin>"), "--from")


# -----------------------------------------------------------------------------
# exports of tokenizers that others made

def test_an_unknown_token_is_exported(command, small, in_process):
    """transformers prints [UNK], and we do not: the ids are the same, so the export is right."""
    model = metaspace_bpe()["model"]
    vocab = {piece: place for place, piece in enumerate(
        ["[UNK]", "[SEP]", *(piece for piece in model["vocab"] if piece != "</s>")])}
    small(spec(model | {"vocab": vocab, "unk_token": "[UNK]"}, [(0, "[UNK]"), (1, "[SEP]")],
               pre_tokenizer={"type": "Whitespace"}))
    assert command("--from", "theirs", "--out", "run")[0] == 0
    code, out, err = command("--checkpoint", "run", "--out", "hf")
    assert code == 0 and "logits differ by" in out, err


def test_a_decoder_is_exported(rng, command, small):
    """A file without a decoder gets one, so that transformers prints text."""
    from transformers import AutoTokenizer
    small(byte_bpe(decoder=None))
    assert command("--from", "theirs", "--out", "run")[0] == 0 and command("--checkpoint", "run", "--out", "hf")[0] == 0
    theirs, ours = AutoTokenizer.from_pretrained("hf"), checkpoint.open_trained(Path("run")).vocabulary
    assert theirs.decode(ours.encode("the quick fox").tolist()) == "the quick fox"
    assert command("--checkpoint", "run", "--out", "int8", "--format", "int8")[0] == 0
    assert checkpoint.open_trained(Path("int8")).vocabulary.sha256 == ours.sha256


# -----------------------------------------------------------------------------
# damaged files

@pytest.mark.parametrize("name, count", [("config.json", 1000), ("model.safetensors.index.json", 1000)])
def test_a_thousand_damaged_files(rng, tmp_path, monkeypatch, name, count):
    """A damaged config or index is refused in one line, or gives the model that it describes."""
    model = their_model(rng, num_hidden_layers=1, vocab_size=64)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="8KB")
    path = tmp_path / "theirs" / name
    original, taken = path.read_bytes(), 0
    for _ in range(count):
        path.write_bytes(mutated(rng, original))
        try:
            if name == "config.json":
                config, theirs = importer.read_config(tmp_path / "theirs")
                importer.Beside(theirs).eos({}, {2})
                if config.num_hidden_layers < 4:
                    with torch.device("meta"):
                        importer.Llama(config)
            else:
                importer.read_weights(tmp_path / "theirs")
            taken += 1
        except BadInput as error:
            assert "\n" not in str(error) and len(str(error)) < 800
    assert taken > 20
