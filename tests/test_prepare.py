"""prepare.py: what is in the bins of the embedded data, and what happens when it is stopped or cannot go on."""
import json
import resource
import signal
import time
from functools import partial

import pytest

import prepare
import tokenizer
import train
from cli import BadInput
from sources import embedded
from tests.commands import refused, run, start

SOURCES = ("web", "code", "math")
SPLITS = ("train", "val")


@pytest.fixture
def command(in_tmp_path):
    """prepare.py in tmp_path."""
    return partial(in_tmp_path, prepare.main)


@pytest.fixture
def sums(tmp_path):
    """A recipe of arithmetic alone, which is there in a second; the documentation takes ten to collect."""
    file = tmp_path / "sums.py"
    file.write_text("from config import Config, Source\nconfig = Config(sources={'math': "
                    "Source('library:arithmetic', preserve_linebreaks=True)})\n")
    return file


def test_meta_counts_what_is_in_the_bins(quickstart_data, quickstart_bins, quickstart_texts):
    meta = json.loads((quickstart_data / "meta.json").read_text())
    for source in SOURCES:
        for split in SPLITS:
            counts = meta["sources"][source][split]
            assert counts["documents"] == len(quickstart_bins[source, split])
            assert counts["tokens"] == sum(map(len, quickstart_bins[source, split]))
            assert counts["bytes"] == sum(len(text.encode()) for text in quickstart_texts[source, split])
            assert counts["dropped_bytes"] == 0


def test_the_eos_ends_documents_and_stands_nowhere_else(quickstart_bins, quickstart_texts):
    eos = tokenizer.load("quickstart-2048").eos_id
    for key, documents in quickstart_bins.items():
        assert all((ids == eos).sum() == 1 and ids[-1] == eos and len(ids) > 1 for ids in documents), key
        assert not any("\r" in text for text in quickstart_texts[key])


def test_quiz_is_written_beside_the_bins(quickstart_data):
    lines = (quickstart_data / "math_quiz.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == embedded.arithmetic_quiz()


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
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    refused(run("prepare.py", sums, "--data_dir", "data", cwd=tmp_path, preexec_fn=limit,
                env={"NUMBA_DISABLE_JIT": "0"}))
    assert not (tmp_path / "data" / "meta.json").exists()


@pytest.mark.parametrize("held, missing", [(False, "held-out"), (True, "training")])
def test_a_source_that_fills_one_split_only(tmp_path, monkeypatch, held, missing):
    monkeypatch.setitem(embedded.SOURCES, "library:arithmetic", lambda: iter([(held, "one document, and no other")]))
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
