"""prepare.py on streams: however it is stopped or cut off, its bins end up as a plain reference computes them."""
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import string
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers

import checkpoint
import prepare
from cli import BadInput
from config import Source, load
from data import Batches, tokens_needed
from sources import streams
from tests.commands import refused, run, start
from tests.sources.texts import (
    HELD_OUT,
    Text,
    expected,
    make,
    needed,
    preset,
    result,
    two_sources,
    write_parquet,
    write_shards,
)


def test_bins_are_what_a_plain_reference_computes(rng, tmp_path, fine):
    """Ids, counts and held-out copies, for a run that ends within the text and one that wants all of it."""
    sources, rows = two_sources(tmp_path, rng)
    file = preset(tmp_path / "run.py", sources)
    for steps in (rng.randint(10, 300), 10**6):
        made = make(file, tmp_path / str(steps), "--max_steps", steps)
        assert made == expected(sources, rows, needed(file, steps))
    files, counts = made
    assert all(counts[name]["exhausted"] and counts[name]["read"] == len(rows[name]) for name in rows)


def test_what_a_vocabulary_cannot_write_is_counted(rng, tmp_path, fine):
    """With a tokenizer.json that knows ASCII alone."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    bpe.train_from_iterator([string.printable] * 2, tokenizers.trainers.BpeTrainer(special_tokens=["<unk>", "</s>"]))
    bpe.save(str(tmp_path / "ascii.json"))
    sources, rows = two_sources(tmp_path, rng, 20_000)
    file = preset(tmp_path / "run.py", sources, tokenizer=str(tmp_path / "ascii.json"))
    files, counts = make(file, tmp_path / "data")
    assert (files, counts) == expected(sources, rows, needed(file, 1000), str(tmp_path / "ascii.json"))
    assert all(counts[name]["train"]["dropped_bytes"] for name in rows)


@pytest.mark.parametrize("chunk", [1, 20_000, 10**9])
def test_chunks_do_not_show(rng, tmp_path, monkeypatch, chunk):
    """However much a worker gets at a time, and with the default pace of saving."""
    monkeypatch.setattr(streams, "CHUNK", chunk)
    sources, rows = two_sources(tmp_path, rng, 50_000, largest=40)
    file = preset(tmp_path / "run.py", sources, max_steps=rng.randint(100, 400))
    assert make(file, tmp_path / "data") == expected(sources, rows, tokens_needed(load([str(file)])))


def test_a_longer_run_goes_on_where_the_shorter_ended(rng, tmp_path, fine, capsys):
    """Step by step, prepared at once or as the rest of a shorter run: the same bins; a shorter run is complete."""
    sources, rows = two_sources(tmp_path, rng)
    file = preset(tmp_path / "run.py", sources)
    steps = sorted(rng.sample(range(1, 500), 4)) + [10**6]
    for number in steps:
        assert make(file, tmp_path / "data", "--max_steps", number) == expected(sources, rows, needed(file, number))
    assert make(file, tmp_path / "at_once", "--max_steps", 10**6) == result(tmp_path / "data")
    make(file, tmp_path / "half", "--max_steps", steps[0])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Death):
        die(patch, 9, tmp_path / "half")
        make(file, tmp_path / "half", "--max_steps", 10**6)
    assert not (tmp_path / "half" / "meta.json").exists()  # train.py must not take it for complete
    (tmp_path / "half" / "code.bin").open("ab").write(b"what a kill may leave after the last save")
    files, counts = make(file, tmp_path / "half", "--max_steps", steps[0])  # the shorter run again: enough is there
    assert all(len(files[f"{name}.bin"]) == 2 * counts[name]["train"]["tokens"] for name in rows)
    assert make(file, tmp_path / "half", "--max_steps", 10**6) == result(tmp_path / "data")
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()}
    for number in (steps[0], 10**7):  # less than there is; more, of sources that hold no more
        make(file, tmp_path / "data", "--max_steps", number)
        assert "is complete" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()}


# -----------------------------------------------------------------------------
# stopped at an operation or a line

class Death(BaseException):
    """Nothing in prepare.py catches this one."""


def die(monkeypatch, number, data_dir):
    """At the number-th operation on a file of data_dir, raise Death, and at all that follow: the process is no more.

    Returns a function that then takes from the bins what no fsync had brought to the disk, as when the power goes.
    """
    synced, left, process = {path: path.stat().st_size for path in data_dir.glob("*.bin")}, [number], os.getpid()

    def patched(real):
        def operation(where, *arguments, **options):
            path = Path(os.readlink(f"/proc/self/fd/{where}") if isinstance(where, int) else where)
            if data_dir in (path, path.parent) and os.getpid() == process:  # not a worker
                left[0] -= 1
                if left[0] < 0:
                    raise Death
                if real is fsync:
                    synced[path] = path.stat().st_size
            return real(where, *arguments, **options)
        return operation

    fsync = os.fsync
    for owner, name in ((os, "fsync"), (Path, "touch"), (Path, "open"), (Path, "replace")):
        monkeypatch.setattr(owner, name, patched(getattr(owner, name)))

    def lose():
        for path in data_dir.glob("*.bin"):
            os.truncate(path, synced.get(path, 0))
    return lose


def test_killed_at_any_file_operation(rng, tmp_path, fine):
    """Dead at the n-th operation, for one n after the other, each run going on with what the one before it left."""
    sources, rows = two_sources(tmp_path, rng, 25_000)
    file = preset(tmp_path / "run.py", sources, max_steps=150)
    whole, deaths, number = expected(sources, rows, tokens_needed(load([str(file)]))), 0, 0
    while deaths < 30:
        number += 1
        with pytest.MonkeyPatch.context() as patch:
            lose = die(patch, number, tmp_path / "data")
            try:
                prepare.main([str(file), "--data_dir", str(tmp_path / "data")])
            except Death:
                deaths += 1
            else:
                lose = None
        if lose:
            lose()
        else:
            assert result(tmp_path / "data") == whole, number
            shutil.rmtree(tmp_path / "data")
            number = rng.randint(0, 9)
    assert make(file, tmp_path / "data") == whole


def test_interrupted_at_any_line_of_write(rng, tmp_path, fine):
    """Ctrl-C at each line of the method that writes, and of the function that picks what to write, one after the other:
    nothing is lost or comes twice."""
    sources, rows = two_sources(tmp_path, rng, 60_000)
    file = preset(tmp_path / "run.py", sources, max_steps=500)
    write, take, seen = prepare.Preparation.write.__code__, prepare.take.__code__, set()

    def trace(frame, event, _):
        return line if frame.f_code in (write, take) else None

    def line(frame, event, _):
        writing = frame if frame.f_code is write else frame.f_back
        if event == "line" and frame.f_lineno not in seen and writing.f_locals["split"] == "train":
            seen.add(frame.f_lineno)
            raise KeyboardInterrupt
        return line

    for _ in range(60):
        sys.settrace(trace)
        try:
            prepare.main([str(file), "--data_dir", str(tmp_path / "data")])
        except KeyboardInterrupt:
            continue
        finally:
            sys.settrace(None)
        break
    assert len(seen) > 25
    assert make(file, tmp_path / "data") == expected(sources, rows, tokens_needed(load([str(file)])))


def test_a_worker_that_outlives_its_parent_does_not_hold_the_lock(tmp_path):
    """A fork shares the lock; it ends with the run that took it, and a killed run's is waited for."""
    fork = multiprocessing.get_context("fork")
    with checkpoint.alone(tmp_path, "run"):
        child = fork.Process(target=time.sleep, args=(100,))
        child.start()
    with checkpoint.alone(tmp_path, "run"):
        child.kill()
        child.join()

    def killed():
        with checkpoint.alone(tmp_path, "run"):
            fork.Process(target=time.sleep, args=(1,)).start()
            os.kill(os.getpid(), signal.SIGKILL)

    parent = fork.Process(target=killed)
    parent.start()
    parent.join()
    with checkpoint.alone(tmp_path, "run"):
        pass


