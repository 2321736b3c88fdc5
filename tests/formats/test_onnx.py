"""The ONNX graph computes what the model does, whatever the batch, the past and the padding, under the names that
optimum and transformers.js look for."""
import json
import math
import os
import random
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch

import checkpoint
import export
import tokenizer
from config import Config
from decoding.generate import generate
from model import Llama, ModelConfig
from tests.commands import ROOT, refused
from tokenizer import portable

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

CONTEXT = 64
VOCABULARY = tokenizer.load("quickstart-2048")
# Heads of another size than hidden_size / heads, and a block of both kinds; and all as plain as can be.
SHAPES = {"grouped, untied, an FP32 block": dict(num_key_value_heads=2, head_dim=24, fp32_blocks=(0,)),
          "all heads, tied": dict(num_key_value_heads=4, tie_word_embeddings=True, fp32_blocks=(), fp32_norms=False)}


def llama(**changes):
    """A small model with weights so large that its likeliest tokens change from place to place."""
    model = Llama(ModelConfig(**dict(vocab_size=2050, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                     num_attention_heads=4, max_position_embeddings=CONTEXT, rms_norm_eps=1e-5,
                                     rope_theta=50_000.0) | changes))
    for p in model.parameters():
        p.data.uniform_(0.5, 1.5) if p.dim() == 1 else p.data.normal_(0, 1.5 * p.size(1) ** -0.5)
    return model


def save(folder, model):
    """A run with one checkpoint of the model, as train.py leaves it."""
    config = Config(name="tiny", model=model.config, block_size=32, tokens_per_step=32)
    state = {"step": 3, "seconds": 60.0, "tokenizer_sha256": VOCABULARY.sha256,
             "config": json.loads(json.dumps(asdict(config), default=str))}
    checkpoint.save(folder, model, None, state, True, 1)


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES)
def exported(request, tmp_path_factory):
    """(folder of the export, the model)"""
    seed = int(os.environ.get("TEST_SEED") or random.SystemRandom().randrange(2**32))
    print(f"TEST_SEED={seed} of the model")
    torch.manual_seed(seed)
    folder, model = tmp_path_factory.mktemp("onnx"), llama(**request.param)
    save(folder / "run", model)
    export.main(["--checkpoint", str(folder / "run"), "--out", str(folder / "new"), "--format", "onnx"])
    return folder / "new", model


