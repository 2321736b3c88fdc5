"""prepare.py: what is in the bins of the embedded data, and what happens when it is stopped or cannot go on."""
import json
import random
import re
import resource
import signal
import time
import unicodedata
from functools import partial

import numpy as np
import pytest

import library
import prepare
import tokenizer
import train
from config import BadInput
from tests.commands import refused, run, start

SOURCES = ("web", "code", "math")
SPLITS = ("train", "val")


@pytest.fixture(scope="module")
def bins(quickstart_data):
    """(source, split) -> its documents as lists of ids, the eos taken off."""
    eos = json.loads((quickstart_data / "meta.json").read_text())["eos_id"]
    documents = {}
    for source in SOURCES:
        for split, suffix in (("train", ""), ("val", "_val")):
            ids = np.fromfile(quickstart_data / f"{source}{suffix}.bin", np.uint16)
            assert ids[-1] == eos
            documents[source, split] = np.split(ids, np.flatnonzero(ids == eos) + 1)[:-1]
    return documents


@pytest.fixture(scope="module")
def texts(bins):
    """(source, split) -> its documents as text."""
    vocabulary = tokenizer.load("quickstart-2048")
    return {key: [vocabulary.decode(ids) for ids in documents] for key, documents in bins.items()}


@pytest.fixture
def command(in_process, tmp_path, monkeypatch):
    """prepare.py in tmp_path."""
    monkeypatch.chdir(tmp_path)
    return partial(in_process, prepare.main)


@pytest.fixture
def sums(tmp_path):
    """A recipe of arithmetic alone, which is there in a second; the documentation takes ten to collect."""
    file = tmp_path / "sums.py"
    file.write_text("from config import Config, Source\nconfig = Config(sources={'math': "
                    "Source('library:arithmetic', preserve_linebreaks=True)})\n")
    return file


def test_meta_counts_what_is_in_the_bins(quickstart_data, bins, texts):
    meta = json.loads((quickstart_data / "meta.json").read_text())
    for source in SOURCES:
        for split in SPLITS:
            counts = meta["sources"][source][split]
            assert counts["documents"] == len(bins[source, split])
            assert counts["tokens"] == sum(map(len, bins[source, split]))
            assert counts["bytes"] == sum(len(text.encode()) for text in texts[source, split])
            assert counts["dropped_bytes"] == 0


def test_the_eos_ends_documents_and_stands_nowhere_else(bins, texts):
    eos = tokenizer.load("quickstart-2048").eos_id
    for key, documents in bins.items():
        assert all((ids == eos).sum() == 1 and ids[-1] == eos and len(ids) > 1 for ids in documents), key
        assert not any("\r" in text for text in texts[key])


def test_there_is_enough_of_every_source(texts):
    for source, megabytes in (("web", 5), ("code", 6), ("math", 3)):
        assert sum(map(len, texts[source, "train"])) > megabytes * 1e6
        assert sum(map(len, texts[source, "val"])) > 40_000


def test_held_out_text_is_in_no_training_bin(texts):
    """Not as a document, not within one, and not in the other source that the same file went to."""
    flat = {key: "\0".join(" ".join(text.split()) for text in documents) for key, documents in texts.items()}
    for held in ("web", "code", "math"):
        for trained in ("web", "code", "math"):
            found = [text for text in texts[held, "val"] if " ".join(text.split()) in flat[trained, "train"]]
            assert not found, (held, trained, found[:2])
    assert not [text for text in texts["web", "train"] if text in flat["code", "val"]]


def test_no_document_stands_twice(texts):
    documents = [text for source in SOURCES for split in SPLITS for text in texts[source, split]]
    assert len(documents) == len(set(documents))


def test_arithmetic_is_right_and_held_out_sums_are_unseen(texts):
    asked = {(int(a), int(b)) for question in library.arithmetic_quiz()
             for a, b in re.findall(r"(\d+) \+ (\d+) =", question["prompt"])}
    assert 10 <= len(asked) <= 30
    for split in SPLITS:
        for line in "\n".join(texts["math", split]).splitlines():
            a, b, c = map(int, re.findall(r"\d+", line))
            sign = re.search(r" ([-+*]) |(plus|get)|(minus|eat)|(times)", line)
            kind = sign[1] or ("+" if sign[2] else "-" if sign[3] else "*")
            assert c == {"+": a + b, "-": a - b, "*": a * b}[kind], line
            assert ((a, b) in asked) == (split == "val") or kind != "+", line
    for question in library.arithmetic_quiz():
        assert question["answer"] == str(eval(question["prompt"].rstrip("= ")))


