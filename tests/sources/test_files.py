"""The files of a source: what is read and what is left out is said, and nothing is chosen in silence."""
import json
import os
from pathlib import Path

import pytest

import prepare
from cli import BadInput
from config import Source
from sources.files import find_files
from tests.sources.texts import make, preset, result


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    """The current directory is a fresh one."""
    monkeypatch.chdir(tmp_path)


def fill(*names):
    """Files of a few documents each, of the kind that their names say."""
    for name in names:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        words = [f"{name} {number}" for number in range(5)]
        path.write_text({".jsonl": "\n".join(json.dumps({"text": word}) for word in words),
                         ".csv": "\n".join(["text", *words])}.get(path.suffix, "\n\n".join(words)))


def found(source):
    """(names of the files that are read, of those that are not)."""
    listing = find_files(source)
    return [os.path.relpath(file.path) for file in listing.files], listing.left_out


def refusal(source):
    """The one line with which a source is refused."""
    with pytest.raises(BadInput) as refused:
        find_files(source)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_words_in_names_are_no_splits():
    names = ["my/alice.txt", "my/dev_notes.txt", "my/evaluation.txt", "my/testament.txt", "my/train_journey.txt"]
    fill(*names)
    assert found(Source("my")) == (names, [])


def test_a_folder_of_several_kinds(tmp_path, capsys):
    """All that we can read is read, and the rest is named."""
    fill("my/a.txt", "my/b.md", "my/c.jsonl", "my/deep/d.csv", "my/e.pdf", "my/README.md", "my/.hidden.txt")
    assert found(Source("my")) == (["my/a.txt", "my/b.md", "my/c.jsonl", "my/deep/d.csv"],
                                   [".hidden.txt", "README.md", "e.pdf"])
    files, counts = make(preset(tmp_path / "run.py", {"mine": Source("my", held_out=3)}), tmp_path / "data")
    assert counts["mine"]["read"] == 20 and counts["mine"]["exhausted"]
    said = capsys.readouterr().out
    assert "reads 4 files in my: a.txt, b.md, c.jsonl, deep/d.csv" in said
    assert "leaves out 3 others: .hidden.txt, README.md, e.pdf" in said


def test_real_splits():
    fill("my/train.txt", "my/test.txt", "my/validation-00000-of-00001.txt")
    assert found(Source("my")) == (["my/train.txt"], ["test.txt", "validation-00000-of-00001.txt"])
    assert found(Source("my", split="test"))[0] == ["my/test.txt"]
    assert found(Source("my", split="dev"))[0] == ["my/validation-00000-of-00001.txt"]
    fill("my/alice.txt")
    assert "alice.txt" in refusal(Source("my")) and "data_files" in refusal(Source("my"))
    fill("other/a.txt")
    assert "no split 'test'" in refusal(Source("other", split="test"))


def test_files_as_they_are_named(monkeypatch):
    """In the order given, each once; "~", brackets and folders are what they seem."""
    fill("b.txt", "a.txt", "texts [v2]/c.txt", "texts [v2]/d.jsonl", "x[1].txt")
    monkeypatch.setenv("HOME", os.getcwd())
    assert found(Source("text", data_files=("b.txt", "*.txt")))[0] == ["b.txt", "a.txt", "x[1].txt"]
    assert found(Source("text", data_files="~/a.txt"))[0] == ["a.txt"]
    assert found(Source("text", data_files="texts [v2]/*.txt"))[0] == ["texts [v2]/c.txt"]
    assert found(Source("text", data_files="texts [v2]")) == (["texts [v2]/c.txt"], ["texts [v2]/d.jsonl"])
    assert found(Source("text", data_files="x[1].txt"))[0] == ["x[1].txt"]
    assert found(Source("~/texts [v2]"))[0] == ["texts [v2]/c.txt", "texts [v2]/d.jsonl"]
    assert found(Source("texts [v2]", data_files="*.jsonl"))[0] == ["texts [v2]/d.jsonl"]
    assert found(Source("text", data_files="*")) == (["a.txt", "b.txt", "x[1].txt"], ["the folder texts [v2]"])
    assert len(found(Source("text", data_files="**/*.txt"))[0]) == 4


@pytest.mark.parametrize("source, words", [
    (Source("text", data_files="text.txt"), ["there is no text.txt", "do you mean texts.txt?"]),
    (Source("text", data_files="nowhere/*.txt"), ["no file matches nowhere/*.txt"]),
    (Source("json", data_files="*.json"), ["no file matches *.json"]),
    (Source("./min"), ["there is no min", "do you mean mine?"]),
    (Source("mine/deep"), ["there is no mine/deep"]),
    (Source("~/nowhere/of/mine"), ["there is no", "nowhere/of/mine"]),
    (Source("empty"), ["holds no", ".jsonl", "only cover.png"]),
    (Source("./texts.txt"), ["is a file", "data_files"]),
    (Source("mine", subset="en"), ["no subset 'en'"]),
    (Source("text", data_files="texts.txt", split="test"), ["no split 'test'"]),
    (Source("text", data_files="a\0b.txt"), ["no file matches"]),
])
def test_what_is_not_there_is_said_at_once(source, words):
    fill("texts.txt", "mine/a.txt", "empty/cover.png")
    assert all(word in refusal(source) for word in words), refusal(source)


def test_a_mistyped_name_costs_no_work(tmp_path, monkeypatch):
    """It is refused before a worker starts."""
    monkeypatch.setattr(prepare, "worker_pool", None)
    file = preset(tmp_path / "run.py", {"mine": Source("text", data_files="nowhere.txt")})
    with pytest.raises(BadInput, match="mine.*there is no nowhere.txt"):
        make(file, tmp_path / "data")


@pytest.mark.parametrize("dataset", ["text", "json", "csv", "parquet", "arrow", "webdataset"])
def test_a_kind_of_file_without_files(dataset):
    with pytest.raises(ValueError, match="needs data_files"):
        Source(dataset)


@pytest.mark.parametrize("change", ["content", "time"])
def test_a_file_that_changed_between_two_sessions(tmp_path, change):
    """Its positions mean nothing any more; what is prepared stays."""
    rows = [json.dumps({"text": f"some words of row {number}"}) for number in range(4000)]
    Path("a.jsonl").write_text("\n".join(rows))
    file = preset(tmp_path / "run.py", {"mine": Source("json", data_files="a.jsonl")})
    before = make(file, tmp_path / "data", "--max_steps", 20)
    if change == "content":
        Path("a.jsonl").write_text("\n".join(rows[1:]))
    else:
        os.utime("a.jsonl", ns=(1, 1))
    assert make(file, tmp_path / "data", "--max_steps", 20) == before  # it is complete, and needs no file
    with pytest.raises(BadInput, match="a.jsonl: changed since this preparation began"):
        make(file, tmp_path / "data", "--max_steps", 400)
    make(file, tmp_path / "data", "--max_steps", 20)
    assert result(tmp_path / "data") == before
