"""Checkpoints with INT8 or INT4 weights hold what they say, as a folder or one file, and sample.py runs on them."""
import copy
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
import eval
import quant_t4
import sample
import tokenizer
from decoding.generate import prompt_ids
from decoding.narrow import Narrow, narrow
from tests.commands import refused
from tests.formats.exports import QUICK, greedy, llama, names, save

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
pytestmark = pytest.mark.usefixtures("offline")


@torch.no_grad()
@pytest.mark.parametrize("linears", [("q_proj", "down_proj"), LINEARS])
def test_int8(rng, command, tmp_path, linears, in_process):
    """The INT8 weights are, bit for bit, those that the training's forward pass used; sample.py runs on them."""
    model = llama(num_hidden_layers=3, fp32_blocks=(rng.randrange(3),), tie_word_embeddings=rng.random() < 0.5)
    save(tmp_path / "run", model, int8_linears=linears)
    code, out, _ = command("--checkpoint", "run", "--out", "int8", "--format", "int8")
    assert code == 0 and f"{2 * len(linears)} weights in INT8" in out and "was not trained" not in out
    assert names(tmp_path / "int8") == ["README.md", "model.safetensors", "state.json", "tokenmonster.vocab"]

    quant_t4.apply_t4_recipe(model, linears)  # as in training, but for the inputs
    used, parameters = {}, dict(model.named_parameters())
    for name, module in model.named_modules():
        if isinstance(module, quant_t4.Int8LinearT4):
            module.quantize_input = False
            used[f"{name}.weight"] = quant_t4.FakeQuantize.apply(module.weight)
    stored = load_file("int8/model.safetensors")
    assert len(used) == 2 * len(linears) and stored.keys() == {*parameters, *(f"{name}_scale" for name in used)}
    for name, p in parameters.items():
        if name in used:
            integers, scale = quant_t4.quantize(p)
            assert torch.equal(stored[name], integers) and torch.equal(stored[f"{name}_scale"], scale)
            assert torch.equal(integers * scale, used[name])
        else:
            assert torch.equal(stored[name], p)
    trained = checkpoint.open_trained(Path("int8"), "latest")
    loaded, vocabulary = trained.model, trained.vocabulary
    assert all(torch.equal(p, used.get(name, parameters[name])) for name, p in loaded.named_parameters())
    ids = torch.randint(2048, (2, 64))
    assert torch.equal(loaded(ids)[0], model(ids)[0])
    assert vocabulary.sha256 == QUICK.sha256 and vocabulary.eos_id == QUICK.eos_id
    before, after = (checkpoint.find(Path(name)) / "model.safetensors" for name in ("run", "int8"))
    assert after.stat().st_size < before.stat().st_size

    code, out, _ = in_process(sample.main, "--checkpoint", "int8", "--prompt", "def f", "--greedy",
                              "--max_new_tokens", 9, "--repetition_penalty", 1, "--dtype", "fp32")
    ids = greedy(loaded, prompt_ids(QUICK, "def f"), 9, QUICK.eos_id)
    assert code == 0 and out == "def f" + QUICK.decode(ids) + "\n"


