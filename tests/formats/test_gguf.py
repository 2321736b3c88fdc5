"""The GGUF file holds our model and our vocabulary, and llama.cpp computes and writes with it what we do."""
import ctypes
import itertools
import json
import math
import os
import random
import re
import sys
from dataclasses import asdict
from functools import lru_cache

import numpy as np
import pytest
import torch

import checkpoint
import export
import tokenizer
from config import Config
from decoding.choice import Sampler
from decoding.generate import generate
from model import Llama, ModelConfig
from tests.commands import ROOT, refused
from tokenizer import TokenMonster, portable

gguf = pytest.importorskip("gguf")

NORMAL, CONTROL, BYTE = 1, 3, 6
SHARED = ROOT.parent / "shared" / "tokenmonster"
# By whether the head is tied, and key and value heads are shared; the sizes of heads are hidden_size / heads or not.
SHAPES = {"untied, grouped": dict(num_attention_heads=4, num_key_value_heads=2, head_dim=24),
          "tied, grouped": dict(num_attention_heads=4, num_key_value_heads=1, tie_word_embeddings=True),
          "untied, all heads": dict(num_attention_heads=2, num_key_value_heads=2),
          "tied, all heads": dict(num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True)}


def llama(**changes):
    """A small model with weights so large that its likeliest tokens change from place to place."""
    model = Llama(ModelConfig(**dict(vocab_size=2048, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                     num_attention_heads=4, max_position_embeddings=192, rms_norm_eps=1e-5,
                                     rope_theta=50_000.0) | changes))
    for p in model.parameters():
        p.data.uniform_(0.5, 1.5) if p.dim() == 1 else p.data.normal_(0, 1.5 * p.size(1) ** -0.5)
    return model


def save(folder, model, name="quickstart-2048", segmentation="exact"):
    """A run with one checkpoint of the model; its tokenizer, which `name` or a path tells."""
    vocabulary = tokenizer.load(name, segmentation)
    config = Config(name="tiny", model=model.config, tokenizer=str(name), tokenizer_segmentation=segmentation,
                    block_size=32, tokens_per_step=32)
    state = {"step": 3, "seconds": 60.0, "tokenizer_sha256": vocabulary.sha256,
             "config": json.loads(json.dumps(asdict(config), default=str))}
    checkpoint.save(folder, model, None, state, True, 1)
    return vocabulary


def write(folder, model, dtype="fp32", **which):
    """Export a model by the command -> (path of the file, the tokenizer that it was trained with)."""
    trained_with = save(folder / "run", model, **which)
    export.main(["--checkpoint", str(folder / "run"), "--out", str(folder / "gguf"), "--format", "gguf",
                 "--dtype", dtype])
    card, path = sorted(path for path in (folder / "gguf").iterdir())
    kind = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "int8": "Q8_0", "q8_0": "Q8_0"}[dtype]
    assert (card.name, path.name) == ("README.md", f"tiny-{kind}.gguf")
    return path, trained_with


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES)
def shaped(request, tmp_path_factory):
    """A model of each shape, exported in F32 -> (path of the file, its tokenizer, the model)."""
    seed = int(os.environ.get("TEST_SEED") or random.SystemRandom().randrange(2**32))
    print(f"TEST_SEED={seed} of the model")
    draw = random.Random(seed)
    torch.manual_seed(seed)
    model = llama(rope_theta=float(draw.randint(5_000, 900_000)), max_position_embeddings=draw.randint(150, 250),
                  rms_norm_eps=draw.choice([1e-5, 1e-6]), **request.param)
    return *write(tmp_path_factory.mktemp("shaped"), model), model


def reading(vocabulary):
    """The tokenizer that the file should have: the portable one."""
    if not isinstance(vocabulary, TokenMonster):
        return vocabulary
    return tokenizer.TokenizerJson(portable.tokenizer_json(vocabulary, lossless=False), "reading")


def metadata(path):
    """Every key of the file and its value."""
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@lru_cache(1)
def paragraphs():
    """The project's own documentation and code, cut behind blank lines."""
    rooms = [path for path in sorted(ROOT.glob("*/*.py")) if path.parent.name != "tests"]
    files = [ROOT / "README.md", *sorted(ROOT.glob("*.py")), *rooms]
    texts = [path.read_text(encoding="utf-8") for path in files]
    return [part for text in texts for part in re.split(r"(?<=\n\n)(?!\n)", text) if part]