# -----------------------------------------------------------------------------
# the real command, killed and interrupted

def session_members(session):
    """Processes of a session that are not just waiting to be buried."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # gone in the meantime
            continue
        if int(its_session) == session and state not in "ZX":
            members.append(stat.parent)
    return members


def all_gone(session):
    """Whether a session is empty, now or in a few seconds."""
    deadline = time.monotonic() + 10
    while session_members(session) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not session_members(session)


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """50 MB of text in shards, a run that needs all of it, and what that gives when nothing interrupts it."""
    if not Path("/proc/self/stat").exists():
        pytest.skip("looks for processes in /proc")
    seed = int(os.environ.get("TEST_SEED") or random.SystemRandom().randrange(2**32))
    print(f"TEST_SEED={seed}")
    rng, directory = random.Random(seed), tmp_path_factory.mktemp("big")
    text = Text(rng)
    sources = {}
    for name in ("web", "code"):
        rows = text.documents(24_000_000, (50, 500, 2000, 9000), [rng.randint(200_000, 600_000) for _ in range(3)])
        sources[name] = Source("parquet", data_files=write_shards(directory, name, rows, rng, 4, largest=900),
                               preserve_linebreaks=name == "code")
    file = preset(directory / "run.py", sources, max_steps=10**6)
    began = time.monotonic()
    code, out, err = run("prepare.py", file, "--data_dir", "whole", cwd=directory)
    assert code == 0, (out, err)
    return SimpleNamespace(directory=directory, file=file, whole=result(directory / "whole"), began=began,
                           seconds=time.monotonic() - began)


def test_killed_at_twenty_moments(rng, big, tmp_path):
    """SIGKILL to the one process that a user knows of: its workers follow it, and the bins come out the same."""
    moments = [rng.uniform(0, big.seconds) for _ in range(20)]
    resumed = 0
    for moment in moments:
        resumed += (tmp_path / "data" / "progress.json").exists()
        process = start("prepare.py", big.file, "--data_dir", "data", cwd=tmp_path, start_new_session=True)
        try:
            out, err = process.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            process.kill()
            assert all_gone(process.pid), moments
            process.communicate()
        else:
            assert process.returncode == 0, (out, err)
            assert result(tmp_path / "data") == big.whole, moments
            shutil.rmtree(tmp_path / "data")
    assert resumed, moments
    code, out, err = run("prepare.py", big.file, "--data_dir", "data", cwd=tmp_path)
    assert code == 0, (out, err)
    assert result(tmp_path / "data") == big.whole, moments


def started(big, cwd, size):
    """The command at work: web.bin holds at least `size` bytes."""
    process = start("prepare.py", big.file, "--data_dir", "data", cwd=cwd, start_new_session=True)
    while process.poll() is None and not ((path := cwd / "data" / "web.bin").exists() and path.stat().st_size >= size):
        time.sleep(0.01)
    return process


def test_ctrl_c_and_sigterm_and_a_second_command(rng, big, tmp_path):
    """Interrupted, it says what is safe; another command beside it is refused; and in the end the bins are the same."""
    process = started(big, tmp_path, rng.randint(1, 3_000_000))
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == "interrupted\n", (out, err)
    assert all_gone(process.pid)
    progress = json.loads((tmp_path / "data" / "progress.json").read_text())
    safe = {f"{name}{suffix}.bin": source[split]["tokens"] for name, source in progress["sources"].items()
            for split, suffix in (("train", ""), ("val", "_val"))}
    assert int(re.search(r"([\d,]+) tokens are safe in data", out)[1].replace(",", "")) == sum(safe.values()) > 0
    for name, tokens in safe.items():
        path = tmp_path / "data" / name
        assert (path.read_bytes() if path.exists() else b"")[:2 * tokens] == big.whole[0][name][:2 * tokens]

    process = started(big, tmp_path, 2 * safe["web.bin"] + 1)
    process.send_signal(signal.SIGSTOP)  # so that it is there for as long as the other one takes
    try:
        refused(run("prepare.py", big.file, "--data_dir", "data", cwd=tmp_path), "another prepare.py", "data")
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
    process.communicate(timeout=60)
    assert process.returncode != 0 and not (tmp_path / "data" / "meta.json").exists()
    assert all_gone(process.pid)

    code, out, err = run("prepare.py", big.file, "--data_dir", "data", cwd=tmp_path)
    assert code == 0 and " there" in out, (out, err)
    assert result(tmp_path / "data") == big.whole


def peak_memory(process):
    """The most MB that a process and its children have held at a time, until it ends."""
    peak = 0
    while process.poll() is None:
        held = 0
        for member in session_members(process.pid):
            try:
                held += int(re.search(r"VmRSS:\s+(\d+) kB", (member / "status").read_text())[1])
            except (OSError, TypeError):  # gone in the meantime
                pass
        peak = max(peak, held / 1000)
        time.sleep(0.02)
    return peak


def test_memory_does_not_grow_with_the_text(rng, tmp_path):
    """60 MB of text take no more memory than 6 MB."""
    if not Path("/proc/self/status").exists():
        pytest.skip("looks for processes in /proc")
    rows = Text(rng).documents(6_000_000, (50, 500, 2000, 9000))
    for number in range(10):
        write_parquet(tmp_path / f"{number}.parquet", rows, rng, largest=200, width=8)
    peaks = []
    for pattern in ("0.parquet", "*.parquet"):
        sources = {"web": Source("parquet", data_files=str(tmp_path / pattern))}
        file = preset(tmp_path / "run.py", sources, max_steps=10**6)
        process = start("prepare.py", file, "--data_dir", f"data{len(peaks)}", cwd=tmp_path, start_new_session=True)
        peaks.append(peak_memory(process))
        out, err = process.communicate()
        assert process.returncode == 0 and "holds no more" in out, (out, err)
    assert peaks[1] < peaks[0] + 60, peaks


# -----------------------------------------------------------------------------
# a run's wishes, and what stands in their way

def test_a_source_without_a_share_needs_no_training_text(rng, tmp_path, fine):
    """Not now, and not in the anneal: its documents are held out, and no more is read of it than that."""
    sources, rows = two_sources(tmp_path, rng)
    file = preset(tmp_path / "run.py", sources)
    none = ["--sources.web.ratio=1", "--sources.web.anneal_ratio=1", "--sources.code.ratio=0",
            "--sources.code.anneal_ratio=0"]
    files, counts = make(file, tmp_path / "data", *none)
    assert files["code.bin"] == b"" and files["code_val.bin"] and counts["code"]["read"] == HELD_OUT
    config = load([str(file), "--data_dir", str(tmp_path / "data"), *none])
    batches = Batches(config, "train")
    assert set(batches.order) == {0} and len(batches[0][0]) == 1


def test_a_run_keeps_its_order_when_text_is_added(rng, tmp_path, fine):
    """Batches limited to the tokens that were there at first are the same batches."""
    sources, rows = two_sources(tmp_path, rng)
    file = preset(tmp_path / "run.py", sources)
    make(file, tmp_path / "data", "--max_steps", 60)
    config = load([str(file), "--data_dir", str(tmp_path / "data"), "--max_steps", "60"])
    first = {name: counts["train"]["tokens"] for name, counts in result(tmp_path / "data")[1].items()}
    before = [batch[0].tolist() for batch in Batches(config, "train")]
    make(file, tmp_path / "data", "--max_steps", 200)
    assert [batch[0].tolist() for batch in Batches(config, "train", first=first)] == before
    assert [batch[0].tolist() for batch in Batches(config, "train")] != before


def test_a_full_disk_is_seen_before_the_work(rng, tmp_path, monkeypatch):
    write_parquet(tmp_path / "good.parquet", Text(rng).documents(20_000), rng)
    file = preset(tmp_path / "run.py", {"mine": Source("parquet", data_files=str(tmp_path / "good.parquet"))})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * 64 * 1000))
    with pytest.raises(BadInput, match="GB free"):  # a block and one token more, of two bytes, for each step
        prepare.main([str(file), "--data_dir", str(tmp_path / "data")])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * 64 * 1000 + 2))
    make(file, tmp_path / "data")


def test_a_corrected_command_needs_nothing_deleted(rng, tmp_path, fine):
    """After a typo in the file's name, the column or the split."""
    rows = {"mine": Text(rng).documents(20_000)}
    write_parquet(tmp_path / "good.parquet", rows["mine"], rng)
    sources = {"mine": Source("parquet", data_files=str(tmp_path / "good.parquet"))}
    file = preset(tmp_path / "run.py", sources)
    for wrong in (["data_files", str(tmp_path / "god.parquet")], ["column", "txt"], ["split", "trian"]):
        with pytest.raises(BadInput, match="mine"):
            make(file, tmp_path / "data", f"--sources.mine.{wrong[0]}", wrong[1])
    assert make(file, tmp_path / "data") == expected(sources, rows, needed(file, 1000))


