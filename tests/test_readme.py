"""The README is the front door: what it says about the files must be so."""
import re
from pathlib import Path

import pytest

from tests.commands import run
from tests.test_family import FAMILY

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COUNTS = re.findall(r"\[\S+\]\((\S+\.py)\) \| (\d+) \|", README)


@pytest.mark.parametrize("file, lines", COUNTS)
def test_line_counts(file, lines):
    """The reading order's line counts are right to a tenth."""
    assert len((ROOT / file).read_text().splitlines()) == pytest.approx(int(lines), rel=0.1)


def test_every_room_is_in_the_reading_order():
    listed = {file for file, _ in COUNTS} | {"bench.py"}
    assert listed == {path.name for path in ROOT.glob("*.py")} | {"config/__init__.py", "config/quickstart.py"}
    for name in FAMILY:
        assert f"](config/{name}.py)" in README


def test_nothing_is_left_to_be_filled_in():
    """No word in capitals stands where a figure or a table is to come."""
    for name in ("README.md", "BENCHMARKS.md", "NOTES.md"):
        assert not re.findall(r"^[A-Z_]{4,}$|\| [A-Z_]{4,} \|", (ROOT / name).read_text(), re.MULTILINE)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_commands_are_the_makefiles():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"`?make ([\w-]+)", README)) <= set(targets)


def test_options_exist():
    """Every --option of the README is one that a script has, or torchrun."""
    text = "".join((ROOT / name).read_text() for name in ("config/__init__.py", "sample.py", "model.py", "evaluate.py",
                                                                  "export.py", "demo.py"))
    for option in set(re.findall(r"--([a-z0-9_]+(?:\.[a-z_]+)?)", README)) - {"help", "standalone", "nproc_per_node"}:
        assert re.search(rf"^    {option.split('.')[-1]}_?: ", text, re.MULTILINE), option


def test_your_own_text(rng, tmp_path):
    """The README's own config of four lines prepares plain text files, and trains on them."""
    [lines] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "mine.py").write_text(lines)
    (tmp_path / "my").mkdir()
    for name in "ab":
        paragraphs = [f"Paragraph {rng.random()} is\nnot like the others." for _ in range(300)]
        (tmp_path / "my" / f"{name}.txt").write_text("\n\n".join(paragraphs))
    code, out, err = run("prepare.py", "mine.py", cwd=tmp_path)
    assert code == 0 and " 500 documents" in out and " 100 held out" in out, (out, err)
    code, out, err = run("train.py", "mine.py", "--max_steps=2", "--tokens_per_step=512", cwd=tmp_path)
    assert code == 0 and "trained 2 steps" in out, (out, err)