# -----------------------------------------------------------------------------
# the file

def test_metadata(shaped):
    """The shape, the context, RoPE's base, epsilon, special tokens and flags are those of the model."""
    path, vocabulary, model = shaped
    c, found = model.config, metadata(path)
    wanted = {
        "general.architecture": "llama", "general.name": "tiny", "general.file_type": gguf.LlamaFileType.ALL_F32,
        "llama.context_length": c.max_position_embeddings, "llama.embedding_length": 64, "llama.block_count": 2,
        "llama.feed_forward_length": 96, "llama.attention.head_count": c.num_attention_heads,
        "llama.attention.head_count_kv": c.num_key_value_heads, "llama.attention.key_length": c.head_dim,
        "llama.attention.value_length": c.head_dim, "llama.rope.dimension_count": c.head_dim,
        "llama.vocab_size": 2048, "tokenizer.ggml.model": "t5", "tokenizer.ggml.bos_token_id": vocabulary.eos_id,
        "tokenizer.ggml.eos_token_id": vocabulary.eos_id, "tokenizer.ggml.padding_token_id": vocabulary.eos_id,
        "tokenizer.ggml.unknown_token_id": vocabulary.encode("?").item(), "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False, "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.remove_extra_whitespaces": False}
    assert wanted.items() <= found.items()
    assert found["llama.rope.freq_base"] == c.rope_theta
    assert found["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(c.rms_norm_eps, rel=1e-6)
    assert [len(found[f"tokenizer.ggml.{kind}"]) for kind in ("tokens", "scores", "token_type")] == [2048] * 3


def neighbours(weight, head_dim):
    """Rows of q_proj or k_proj in llama.cpp's order: 0, D/2, 1, D/2 + 1 ... of each head."""
    heads = range(0, len(weight), head_dim)
    half = head_dim // 2
    return weight[[start + j + part for start in heads for j in range(half) for part in (0, half)]]


def wanted_tensors(model):
    """llama.cpp's name -> our numbers in its order."""
    parts = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
             "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    state = {name: p.detach().numpy() for name, p in model.state_dict().items()}
    wanted = {"token_embd.weight": state["model.embed_tokens.weight"], "output_norm.weight": state["model.norm.weight"]}
    if not model.config.tie_word_embeddings:
        wanted["output.weight"] = state["lm_head.weight"]
    for layer, (ours, theirs) in itertools.product(range(model.config.num_hidden_layers), parts.items()):
        weight = state[f"model.layers.{layer}.{ours}.weight"]
        turned = theirs in ("attn_q", "attn_k")
        wanted[f"blk.{layer}.{theirs}.weight"] = neighbours(weight, model.config.head_dim) if turned else weight
    return wanted


def half_a_step(weight, kind):
    """The most that rounding to this type changes each of these numbers by."""
    size = np.abs(weight)
    if kind == "Q8_0":  # in blocks of 32 the largest is 127 steps; a step is an FP16 number, 2^-11 off at most
        step = size.reshape(-1, 32).max(1, keepdims=True) / 127
        return np.broadcast_to(step / 2 + 127 * step * 2**-11, (len(step), 32)).reshape(weight.shape) * 1.001 + 2**-25
    return {"F32": 0 * size, "F16": size * 2**-11 + 2**-25, "BF16": size * 2**-8}[kind]


def test_tensors(shaped):
    """In F32 every number is ours to the bit, under llama.cpp's names; only an untied head is there."""
    path, _, model = shaped
    wanted, read = wanted_tensors(model), {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert read.keys() == wanted.keys() and ("output.weight" in read) != model.config.tie_word_embeddings
    for name, tensor in read.items():
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert np.array_equal(tensor.data, wanted[name]), name


@pytest.mark.parametrize("dtype, kind", [("fp16", "F16"), ("bf16", "BF16"), ("int8", "Q8_0"), ("q8_0", "Q8_0")])
def test_rounded_tensors(dtype, kind, tmp_path, rng):
    """Matrices are within their type's rounding, and use it; norms are ours to the bit. Rows that do not divide into
    blocks of 32 are F16 where Q8_0 is asked for."""
    model = llama(hidden_size=48, intermediate_size=rng.choice([64, 96]), num_attention_heads=4)
    path, _ = write(tmp_path, model, dtype)
    wanted, types = wanted_tensors(model), set()
    for tensor in gguf.GGUFReader(path).tensors:
        weight, used = wanted.pop(tensor.name), tensor.tensor_type.name
        odd = kind == "Q8_0" and weight.shape[-1] % 32 != 0
        assert used == ("F32" if weight.ndim == 1 else "F16" if odd else kind), tensor.name
        error = np.abs(gguf.quants.dequantize(tensor.data, tensor.tensor_type) - weight)
        assert (error <= half_a_step(weight, used)).all() and error.any() == (weight.ndim == 2), tensor.name
        types.add(used)
    assert not wanted and types == {"F32", "F16", kind} if kind == "Q8_0" else types == {"F32", kind}
    assert metadata(path)["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{kind}"]


@pytest.mark.parametrize("segmentation, spare", [("exact", 37), ("portable", 0)])
def test_token_table(segmentation, spare, tmp_path):
    """A token for each row of the model. What is UTF-8 stands there as text, with a sign for the space; a byte that is
    not, as that byte; and the end of a document, and what is neither, cannot be written."""
    path, vocabulary = write(tmp_path, llama(vocab_size=2048 + spare, hidden_size=32), segmentation=segmentation)
    found = metadata(path)
    texts, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    scores = found["tokenizer.ggml.scores"]
    assert len(texts) == len(kinds) == len(scores) == found["llama.vocab_size"] == 2048 + spare
    assert len(set(texts)) == len(texts) and set(kinds) == {NORMAL, CONTROL, BYTE}
    assert texts[vocabulary.eos_id] == "<|endoftext|>" and kinds[vocabulary.eos_id] == CONTROL
    assert all(kinds[row] == CONTROL and scores[row] == portable.DEAD for row in range(2048, 2048 + spare))
    scores_of_ours = json.loads(reading(vocabulary).data)["model"]["vocab"]
    assert scores[:2048] == [score for _, score in scores_of_ours]
    bytes_there = set()
    for token in set(range(2048)) - {vocabulary.eos_id}:
        text, decoded = texts[token], vocabulary.decode([token])
        if kinds[token] == NORMAL:  # an id that ends with a mark is written with it
            assert re.sub("(?s)\x7f.?", "", text.replace("\u2581", " ")) == decoded.replace("\x7f", "")
            assert "\ufffd" not in text and " " not in text
        else:
            assert "\ufffd" in decoded or decoded == "\0"  # no text by itself, or none to llama.cpp
            assert (kinds[token] == BYTE) == (len(vocabulary.decode_bytes([token])) == 1) or segmentation == "portable"
        if kinds[token] == BYTE:
            bytes_there.add(int(re.fullmatch("<0x([0-9A-F]{2})>", text)[1], 16))
    if segmentation == "portable":
        assert bytes_there - {0} == {byte for byte in portable.UTF8 if byte >= 0x80}


def other_unigram(changes=None, **parts):
    """A tokenizer.json like those that portable.py writes, but for some parts, and some fields of its ByteLevel."""
    made = json.loads(tokenizer.load("quickstart-2048", "portable").data)
    made["pre_tokenizer"] |= changes or {}
    return made | parts


@pytest.mark.parametrize("made, word", [
    (other_unigram({"add_prefix_space": True}), "add_prefix_space"), (other_unigram({"use_regex": True}), "use_regex"),
    (other_unigram(normalizer={"type": "Lowercase"}), "Lowercase"),
    (other_unigram(pre_tokenizer=None), "pre_tokenizer"),
    (other_unigram(pre_tokenizer={"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always",
                                  "split": True}), "Metaspace"),
    (other_unigram(model={"type": "Unigram", "unk_id": None, "byte_fallback": False, "vocab": [
        ["<|endoftext|>", 0.0], *([chr(0x100 + place), -1.1 * place] for place in range(9))]}), "single precision"),
])
def test_a_unigram_that_llama_cpp_reads_otherwise(in_process, tmp_path, made, word):
    """What llama.cpp cannot do is refused by its name, and not exported with other ids."""
    (tmp_path / "theirs.json").write_text(json.dumps(made))
    save(tmp_path / "run", llama(), tmp_path / "theirs.json")
    result = in_process(export.main, "--checkpoint", tmp_path / "run", "--out", tmp_path / "out", "--format", "gguf")
    refused(result, word, "--format hf")
    assert not (tmp_path / "out").exists()


def test_special_tokens_with_names_of_their_own(in_process, tmp_path):
    """A special token of any name is written as one, under that name; it need not be spelled in bytes."""
    made = other_unigram()
    free = next(row for row, (_, score) in enumerate(made["model"]["vocab"]) if score == portable.DEAD and row != 2)
    made["model"]["vocab"][free][0] = "<|une fin \u65e5|>"
    made["added_tokens"].append(made["added_tokens"][0] | {"id": free, "content": "<|une fin \u65e5|>"})
    (tmp_path / "theirs.json").write_text(json.dumps(made))
    save(tmp_path / "run", llama(), tmp_path / "theirs.json")
    code, _, err = in_process(export.main, "--checkpoint", tmp_path / "run", "--out", tmp_path / "out", "--format",
                              "gguf")
    assert code == 0, err
    found = metadata(next((tmp_path / "out").glob("*.gguf")))
    assert found["tokenizer.ggml.tokens"][free] == "<|une fin \u65e5|>"
    assert found["tokenizer.ggml.token_type"][free] == CONTROL


def test_bpe_is_refused(in_process, tmp_path):
    """A tokenizer.json that portable.py has not made is none of llama.cpp's "t5" kind: one line, and no folder."""
    library = pytest.importorskip("tokenizers")
    bpe = library.Tokenizer(library.models.BPE())
    bpe.pre_tokenizer = library.pre_tokenizers.ByteLevel()
    bpe.train_from_iterator(paragraphs()[:50], library.trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"]))
    bpe.save(str(tmp_path / "tokenizer.json"))
    save(tmp_path / "run", llama(hidden_size=32), tmp_path / "tokenizer.json")
    result = in_process(export.main, "--checkpoint", tmp_path / "run", "--out", tmp_path / "new", "--format", "gguf")
    refused(result, "BPE", "--format hf")
    assert not list(tmp_path.glob("new*"))


def test_missing_package(in_process, tmp_path, monkeypatch):
    """One line that says what to install."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    save(tmp_path / "run", llama(hidden_size=32))
    result = in_process(export.main, "--checkpoint", tmp_path / "run", "--out", tmp_path / "new", "--format", "gguf")
    refused(result, "pip install gguf")
    assert not list(tmp_path.glob("new*"))


# -----------------------------------------------------------------------------
# llama.cpp: numbers

@pytest.fixture
def opened():
    """Opens a file with llama.cpp. It keeps keys and values in F16 unless exact_cache is set."""
    llama_cpp, models = pytest.importorskip("llama_cpp"), []

    def call(path, exact_cache=True):
        kind = llama_cpp.GGML_TYPE_F32 if exact_cache else llama_cpp.GGML_TYPE_F16
        models.append(llama_cpp.Llama(str(path), n_ctx=256, n_threads=1, n_threads_batch=1, logits_all=True, seed=1,
                                      type_k=kind, type_v=kind, verbose=False))
        return models[-1]

    yield call
    for model in models:
        model.close()


def their_logits(theirs, ids):
    """llama.cpp's logits of a text of ids, (n, V)."""
    theirs.reset()
    theirs.eval(ids)
    return torch.tensor(np.array(theirs.scores[:len(ids)]))


def compare(theirs, model, ids):
    """How llama.cpp's logits of a text differ: (largest, root mean square) in standard deviations of ours, and the
    perplexity of the text, theirs / ours. No likeliest token differs but where ours are equal within that much."""
    ids = ids[:model.config.max_position_embeddings]
    with torch.no_grad():
        ours = model(torch.tensor([ids]))[0][0]
    logits = their_logits(theirs, ids)
    difference, std = (logits - ours).abs(), float(ours.std())
    taken = ours.gather(1, logits.argmax(1, keepdim=True))[:, 0]
    assert (taken >= ours.max(1).values - 2 * difference.max()).all()
    nats = [float(torch.nn.functional.cross_entropy(x[:-1], torch.tensor(ids[1:]))) for x in (logits, ours)]
    found = float(difference.max()) / std, float(difference.pow(2).mean().sqrt()) / std, math.exp(nats[0] - nats[1])
    print("logits differ by {:.2g} standard deviations at most, {:.2g} mostly; perplexity by {:.6f}".format(*found))
    return found


@pytest.mark.parametrize("exact_cache, tolerance", [(True, 1e-3), (False, 4e-2)], ids=["F32 cache", "F16 cache"])
def test_logits(shaped, exact_cache, tolerance, opened, rng):
    """llama.cpp's logits are ours, on a text and on random ids; so are its likeliest tokens and its perplexity."""
    path, vocabulary, model = shaped
    theirs = opened(path, exact_cache)
    text = vocabulary.encode(rng.choice([part for part in paragraphs() if len(part) > 900])).tolist()
    for ids in (text, [rng.randrange(2048) for _ in range(250)]):
        largest, mostly, perplexity = compare(theirs, model, ids)
        assert largest < tolerance and mostly < tolerance / 10 and abs(perplexity - 1) < 1e-3


@pytest.mark.parametrize("dtype, tolerance", [("fp16", 0.005), ("bf16", 0.04), ("int8", 0.15)])
def test_logits_of_rounded_weights(dtype, tolerance, tmp_path, opened, rng):
    """Rounded weights, and numbers that llama.cpp rounds alike before it multiplies them, move the logits by no more
    than so many standard deviations (root mean square)."""
    model = llama(hidden_size=rng.choice([48, 64]))  # 48: some rows of Q8_0 are F16
    path, _ = write(tmp_path, model, dtype)
    _, mostly, perplexity = compare(opened(path), model, [rng.randrange(2048) for _ in range(192)])
    assert mostly < tolerance and abs(perplexity - 1) < tolerance


# -----------------------------------------------------------------------------
# llama.cpp: text

@pytest.fixture(params=["quickstart-2048", "english-4096-strict-nocapcode-v1", "english-8000-strict-nocapcode-v1"])
def name(request):
    """A name, or a path that is there."""
    if request.param == "quickstart-2048":
        return request.param
    path = SHARED / f"{request.param}.vocab"
    return path if path.is_file() else pytest.skip(f"{path.name} is not here")


def ids_of(theirs, text):
    """llama.cpp's tokens of a text."""
    return theirs.tokenize(text.encode(), add_bos=False, special=False)


def piece(theirs, token):
    """The bytes that llama.cpp writes for a token. (llama-cpp-python's detokenize has room for 32 only.)"""
    import llama_cpp
    buffer = (ctypes.c_char * 256)()
    size = llama_cpp.llama_token_to_piece(theirs._model.vocab, token, buffer, len(buffer), 0, False)
    assert size >= 0
    return buffer.raw[:size]


@pytest.mark.parametrize("segmentation", ["exact", "portable"])
def test_text(name, segmentation, tmp_path, opened, rng):
    """A text has the portable tokenizer's ids, with the end of a document before it; written one id at a time they are
    the text again: the project's own paragraphs, random ones of ASCII, and 100 kB in one piece; but for "??"."""
    rows = 2048 if name == "quickstart-2048" else 8001
    model = llama(vocab_size=rows, hidden_size=16, intermediate_size=16, num_hidden_layers=1, fp32_blocks=())
    path, vocabulary = write(tmp_path, model, name=name, segmentation=segmentation)
    theirs, ours = opened(path), reading(vocabulary)
    texts = [part for part in paragraphs() if part.isascii()]
    words = [*"".join(texts).split(), *(chr(code) for code in range(0x20, 0x7F)), " ", "  ", "\n", "\n\n", "\t"]
    texts += ["".join(rng.choice(words) * rng.choice([1, 1, 1, 2, 40]) for _ in range(20)) for _ in range(100)]
    texts = [re.sub(r"\?+", "?", text) for text in texts]
    rng.shuffle(texts)
    texts.append(re.sub(r"\?+", "?", "".join(texts))[:100_000])
    written = [piece(theirs, token) for token in range(theirs.n_vocab())]
    for text, ids in zip(texts, ours.encode_batch(texts)):
        found = ids_of(theirs, text)
        assert found == ids.tolist(), text
        assert b"".join(written[token] for token in found) == text.encode()
    assert len(text) == 100_000
    assert theirs.tokenize(texts[0].encode()) == [vocabulary.eos_id, *ours.encode(texts[0]).tolist()]
    assert theirs.tokenize(b"a<|endoftext|>", add_bos=False, special=True) == [*ours.encode("a"), vocabulary.eos_id]


@pytest.fixture
def portable_model(tmp_path, opened):
    """llama.cpp with a model that learnt with the portable segmentation, and the tokenizer of that."""
    path, vocabulary = write(tmp_path, llama(hidden_size=32), segmentation="portable")
    return opened(path), vocabulary


def test_any_character_is_written(portable_model, rng):
    """What a model that learnt with the portable segmentation writes comes out whole, whatever characters it is of."""
    theirs, vocabulary = portable_model
    for _ in range(200):
        text = "".join(chr(rng.randrange(1, rng.choice([0x80, 0x800, 0xD800, 0x110000]))) for _ in range(20))
        text = text.encode("utf-8", "ignore").decode()
        assert b"".join(piece(theirs, token) for token in vocabulary.encode(text).tolist()) == text.encode()


def test_every_character_of_ascii(portable_model):
    """Each comes back, NUL and the delete mark too, and each but NUL has the portable tokenizer's id."""
    theirs, vocabulary = portable_model
    ids = {chr(code): vocabulary.encode(chr(code)).tolist() for code in range(128)}
    written = {character: b"".join(piece(theirs, token) for token in ids[character]) for character in ids}
    assert {character: text for character, text in written.items() if text != character.encode()} == {}
    del ids["\0"]  # which no string of llama.cpp's holds
    assert {character: ids_of(theirs, character) for character in ids} == ids


def completions(theirs, model, vocabulary, rng):
    """Compare what follows some prompts; see the tests."""
    ours = reading(vocabulary)
    prompts = [part[:60] for part in paragraphs() if part[:60].isascii()]
    # llama.cpp's create_completion takes a special token's text in a prompt for the token.
    for prompt in rng.sample([prompt for prompt in prompts if "<|endoftext|>" not in prompt], 4):
        ids = [vocabulary.eos_id, *ours.encode(prompt).tolist()]
        wanted = list(generate(model, ids, 40, Sampler(vocab_size=vocabulary.vocab_size), vocabulary.eos_id))
        theirs.reset()
        found = list(itertools.islice(theirs.generate(ids, temp=0.0, repeat_penalty=1.0), len(wanted)))
        same = next((n for n, (our, their) in enumerate(zip(wanted, found)) if our != their), len(wanted))
        if same < len(wanted):
            with torch.no_grad():
                logits = model(torch.tensor([ids + wanted[:same]]))[0][0, -1]
            assert logits.max() - logits[found[same]] < 1e-3
        completion = theirs.create_completion(prompt, max_tokens=40, temperature=0.0, repeat_penalty=1.0)
        text = b"".join(piece(theirs, token) for token in wanted[:same]).decode(errors="ignore")
        assert completion["choices"][0]["text"].startswith(text)  # it goes on while a character is incomplete


def test_greedy_completion(shaped, opened, rng):
    """llama.cpp, given a text, writes what our generate writes after it; they may part at a rounded tie."""
    path, vocabulary, model = shaped
    completions(opened(path), model, vocabulary, rng)


def test_greedy_completion_of_a_portable_model(tmp_path, opened, rng):
    """So it does where the model learnt with the portable segmentation, and has rows to spare."""
    model = llama(vocab_size=2080)
    model.lm_head.weight.data[2048:] = 0  # which no training makes likely
    path, vocabulary = write(tmp_path, model, segmentation="portable")
    completions(opened(path), model, vocabulary, rng)