# -----------------------------------------------------------------------------
# text that is odd, and what becomes of it

@pytest.fixture
def unigram(tmp_path):
    """A vocabulary for which "</s>" in a text is the end-of-document id, whatever it is told; and "<s>" another."""
    pieces = [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz<>/ 0123456789"]
    known = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", -1.0), *pieces]
    library = tokenizers.Tokenizer(tokenizers.models.Unigram(known, 0))
    library.add_special_tokens(["<s>", "</s>", "<unk>"])
    library.save(str(tmp_path / "unigram.json"))
    return str(tmp_path / "unigram.json")


def rows_of(name, documents):
    """A file of JSON lines with these texts."""
    Path(name).write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))


@pytest.mark.parametrize("choice", ["text", "drop", "refuse"])
def test_text_that_looks_like_a_special_token(rng, tmp_path, monkeypatch, capsys, unigram, choice):
    """One page cannot stop a run, unless it is told to; each is counted and told."""
    monkeypatch.chdir(tmp_path)
    documents = [f"document {number}" for number in range(400)]
    spelled = rng.sample(range(400), 9)
    for number in spelled:
        documents[number] += rng.choice([" </s>", " <unk>"])
    rows_of("a.jsonl", documents)
    source = Source("json", data_files="a.jsonl", special_tokens=choice)
    file = preset(tmp_path / "run.py", {"mine": source}, tokenizer=unigram, max_steps=10**6)
    if choice == "refuse":
        with pytest.raises(BadInput, match="document that begins 'document .*special token"):
            make(file, tmp_path / "data")
        return
    files, counts = make(file, tmp_path / "data")
    both = {kind: counts["mine"]["train"][kind] + counts["mine"]["val"][kind] for kind in counts["mine"]["train"]}
    assert both["special"] + both["marked"] == 9 and both["documents"] == 400 - both["special"]
    assert (both["marked"] == 0) == (choice == "drop")
    eos = json.loads((tmp_path / "data" / "meta.json").read_text())["eos_id"]
    assert sum(data[place] == eos for data in files.values() for place in range(0, len(data), 2)) == both["documents"]
    assert "special token" in capsys.readouterr().out