def test_int8_of_a_model_not_trained_for_it(rng, command, tmp_path):
    """Without int8_linears all linears of the blocks become INT8, but for the FP32 blocks'; the rest has --dtype."""
    vocabulary = tokenizer.load("quickstart-2048", "portable")
    model = llama(num_hidden_layers=3, fp32_blocks=(0,))
    save(tmp_path / "run", model, vocabulary, tokenizer_segmentation="portable")
    code, out, _ = command("--checkpoint", "run", "--out", "int8", "--format", "int8", "--dtype", "bf16")
    assert code == 0 and "14 weights in INT8" in out and "was not trained for it" in out
    stored = load_file("int8/model.safetensors")
    int8 = {name for name, tensor in stored.items() if tensor.dtype == torch.int8}
    assert int8 == {name for name in stored if re.search(r"layers\.[12]\..*_proj\.weight$", name)}
    assert all(tensor.dtype == torch.bfloat16 for name, tensor in stored.items()
               if name not in int8 and not name.endswith("_scale"))
    loaded = checkpoint.open_trained(Path("int8"))
    assert loaded.vocabulary.data == vocabulary.data
    assert all(torch.allclose(p, q, atol=0.05)
               for p, q in zip(loaded.model.parameters(), model.parameters(), strict=True))


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize("bundle", [False, True])
def test_packed_weights(rng, command, tmp_path, in_process, kind, tied, bundle):
    """The weights come back as decoding/narrow.py rounds them, of widths that INT4 pads too; sample.py and eval.py read
    a folder or one file, and write in the type that it was rounded to what they write of the run in that type."""
    if kind == "int8" and not bundle:
        pytest.skip("test_int8")
    model = llama(hidden_size=40, num_attention_heads=4, num_key_value_heads=2, head_dim=6, intermediate_size=72,
                  tie_word_embeddings=tied)
    save(tmp_path / "run", model)
    arguments = ["--format", "bundle", "--dtype", kind] if bundle else ["--format", kind]
    code, out, err = command("--checkpoint", "run", "--out", "packed", *arguments)
    assert code == 0 and kind.upper() in out and "bits a parameter" in out, (out, err)
    [path] = (tmp_path / "packed").glob("*.safetensors")
    others = set() if bundle else {"state.json", "tokenmonster.vocab"}
    assert set(names(tmp_path / "packed")) == {"README.md", path.name} | others
    if not bundle:
        path = path.parent
    trained = checkpoint.open_trained(path)
    assert trained.step_dir == path and trained.vocabulary.data == QUICK.data
    rounded = narrow(copy.deepcopy(model), kind)
    for name, p in trained.model.named_parameters():
        theirs = rounded.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(p, theirs.wide() if isinstance(theirs, Narrow) else theirs.weight), name
    options = ["--prompt", "def f", "--greedy", "--max_new_tokens", 9]
    code, text, err = in_process(sample.main, "--checkpoint", path, *options)
    assert code == 0 and text == in_process(sample.main, "--checkpoint", "run", "--dtype", kind, *options)[1], err
    (tmp_path / "a.txt").write_text("def read(self):\n    return self.text\n" * 9)
    code, out, err = in_process(eval.main, "--checkpoint", path, "--text", "a.txt", "--dtype", kind)
    assert code == 0 and "bits" in out, (out, err)


@pytest.mark.parametrize("damage", ["half", "another tensor", "no state", "no file", "state is a list",
                                    "a file elsewhere"])
def test_a_bundle_that_is_none(rng, command, tmp_path, in_process, damage):
    """One line, and what was in it is not half open."""
    save(tmp_path / "run", llama())
    assert command("--checkpoint", "run", "--out", "packed", "--format", "bundle")[0] == 0
    [path] = (tmp_path / "packed").glob("*.safetensors")
    tensors, state = load_file(path), {"state": '{"config": {"tokenizer": "a"}}'}
    if damage == "half":
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    elif damage == "another tensor":
        save_file({"a": torch.ones(3)}, path, state)
    elif damage == "no state":
        save_file(tensors, path)
    elif damage == "a file elsewhere":
        save_file(tensors, path, {"state": '{"step": 1, "config": {"tokenizer": "../.."}}'})
    elif damage == "state is a list":
        save_file(tensors, path, {"state": "[]"})
    else:
        path.unlink()
    refused(in_process(sample.main, "--checkpoint", path, "--prompt", "a"), path.name)


@pytest.mark.parametrize("arguments, words", [
    (["--format", "int4", "--dtype", "bf16"], ["int4", "bf16"]), (["--format", "bundle", "--dtype", "fp16"], ["fp16"]),
    (["--format", "bundle", "--tokenizer", "exact"], ["bundle", "tokenizer"]), (["--dtype", "int4"], ["gguf", "q4_0"]),
])
def test_refusals(command, arguments, words, tmp_path):
    save(tmp_path / "run", llama())
    refused(command("--checkpoint", "run", "--out", "export", *arguments), *words)
