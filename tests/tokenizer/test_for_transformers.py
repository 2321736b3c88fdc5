"""TokenMonster in transformers has our ids and our text, and needs nothing of ours. These tests also run with
transformers 4.46 (make compat)."""
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

import pytest
import torch
from transformers import AutoTokenizer, TextIteratorStreamer

import export
import tokenizer
from tests.commands import ROOT
from tests.formats.exports import EOS, QUICK, REMOTE, any_text, export_both, llama, save, texts, well_formed

SHARED = ROOT.parent / "shared" / "tokenmonster"
ENGLISH = [f"english-{size}-strict-nocapcode-v1" for size in (4096, 8000)]
pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with a run and its exports: out/tiny, hf (exact) and plain/hf (portable)."""
    return export_both(tmp_path_factory.mktemp("exported"))


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


# -----------------------------------------------------------------------------
# ids and text

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


# -----------------------------------------------------------------------------
# files

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
    modules = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/*.py")}
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
# one id at a time

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