def test_a_document_that_a_vocabulary_cannot_encode(tmp_path, monkeypatch):
    """The tokenizers library raises a bare Exception for a WordLevel without an unknown token: one line."""
    monkeypatch.chdir(tmp_path)
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 1}, unk_token="<none>"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.save("words.json")
    rows_of("a.jsonl", ["a a"] * 30 + ["a b"] + ["a"] * 99)
    file = preset(tmp_path / "run.py", {"mine": Source("json", data_files="a.jsonl")}, tokenizer="words.json")
    with pytest.raises(BadInput, match="words.*cannot encode"):
        make(file, tmp_path / "data")


def test_bad_rows_are_counted_or_refused(rng, tmp_path, monkeypatch, capsys):
    """They are neither written nor lost, wherever a run stops and goes on; or the first ends it."""
    monkeypatch.chdir(tmp_path)
    documents = [f"document {number}" if rng.random() < 0.9 else number for number in range(3000)]
    documents[0] = 0
    rows_of("a.jsonl", documents)
    file = preset(tmp_path / "run.py", {"mine": Source("json", data_files="a.jsonl")})
    monkeypatch.setattr(streams, "CHUNK", 500)
    for steps in (50, 200, 10**6):
        counts = make(file, tmp_path / "data", "--max_steps", steps)[1]["mine"]
        seen = documents[:counts["read"]]
        assert counts["train"]["bad_rows"] + counts["val"]["bad_rows"] == len([row for row in seen if row != str(row)])
    said = capsys.readouterr().out
    assert said.count("leaves out a row") == 9 and "a.jsonl, line 1, has a number as its 'text'" in said
    assert "rows without text, or damaged" in said
    with pytest.raises(BadInput, match="mine.*a.jsonl, line 1, .*--sources.mine.bad_rows skip"):
        make(file, tmp_path / "strict", "--sources.mine.bad_rows", "refuse")


