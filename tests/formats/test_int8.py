"""A checkpoint with INT8 weights has those that the training used, and sample.py runs on it."""
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import quant_t4
import sample
import tokenizer
from decoding.generate import prompt_ids
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
                              "--max_new_tokens", 9, "--repetition_penalty", 1)
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
