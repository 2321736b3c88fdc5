"""An export is the same model and the same tokens in transformers, or it is not kept. These tests also run with
transformers 4.46 (make compat)."""
import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, TextIteratorStreamer

import checkpoint
import tokenizer
from backend import PRECISIONS
from formats import hf
from formats.card import READ_PORTABLY
from tests.commands import refused
from tests.formats.exports import (
    EOS,
    EXACT_FILES,
    PORTABLE_FILES,
    QUICK,
    REMOTE,
    difference,
    greedy,
    llama,
    load_hf,
    names,
    save,
    texts,
    well_formed,
)
from tokenizer import portable

pytestmark = pytest.mark.usefixtures("offline")


# -----------------------------------------------------------------------------
# the model

@pytest.mark.parametrize("shape", [
    {"tie_word_embeddings": True}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1, "num_hidden_layers": 3},
    {"vocab_size": 2176, "tie_word_embeddings": True, "num_key_value_heads": 4, "hidden_size": 64, "head_dim": 16},
], ids=["tied", "untied MHA", "untied MQA", "rows to spare"])
def test_round_trip(rng, command, tmp_path, shape, caplog):
    """transformers loads an export without a word, and computes our logits; the config says all that it needs to."""
    theta, eps = rng.choice([500.0, 12_345.0, 500_000.0]), rng.choice([1e-6, 1e-5])
    model = llama(rope_theta=theta, rms_norm_eps=eps, **shape)
    save(tmp_path / "run", model)
    code, out, err = command("--checkpoint", "run", "--out", "hf")
    assert code == 0 and err == "" and f"read with transformers {transformers.__version__}" in out
    assert names(tmp_path / "hf") == EXACT_FILES and sorted(os.listdir()) == ["hf", "run"]
    assert all(name in out for name in EXACT_FILES)

    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_propagation()  # so that caplog sees it
    theirs, info = LlamaForCausalLM.from_pretrained("hf", output_loading_info=True)
    transformers.logging.disable_propagation()
    assert not any(info.values()) and not caplog.records
    assert difference(model, theirs.eval()) <= 1e-4
    assert {name: tuple(p.shape) for name, p in theirs.named_parameters()} == \
        {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert (theirs.lm_head.weight is theirs.model.embed_tokens.weight) == model.config.tie_word_embeddings

    written, generation = (json.loads((tmp_path / "hf" / name).read_text())
                           for name in ("config.json", "generation_config.json"))
    assert written["head_dim"] == model.config.head_dim and written["vocab_size"] == model.config.vocab_size
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == theta
    assert written["torch_dtype"] == written["dtype"] == "float32" and written["rms_norm_eps"] == eps
    ids = {f"{kind}_token_id": QUICK.eos_id for kind in ("bos", "eos", "pad")}
    assert generation == ids and written.items() >= ids.items()
    for config in (theirs.config, theirs.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (QUICK.eos_id,) * 3
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_dtype(rng, command, tmp_path, dtype):
    """The weights are ours, rounded to the precision that is asked for, and transformers loads them in it."""
    model = llama(tie_word_embeddings=rng.random() < 0.5)
    save(tmp_path / "run", model)
    assert command("--checkpoint", "run", "--out", "hf", "--dtype", dtype, "--tokenizer", "portable")[0] == 0
    stored, torch_dtype = load_file("hf/model.safetensors"), PRECISIONS[dtype]
    parameters = dict(model.named_parameters())
    assert stored.keys() == parameters.keys()
    assert all(torch.equal(stored[name], p.to(torch_dtype)) for name, p in parameters.items())
    for name in ("dtype", "torch_dtype"):
        assert f"torch.{json.loads(Path('hf/config.json').read_text())[name]}" == str(torch_dtype)
    theirs = AutoModelForCausalLM.from_pretrained("hf", torch_dtype="auto")
    assert {p.dtype for p in theirs.parameters()} == {torch_dtype}
    model.load_state_dict({name: p.float() for name, p in stored.items()}, strict=False)
    assert difference(model, theirs.float().eval()) <= 1e-4


def spoil_config(patch, **values):
    """Let hf.py write other values into config.json than it means to."""
    right = hf.llama_config
    patch.setattr(hf, "llama_config", lambda *arguments: right(*arguments) | values)


def spoil_code(patch, was, becomes):
    """Let hf.py write other code for the tokenizer than it means to."""
    source = hf.remote_code()
    assert was in source
    patch.setattr(hf, "remote_code", lambda: source.replace(was, becomes))


@pytest.mark.parametrize("spoil, word", [
    (partial(spoil_config, rope_theta=99.0, rope_parameters={"rope_type": "default", "rope_theta": 99.0}), "logits"),
    (partial(spoil_config, rms_norm_eps=0.5), "logits"), (partial(spoil_config, hidden_act="relu"), "logits"),
    (partial(spoil_code, was="self.vocabulary.encode(text)", becomes="self.vocabulary.encode(text)[::-1]"), "tokens"),
    (partial(spoil_code, was='"\\x7f" if open_line else ""', becomes='"."'), "tokens"),
], ids=["rope_theta", "rms_norm_eps", "hidden_act", "encode", "decode"])
def test_what_is_not_the_same_is_not_kept(rng, command, exported, tmp_path, monkeypatch, spoil, word):
    """An export from which transformers makes another model or other tokens is refused, and nothing is left of it."""
    spoil(monkeypatch)
    refused(command("--checkpoint", exported / "out/tiny", "--out", "spoilt"), word, transformers.__version__)
    assert os.listdir() == []


def test_heads_that_do_not_divide(command, tmp_path):
    """transformers has no model whose heads do not divide its width: such a one is refused."""
    save(tmp_path / "run", llama(hidden_size=42, head_dim=8))
    refused(command("--checkpoint", "run", "--out", "hf"), "hidden_size", "42", "4")
    assert os.listdir() == ["run"]


# -----------------------------------------------------------------------------
# the portable tokenizer (of the exact one see tests/tokenizer/test_for_transformers.py)

def test_portable(rng, exported):
    """A portable export holds no code, is loaded without trust, and has the ids and the text of its tokenizer.json."""
    folder = exported / "plain" / "hf"
    assert names(folder) == PORTABLE_FILES and names(exported / "hf") == EXACT_FILES
    data = (folder / "tokenizer.json").read_bytes()
    assert data == portable.tokenizer_json(QUICK, lossless=False)
    ours, theirs = tokenizer.TokenizerJson(data, "portable"), AutoTokenizer.from_pretrained(folder)
    assert type(AutoTokenizer.from_pretrained(folder, **REMOTE)) is type(theirs)  # there is no other to take
    assert theirs.bos_token_id == theirs.eos_token_id == theirs.pad_token_id == QUICK.eos_id
    differing = 0
    for text in map(well_formed, texts(rng)):
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode(text).tolist(), text
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids), text
        differing += ids != QUICK.encode(text).tolist()
    assert differing > 10  # it is not the exact one
    assert theirs("Hello" + EOS)["input_ids"][-1] == QUICK.eos_id


def test_trained_with_the_portable(rng, command, tmp_path):
    """A model that was trained with a tokenizer.json is exported with that very file, and never with another."""
    ours = tokenizer.load("quickstart-2048", "portable")
    save(tmp_path / "run", llama(), ours, tokenizer_segmentation="portable")
    for arguments in ([], ["--tokenizer", "portable"]):
        assert command("--checkpoint", "run", "--out", "hf", *arguments)[0] == 0
        assert names(tmp_path / "hf") == PORTABLE_FILES
        assert Path("hf/tokenizer.json").read_bytes() == ours.data
        assert READ_PORTABLY not in Path("hf/README.md").read_text(encoding="utf-8")
        theirs = AutoTokenizer.from_pretrained("hf")
        for text in map(well_formed, texts(rng, 50)):
            ids = theirs(text)["input_ids"]
            assert ids == ours.encode(text).tolist()
            assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
        shutil.rmtree("hf")
    refused(command("--checkpoint", "run", "--out", "hf", "--tokenizer", "exact"), "--tokenizer", "portable")
    assert os.listdir() == ["run"]


# -----------------------------------------------------------------------------
# what transformers does with an export

@pytest.mark.parametrize("form", ["hf", "plain/hf"])
def test_pipeline(exported, form):
    """pipeline("text-generation") continues a prompt as decoding's generate does.

    Version 4 asks the tokenizer to take spaces out before punctuation, whatever its own settings say.
    """
    model = checkpoint.open_trained(exported / "out/tiny", "latest").model
    generate = transformers.pipeline("text-generation", model=str(exported / form), device="cpu",
                                     trust_remote_code=form == "hf")
    ids = generate.tokenizer("def read(self")["input_ids"]
    made = generate("def read(self", max_new_tokens=12, do_sample=False, clean_up_tokenization_spaces=False)
    wanted = generate.tokenizer.decode(ids + greedy(model, ids, 12), skip_special_tokens=True)
    assert made == [{"generated_text": wanted}]


def test_generate(rng, exported):
    """generate gives our greedy tokens, alone or in a batch padded on the left, and the text that our decode gives."""
    model = checkpoint.open_trained(exported / "out/tiny", "latest").model
    theirs = load_hf(exported / "hf")
    tokens = AutoTokenizer.from_pretrained(exported / "hf", padding_side="left", **REMOTE)
    prompts = ["Once upon a time", "1 + 1 =", "def __init__(self):\n    "]
    ids = [QUICK.encode(text).tolist() for text in prompts]
    made = theirs.generate(**tokens(prompts, padding=True, return_tensors="pt"), max_new_tokens=20, do_sample=False)
    assert [row[-20:] for row in made.tolist()] == [greedy(model, row, 20) for row in ids]
    texts = tokens.batch_decode(made[:, -20:], skip_special_tokens=True)
    assert [text.removesuffix("\x7f") for text in texts] == [QUICK.decode(row[-20:]) for row in made]


def test_streamer_of_generate(rng, exported):
    """generate's streamer shows the continuation, without the prompt."""
    theirs, tokens = load_hf(exported / "hf"), AutoTokenizer.from_pretrained(exported / "hf", **REMOTE)
    inputs, streamer = tokens("Once upon a time", return_tensors="pt"), TextIteratorStreamer(tokens, skip_prompt=True)
    made = theirs.generate(**inputs, max_new_tokens=60, do_sample=False, streamer=streamer)
    new = made[0, inputs["input_ids"].size(1):].tolist()
    shown = "".join(streamer)
    assert shown == tokens.decode(new) and shown.removesuffix("\x7f") == QUICK.decode(new) and len(new) == 60


def test_assistant(rng, exported, command):
    """Speculative decoding with another export of the same vocabulary gives the tokens that the model gives alone."""
    save(Path("small"), llama(num_hidden_layers=1, fp32_blocks=()))
    assert command("--checkpoint", "small", "--out", "hf")[0] == 0
    theirs, assistant = load_hf(exported / "hf").double(), load_hf("hf").double()
    inputs = AutoTokenizer.from_pretrained("hf", **REMOTE)("The history of", return_tensors="pt")
    alone, assisted = (theirs.generate(**inputs, max_new_tokens=40, do_sample=False, **more).tolist()
                       for more in ({}, {"assistant_model": assistant}))
    assert alone == assisted and len(alone[0]) > 40
