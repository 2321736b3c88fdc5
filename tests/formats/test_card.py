"""Every figure of a card is its run's, and what it says about loading is so."""
import json
import re
from pathlib import Path

import pytest
import torch

import checkpoint
from decoding.choice import Sampler
from decoding.generate import generate, prompt_ids
from formats.card import PROMPTS, READ_PORTABLY, ROWS
from sizing import count_parameters
from tests.formats.exports import QUICK, contents, llama, save

pytestmark = pytest.mark.usefixtures("offline")


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
    state["commits"] = {"web": "0123456789" * 4}
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
    assert settings["web"] == [f"some/web a.txt at commit {'0123456789' * 4}", "75%", "50%"]
    assert settings["code"] == ["some/code a.txt", "25%", "50%"] and training.count("revision=") == 1

    assert card.startswith("---\nlicense: mit\n") and "# my model\n" in card and "1.2345 bits per byte" in card
    assert section(card, "Licence").strip().startswith("mit.")
    outside = card.replace(section(card, "What it writes"), "")
    assert not re.search(r"\{\w*\}|\{\{|\}\}|None|\bnan\b", outside)
    for prompt in PROMPTS:
        sampler = Sampler(0.8, None, 0.9, 1.1, torch.Generator().manual_seed(0), 2048)
        made = generate(model, prompt_ids(QUICK, prompt), 80, sampler, QUICK.eos_id)
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
    assert "commit" not in section(card, "Training")
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
