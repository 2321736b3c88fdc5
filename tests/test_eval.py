"""Bits per byte are those of the text, whatever the vocabulary, the blocks and the precision; runs are put side by
side; a tracker gets what is logged; and what cannot be evaluated is refused in one line."""
import importlib.util
import json
import math
import os
import random
import re
import shutil
import statistics
import sys
from functools import partial

import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers

import backend
import checkpoint
import eval
import export
import prepare
import run
import tokenizer
import train
from backend import PRECISIONS
from config import Config, Source
from decoding.narrow import quantize_int4, widen_int4
from model import Llama, ModelConfig
from quant_t4 import FakeQuantize, quantize
from sources.streams import clean_text
from tests.commands import metrics, refused
from tests.formats.peer import another_model

VOCABULARIES = {form: tokenizer.load("quickstart-2048", form) for form in ("exact", "portable")}
EXACT = VOCABULARIES["exact"]
CPU = torch.device("cpu")
CONTEXT = 32
SOURCES = {"prose": Source("text", 0.7, data_files="prose.txt", preserve_linebreaks=True, held_out=6),
           "code": Source("text", 0.3, data_files="code.txt", preserve_linebreaks=True, held_out=4)}
pytestmark = pytest.mark.usefixtures("offline")
both_forms = pytest.mark.parametrize("form", ["exact", "portable"])


def llama(**changes):
    """A tiny model with large weights, all of whose arithmetic is in the type of its parameters."""
    model = Llama(ModelConfig(**dict(vocab_size=2048, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                     num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=CONTEXT,
                                     fp32_norms=False, fp32_blocks=()) | changes))
    for p in model.parameters():
        p.data.uniform_(0.5, 1.5) if p.dim() == 1 else p.data.normal_(0, p.size(1) ** -0.5)
    return model


def some_text(rng, words=12):
    """Words, sums and code that quickstart-2048 can write, in lines."""
    choices = ["the", "of a", "return self", "don't", "(x, y)", "://", "??", "99999", "1 + 1 = 2.", "Once", "upon\n",
               "if x:\n    y", "import numpy\n", "a", "Paragraph", "reading"]
    text = " ".join(rng.choice(choices) for _ in range(words)) + f" {rng.random()}."
    return clean_text(text, preserve_linebreaks=True)


