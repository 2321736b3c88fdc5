"""An export is the same model and the same tokens in the programs that it is for, an import is the same model here, and
what cannot be either is refused in one line. These tests also run with transformers 4.46 (make compat)."""
import ast
import copy
import importlib.util
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import unicodedata
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, TextIteratorStreamer

import checkpoint
import export
import portable
import quant_t4
import sample
import tokenizer
import train
from config import Config
from model import Llama, ModelConfig, count_parameters
from model_card import PROMPTS, READ_PORTABLY, ROWS
from tests.commands import ROOT, refused

QUICK = tokenizer.load("quickstart-2048")
SHARED = ROOT.parent / "shared" / "tokenmonster"
pytestmark = pytest.mark.usefixtures("offline")
ENGLISH = [f"english-{size}-strict-nocapcode-v1" for size in (4096, 8000)]
REMOTE = {"trust_remote_code": True}
EOS = "<|endoftext|>"
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EXACT_FILES = ["README.md", "config.json", "generation_config.json", "model.safetensors",
               "tokenization_tokenmonster.py", "tokenizer_config.json", "tokenmonster.vocab"]
PORTABLE_FILES = ["README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                  "tokenizer_config.json"]
FRAGMENTS = ["the", " of a", "return self", "don't", "l\u2019eau", "(x, y)", "://", "?", "??", "111", "99999",
             " 1 + 1 = 2.", "def f(self):\n    return [x for x in self]\n", "import numpy as np\n", "0000 ", "-" * 40,
             " ", "  ", " " * 30, "\t", "\n", "\n\n", " \n", "\r\n", "\r", "\x7f", "\x7f a", "\x00\x01", "\x14", "\x85",
             "\xa0", "\u2028", "\ufeff", "\ufffd", "\u00e9", "e\u0301", "\u0301", "\u1e69", "\u212b", "\uac00",
             "\u4e00\u4e8c", "\u0414\u0430", "\U0001f600", "\U0001f468\u200d\U0001f469", "\U0010ffff", "</s>",
             "<|endoftext", "[PAD]"]


@pytest.fixture
def command(in_process, tmp_path, monkeypatch):
    """export.py in tmp_path."""
    monkeypatch.chdir(tmp_path)
    return partial(in_process, export.main)


def llama(**changes):
    """A tiny model with weights so large that its likeliest tokens change from place to place, but never end a text."""
    model = Llama(ModelConfig(**dict(vocab_size=2048, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                     num_attention_heads=4, num_key_value_heads=2,
                                     max_position_embeddings=256) | changes))
    for p in model.parameters():
        p.data.uniform_(0.5, 1.5) if p.dim() == 1 else p.data.normal_(0, 1.5 * p.size(1) ** -0.5)
    if not model.config.tie_word_embeddings:
        model.lm_head.weight.data[QUICK.eos_id] = 0
    return model


def save(run, model, tokens=QUICK, step=1200, **config):
    """A run of this model as train.py leaves it."""
    settings = Config(name="tiny", model=model.config, block_size=32, tokens_per_step=32, **config)
    state = {"step": step, "seconds": 65.0, "best_loss": 1.5, "int8_product": None, "val_loss": 1.5,
             "bits_per_byte": 1.2345, "tokenizer_sha256": tokens.sha256, "scaler": {}, "train_tokens": {},
             "config": json.loads(json.dumps(asdict(settings), default=str))}
    checkpoint.save(run, model, torch.optim.AdamW(model.parameters()), state, True, 1)
    return run


def names(folder):
    """The files of a folder, as paths relative to it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def contents(folder):
    """Everything in a folder: empty directories and the bytes of files too."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def state_of(run):
    return json.loads((checkpoint.find(run) / "state.json").read_text())


def change(file, **values):
    """Other values in a JSON file; None removes one."""
    changed = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))


def any_text(rng):
    """Some fragments and some characters of any kind, lone surrogates too."""
    def character():  # one of one byte, of two, of three, of four
        return chr(rng.randrange(rng.choice([0x80, 0x800, 0x10000, 0x110000])))

    parts = [rng.choice(FRAGMENTS) if rng.random() < 0.7 else character() for _ in range(rng.randint(1, 14))]
    return "".join(parts).replace(EOS, "")  # that, transformers takes for the token


def texts(rng, count=300):
    return ["", " ", "\n", *(any_text(rng) for _ in range(count))]


def well_formed(text):
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def load_hf(folder):
    """A folder's model, in FP32."""
    return AutoModelForCausalLM.from_pretrained(folder).float().eval()