def test_too_few_documents_say_why(tmp_path, monkeypatch):
    """All of a file in one paragraph, or one row too few: what separates documents, and how many are held out."""
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("line\n" * 999)
    file = preset(tmp_path / "run.py", {"mine": Source("text", data_files="a.txt")})
    with pytest.raises(BadInput, match="training documents: it has 1.*held_out.*empty lines separate.*sample_by"):
        make(file, tmp_path / "data")


@pytest.mark.parametrize("form", ["parquet", "json", "line", "paragraph"])
def test_a_preparation_of_an_earlier_version_goes_on(rng, tmp_path, monkeypatch, form):
    """Its position is the state of a `datasets` stream, and it has fewer counts; of paragraphs it is refused."""
    monkeypatch.chdir(tmp_path)
    documents = [f"document {number}" for number in range(3000)]
    if form == "parquet":
        write_parquet("a.parquet", documents, rng)
    elif form == "json":
        rows_of("a.json", documents)
    else:
        Path(f"a.{form}").write_text("\n\n".join(documents))
    kind = form if form in ("parquet", "json") else "text"
    source = Source(kind, data_files=f"a.{form}", sample_by=form if kind == "text" else "line")
    file = preset(tmp_path / "run.py", {"mine": source})
    make(file, tmp_path / "data", "--max_steps", 100)
    meta = json.loads(Path("data/meta.json").read_text())
    old = meta["sources"]["mine"]
    old["position"] = [{"examples_iterable": {"shard_idx": 0, "shard_example_idx": 9}, "epoch": 0}, 3]
    del old["stamps"], old["commit"]
    for split in ("train", "val"):
        old[split] = {kind: old[split][kind] for kind in ("documents", "tokens", "bytes", "dropped_bytes")}
    Path("data/meta.json").write_text(json.dumps(meta))
    if form == "paragraph":
        before = Path("data/meta.json").read_bytes()
        with pytest.raises(BadInput, match="mine.*another --data_dir"):
            make(file, tmp_path / "data", "--max_steps", 300)
        assert Path("data/meta.json").read_bytes() == before
        return
    prepare.main([str(file), "--data_dir", "data", "--max_steps", "300"])
    assert Path("data/mine.bin").read_bytes() == make(file, tmp_path / "new", "--max_steps", 300)[0]["mine.bin"]