def save(folder, model, form="exact", data="data", name="tiny", sources=SOURCES):
    """A run in `folder`, as train.py leaves it; its step directory."""
    config = Config(name=name, data_dir=data, tokenizer_segmentation=form, sources=sources, model=model.config,
                    block_size=CONTEXT, tokens_per_step=CONTEXT)
    state = {"step": 7, "seconds": 1.0, "tokenizer_sha256": VOCABULARIES[form].sha256, "config": run.as_json(config)}
    return checkpoint.save(folder / "out" / name, model, None, state, True, 1)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with texts, and bins of them by prepare.py: exact/ and portable/; and what is held out, by source."""
    seed = int(os.environ.get("TEST_SEED") or random.SystemRandom().randrange(2**32))
    print(f"TEST_SEED={seed}")
    rng, folder = random.Random(seed), tmp_path_factory.mktemp("prepared")
    texts = {name: [some_text(rng) for _ in range(60)] for name in SOURCES}
    for name in SOURCES:
        (folder / f"{name}.txt").write_text("\n\n".join(texts[name]))
    (folder / "mine.py").write_text(f"from config import *\nconfig = Config(name='mine', sources={SOURCES!r})")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for form in VOCABULARIES:
            assert not prepare.main(["mine.py", "--tokenizer_segmentation", form, "--data_dir", form])
    return folder, {name: texts[name][:source.held_out] for name, source in SOURCES.items()}


@pytest.fixture
def command(in_tmp_path):
    """eval.py in tmp_path."""
    return partial(in_tmp_path, eval.main)


@pytest.fixture
def shown(monkeypatch):
    """What the command prints, to all its digits: {model: {text: figures}}."""
    tables, show = {}, eval.show

    def remember(name, rows):
        tables[name] = rows
        show(name, rows)

    monkeypatch.setattr(eval, "show", remember)
    return tables


@torch.no_grad()
def nats(logits_of, encode, texts, eos, context):
    """The whole loss of texts, token by token, each predicted from its block so far -> (nats, tokens)."""
    ids = [eos]
    for text in texts:
        ids += [*map(int, encode(text)), eos]
    total, last = 0.0, len(ids) - 1
    for place in range(1, len(ids)):
        start = (place - 1) // context * context
        log_p = logits_of(torch.tensor([ids[start:place]]))[0, -1].double().log_softmax(-1)
        total -= log_p[ids[place]].item()
    return total, last


def same_figures(row, texts, whole_loss, tokens):
    """Assert that a row is what these nats, tokens and texts come to."""
    size = sum(len(text.encode()) for text in texts)
    assert (row["tokens"], row["bytes"]) == (tokens, size)
    assert row["loss"] == pytest.approx(whole_loss / tokens, rel=1e-5)
    assert row["perplexity"] == pytest.approx(math.exp(whole_loss / tokens), rel=1e-4)
    assert row["bits_per_byte"] == pytest.approx(whole_loss / math.log(2) / size, rel=1e-5)


def own_figures(model, text):
    """The figures of one text by our own model."""
    subject, device = eval.Subject("here", model, EXACT, ours=True), backend.pick("cpu", "fp32")
    return eval.evaluate(subject, [eval.Document(text)], eval.Options(), device)


# -----------------------------------------------------------------------------
# the figures

@both_forms
def test_held_out_bits_per_byte(command, shown, prepared, tmp_path, rng, form):
    """Of a checkpoint and of a model with another vocabulary: those of the raw documents, token by token in float64."""
    folder, held_out = prepared
    model = llama()
    step_dir = save(tmp_path, model, form, folder / form)
    theirs, encode, eos = another_model(tmp_path / "gpt2", sum(held_out.values(), []))
    code, out, err = command("--hf", "gpt2", "--batch_size", rng.randint(1, 9))
    assert code == 0 and list(shown) == [str(step_dir.relative_to(tmp_path)), "gpt2"], (out, err)
    model, vocabulary = model.double(), VOCABULARIES[form]
    theirs.double()
    for name, texts in held_out.items():
        same_figures(shown[str(step_dir.relative_to(tmp_path))][name], texts, *nats(
            lambda ids: model(ids)[0], vocabulary.encode, texts, vocabulary.eos_id, CONTEXT))
        same_figures(shown["gpt2"][name], texts, *nats(lambda ids: theirs(ids).logits, encode, texts, eos, 24))
    for name, rows in shown.items():  # what is printed is that, rounded
        lines = out.split(f"{name}\n")[1].splitlines()[1:]
        for (text, row), line in zip(rows.items(), lines):
            assert re.findall(r"[\d.,]+", line.removeprefix(f"  {text}")) == [
                f"{row['tokens']:,}", f"{row['bytes']:,}", f"{row['loss']:.4f}", f"{row['loss_stderr']:.4f}",
                f"{row['perplexity']:.2f}", f"{row['bits_per_byte']:.4f}", f"{row['bits_per_byte_stderr']:.4f}"]


@both_forms
def test_bits_per_byte_of_any_text(command, shown, tmp_path, rng, form):
    """The same of files, each by itself, in blocks as long as one likes; no data are needed for it."""
    texts = {name: some_text(rng, 20) for name in ("a.txt", "b.txt")}
    for name, text in texts.items():
        (tmp_path / name).write_text(f"\n {text} \t\n")  # is cleaned as training text is
    model = llama()
    step_dir = save(tmp_path, model, form)
    theirs, encode, eos = another_model(tmp_path / "gpt2", texts.values())
    block_size = rng.randint(5, 23)
    code, out, err = command("--text", *texts, "--hf", "gpt2", "--block_size", block_size, "--checkpoint", step_dir)
    assert code == 0 and "dropped" not in out, (out, err)
    model, vocabulary = model.double(), VOCABULARIES[form]
    theirs.double()
    for name, text in texts.items():
        same_figures(shown[str(step_dir)][name], [text], *nats(
            lambda ids: model(ids)[0], vocabulary.encode, [text], vocabulary.eos_id, block_size))
        same_figures(shown["gpt2"][name], [text], *nats(
            lambda ids: theirs(ids).logits, encode, [text], eos, block_size))


@both_forms
def test_an_export_has_the_same_figures(command, shown, prepared, tmp_path, rng, form):
    """A model exported for transformers has those of the checkpoint, on the bins and on any text."""
    folder, _ = prepared
    save(tmp_path, llama(), form, folder / form)
    (tmp_path / "any.txt").write_text(some_text(rng, 40))
    export.main(["--out", "exported"])
    for where in ([], ["--text", "any.txt"]):
        shown.clear()
        code, out, err = command(*where, "--hf", "exported", *(["--trust_remote_code"] if form == "exact" else []))
        assert code == 0 and len(shown) == 2, (out, err)
        ours, theirs = shown.values()
        assert ours.keys() == theirs.keys()
        for text, row in ours.items():
            assert theirs[text] == pytest.approx(row, rel=1e-5, abs=1e-5), text


@both_forms
@pytest.mark.parametrize("odd", ["caf\u00e9 na\u00efve", "<|endoftext|>"])
def test_odd_text_has_as_many_bytes_for_all(command, shown, tmp_path, rng, form, odd):
    """Accents, which some vocabularies take apart, and the name of a special token are text like any other: the same
    tokens and bytes in a checkpoint and in its export, and the bytes are the file's."""
    save(tmp_path, llama(), form)
    text = f"{some_text(rng)} {odd} {some_text(rng)}"
    assert VOCABULARIES[form].count_dropped(text) == 0
    (tmp_path / "odd.txt").write_text(text, encoding="utf-8")
    export.main(["--out", "exported"])
    trust = ["--trust_remote_code"] if form == "exact" else []
    code, out, err = command("--text", "odd.txt", "--hf", "exported", *trust)
    assert code == 0, (out, err)
    ours, theirs = (rows["odd.txt"] for rows in shown.values())
    assert theirs["bytes"] == len(text.encode())
    assert theirs["tokens"] == ours["tokens"]
    assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5)
    assert ours["bytes"] == len(text.encode())