def test_quiz_is_written_beside_the_bins(quickstart_data):
    lines = (quickstart_data / "math_quiz.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == library.arithmetic_quiz()


@pytest.mark.parametrize("text, prose, code", [
    ("a  b\tc", "a b c", "a  b\tc"),
    (" x \r\n  y\r z  ", "x y z", "x\n  y\n z"),
    ("ﬁne １２ Å", "fine 12 Å", "fine 12 Å"),
    ("\n\n  \n", "", ""),
    ("def f():\n\n    return 1   \n", "def f(): return 1", "def f():\n\n    return 1"),
])
def test_clean_text(text, prose, code):
    """By hand, from the Stentor3 card's function."""
    assert prepare.clean_text(text) == prose
    assert prepare.clean_text(text, preserve_linebreaks=True) == code


def test_clean_text_settles(rng):
    """Cleaning clean text changes nothing, whatever the text, and leaves neither \\r nor a space at an end."""
    for _ in range(300):
        text = "".join(chr(rng.choice([rng.randrange(0x250), rng.randrange(0xD800), 10, 13, 32])) for _ in range(40))
        for keep in (False, True):
            clean = prepare.clean_text(text, keep)
            assert clean == unicodedata.normalize("NFKC", clean) == prepare.clean_text(clean, keep)
            assert "\r" not in clean and clean == clean.strip()


def test_prose_leaves_doctests_and_rules_out():
    docstring = "Heading\n-------\n" + "Some words about it. " * 12 + "\n\n>>> f(1)\n2\n\nMore words."
    assert library.prose(docstring) == "Heading\n" + "Some words about it. " * 12 + "\nMore words."
    assert library.prose("Too short to learn from.") == ""


def test_documentation_is_read_without_importing(tmp_path):
    """Docstrings, and the strings that numpy and torch attach to compiled functions; broken files give nothing."""
    file = tmp_path / "module.py"
    file.write_text('"""Top."""\nraise SystemExit\nclass A:\n    """Class."""\n    def f(self):\n        """Inner."""\n'
                    'add_newdoc("numpy", "abs", """\n    Long text.\n    """)\nother("not documentation")\n')
    assert [text for text in library.docstrings(file) if text] == ["Top.", "Class.", "Inner.", "Long text."]
    file.write_text("this is {{ no }} python")
    assert library.docstrings(file) == []


def test_bins_do_not_depend_on_anything_but_the_recipe(tmp_path, sums, quickstart_data):
    """The arithmetic written again is the same, byte for byte, whatever the hash seed of the process."""
    code, out, err = run("prepare.py", sums, "--data_dir", "data", cwd=tmp_path)
    assert code == 0, (out, err)
    for name in ("math.bin", "math_val.bin"):
        assert (tmp_path / "data" / name).read_bytes() == (quickstart_data / name).read_bytes()


def test_a_second_run_leaves_complete_data_alone(quickstart_data, command):
    before = {path: path.stat().st_mtime_ns for path in quickstart_data.iterdir()}
    code, out, _ = command("--data_dir", quickstart_data)
    assert code == 0 and "is complete" in out
    assert before == {path: path.stat().st_mtime_ns for path in quickstart_data.iterdir()}
    refused(command("--data_dir", quickstart_data, "--sources.web.preserve_linebreaks", "True"), "another recipe")


def test_ctrl_c_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
    """Interrupted while it writes: one line, the usual exit code, no meta.json; and train.py says what to do."""
    process = start("prepare.py", "--data_dir", "data", "--sources.web.dataset=library:arithmetic", cwd=tmp_path,
                    start_new_session=True)  # without the documentation, which takes seconds to collect
    assert "preparing" in process.stdout.readline()
    while not (tmp_path / "data" / "progress.json").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.strip() == "interrupted"
    assert not (tmp_path / "data" / "meta.json").exists()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="not complete.*prepare.py"):
        train.main(["--data_dir", "data"])


def test_full_disk(tmp_path, sums):
    """A file that cannot grow beyond 100 kB: one line, exit code 2, nothing complete."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731
    refused(run("prepare.py", sums, "--data_dir", "data", cwd=tmp_path, preexec_fn=limit,
                env={"NUMBA_DISABLE_JIT": "0"}))
    assert not (tmp_path / "data" / "meta.json").exists()


@pytest.mark.parametrize("held, missing", [(False, "held-out"), (True, "training")])
def test_a_source_that_fills_one_split_only(tmp_path, monkeypatch, held, missing):
    monkeypatch.setitem(library.SOURCES, "library:arithmetic", lambda: iter([(held, "one document, and no other")]))
    file = tmp_path / "one.py"
    file.write_text("from config import Config, Source\n"
                    "config = Config(sources={'math': Source('library:arithmetic')})\n")
    with pytest.raises(BadInput, match=f"no {missing} documents"):
        prepare.main([str(file), "--data_dir", str(tmp_path / "data")])
    assert not (tmp_path / "data" / "meta.json").exists()


def test_damaged_meta(tmp_path, command):
    """A meta.json that cannot be read is not taken for complete data, and is not a traceback."""
    (tmp_path / "data").mkdir()
    for text in ("", "{}", "[]"):
        (tmp_path / "data" / "meta.json").write_text(text)
        refused(command("--data_dir", "data"), "data", "delete it")


def test_bad_input(tmp_path, command):
    refused(run("prepare.py", "--tokenizer", "nowhere.vocab", cwd=tmp_path), "nowhere.vocab")
    refused(command("--sources.web.dataset", "library:poems"), "library:poems", "library:docs")