@pytest.fixture(scope="module")
def session(exported):
    return onnxruntime.InferenceSession(exported[0] / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def model(exported):
    return exported[1]


def empty(session, batch):
    """The past of nothing: name -> (B, K, 0, D)."""
    return {i.name: np.zeros((batch, i.shape[1], 0, i.shape[3]), np.float32) for i in session.get_inputs()[2:]}


def step(session, ids, mask, past):
    """One pass of the graph: logits (B, T, V) of ids (B, T), and the past of the next pass. mask: (B, P + T)."""
    feed = {"input_ids": torch.as_tensor(ids).numpy(), "attention_mask": torch.as_tensor(mask).numpy()}
    outputs = session.run(None, feed | past)
    named = dict(zip((output.name for output in session.get_outputs()), outputs))
    return torch.from_numpy(named.pop("logits")), {
        name.replace("present", "past_key_values"): value for name, value in named.items()}


def same(theirs, ours):
    """Equal logits, to 1e-5 of the largest."""
    return theirs.shape == ours.shape and float((theirs - ours).abs().max()) < 1e-5 * float(ours.abs().max())


# -----------------------------------------------------------------------------
# the files

def test_names_and_axes(session, model):
    """Inputs, outputs and axes are called what optimum calls them: transformers.js knows a batch axis by its name."""
    c, head = model.config, ["batch_size", model.config.num_key_value_heads]
    pairs = [(layer, part) for layer in range(c.num_hidden_layers) for part in ("key", "value")]
    both = "past_sequence_length + sequence_length"
    assert [(i.name, i.shape, i.type) for i in session.get_inputs()] == [
        ("input_ids", ["batch_size", "sequence_length"], "tensor(int64)"),
        ("attention_mask", ["batch_size", both], "tensor(int64)"),
        *[(f"past_key_values.{layer}.{part}", [*head, "past_sequence_length", c.head_dim], "tensor(float)")
          for layer, part in pairs]]
    assert [(o.name, o.shape, o.type) for o in session.get_outputs()] == [
        ("logits", ["batch_size", "sequence_length", c.vocab_size], "tensor(float)"),
        *[(f"present.{layer}.{part}", [*head, both, c.head_dim], "tensor(float)") for layer, part in pairs]]


def test_folder(exported):
    """What transformers.js reads is there, and no weights besides those in the graph, which needs no other file."""
    folder, model = exported
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == [
        "README.md", "config.json", "generation_config.json", "onnx/model.onnx", "tokenizer.json",
        "tokenizer_config.json"]
    assert (folder / "tokenizer.json").read_bytes() == portable.tokenizer_json(VOCABULARY, lossless=False)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama" and config["num_key_value_heads"] == model.config.num_key_value_heads
    assert config["eos_token_id"] == config["bos_token_id"] == VOCABULARY.eos_id
    graph = onnx.load(folder / "onnx" / "model.onnx", load_external_data=False)
    onnx.checker.check_model(graph, full_check=True)
    assert {imported.domain for imported in graph.opset_import} == {""}
    # A tied head is stored once.
    numbers = sum(math.prod(tensor.dims) for tensor in graph.graph.initializer)
    assert model.num_parameters() <= numbers < model.num_parameters() + 2 * CONTEXT * model.config.head_dim + 1000


def test_no_path_of_this_machine(exported):
    """The graph says what it computes, not which lines of whose code it was made of."""
    data = (exported[0] / "onnx/model.onnx").read_bytes()
    for place in (ROOT, torch.__file__, sys.prefix, exported[0]):
        assert str(place).encode() not in data
    assert b"stack_trace" not in data and b"onnx.py" not in data


def test_transformers_reads_tokenizer_and_config(exported, rng):
    """AutoTokenizer and AutoConfig load the folder, with no code of ours; ids are the portable tokenizer's."""
    transformers = pytest.importorskip("transformers")
    folder, model = exported
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = tokenizer.TokenizerJson((folder / "tokenizer.json").read_bytes(), "ours")
    words = ["return", "the end.", "(x, y)", "1 + 1 =", "caf\u00e9", "\n\n", "??"]
    for _ in range(30):
        text = " ".join(rng.choices(words, k=9))
        assert theirs(text)["input_ids"] == ours.encode(text).tolist()
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text))
    assert theirs.eos_token_id == VOCABULARY.eos_id and theirs.model_max_length == CONTEXT
    config = transformers.AutoConfig.from_pretrained(folder)
    assert config.architectures == ["LlamaForCausalLM"] and config.head_dim == model.config.head_dim


# -----------------------------------------------------------------------------
# the numbers

@pytest.mark.parametrize("batch, length", [(1, 1), (1, CONTEXT), (2, 2), (3, 17), (5, 1), (8, 33)])
@torch.no_grad()
def test_logits(session, model, batch, length, rng):
    """Of any number of texts of any length, without a past and after one: whole, in two parts, and token by token."""
    ids = torch.randint(2050, (batch, length))
    ours, mask = model(ids)[0], torch.ones(batch, length, dtype=torch.int64)
    whole, past = step(session, ids, mask, empty(session, batch))
    assert same(whole, ours)
    assert {value.shape[2] for value in past.values()} == {length}
    for cuts in ([rng.randint(1, length)], sorted(rng.sample(range(1, length + 1), min(5, length)))):
        past, parts = empty(session, batch), []
        for start, end in zip([0, *cuts], [*cuts, length]):
            if start < end:
                logits, past = step(session, ids[:, start:end], mask[:, :end], past)
                parts.append(logits)
        assert same(torch.cat(parts, dim=1), ours)