@torch.no_grad()
def difference(ours, theirs, rows=None):
    """The largest difference between the logits of two models on random ids."""
    ids = torch.randint(rows or ours.config.vocab_size, (3, ours.config.max_position_embeddings // 2))
    return float((ours(ids)[0] - theirs(ids).logits).abs().max())


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with a run and its exports: out/tiny, hf (exact) and plain/hf (portable)."""
    root = tmp_path_factory.mktemp("exported")
    run = save(root / "out" / "tiny", llama())
    export.main(["--checkpoint", str(run), "--out", str(root / "hf")])
    export.main(["--checkpoint", str(run), "--out", str(root / "plain" / "hf"), "--tokenizer", "portable"])
    return root


# -----------------------------------------------------------------------------
# the model in transformers

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


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype(rng, command, tmp_path, dtype):
    """The weights are ours, rounded to the precision that is asked for, and transformers loads them in it."""
    model = llama(tie_word_embeddings=rng.random() < 0.5)
    save(tmp_path / "run", model)
    assert command("--checkpoint", "run", "--out", "hf", "--dtype", dtype, "--tokenizer", "portable")[0] == 0
    stored, torch_dtype = load_file("hf/model.safetensors"), getattr(torch, dtype)
    parameters = dict(model.named_parameters())
    assert stored.keys() == parameters.keys()
    assert all(torch.equal(stored[name], p.to(torch_dtype)) for name, p in parameters.items())
    for name in ("dtype", "torch_dtype"):
        assert json.loads(Path("hf/config.json").read_text())[name] == dtype
    theirs = AutoModelForCausalLM.from_pretrained("hf", torch_dtype="auto")
    assert {p.dtype for p in theirs.parameters()} == {torch_dtype}
    model.load_state_dict({name: p.float() for name, p in stored.items()}, strict=False)
    assert difference(model, theirs.float().eval()) <= 1e-4


def test_which_checkpoint(rng, command, tmp_path):
    """The newest run's best checkpoint is exported, or its latest, or the step that is named."""
    run = Path("out/tiny")
    best, latest = llama(), llama()
    save(tmp_path / run, best, step=7)
    state = state_of(run)
    checkpoint.save(tmp_path / run, latest, None, state | {"step": 9}, False, 2)
    of_step = ["--checkpoint", run / "step_00000007"]
    for arguments, model in (([], best), (["--which", "latest"], latest), (of_step, best)):
        assert command(*arguments, "--out", "hf", "--tokenizer", "portable")[0] == 0
        assert torch.equal(load_file("hf/model.safetensors")["model.norm.weight"], model.model.norm.weight)
        shutil.rmtree("hf")


def spoil_config(patch, **values):
    """Let export.py write other values into config.json than it means to."""
    right = export.llama_config
    patch.setattr(export, "llama_config", lambda *arguments: right(*arguments) | values)


def spoil_code(patch, was, becomes):
    """Let export.py write other code for the tokenizer than it means to."""
    source = export.remote_code()
    assert was in source
    patch.setattr(export, "remote_code", lambda: source.replace(was, becomes))


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


# -----------------------------------------------------------------------------
# TokenMonster in transformers

@pytest.fixture(scope="module", params=["quickstart-2048", *ENGLISH])
def exact(request, exported, tmp_path_factory):
    """An export's folder with each vocabulary, what AutoTokenizer makes of it, and our tokenizer."""
    if request.param == "quickstart-2048":
        return exported / "hf", AutoTokenizer.from_pretrained(exported / "hf", **REMOTE), QUICK
    if not (SHARED / f"{request.param}.vocab").is_file():
        pytest.skip(f"{request.param}.vocab is not here")
    ours, root = tokenizer.load(SHARED / f"{request.param}.vocab"), tmp_path_factory.mktemp("english")
    model = llama(vocab_size=ours.vocab_size + 63)
    save(root / "run", model, ours, tokenizer=str(SHARED / f"{request.param}.vocab"))
    export.main(["--checkpoint", str(root / "run"), "--out", str(root / "hf")])
    return root / "hf", AutoTokenizer.from_pretrained(root / "hf", **REMOTE), ours


def test_exact_ids(rng, exact):
    """AutoTokenizer's ids are ours and decode to what ours decode to, whatever the text."""
    _, theirs, ours = exact
    for text in texts(rng):
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode(text).tolist(), text
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids), text
        assert ours.eos_id in ids or theirs.decode(ids) == ours.decode(ids), text
        assert theirs.convert_tokens_to_ids(theirs.tokenize(text)) == ids, text


def test_exact_golden(exact):
    """The published ids of the reference come out of transformers too."""
    _, theirs, ours = exact
    file = ROOT / "tests" / "golden_quickstart.jsonl" if ours is QUICK else SHARED / "golden_english.jsonl"
    cases = [case for line in file.read_text(encoding="utf-8").splitlines()
             if (case := json.loads(line)).get("vocab", ours.name) == ours.name]
    assert cases and all(theirs(case["text"])["input_ids"] == case["ids"] for case in cases)


def test_exact_special_tokens(rng, exact):
    """One token begins, ends and pads; it stands for itself, or for nothing; ids that no token has are no text."""
    _, theirs, ours = exact
    assert len(theirs) == theirs.vocab_size == len(theirs.get_vocab()) == ours.vocab_size
    assert sorted(theirs.get_vocab().values()) == list(range(ours.vocab_size))
    assert theirs.bos_token_id == theirs.eos_token_id == theirs.pad_token_id == ours.eos_id == (
        8000 if "8000" in ours.name else 2)
    for _ in range(50):
        one, other = (any_text(rng).replace("\r", "") for _ in range(2))
        first, second = ours.encode(one).tolist(), ours.encode(other).tolist()
        ids = [*first, ours.eos_id, *second]
        assert theirs(one + EOS + other)["input_ids"] == ids
        assert theirs.decode(ids) == ours.decode(first) + EOS + ours.decode(second)
    for beyond in (ours.vocab_size, ours.vocab_size + rng.randrange(60)):
        assert theirs.decode([beyond]) == theirs.decode([beyond, beyond]) == ""
        assert theirs.decode([ours.eos_id, beyond], skip_special_tokens=True) == ""


@pytest.mark.parametrize("side", ["left", "right"])
def test_exact_batches(rng, exact, side):
    """Padding on either side, with its mask; truncation; and a batch decoded."""
    _, theirs, ours = exact
    theirs = copy.deepcopy(theirs)
    theirs.padding_side = side
    batch = [any_text(rng).replace("\r", "") for _ in range(20)]
    ids = [ours.encode(text).tolist() for text in batch]
    longest = max(map(len, ids))
    made = theirs(batch, padding=True, return_tensors="pt")
    for row, mask, wanted in zip(made["input_ids"].tolist(), made["attention_mask"].tolist(), ids, strict=True):
        pad = longest - len(wanted)
        assert row == ([ours.eos_id] * pad + wanted if side == "left" else wanted + [ours.eos_id] * pad)
        assert mask == ([0] * pad + [1] * len(wanted) if side == "left" else [1] * len(wanted) + [0] * pad)
    assert theirs.batch_decode(made["input_ids"], skip_special_tokens=True) == [ours.decode(row) for row in ids]
    length = rng.randint(1, longest)
    cut = theirs(batch, truncation=True, max_length=length)["input_ids"]
    assert cut == [row[:length] for row in ids]
    assert theirs(batch, padding="max_length", max_length=longest + 3)["input_ids"][0].count(ours.eos_id) >= 3


def test_exact_saved_again(rng, exact, tmp_path):
    """What transformers saves of the tokenizer is whole by itself, twice over, and has the same ids."""
    folder, _, ours = exact
    for name in ("hf", "again", "hf.partial"):
        theirs = AutoTokenizer.from_pretrained(folder, **REMOTE)
        theirs.save_pretrained(tmp_path / name)
        if folder.parent == tmp_path:
            shutil.rmtree(folder)
        folder = tmp_path / name
    assert {"tokenmonster.vocab", "tokenization_tokenmonster.py", "tokenizer_config.json"} <= set(os.listdir(folder))
    theirs = AutoTokenizer.from_pretrained(folder, **REMOTE)
    assert theirs.eos_token_id == theirs.pad_token_id == ours.eos_id and len(theirs) == ours.vocab_size
    for text in texts(rng, 50):
        ids = ours.encode(text).tolist()
        assert theirs(text)["input_ids"] == ids and theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": False}])
def test_exact_is_not_loaded_without_trust(exported, trust):
    """Without trust_remote_code there is an error that names it, and never a tokenizer of other ids."""
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoTokenizer.from_pretrained(exported / "hf", **trust)


ALONE = """
import json, sys
sys.modules["numba"] = None  # cannot be imported
from transformers import AutoTokenizer
tokens = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
rows = [(ids := tokens(text)["input_ids"], tokens.decode(ids, skip_special_tokens=True))
        for text in json.load(sys.stdin)]
print(json.dumps([rows, [name for name in sys.argv[2:] if name in sys.modules]]))
"""


def test_exact_needs_nothing_of_ours(rng, exported, tmp_path):
    """The exported code imports nothing of the project, and without numba and from elsewhere gives the same ids."""
    modules = {path.stem for path in ROOT.glob("*.py")}
    tree = ast.parse((exported / "hf" / "tokenization_tokenmonster.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    imported = {alias.name.split(".")[0] for node in imports if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module.split(".")[0] for node in imports if isinstance(node, ast.ImportFrom) and not node.level}
    assert not any(isinstance(node, ast.ImportFrom) and node.level for node in imports)
    assert imported <= {*sys.stdlib_module_names, "numpy", "numba", "transformers"} and not imported & modules
    drawn = [well_formed(text) for text in texts(rng, 100)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", ALONE, exported / "hf", *modules], input=json.dumps(drawn), text=True,
                          cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=120,
                          env=environment | {"HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    rows, ours = json.loads(done.stdout.splitlines()[-1])
    assert rows == [[ids := QUICK.encode(text).tolist(), QUICK.decode(ids)] for text in drawn] and ours == []


@pytest.mark.parametrize("numba", [True, False])
def test_exact_copies(rng, exported, tmp_path, monkeypatch, numba):
    """The tokenizer can be copied, and so sent to other processes (pickle), with numba and without."""
    if not numba:
        monkeypatch.setitem(sys.modules, "numba", None)  # cannot be imported
    code = shutil.copy(exported / "hf" / "tokenization_tokenmonster.py", tmp_path / "exported.py")
    spec = importlib.util.spec_from_file_location("exported", code)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "exported", module)
    spec.loader.exec_module(module)
    assert module.COMPILED == (numba and tokenizer.TokenMonster.encode_counted.__globals__["COMPILED"])
    theirs = module.TokenMonsterTokenizer.from_pretrained(exported / "hf")
    for other in (copy.deepcopy(theirs), pickle.loads(pickle.dumps(theirs))):
        assert all(other(text)["input_ids"] == QUICK.encode(text).tolist() for text in texts(rng, 20))


# -----------------------------------------------------------------------------
# the portable tokenizer in transformers

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
    tokens = tokenizer.load("quickstart-2048", "portable")
    save(tmp_path / "run", llama(), tokens, tokenizer_segmentation="portable")
    for arguments in ([], ["--tokenizer", "portable"]):
        assert command("--checkpoint", "run", "--out", "hf", *arguments)[0] == 0
        assert names(tmp_path / "hf") == PORTABLE_FILES
        assert Path("hf/tokenizer.json").read_bytes() == tokens.data
        assert READ_PORTABLY not in Path("hf/README.md").read_text(encoding="utf-8")
        theirs = AutoTokenizer.from_pretrained("hf")
        for text in map(well_formed, texts(rng, 50)):
            ids = theirs(text)["input_ids"]
            assert ids == tokens.encode(text).tolist()
            assert theirs.decode(ids, skip_special_tokens=True) == tokens.decode(ids)
        shutil.rmtree("hf")
    refused(command("--checkpoint", "run", "--out", "hf", "--tokenizer", "exact"), "--tokenizer", "portable")
    assert os.listdir() == ["run"]


# -----------------------------------------------------------------------------
# what transformers does with an export

def greedy(model, prompt, count):
    """Our greedy continuation."""
    return list(sample.generate(model, prompt, count, vocab_size=2048))


@pytest.mark.parametrize("form", ["hf", "plain/hf"])
def test_pipeline(exported, form):
    """pipeline("text-generation") continues a prompt as sample.py's generate does.

    Version 4 asks the tokenizer to take spaces out before punctuation, whatever its own settings say.
    """
    model, _ = checkpoint.load_model(checkpoint.find(exported / "out/tiny"))
    generate = transformers.pipeline("text-generation", model=str(exported / form), device="cpu",
                                     trust_remote_code=form == "hf")
    ids = generate.tokenizer("def read(self")["input_ids"]
    made = generate("def read(self", max_new_tokens=12, do_sample=False, clean_up_tokenization_spaces=False)
    wanted = generate.tokenizer.decode(ids + greedy(model, ids, 12), skip_special_tokens=True)
    assert made == [{"generated_text": wanted}]


def test_generate(rng, exported):
    """generate gives our greedy tokens, alone or in a batch padded on the left, and the text that our decode gives."""
    model, _ = checkpoint.load_model(checkpoint.find(exported / "out/tiny"))
    theirs = load_hf(exported / "hf")
    tokens = AutoTokenizer.from_pretrained(exported / "hf", padding_side="left", **REMOTE)
    prompts = ["Once upon a time", "1 + 1 =", "def __init__(self):\n    "]
    ids = [QUICK.encode(text).tolist() for text in prompts]
    made = theirs.generate(**tokens(prompts, padding=True, return_tensors="pt"), max_new_tokens=20, do_sample=False)
    assert [row[-20:] for row in made.tolist()] == [greedy(model, row, 20) for row in ids]
    texts = tokens.batch_decode(made[:, -20:], skip_special_tokens=True)
    assert [text.removesuffix("\x7f") for text in texts] == [QUICK.decode(row[-20:]) for row in made]


def streamed(theirs, ids):
    """What a streamer shows of these ids, given one at a time."""
    streamer = TextIteratorStreamer(theirs, skip_special_tokens=True)
    for token in ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    return "".join(streamer)


def open_lines(ours):
    """The ids of pieces that end a line and hold the mark that deletes the space of the word after it."""
    return [token for token, piece in enumerate(ours.pieces) if piece.endswith(b"\n\x7f")]


def test_streamer(rng, exact):
    """A streamer's pieces make the text of any ids, open marks and broken characters among them."""
    _, theirs, ours = exact
    drawn = [ours.encode(any_text(rng)).tolist() for _ in range(100)]
    drawn += [[rng.randrange(ours.vocab_size) for _ in range(60)] for _ in range(20)]
    for ids in drawn:
        shown = streamed(theirs, ids)
        assert shown == theirs.decode(ids, skip_special_tokens=True), ids
        assert shown.removesuffix("\x7f") == ours.decode(ids), ids  # of an open mark see the next test


def test_streamer_after_a_line(rng, exact):
    """A word at the beginning of a line has no space before it, also where its mark stands in the line's last token.

    A streamer forgets the tokens before the end of a line; so a text that stops there keeps the mark.
    """
    _, theirs, ours = exact
    words = [token for token, piece in enumerate(ours.pieces) if re.fullmatch(rb" [a-z]+", piece)]
    for token in open_lines(ours):
        ids = [rng.choice(words), token, rng.choice(words), rng.choice(words)]
        assert streamed(theirs, ids) == theirs.decode(ids) == ours.decode(ids), ids
        assert theirs.decode(ids[:2]) == ours.decode(ids[:2]) + "\x7f"


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


# -----------------------------------------------------------------------------
# INT8

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
    loaded, state = checkpoint.load_model(checkpoint.find(Path("int8")))
    assert all(torch.equal(p, used.get(name, parameters[name])) for name, p in loaded.named_parameters())
    ids = torch.randint(2048, (2, 64))
    assert torch.equal(loaded(ids)[0], model(ids)[0])
    tokens = checkpoint.load_tokenizer(Path("int8"), state)
    assert tokens.sha256 == QUICK.sha256 and tokens.eos_id == QUICK.eos_id
    before, after = (checkpoint.find(Path(name)) / "model.safetensors" for name in ("run", "int8"))
    assert after.stat().st_size < before.stat().st_size

    code, out, _ = in_process(sample.main, "--checkpoint", "int8", "--prompt", "def f", "--greedy",
                              "--max_new_tokens", 9, "--repetition_penalty", 1)
    assert code == 0 and out == "def f" + QUICK.decode(greedy(loaded, sample.prompt_ids(QUICK, "def f"), 9)) + "\n"


def test_int8_of_a_model_not_trained_for_it(rng, command, tmp_path):
    """Without int8_linears all linears of the blocks become INT8, but for the FP32 blocks'; the rest has --dtype."""
    tokens = tokenizer.load("quickstart-2048", "portable")
    model = llama(num_hidden_layers=3, fp32_blocks=(0,))
    save(tmp_path / "run", model, tokens, tokenizer_segmentation="portable")
    code, out, _ = command("--checkpoint", "run", "--out", "int8", "--format", "int8", "--dtype", "bfloat16")
    assert code == 0 and "14 weights in INT8" in out and "was not trained for it" in out
    stored = load_file("int8/model.safetensors")
    int8 = {name for name, tensor in stored.items() if tensor.dtype == torch.int8}
    assert int8 == {name for name in stored if re.search(r"layers\.[12]\..*_proj\.weight$", name)}
    assert all(tensor.dtype == torch.bfloat16 for name, tensor in stored.items()
               if name not in int8 and not name.endswith("_scale"))
    loaded, state = checkpoint.load_model(Path("int8"))
    assert checkpoint.load_tokenizer(Path("int8"), state).data == tokens.data
    assert all(torch.allclose(p, q, atol=0.05) for p, q in zip(loaded.parameters(), model.parameters(), strict=True))


# -----------------------------------------------------------------------------
# import

def their_model(rng, **changes):
    """Somebody's Llama, made by transformers, that ends its texts with our token."""
    theta = rng.choice([500.0, 20_000.0])
    config = LlamaConfig(**dict(
        vocab_size=2048, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=2, eos_token_id=2, rope_theta=theta,
        rope_parameters={"rope_type": "default", "rope_theta": theta}, rms_norm_eps=1e-5) | changes)
    model = LlamaForCausalLM(config).eval()
    for p in model.parameters():
        p.data.uniform_(0.5, 1.5) if p.dim() == 1 else p.data.normal_(0, 1.5 * p.size(1) ** -0.5)
    return model


def with_tokenizer(folder):
    (folder / "tokenizer.json").write_bytes(portable.tokenizer_json(QUICK, lossless=True))
    return folder


@pytest.fixture
def theirs(rng, tmp_path):
    """The folder `theirs` of a whole model of somebody's, and the model."""
    model = their_model(rng)
    model.save_pretrained(tmp_path / "theirs")
    with_tokenizer(tmp_path / "theirs")
    return model


def edit_weights(edit):
    """Change the tensors of the folder `theirs`: edit takes them, and changes them in place."""
    tensors = load_file("theirs/model.safetensors")
    edit(tensors)
    save_file(tensors, "theirs/model.safetensors", {"format": "pt"})


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
        torch.save({name: p for name, p in model.state_dict().items()}, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    files = {"shards": 3 - model.config.tie_word_embeddings, "bin": 0}
    assert len(list(folder.glob("*.safetensors"))) == files.get(stored, 1)
    with_tokenizer(folder)
    code, out, err = command("--from", "theirs", "--out", "out/theirs")
    assert code == 0 and err == "" and "note:" not in out and "logits differ by" in out
    loaded, state = checkpoint.load_model(checkpoint.find(Path("out/theirs"), "best"))
    weights = dict(model.named_parameters())
    assert all(torch.equal(p, weights.pop(name).float()) for name, p in loaded.named_parameters()) and not weights
    assert difference(loaded, load_hf(folder)) <= 1e-4
    tokens = checkpoint.load_tokenizer(checkpoint.find(Path("out/theirs")), state)
    assert tokens.data == (folder / "tokenizer.json").read_bytes() and state["step"] == 0
    shutil.rmtree(folder)  # the run is whole by itself
    code, out, _ = in_process(sample.main, "--prompt", "def f", "--greedy", "--max_new_tokens", 5,
                              "--repetition_penalty", 1)
    assert code == 0
    assert out == "def f" + tokens.decode(greedy(loaded, sample.prompt_ids(tokens, "def f"), 5)) + "\n"


def test_there_and_back(rng, command, exported, tmp_path, in_process):
    """An exact export that is imported again has the first weights bit for bit and the first vocabulary."""
    code, out, _ = command("--from", exported / "hf", "--out", "out/back")
    assert code == 0 and "note:" not in out
    ours, state = checkpoint.load_model(checkpoint.find(exported / "out/tiny"))
    loaded, again = checkpoint.load_model(checkpoint.find(Path("out/back")))
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), loaded.parameters(), strict=True))
    assert again["tokenizer_sha256"] == state["tokenizer_sha256"]
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
    loaded, _ = checkpoint.load_model(checkpoint.find(Path("out/theirs")))
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
    loaded, _ = checkpoint.load_model(checkpoint.find(Path("run")))
    assert difference(loaded, model) <= 1e-4


def test_vocabulary_by_name(rng, command, theirs):
    """A folder without a vocabulary is imported with the one that --vocabulary names, copied beside the weights."""
    Path("theirs/tokenizer.json").unlink()
    refused(command("--from", "theirs", "--out", "run"), "theirs", "--vocabulary")
    refused(command("--from", "theirs", "--out", "run", "--vocabulary", "nowhere.vocab"), "nowhere.vocab")
    assert command("--from", "theirs", "--out", "run", "--vocabulary", "quickstart-2048")[0] == 0
    step_dir = checkpoint.find(Path("run"))
    assert Path("run/quickstart-2048.vocab").read_bytes() == QUICK.data
    assert checkpoint.load_tokenizer(step_dir, checkpoint.read_state(step_dir)).sha256 == QUICK.sha256


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
        "--dtype=float32"]


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
    loaded, state = checkpoint.load_model(checkpoint.find(Path("out/quickstart")))
    ours, _ = checkpoint.load_model(checkpoint.find(Path("out/theirs")))
    assert loaded.config == ours.config and state["step"] == 1
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


# -----------------------------------------------------------------------------
# the model card

def tables(card):
    """The rows of a card's Markdown tables, by the first cell of each row; what is no row is left out."""
    rows = [line.strip("|").split(" | ") for line in card.splitlines() if line.startswith("| ")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


def section(card, name):
    """The text of one section, or None."""
    found = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", card, re.MULTILINE | re.DOTALL)
    return found and found[1]


def test_card(rng, command, tmp_path):
    """Every figure of a card is the run's: evaluations, settings, parameters and what the model writes."""
    model = llama(tie_word_embeddings=rng.random() < 0.5)
    sources = {"web": {"dataset": "some/web", "ratio": 0.75}, "code": {"dataset": "some/code", "ratio": 0.25}}
    run = save(tmp_path / "run", model, step=1200)
    state_file = checkpoint.find(run) / "state.json"
    state = json.loads(state_file.read_text())
    for source in sources.values():
        source |= {"subset": None, "data_files": ["a.txt"], "anneal_ratio": 0.5}
    state["config"] |= {"sources": sources, "learning_rate": 0.00321, "seed": 97, "name": "my model"}
    state_file.write_text(json.dumps(state))
    steps = sorted(rng.sample(range(1, 1200), rng.randrange(40))) + [1200, 1300]  # the last is past the checkpoint
    entries = []
    for step in steps:
        loss = rng.uniform(1, 4)
        entries += [{"step": step, "tokens": 32 * step, "train_loss": loss},
                    {"step": step, "val_loss": loss, "val_perplexity": rng.uniform(5, 90),
                     "val_bits_per_byte": rng.random(), "val_loss_web": loss}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries) + '{"step": 13')
    (run / "curves.png").write_bytes(b"a picture")
    assert command("--checkpoint", "run", "--out", "hf", "--license", "mit")[0] == 0
    card = Path("hf/README.md").read_text(encoding="utf-8")

    wanted = {f"{e['step']:,}": [f"{e['val_loss']:.4f}", f"{e['val_perplexity']:.2f}", f"{e['val_bits_per_byte']:.4f}"]
              for e in entries if "val_loss" in e and e["step"] <= 1200}
    shown = {key: row for key, row in tables(section(card, "Evaluation")).items() if key not in ("step", "---")}
    assert shown.items() <= wanted.items() and "1,200" in shown
    assert min(len(wanted), ROWS // 2) <= len(shown) <= ROWS
    assert "curves.png" in card and Path("hf/curves.png").read_bytes() == b"a picture"

    rows = tables(section(card, "Architecture"))
    counts = {name: int(rows[name][0].replace(",", "")) for name in count_parameters(model)}
    assert counts == count_parameters(model)
    assert sum(counts.values()) == int(rows["total"][0].replace(",", "")) == sum(p.numel() for p in model.parameters())
    assert abs(sum(float(rows[name][1].rstrip("%")) for name in counts) - 100) < 0.5
    assert rows["layers"] == ["2"] and rows["context"] == ["256 tokens"] and "2,048" in rows["vocabulary"][0]

    training = section(card, "Training")
    assert "1,200 optimizer steps of 32 tokens, 38,400 tokens in all, in 65 s" in training
    settings = tables(training)
    assert settings["`learning_rate`"] == ["0.00321"] and settings["`seed`"] == ["97"]
    assert settings["web"] == ["some/web a.txt", "75%", "50%"] and settings["code"] == ["some/code a.txt", "25%", "50%"]

    assert card.startswith("---\nlicense: mit\n") and "# my model\n" in card and "1.2345 bits per byte" in card
    assert section(card, "Licence").strip().startswith("mit.")
    outside = card.replace(section(card, "What it writes"), "")
    assert not re.search(r"\{\w*\}|\{\{|\}\}|None|\bnan\b", outside)
    for prompt in PROMPTS:
        made = sample.generate(model, sample.prompt_ids(QUICK, prompt), 80, 0.8, None, 0.9, 1.1, QUICK.eos_id, 2048,
                               torch.Generator().manual_seed(0))
        text = "".join(c if c.isprintable() or c == "\n" else " " for c in prompt + QUICK.decode(list(made)))
        assert "".join(f"    {line}" for line in text.splitlines(True)) in card


def test_card_again(rng, exported, command):
    """The same checkpoint gives the same card, and the same files, to the byte."""
    assert command("--checkpoint", exported / "out/tiny", "--out", "hf")[0] == 0
    assert contents(Path("hf")) == contents(exported / "hf")


def test_card_without_evaluations(rng, command, exported, tmp_path):
    """Where nothing was measured the card has no evaluation; an import's names its origin, and no training."""
    card = (exported / "hf" / "README.md").read_text(encoding="utf-8")
    assert section(card, "Evaluation") is None and section(card, "Training") and "curves.png" not in card
    assert "from scratch" in card
    assert command("--from", exported / "hf", "--out", "back")[0] == 0
    for format in ("hf", "int8"):
        assert command("--checkpoint", "back", "--out", format, "--format", format)[0] == 0
        card = Path(format, "README.md").read_text(encoding="utf-8")
        assert f"imported from {exported / 'hf'}" in card and "from scratch" not in card and "# back\n" in card
        assert section(card, "Training") is None and section(card, "Evaluation") is None and "bits per byte" not in card


def test_card_of_a_run_that_began_with_another(rng, exported, command):
    """The card of a run that began with other weights (--init_from) does not say that there were none."""
    save(Path("out/tuned"), llama(), init_from=exported / "out/tiny")
    assert command("--out", "hf", "--tokenizer", "portable")[0] == 0
    card = Path("hf/README.md").read_text(encoding="utf-8")
    assert "from scratch" not in card and str(exported / "out/tiny") in card


@pytest.mark.parametrize("form", ["hf", "plain/hf"])
def test_card_loads(exported, capsys, form):
    """The Python of a card runs as it stands, with the folder in the place of its name."""
    card = (exported / form / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", section(card, "How to load it"), re.DOTALL)[1]
    assert ("trust_remote_code=True" in code) == (form == "hf")
    assert (READ_PORTABLY in card) == (form != "hf")
    exec(code.replace("FOLDER", str(exported / form)), {})
    assert capsys.readouterr().out.startswith("The history of")


# -----------------------------------------------------------------------------
# what the user can put right

@pytest.fixture
def run(tmp_path):
    """A run in tmp_path."""
    return save(tmp_path / "run", llama())


@pytest.mark.parametrize("arguments, words", [
    (["--checkpoint", "out/nothing"], ["no checkpoint", "out/nothing"]), ([], ["prepare.py", "train.py"]),
    (["--dtype", "q8_0"], ["q8_0", "gguf"]), (["--format", "int8", "--dtype", "q8_0"], ["q8_0", "gguf"]),
    (["--format", "onnx", "--dtype", "float16"], ["onnx", "float32"]),
    (["--format", "int8", "--tokenizer", "exact"], ["int8", "tokenizer"]), (["--format", "pickle"], ["pickle"]),
    (["--dtype", "float64"], ["float64"]), (["--which", "worst"], ["worst"]), (["--tokenizer", "fast"], ["fast"]),
])
def test_refusals(command, arguments, words, tmp_path):
    """What cannot be asked for is refused, and nothing is written."""
    refused(command("--out", "export", *arguments), *words)
    assert os.listdir() == []


def test_foreign_folder(command, exported, run, tmp_path):
    """A folder that train.py did not make is no checkpoint, and neither is one whose state.json is not."""
    Path("foreign").mkdir()
    Path("foreign/notes.txt").write_text("mine")
    for folder in ("foreign", exported / "hf"):
        refused(command("--checkpoint", folder, "--out", "export"), "no checkpoint", str(folder))
    for state in ("", "{", "[]", "{}", '{"config": {"model": {"hidden_size": 7}}}'):
        Path("foreign/state.json").write_text(state)
        refused(command("--checkpoint", "foreign", "--out", "export"), "state.json")
    assert sorted(os.listdir()) == ["foreign", "run"] and sorted(os.listdir("foreign")) == ["notes.txt", "state.json"]


def test_damaged_checkpoint(command, run):
    """Missing weights, and a missing or another vocabulary, are refused by their names."""
    step_dir = checkpoint.find(run)
    state = json.loads((step_dir / "state.json").read_text())
    gone = {"config": state["config"] | {"tokenizer": "gone.vocab"}}
    for changes, word in ((gone, "gone.vocab"), ({"tokenizer_sha256": "0"}, "another vocabulary")):
        (step_dir / "state.json").write_text(json.dumps(state | changes))
        refused(command("--checkpoint", "run", "--out", "export"), word)
    (step_dir / "state.json").write_text(json.dumps(state))
    (step_dir / "model.safetensors").unlink()
    refused(command("--checkpoint", "run", "--out", "export"), "model.safetensors")
    assert os.listdir() == ["run"]


def test_out_that_is_taken(command, run, exported, tmp_path):
    """A folder with something in it and a file are left as they are; an empty folder is filled."""
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine")
    Path("file").write_text("mine")
    before = contents(tmp_path)
    for out in ("full", "file", "file/inside", "run"):
        for arguments in (["--checkpoint", "run"], ["--from", exported / "hf"]):
            refused(command(*arguments, "--out", out), out)
            assert contents(tmp_path) == before
    Path("empty").mkdir()
    assert command("--checkpoint", "run", "--out", "empty", "--tokenizer", "portable")[0] == 0
    assert names(Path("empty")) == PORTABLE_FILES
    Path("none").mkdir()
    assert command("--from", exported / "hf", "--out", "none")[0] == 0
    assert checkpoint.load_model(checkpoint.find(Path("none")))
    assert sorted(os.listdir()) == ["empty", "file", "full", "none", "run"]


def test_out_that_is_here(command, run, tmp_path, monkeypatch):
    """The current folder, empty, as --out is filled or refused."""
    Path("here").mkdir()
    monkeypatch.chdir("here")
    result = command("--checkpoint", run, "--out", ".", "--tokenizer", "portable")
    if result[0]:
        refused(result)
    assert names(tmp_path / "here") == ([] if result[0] else PORTABLE_FILES)
    assert sorted(os.listdir(tmp_path)) == ["here", "run"]


def test_heads_that_do_not_divide(command, tmp_path):
    """transformers has no model whose heads do not divide its width: such a one is refused."""
    save(tmp_path / "run", llama(hidden_size=42, head_dim=8))
    refused(command("--checkpoint", "run", "--out", "hf"), "hidden_size", "42", "4")
    assert os.listdir() == ["run"]


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files")
@pytest.mark.parametrize("arguments", [[], ["--tokenizer", "portable"], ["--format", "int8"], ["--from"]],
                         ids=["exact", "portable", "int8", "import"])
def test_full_disk(rng, command, run, exported, tmp_path, arguments):
    """Where a file cannot be written there is one line, and nothing is left."""
    import resource
    if arguments == ["--from"]:
        arguments = ["--from", exported / "hf"]
    else:
        arguments = ["--checkpoint", "run", *arguments]
    contents_before, before = contents(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 1000, 20_000, rng.randint(60_000, 500_000)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            result = command(*arguments, "--out", "export")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        refused(result)
        assert contents(tmp_path) == contents_before


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("module, name, arguments", [
    (export, "write_tokenizer", []), (export, "check_hf", []), (export, "model_card", []),
    (export, "write_tensors", ["--format", "int8"]), (checkpoint, "save", ["--from"]), (shutil, "copyfile", ["--from"]),
])
def test_interrupted(command, run, exported, tmp_path, monkeypatch, module, name, arguments):
    """Ctrl-C at any point leaves nothing, and the next export is as if there had been none."""
    arguments = ["--from", exported / "hf"] if arguments == ["--from"] else ["--checkpoint", "run", *arguments]
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupt)
        code, _, err = command(*arguments, "--out", "export")
    assert code == 130 and err == "interrupted\n" and contents(tmp_path) == before


def test_beside_others(command, run, tmp_path):
    """An export touches nothing but its own folder, whatever the folders beside it are called."""
    Path("export.partial").mkdir()
    Path("export.partial/thesis.txt").write_text("precious")
    assert command("--checkpoint", "run", "--out", "export", "--tokenizer", "portable")[0] == 0
    assert names(Path("export")) == PORTABLE_FILES
    assert sorted(os.listdir()) == ["export", "export.partial", "run"]
    assert names(Path("export.partial")) == ["thesis.txt"]
