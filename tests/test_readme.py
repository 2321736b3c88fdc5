"""The README is the front door: what it says about the files must be so."""
import re
from pathlib import Path

import pytest

from tests.commands import run
from tests.test_family import FAMILY

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "BENCHMARKS.md",
         *sorted((ROOT / "docs").glob("*.md"))]
WINGS = ("tokenizer", "sources", "decoding", "formats", "web", "bench")
COUNTS = re.findall(r"\[\S+\]\((\S+\.py)\) \| (\d+) \|", README)


@pytest.mark.parametrize("file, lines", COUNTS)
def test_line_counts(file, lines):
    """The reading order's line counts are right to a tenth."""
    assert len((ROOT / file).read_text().splitlines()) == pytest.approx(int(lines), rel=0.1)


def test_every_room_is_in_the_reading_order():
    """A row for each file at the root, a line for each wing, a link for each member of the family."""
    listed = {file for file, _ in COUNTS}
    assert listed == {path.name for path in ROOT.glob("*.py")} | {"config/__init__.py", "config/quickstart.py"}
    for wing in WINGS:
        assert f"]({wing})" in README
    for name in FAMILY:
        assert f"](config/{name}.py)" in README


def test_a_front_door_is_short():
    assert len(README.splitlines()) <= 170


@pytest.mark.parametrize("page", [*PAGES, ROOT / "NOTES.md"], ids=lambda page: page.name)
def test_nothing_is_left_to_be_filled_in(page):
    """No word in capitals stands where a figure or a table is to come."""
    assert not re.findall(r"^[A-Z_]{4,}$|\| [A-Z_]{4,} \|", page.read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """To a file that is there, and to a heading that it has."""
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text()):
        there = page.parent / target if target else page
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings], anchor


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_the_makefiles(page):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:^ {4}|`)make ([\w-]+)", page.read_text(), re.MULTILINE)) <= set(targets)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_exist(page):
    """Every script that a page tells to run is there, and every module."""
    for script in re.findall(r"python3? (?:-m )?([\w./]+\.py)", page.read_text()):
        if page.name != "CHANGELOG.md" and not script.startswith("config/mine"):
            assert (ROOT / script).exists(), script
    for module in re.findall(r"python -m (?!pip)(\w+(?:\.\w+)*)", page.read_text()):
        assert (ROOT / module.replace(".", "/")).is_dir() or (ROOT / f"{module.replace('.', '/')}.py").exists(), module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_exist(page):
    """Every --option of a page is one that a script has, or torchrun."""
    files = [ROOT / "config/__init__.py", ROOT / "model.py", *ROOT.glob("*.py"), *(ROOT / "bench").glob("*.py")]
    text = "".join(path.read_text() for path in files)
    theirs = {"help", "field", "standalone", "nproc_per_node", "model", "prompt", "temp", "top-p"}
    for option in set(re.findall(r"(?<![\w-])--([a-z0-9_]+(?:\.[a-z_0-9]+)?)", page.read_text())) - theirs:
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