def test_a_uniform_model(command, shown, tmp_path, rng):
    """Its tokens take log2(rows) bits each, and its perplexity is the rows."""
    rows = rng.randint(2048, 3000)
    model = llama(vocab_size=rows)
    model.lm_head.weight.data.zero_()
    save(tmp_path, model)
    (tmp_path / "any.txt").write_text(some_text(rng, 60))
    assert command("--text", "any.txt")[0] == 0
    row, = next(iter(shown.values())).values()
    assert row["bits_per_byte"] * row["bytes"] / row["tokens"] == pytest.approx(math.log2(rows), rel=1e-6)
    assert row["perplexity"] == pytest.approx(rows, rel=1e-5)
    assert row["loss_stderr"] == pytest.approx(0, abs=1e-6)


def test_a_model_that_knows_the_text(rng):
    """Of a text that it has learnt by heart a model's figures tend to 0, and of another they do not."""
    text, model = some_text(rng, 8), llama(hidden_size=48, intermediate_size=64)
    ids = torch.tensor([[EXACT.eos_id, *EXACT.encode(text).tolist(), EXACT.eos_id]])[:, :CONTEXT + 1]
    before, optimizer = own_figures(model, text)["bits_per_byte"], torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        model(ids[:, :-1], ids[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    known = eval.token_losses(lambda ids: model(ids)[0], ids[0].numpy(), CONTEXT, CONTEXT, 8, CPU)
    assert known.mean() < 0.05 and before > 1
    assert own_figures(model, some_text(rng, 8) + "Not the same.")["bits_per_byte"] > 1


@pytest.mark.parametrize("block_size", range(1, 9))
def test_windows(block_size):
    """Each token but the first is predicted once, in order, from no more than a block; and, where windows overlap, from
    block_size - stride tokens at least, once there are so many."""
    for count in range(40):
        for stride in range(1, block_size + 1):
            predicted = []
            for start, stop, counted in eval.windows(count, block_size, stride):
                assert 0 <= start < stop < count and 1 <= counted <= stop - start <= block_size
                places = range(stop - counted + 1, stop + 1)
                assert all(place - start > block_size - stride for place in places) or start == 0
                predicted += places
            assert predicted == list(range(1, count))


@pytest.mark.parametrize("stride", [1, 3, 7, 8])
def test_token_losses(rng, stride):
    """They are those of each window by itself in float64, however many windows go together."""
    model, block_size = llama(vocab_size=50).double(), 8
    ids = np.array([rng.randrange(50) for _ in range(rng.randint(2, 60))])
    wanted = []
    with torch.no_grad():
        for start, stop, counted in eval.windows(len(ids), block_size, stride):
            log_p = model(torch.from_numpy(ids[None, start:stop]))[0][0].log_softmax(-1)
            wanted += [-log_p[place - start - 1, ids[place]].item() for place in range(stop - counted + 1, stop + 1)]
    for batch_size in (1, 2, 5, 100):
        losses = eval.token_losses(lambda ids: model(ids)[0], ids, block_size, stride, batch_size, CPU)
        assert losses.dtype == np.float64 and losses.shape == (len(ids) - 1,)
        assert losses == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def test_stride(command, shown, tmp_path, rng):
    """Overlapping windows are announced, and predict the same tokens from more context; a stride of a block or more is
    none."""
    model = llama()
    save(tmp_path, model)
    text = some_text(rng, 40)
    (tmp_path / "any.txt").write_text(text)
    rows = {}
    for stride in (None, 1, 5, CONTEXT, CONTEXT + 9):
        code, out, _ = command("--text", "any.txt", *(["--stride", stride] if stride else []))
        announced = f"windows of {CONTEXT} tokens move by {stride}: lower figures" in out
        assert code == 0 and announced == (stride in (1, 5))
        rows[stride], = shown.popitem()[1].values()
        assert (rows[stride]["tokens"], rows[stride]["bytes"]) == (rows[None]["tokens"], len(text))
    assert rows[None] == rows[CONTEXT] == rows[CONTEXT + 9]
    assert len({rows[stride]["loss"] for stride in (None, 1, 5)}) == 3
    ids, total = [EXACT.eos_id, *EXACT.encode(text).tolist(), EXACT.eos_id], 0.0
    model = model.double()
    with torch.no_grad():
        for place in range(1, len(ids)):
            logits = model(torch.tensor([ids[max(0, place - CONTEXT):place]]))[0][0, -1]
            total -= logits.log_softmax(-1)[ids[place]].item()
    assert rows[1]["loss"] == pytest.approx(total / (len(ids) - 1), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_rounded_weights(command, shown, tmp_path, rng, dtype, tied):
    """--dtype int8 or int4 gives the figures of a model whose weights are what the rounding has made of them, and whose
    products' inputs are rounded to INT8."""
    text = some_text(rng, 60)
    (tmp_path / "a.txt").write_text(text)
    model = llama(tie_word_embeddings=tied)
    step_dir = save(tmp_path, model)
    code, out, err = command("--text", "a.txt", "--checkpoint", step_dir, "--dtype", dtype)
    assert code == 0, (out, err)
    finest = {"int8": lambda weight: quantize(weight)[0].double() * quantize(weight)[1].double()}
    rounded = finest | {"int4": lambda weight: widen_int4(*quantize_int4(weight), weight.size(1)).double()}
    reference = llama(tie_word_embeddings=False).double()
    reference.load_state_dict(model.state_dict() | {"lm_head.weight": model.lm_head.weight})
    for name, module in reference.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            module.weight.copy_((rounded[dtype] if "layers" in name else finest["int8"])(module.weight))
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, x: FakeQuantize.apply(x[0]))
    got = shown[str(step_dir)]["a.txt"]
    whole, tokens = nats(lambda ids: reference(ids)[0], EXACT.encode, [text], EXACT.eos_id, CONTEXT)
    assert got["tokens"] == tokens
    # An input at the edge between two integers may round the other way in FP32.
    assert got["loss"] == pytest.approx(whole / tokens, rel=2e-3)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_sums_are_exact_in_16_bits(command, shown, tmp_path, rng, dtype):
    """The model's products are in 16 bits, and its losses and their mean are not."""
    model = llama()
    save(tmp_path, model)
    text = some_text(rng, 40)
    (tmp_path / "any.txt").write_text(text)
    code, out, err = command("--text", "any.txt", "--dtype", dtype, "--batch_size", 1)
    assert code == 0, (out, err)
    row, = next(iter(shown.values())).values()
    ids = torch.tensor([EXACT.eos_id, *EXACT.encode(text).tolist(), EXACT.eos_id])
    wanted = []
    for start, stop, counted in eval.windows(len(ids), CONTEXT, CONTEXT):
        with torch.no_grad(), torch.autocast("cpu", PRECISIONS[dtype]):
            logits = model(ids[None, start:stop])[0][0]
        assert logits.dtype == PRECISIONS[dtype]
        losses = F.cross_entropy(logits.float(), ids[start + 1:stop + 1], reduction="none")
        wanted += losses[-counted:].tolist()
    assert row["loss"] == pytest.approx(math.fsum(wanted) / len(wanted), rel=1e-12)
    assert row["loss"] * 64 % 1 != 0
    assert row["loss"] != own_figures(model, text)["loss"] == pytest.approx(row["loss"], rel=0.05)


def test_standard_error(rng):
    """It is that of a mean over whole blocks, by the textbook; bits per byte have the same, in their unit."""
    block_size = rng.randint(1, 20)
    losses = np.array([rng.expovariate(0.3) for _ in range(rng.randint(2 * block_size, 400))])
    means = [statistics.fmean(losses[start:start + block_size])
             for start in range(0, len(losses) - block_size + 1, block_size)]
    row = eval.figures(losses, 1000, block_size)
    assert row["loss"] == pytest.approx(statistics.fmean(losses))
    assert row["loss_stderr"] == pytest.approx(statistics.stdev(means) / math.sqrt(len(means)))
    bits = len(losses) / 1000 / math.log(2)
    assert row["bits_per_byte"] == pytest.approx(row["loss"] * bits)
    assert row["bits_per_byte_stderr"] == pytest.approx(row["loss_stderr"] * bits)


def test_one_block_has_no_standard_error(command, tmp_path, recwarn):
    """Its place says nan, and nobody is warned of a division by zero."""
    save(tmp_path, llama())
    (tmp_path / "short.txt").write_text("Hello.")
    code, out, err = command("--text", "short.txt")
    line = next(line for line in out.splitlines() if "short.txt" in line)
    assert code == 0 and err == "" and line.count("+-    nan") == 2
    assert not [warning for warning in recwarn if issubclass(warning.category, RuntimeWarning)]


# -----------------------------------------------------------------------------
# the text

def test_mixture_is_that_of_training(rng):
    """The same losses make the same mixed figures as in train.py; its error is that of a weighted sum."""
    names = ["one", "two", "three"][:rng.randint(2, 3)]
    weights = [rng.uniform(0.1, 1) for _ in names]
    sources = {name: Source("text", weight / sum(weights), data_files="x") for name, weight in zip(names, weights)}
    rows = {name: {"loss": rng.uniform(1, 8), "loss_stderr": rng.uniform(0, 0.1), "tokens": rng.randint(100, 10**6),
                   "bytes": rng.randint(1000, 10**7)} for name in names}
    config = Config(sources=sources)
    meta = {"sources": {name: {"val": {key: row[key] for key in ("tokens", "bytes")}} for name, row in rows.items()}}
    mixed = eval.mixture(rows, run.as_json(config)["sources"])
    wanted = run.mixed({name: row["loss"] for name, row in rows.items()}, config.sources, meta)
    assert {name: mixed[name] for name in wanted} == pytest.approx(wanted, rel=1e-12)
    error = math.hypot(*(sources[name].ratio * row["loss_stderr"] for name, row in rows.items()))
    assert mixed["loss_stderr"] == pytest.approx(error)
    assert mixed["bits_per_byte_stderr"] / mixed["bits_per_byte"] == pytest.approx(error / mixed["loss"])
    assert (mixed["tokens"], mixed["bytes"]) == tuple(sum(row[key] for row in rows.values())
                                                      for key in ("tokens", "bytes"))


TWO_STEPS = ["--model.hidden_size=16", "--model.intermediate_size=24", "--model.num_hidden_layers=2",
             "--model.num_attention_heads=2", "--model.num_key_value_heads=1", "--model.max_position_embeddings=32",
             "--block_size=32", "--tokens_per_step=128", "--micro_batch_size=4", "--max_steps=2", "--log_interval=1",
             "--dtype=fp32", "--backend=cpu"]


@pytest.fixture
def learn(in_process, prepared, tmp_path, monkeypatch):
    """train.py for two steps on the prepared data, in tmp_path."""
    monkeypatch.chdir(tmp_path)
    folder, _ = prepared
    return partial(in_process, train.main, folder / "mine.py", "--data_dir", folder / "exact", *TWO_STEPS)


def test_mixed_line_agrees_with_the_log(command, learn, shown, prepared, tmp_path):
    """After a real run, the printed mixture has the logged losses but for the tokens that training leaves out: each
    bin's first, and what follows its last whole block. With those left out here too they are the same."""
    assert learn()[0] == 0
    logged = metrics(tmp_path / "out" / "mine")[-1]
    code, out, err = command()
    assert code == 0 and "mixed as in training" in out, (out, err)
    rows = next(iter(shown.values()))
    meta = json.loads((prepared[0] / "exact" / "meta.json").read_text())
    step_dir = checkpoint.find(tmp_path / "out" / "mine")
    model = checkpoint.open_trained(step_dir).model
    for name in SOURCES:
        assert {key: rows[name][key] for key in ("tokens", "bytes")} == {
            key: meta["sources"][name]["val"][key] for key in ("tokens", "bytes")}
        ids = np.fromfile(prepared[0] / "exact" / f"{name}_val.bin", np.uint16)
        whole = ids[:(len(ids) - 1) // CONTEXT * CONTEXT + 1]
        losses = eval.token_losses(lambda ids: model(ids)[0], whole, CONTEXT, CONTEXT, 8, CPU)
        assert losses.mean() == pytest.approx(logged[f"val_loss_{name}"], rel=1e-6)
    mixed = rows["mixed as in training"]
    assert mixed["loss"] == pytest.approx(logged["val_loss"], rel=0.01)
    assert mixed["perplexity"] == pytest.approx(logged["val_perplexity"], rel=0.05)
    assert mixed["bits_per_byte"] / mixed["loss"] == pytest.approx(logged["val_bits_per_byte"] / logged["val_loss"])


def test_max_blocks(command, shown, prepared, tmp_path, rng):
    """The first whole documents that fill so many blocks of the checkpoint's, and the same for another model."""
    folder, held_out = prepared
    save(tmp_path, llama(), data=folder / "exact")
    another_model(tmp_path / "gpt2", held_out["prose"])
    blocks = rng.randint(1, 2)
    code, out, err = command("--max_blocks", blocks, "--hf", "gpt2")
    assert code == 0, (out, err)
    ours, theirs = shown.values()
    for name, texts in held_out.items():
        ends = np.cumsum([len(EXACT.encode(text)) + 1 for text in texts])
        count = min(int((ends < blocks * CONTEXT).sum()) + 1, len(texts))
        assert count < len(texts)
        assert ours[name]["tokens"] == ends[count - 1]
        assert ours[name]["bytes"] == theirs[name]["bytes"] == sum(map(len, texts[:count]))


def test_dropped_bytes_are_announced(command, shown, tmp_path, rng):
    """What the vocabulary cannot write is no part of the checkpoint's figures, and that is said."""
    save(tmp_path, llama())
    text, lost = some_text(rng), "\x01" * rng.randint(1, 9) + "\x7f"
    assert EXACT.count_dropped(text) == 0 and EXACT.count_dropped(lost) == len(lost)
    (tmp_path / "any.txt").write_text(f"{text} {lost}", encoding="utf-8")
    code, out, _ = command("--text", "any.txt")
    row, = next(iter(shown.values())).values()
    assert code == 0 and "1 of 1 documents do not come back whole from its tokenizer" in out
    assert row["bytes"] == len(f"{text} ")


def test_what_another_tokenizer_loses_is_said(command, tmp_path, rng):
    """A model whose tokenizer turns words into one unknown token is cheap to evaluate, and that is said."""
    save(tmp_path, llama())
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "<eos>": 1, "a": 2}, unk_token="<unk>"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=library, eos_token="<eos>",
                                         unk_token="<unk>").save_pretrained("gpt2")
    transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=3, n_positions=24, n_embd=16, n_layer=1, n_head=2, bos_token_id=None,
        eos_token_id=1)).save_pretrained("gpt2")
    (tmp_path / "any.txt").write_text(some_text(rng))
    code, out, err = command("--text", "any.txt", "--hf", "gpt2")
    assert code == 0 and out.count("do not come back whole") == 1, (out, err)
    assert "1 of 1 documents" in out.splitlines()[-1]