@torch.no_grad()
def test_left_padding(session, model, rng):
    """Texts of different lengths, padded in front with any ids, have the logits that they have alone; so have the
    tokens that follow."""
    texts = [torch.randint(2050, (rng.randint(1, 30),)) for _ in range(5)]
    new, longest = torch.randint(2050, (5, 4)), max(map(len, texts))
    padding = [longest - len(text) for text in texts]
    ids = torch.stack([torch.cat((torch.randint(2050, (n,)), text)) for n, text in zip(padding, texts)])
    mask = torch.stack([(torch.arange(longest + 4) >= n).long() for n in padding])
    first, past = step(session, ids, mask[:, :longest], empty(session, 5))
    second, past = step(session, new[:, :3], mask[:, :longest + 3], past)
    third, _ = step(session, new[:, 3:], mask, past)
    theirs = torch.cat((first, second, third), dim=1)
    assert torch.isfinite(theirs).all()
    for row, (n, text) in enumerate(zip(padding, texts)):
        assert same(theirs[row:row + 1, n:], model(torch.cat((text, new[row]))[None])[0])


@torch.no_grad()
def test_right_padding(session, model, rng):
    """Padding behind a text changes none of its logits, and neither those of tokens that follow the padding."""
    texts = [torch.randint(2050, (rng.randint(1, 30),)) for _ in range(5)]
    new, longest = torch.randint(2050, (5, 3)), max(map(len, texts))
    ids = torch.stack([torch.cat((text, torch.randint(2050, (longest - len(text),)))) for text in texts])
    mask = torch.stack([(torch.arange(longest + 3) < len(text)).long() for text in texts])
    mask[:, longest:] = 1
    first, past = step(session, ids, mask[:, :longest], empty(session, 5))
    second, _ = step(session, new, mask, past)
    assert torch.isfinite(first).all()
    for row, text in enumerate(texts):
        theirs = torch.cat((first[row, :len(text)], second[row]))[None]
        assert same(theirs, model(torch.cat((text, new[row]))[None])[0])


def test_greedy_generation(session, model, rng):
    """50 tokens of the graph, one at a time, are those of our generate; they may part at a rounded tie."""
    for length in (1, rng.randint(2, CONTEXT - 50)):
        prompt = [rng.randrange(2048) for _ in range(length)]
        wanted = list(generate(model, prompt, 50))
        ids, fresh, past = list(prompt), list(prompt), empty(session, 1)
        for our_token in wanted:
            logits, past = step(session, [fresh], [[1] * len(ids)], past)
            token = int(logits[0, -1].argmax())
            if token != our_token:
                assert logits[0, -1, token] - logits[0, -1, our_token] < 1e-4
                break
            fresh = [token]
            ids.append(token)


# -----------------------------------------------------------------------------
# without onnxruntime, and refusals

def test_without_onnxruntime(in_process, tmp_path, monkeypatch, rng):
    """A graph is written all the same, and what was not compared is said; a single block, in FP32."""
    torch.manual_seed(rng.randrange(2**32))
    one = llama(num_hidden_layers=1, num_key_value_heads=1, hidden_size=24, intermediate_size=40)
    save(tmp_path / "run", one)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "onnxruntime", None)
        code, out, err = in_process(export.main, "--checkpoint", tmp_path / "run", "--out", tmp_path / "new",
                                    "--format", "onnx")
    assert code == 0 and "pip install onnxruntime" in out, (out, err)
    session = onnxruntime.InferenceSession(tmp_path / "new" / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    ids = torch.randint(2050, (3, 7))
    with torch.no_grad():
        assert same(step(session, ids, torch.ones_like(ids), empty(session, 3))[0], one(ids)[0])


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_missing_package(in_process, tmp_path, monkeypatch, package):
    """One line that says what is missing and what to install."""
    save(tmp_path / "run", llama())
    monkeypatch.setitem(sys.modules, package, None)
    result = in_process(export.main, "--checkpoint", tmp_path / "run", "--out", tmp_path / "new", "--format", "onnx")
    refused(result, f"ONNX needs {package}:", f"pip install {package}")
    assert not list(tmp_path.glob("new*"))


@pytest.mark.parametrize("dtype, words", [("fp16", "fp32"), ("bf16", "fp32"), ("int8", "gguf"), ("q8_0", "gguf")])
def test_wrong_dtype(in_process, tmp_path, dtype, words):
    """Graphs are in FP32: anything else is refused before anything is read."""
    result = in_process(export.main, "--out", tmp_path / "new", "--format", "onnx", "--dtype", dtype)
    refused(result, words)
    assert not list(tmp_path.glob("new*"))
