"""docs/walk.md is a page of real output: pasted block by block into one session, it prints what it shows."""
import code
import re

import pytest

from tests.commands import ROOT

WALK = (ROOT / "docs" / "walk.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```\n```\n(.*?)^```\n", WALK, re.DOTALL | re.MULTILINE)
LESSONS = re.split(r"^## ", WALK, flags=re.MULTILINE)[1:]


class Session(code.InteractiveConsole):
    """Python's own prompt, but an error is the test's."""

    def showtraceback(self):
        raise  # the one that is being handled where this is called

    def showsyntaxerror(self, filename=None, **_):
        raise

    def paste(self, lines):
        """Enter a block line by line, and Enter once more, as its reader does."""
        for line in [*lines.splitlines(), ""]:
            unfinished = self.push(line)
        assert not unfinished, lines


def test_the_page_prints_what_it_shows(quickstart_data, tmp_path, monkeypatch, capsys):
    (tmp_path / "data").symlink_to(quickstart_data.parent)
    monkeypatch.chdir(tmp_path)
    session = Session()
    for block, shown in BLOCKS:
        session.paste(block)
        printed, _ = capsys.readouterr()
        assert printed == shown, f"docs/walk.md shows other output of this block:\n{block}"


def test_every_block_is_followed_by_its_output():
    assert len(BLOCKS) == WALK.count("```python") == WALK.count("\n```\n```\n") >= len(LESSONS)


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson[:1])
def test_a_lesson_has_all_its_parts(lesson):
    """Something to read, a block to run, and one exercise with its answer folded away."""
    parts = [r"\n\nRead \[", "\n```python\n", r"\n\*\*Exercise\.\*\* ", r"\n<details><summary>Answer</summary>\n\n",
             "\n</details>\n"]
    assert [len(re.findall(part, lesson)) for part in parts[2:]] == [1, 1, 1]
    places = [re.search(part, lesson).start() for part in parts]
    assert places == sorted(places)


def test_six_lessons():
    assert [lesson[:3] for lesson in LESSONS] == [f"{number}. " for number in range(1, 7)]


def test_what_there_is_to_read_is_there():
    """A file after a link, and in it whatever is named up to the next link."""
    for paragraph in re.findall(r"^Read \[.*?\n\n", WALK, re.DOTALL | re.MULTILINE):
        for label, file, names in re.findall(r"\[(.*?)\]\(\.\./(.*?)\)([^\[]*)", paragraph):
            source = (ROOT / file).read_text(encoding="utf-8")
            assert label == file
            for name in re.findall(r"`([\w.]+)`", names):
                assert re.search(rf"\b{name.split('.')[-1]}\(|class {name}\b", source), (file, name)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", WALK):
        assert (ROOT / "docs" / target).exists(), target