def test_an_encoder_is_refused(command, tmp_path, rng):
    """What sees the tokens that it is to predict is no causal model, though transformers loads it as one."""
    save(tmp_path, llama())
    another_model(tmp_path / "bert", [some_text(rng)])
    transformers.BertLMHeadModel(transformers.BertConfig(
        vocab_size=320, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=64, initializer_range=0.5)).save_pretrained("bert")
    (tmp_path / "any.txt").write_text(some_text(rng))
    refused(command("--text", "any.txt", "--hf", "bert"), "not a causal model")


# -----------------------------------------------------------------------------
# runs side by side

def logged_run(folder, name, rng, **changes):
    """A run's config.json and metrics.jsonl, as train.py writes them; its evaluations [(step, bits per byte)]."""
    config = Config(name=name, model=ModelConfig(hidden_size=rng.choice([16, 32, 48]), num_attention_heads=2,
                                                 num_hidden_layers=2), tokens_per_step=512)
    evaluations = [(step, rng.uniform(1, 4)) for step in range(100, 100 * rng.randint(2, 9), 100)]
    lines = []
    for step, bits in evaluations:
        lines += [{"step": step, "tokens": step * 512, "train_loss": 3.0},
                  {"step": step, "val_loss": 2.0, "val_perplexity": 7.4, "val_bits_per_byte": bits, "val_loss_a": 2.0}]
    (folder / name).mkdir(parents=True)
    (folder / name / "config.json").write_text(json.dumps(run.as_json(config) | changes, indent=2))
    (folder / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return config, evaluations


def test_compare(command, tmp_path, rng):
    """The table says what was logged, to the end of each run, and the picture is one."""
    runs = {name: logged_run(tmp_path / "out", name, rng) for name in ("first", "second", "third")}
    with (tmp_path / "out" / "first" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1000, "val_bits')  # left by a run that was killed
    code, out, err = command("--compare", *(f"out/{name}" for name in runs))
    assert code == 0 and err == "", (out, err)
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    for name, (config, evaluations) in runs.items():
        model, tokens = Llama(config.model), evaluations[-1][0] * 512
        parameters = sum(p.numel() for p in model.parameters())
        assert lines[name] == [f"{parameters:,}", f"{tokens:,}", f"{tokens * model.flops_per_token(256):.2e}",
                               f"{evaluations[-1][1]:.4f}", f"{min(bits for _, bits in evaluations):.4f}"]
    picture = (tmp_path / "out" / "compare.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and picture.rstrip().endswith(b"IEND\xaeB`\x82")
    code, out, err = command("--compare", "out/second", "--picture", "one.png")
    assert code == 0 and "one.png" in out and (tmp_path / "one.png").read_bytes()[1:4] == b"PNG"


def test_compare_refuses(command, tmp_path, rng):
    """A run that has not been evaluated, a folder that is none, and files that are damaged, each in one line."""
    logged_run(tmp_path, "good", rng)
    runs = {name: tmp_path / name for name in ("new", "begun", "damaged", "shapeless", "other", "steps")}
    for name in runs:
        logged_run(tmp_path, name, rng)
    (runs["new"] / "metrics.jsonl").unlink()
    (runs["begun"] / "metrics.jsonl").write_text('{"step": 1, "train_loss": 3.0}\n')
    (runs["damaged"] / "config.json").write_text('{"model": {"vocab')
    (runs["shapeless"] / "config.json").write_text("[]")
    logged_run(tmp_path, "heads", rng, model={"num_attention_heads": 0})
    (runs["other"] / "config.json").unlink()
    (runs["steps"] / "metrics.jsonl").write_text('{"val_bits_per_byte": 3.0}\n')
    for name, word in {"new": "not been evaluated", "begun": "not been evaluated", "damaged": "damaged",
                       "shapeless": "damaged", "heads": "damaged", "other": "no run", "steps": "damaged",
                       "nowhere": "no run"}.items():
        refused(command("--compare", "good", name, "--picture", "no.png"), name, word)
    assert not (tmp_path / "no.png").exists()


# -----------------------------------------------------------------------------
# refusals

def test_refusals(command, prepared, tmp_path, rng, monkeypatch):
    """What the user can put right is one line on stderr and exit code 2."""
    refused(command(), "no trained model", "prepare.py")
    refused(command("--checkpoint", "out/none"), "no checkpoint in out/none")
    step_dir = save(tmp_path, llama())
    refused(command(), "meta.json", "prepare.py", "--data_dir", "--text")
    refused(command("--data_dir", prepared[0] / "portable"), "another vocabulary", "quickstart-2048")
    files = {"empty.txt": b"", "blank.txt": b" \n \t\n", "binary.txt": b"\x89PNG\xff\xfe", "fine.txt": b"Hello."}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    refused(command("--text", "none.txt"), "none.txt")
    refused(command("--text", "fine.txt", "empty.txt"), "empty.txt is empty")
    refused(command("--text", "blank.txt"), "blank.txt is empty")
    refused(command("--text", "binary.txt"), "binary.txt is not text")
    refused(command("--text", tmp_path), str(tmp_path))
    refused(command("--text", "fine.txt", "--hf", "nowhere/at_all"), "cannot load nowhere/at_all")
    refused(command("--text", "fine.txt", "--hf", tmp_path), "cannot load")
    export.main(["--out", "exported", "--checkpoint", str(step_dir)])
    refused(command("--text", "fine.txt", "--hf", "exported"), "exported comes with code")
    for option in ("max_blocks", "block_size", "stride", "batch_size", "limit"):
        refused(command(f"--{option}", rng.choice([0, -5])), option, "at least 1")
    refused(command("--strides", 4), "--strides", "--stride")
    refused(command("--dtype", "float8"), "--dtype")
    refused(command("--dtype", "int8", "--hf", "fine"), "int8", "--hf")
    refused(command("--dtype", "int8", "--benchmarks"), "int8", "--benchmarks")
    refused(command("--which", "worst"), "worst")
    refused(command("--text", "fine.txt", "--backend", "tpu"), "--backend")
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(command("--text", "fine.txt", "--hf", "exported"), "pip install transformers")


def test_the_way_out_is_named(command, tmp_path):
    """Where an export needs --trust_remote_code, the line says so, however long the path of its folder is."""
    step_dir = save(tmp_path, llama())
    folder = tmp_path / ("x" * 60) / "exported"
    folder.parent.mkdir()
    export.main(["--out", str(folder), "--checkpoint", str(step_dir)])
    (tmp_path / "fine.txt").write_text("Hello.")
    refused(command("--text", "fine.txt", "--hf", folder), "comes with code", "--trust_remote_code")


@pytest.mark.parametrize("damage, word", [
    (lambda ids: ids[:-1], "meta.json says"), (lambda ids: np.append(ids, ids[-1]), "meta.json says"),
    (lambda ids: np.append(ids[:-1], 2048), "the id 2048"), (lambda ids: np.append(65535, ids[1:]), "the id 65535"),
    (lambda ids: np.append(ids[:-1], 300), "has no end")])
def test_damaged_bins_are_refused(command, prepared, tmp_path, damage, word):
    """Ids that the vocabulary has not, or another number of them than meta.json says: two flipped bytes are enough."""
    save(tmp_path, llama(), data="copy")
    shutil.copytree(prepared[0] / "exact", tmp_path / "copy")
    ids = np.fromfile(tmp_path / "copy" / "code_val.bin", "<u2")
    damage(ids).astype("<u2").tofile(tmp_path / "copy" / "code_val.bin")
    refused(command(), "code_val.bin is damaged", word, "prepare.py")


def test_compare_names_the_damaged_line(command, tmp_path, rng):
    """Whatever stands in metrics.jsonl, the refusal is a short line."""
    for number, line in enumerate((b"null", b"\xff" * 43_000, b"[" * 100_000, b'{"step": -1}', b'{"step": "x"}',
                                   b'{"step": 1, "val_bits_per_byte": "much"}', b"")):
        logged_run(tmp_path, str(number), rng)
        path = tmp_path / str(number) / "metrics.jsonl"
        whole = path.read_bytes()
        path.write_bytes(line + b"\n" + whole)
        code, out, err = command("--compare", str(number))
        assert code == 2 and "line 1, is damaged" in err and len(err) < 700, err


@pytest.mark.parametrize("damage, words", [
    ({"meta.json": b'{"recipe"'}, ["meta.json", "damaged"]), ({"meta.json": b"[]"}, ["meta.json", "damaged"]),
    ({"meta.json": b'{"recipe": {}}'}, ["meta.json", "damaged"]), ({"code_val.bin": b""}, ["code_val.bin", "empty"]),
    ({"code_val.bin": None}, ["code_val.bin", "--text"]),
])
def test_damaged_data_are_refused(command, prepared, tmp_path, damage, words):
    """Bins that are not there or empty, and a meta.json that is damaged, are said in one line."""
    save(tmp_path, llama(), data="copy")
    (tmp_path / "copy").mkdir()
    for file in (prepared[0] / "exact").iterdir():
        data = damage.get(file.name, file.read_bytes())
        if data is not None:
            (tmp_path / "copy" / file.name).write_bytes(data)
    refused(command(), *words)


def test_a_text_without_tokens_is_refused(command, tmp_path):
    """A text of which the vocabulary can write nothing has no bytes to divide by."""
    save(tmp_path, llama())
    (tmp_path / "control.txt").write_text("\x01\x02\x7f")
    refused(command("--text", "control.txt"), "control.txt")


# -----------------------------------------------------------------------------
# trackers

def test_a_tracker_that_fails(learn, tmp_path, monkeypatch):
    """A tracker whose server goes away costs a run nothing but the tracker."""
    (tmp_path / "trackio.py").write_text("def init(**settings):\n    return Run()\n\n\nclass Run:\n"
                                         "    def log(self, entry, step):\n        raise ConnectionError('gone')\n")
    monkeypatch.syspath_prepend(tmp_path)
    code, out, err = learn("--tracker=trackio")
    sys.modules.pop("trackio")
    assert code == 0 and out.count("--tracker trackio has failed") == 1 and "trained" in out, (out, err)


@pytest.mark.skipif(importlib.util.find_spec("trackio") is not None, reason="trackio is here")
@pytest.mark.parametrize("again", [[], ["--overwrite"], ["--resume", "--max_steps=4"]], ids=str)
def test_a_tracker_that_is_not_there(learn, tmp_path, again):
    """It is refused in one line, before anything is trained and before anything of an earlier run is deleted."""
    run = tmp_path / "out" / "mine"
    if again:
        assert learn()[0] == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    refused(learn(*again, "--tracker", "trackio"), "--tracker trackio", "pip install trackio")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_wandb(learn, tmp_path, monkeypatch):
    """A run that is tracked offline logs the same as one that is not, and leaves a run of wandb's."""
    wandb = pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    assert learn()[0] == 0
    wanted = metrics(tmp_path / "out" / "mine")
    code, out, err = learn("--name", "tracked", "--tracker", "wandb")
    assert code == 0 and "trained 2 steps" in out, (out, err)
    assert metrics(tmp_path / "out" / "tracked") == wanted
    wandb.teardown()  # ends its process, and so waits until that has written
    logs = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(logs) == 1 and b"val_bits_per_byte" in logs[0].read_bytes()
