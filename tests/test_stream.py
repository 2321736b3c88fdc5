"""prepare.py on streams: however it is stopped or cut off, its bins end up as a plain reference computes them."""
import gzip
import http.server
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import string
import subprocess
import sys
import threading
import time
import unicodedata
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
import tokenizers

import prepare
import tokenizer
from config import BadInput, Source
from data import Batches, tokens_needed
from tests.commands import ROOT, refused, run, start

HELD_OUT = 40  # documents of each source, in all tests here


# -----------------------------------------------------------------------------
# inputs: documents, the files that hold them, the run that wants them

class Text:
    """Documents drawn afresh: words of ASCII and others, every kind of white space, code-like lines."""

    def __init__(self, rng):
        letters = "etaoinshrdlu" * 9 + string.ascii_letters + string.digits + string.punctuation + "éﬁ½漢字😀\u0301\u212b"
        spaces = [" "] * 40 + list("\n\r\t\x0b\x85\xa0\u2028\u3000") + ["\n    ", "\n\n", "\r\n", "  ", " \n"]
        word = lambda: "".join(rng.choices(letters, k=rng.randint(1, 9)))  # noqa: E731
        self.rng, self.pieces = rng, [word() + rng.choice(spaces) for _ in range(9000)]

    def document(self, size):
        """About this many characters."""
        return "".join(self.rng.choices(self.pieces, k=max(1, size // 6)))

    def documents(self, size, lengths=(5, 20, 80, 1000), long=()):
        """Rows of about `size` characters in all: some empty, some copies of the first, some `long` besides."""
        rows, left = [self.document(300) for _ in range(HELD_OUT // 2)], size
        while left > 0:
            kind = self.rng.random()
            rows.append(self.rng.choice(["", None, " \r\n\t", "\u3000\n"]) if kind < 0.05 else
                        f" {self.rng.choice(rows[:HELD_OUT])}\r\n" if kind < 0.1 else
                        self.document(self.rng.choice(lengths)))
            left -= len(rows[-1] or "")
        for length in long:
            rows.insert(self.rng.randrange(len(rows)), self.document(length))
        return rows


def write_parquet(path, rows, rng, column="text", smallest=1, largest=300, width=64):
    """A Parquet file whose row groups are of all sizes, and which has columns besides the text."""
    schema = pyarrow.schema({"id": pyarrow.int64(), "embedding": pyarrow.binary(), column: pyarrow.string()})
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        done = 0
        while done < len(rows):
            some = rows[done:done + rng.randint(smallest, largest)]
            numbers = list(range(done, done + len(some)))
            embeddings = [rng.randbytes(width) for _ in some]
            writer.write_table(pyarrow.table([numbers, embeddings, some], schema=schema))
            done += len(some)


def write_shards(directory, name, rows, rng, count, **options):
    """The rows, in order, in `count` Parquet files of unlike lengths; returns the pattern that names them."""
    cuts = [0, *sorted(rng.sample(range(1, len(rows)), count - 1)), len(rows)]
    for number, (first, last) in enumerate(zip(cuts, cuts[1:])):
        write_parquet(directory / f"{name}-{number}.parquet", rows[first:last], rng, **options)
    return str(directory / f"{name}-*.parquet")


def preset(path, sources, **settings):
    """A config file of these sources, all with the same share of a run whose steps are one block of 64 tokens."""
    for source in sources.values():
        source.ratio = source.anneal_ratio = 1 / len(sources)
        source.held_out = HELD_OUT if source.held_out == 100 else source.held_out
    settings = {"data_dir": "data", "block_size": 64, "tokens_per_step": 64, "max_steps": 1000} | settings
    path.write_text(f"from config import Config, Source\nconfig = Config(sources={sources!r}, **{settings!r})\n")
    return path


def two_sources(directory, rng, size=100_000, **options):
    """Prose and code in a few shards each -> (sources, name -> rows)."""
    text = Text(rng)
    rows = {name: text.documents(size) for name in ("web", "code")}
    files = {name: write_shards(directory, name, rows[name], rng, 3, **options) for name in rows}
    return {"web": Source("parquet", data_files=files["web"]),
            "code": Source("parquet", data_files=files["code"], preserve_linebreaks=True)}, rows


# -----------------------------------------------------------------------------
# what comes out, and what should

def result(data_dir):
    """Everything that a finished directory must hold: the bins' bytes, the counts of meta.json, no other file."""
    files = {path.name: path.read_bytes() for path in data_dir.iterdir()}
    meta = json.loads(files.pop("meta.json"))
    counts = {name: {key: value for key, value in source.items() if key not in ("position", "files")}
              for name, source in meta["sources"].items()}
    return files, counts


def card_clean(text, preserve_linebreaks):
    """The Stentor3 card's function as it is printed there (its doubled backslashes undone)."""
    text = unicodedata.normalize("NFKC", text)
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if preserve_linebreaks:
        lines = [line.rstrip() for line in text.splitlines()]
        text = "\n".join(lines).strip()
    else:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        text = " ".join(lines)
        text = " ".join(text.split())
    return text


def expected(sources, rows, goals, name_or_path="quickstart-2048"):
    """What `result` must be: computed one document after another, without datasets, workers or positions."""
    vocabulary = tokenizer.load(name_or_path)
    files, counts, unwanted = {}, {}, set()

    def take(name, split, some, goal):
        data, documents, size, dropped, read = b"", 0, 0, 0, 0
        for row in some:
            if len(data) // 2 >= goal:
                break
            read += 1
            text = card_clean(row or "", sources[name].preserve_linebreaks)
            ids = vocabulary.encode(text)
            if len(ids) == 0 or split == "train" and ids.tobytes() in unwanted:
                continue
            if split == "val":
                unwanted.add(ids.tobytes())
            data += ids.astype("<u2").tobytes() + vocabulary.eos_id.to_bytes(2, "little")
            documents += 1
            size += len(vocabulary.decode_bytes(ids))
            dropped += vocabulary.count_dropped(text)
        files[f"{name}.bin" if split == "train" else f"{name}_val.bin"] = data
        counts[name][split] = {"documents": documents, "tokens": len(data) // 2, "bytes": size,
                               "dropped_bytes": dropped}
        counts[name]["read"] += read

    for name in sources:
        counts[name] = {"read": 0}
        take(name, "val", rows[name][:sources[name].held_out], math.inf)
    for name in sources:
        take(name, "train", rows[name][sources[name].held_out:], goals[name])
        counts[name]["exhausted"] = counts[name]["train"]["tokens"] < goals[name]
    return files, counts


def make(file, data_dir, *options):
    """prepare.py in this process -> what it made."""
    prepare.main([str(file), "--data_dir", str(data_dir), *map(str, options)])
    return result(data_dir)


@pytest.fixture
def fine(monkeypatch):
    """Chunks of a few documents, and a save after each: many positions in little text."""
    monkeypatch.setattr(prepare, "CHUNK", 3000)
    monkeypatch.setattr(prepare, "SAVE_SECONDS", -1)


def needed(file, steps):
    return tokens_needed(prepare.load([str(file), "--max_steps", str(steps)]))


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
    monkeypatch.setattr(prepare, "CHUNK", chunk)
    sources, rows = two_sources(tmp_path, rng, 50_000, largest=40)
    file = preset(tmp_path / "run.py", sources, max_steps=rng.randint(100, 400))
    assert make(file, tmp_path / "data") == expected(sources, rows, tokens_needed(prepare.load([str(file)])))


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
    whole, deaths, number = expected(sources, rows, tokens_needed(prepare.load([str(file)]))), 0, 0
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
    """Ctrl-C at each line of the method that writes, one after the other: nothing is lost or comes twice."""
    sources, rows = two_sources(tmp_path, rng, 60_000)
    file = preset(tmp_path / "run.py", sources, max_steps=500)
    code, seen = prepare.Preparation.write.__code__, set()

    def trace(frame, event, _):
        return line if frame.f_code is code else None

    def line(frame, event, _):
        if event == "line" and frame.f_lineno not in seen and frame.f_locals["split"] == "train":
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
    assert make(file, tmp_path / "data") == expected(sources, rows, tokens_needed(prepare.load([str(file)])))


def test_a_worker_that_outlives_its_parent_does_not_hold_the_lock(tmp_path):
    """A fork shares the lock; it ends with the run that took it, and a killed run's is waited for."""
    fork = multiprocessing.get_context("fork")
    with prepare.alone(tmp_path):
        child = fork.Process(target=time.sleep, args=(100,))
        child.start()
    with prepare.alone(tmp_path):
        child.kill()
        child.join()

    def killed():
        with prepare.alone(tmp_path):
            fork.Process(target=time.sleep, args=(1,)).start()
            os.kill(os.getpid(), signal.SIGKILL)

    parent = fork.Process(target=killed)
    parent.start()
    parent.join()
    with prepare.alone(tmp_path):
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
# formats

def no_blank_lines(row):
    """A document as plain text can hold it between blank lines."""
    return "\n".join(line for line in (row or "x").splitlines() if line.strip()) or "x"


FORMS = ["parquet", "column", "json", "json.gz", "line", "paragraph", "document", "glob", "folder"]


@pytest.mark.parametrize("form", FORMS)
def test_formats(rng, tmp_path, fine, form):
    """The same documents from whatever holds them."""
    rows = Text(rng).documents(20_000)[:300]
    if form == "parquet":
        half = len(rows) // 2
        write_parquet(tmp_path / "b.parquet", rows[:half], rng)
        write_parquet(tmp_path / "a.parquet", rows[half:], rng)
        source = Source("parquet", data_files=(str(tmp_path / "b.parquet"), str(tmp_path / "a.parquet")))  # as given
    elif form == "column":
        write_parquet(tmp_path / "all.parquet", rows, rng, column="content")
        source = Source("parquet", data_files=str(tmp_path / "all.parquet"), column="content")
    elif form.startswith("json"):
        lines = "".join(json.dumps({"id": number, "text": row}) + "\n" for number, row in enumerate(rows)).encode()
        path = tmp_path / f"all.{form.replace('json', 'jsonl')}"
        path.write_bytes(gzip.compress(lines) if form == "json.gz" else lines)
        source = Source("json", data_files=(str(path),))
    elif form == "line":
        rows = [" ".join(no_blank_lines(row).split()) for row in rows]
        (tmp_path / "all.txt").write_text("\n".join(rows) + "\n")
        source = Source("text", data_files=str(tmp_path / "all.txt"), sample_by="line")
    elif form == "paragraph":
        rows = [no_blank_lines(row) for row in rows]
        (tmp_path / "all.txt").write_text("\n\n".join(rows) + "\n\n")
        source = Source("text", data_files=str(tmp_path / "all.txt"), preserve_linebreaks=True)
    elif form == "document":
        rows = rows[:HELD_OUT + 20]
        for number, row in enumerate(rows):
            (tmp_path / f"{number:03}.txt").write_text(row or "", newline="")
        source = Source("text", data_files=str(tmp_path / "*.txt"), sample_by="document", preserve_linebreaks=True)
    elif form == "glob":
        for number in range(0, len(rows), 50):
            lines = "".join(json.dumps({"text": row}) + "\n" for row in rows[number:number + 50])
            (tmp_path / f"part-{number:04}.jsonl").write_text(lines)
        source = Source("json", data_files=str(tmp_path / "part-*.jsonl"))
    elif form == "folder":
        folder = tmp_path / "texts"
        (folder / "prose").mkdir(parents=True)
        write_parquet(folder / "prose" / "x.parquet", rows, rng)
        write_parquet(folder / "other.parquet", rows[::-1], rng)
        (folder / "README.md").write_text(
            "---\nconfigs:\n- config_name: other\n  data_files: other.parquet\n  default: true\n- config_name: prose\n"
            "  data_files:\n  - split: test\n    path: prose/*.parquet\n---\n# Texts\n")
        source = Source(str(folder), subset="prose", split="test")
    sources = {"it": source}
    file = preset(tmp_path / "run.py", sources, max_steps=10**6)
    assert make(file, tmp_path / "data") == expected(sources, {"it": rows}, {"it": math.inf})


# -----------------------------------------------------------------------------
# wrong input

def test_wrong_input_is_one_line(rng, tmp_path):
    """Each as the user gives it: one line that says what is wrong, code 2, no traceback."""
    rows = Text(rng).documents(20_000)
    write_parquet(tmp_path / "good.parquet", rows, rng)
    (tmp_path / "half.parquet").write_bytes((tmp_path / "good.parquet").read_bytes()[:9000])
    (tmp_path / "prose.txt").write_text("This is prose.\nThis too.\n" * 100)
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(tmp_path / "good.parquet", folder)
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: only\n  data_files: good.parquet\n---\n")
    good = str(tmp_path / "good.parquet")
    cases = [
        (Source("parquet", data_files="nothing.parquet"), "nothing.parquet"),
        (Source("parquet", data_files=good, column="body"), "body"),
        (Source("parquet", data_files=good, column="id"), "'id'", "text"),
        (Source("parquet", data_files="half.parquet"), "Parquet", "corrupt"),
        (Source("parquet", data_files=good, split="validation"), "validation"),
        (Source("parquet", data_files=good, held_out=10**6), "training", "held_out"),
        (Source(str(folder), subset="another"), "another", "only"),
        (Source("json", data_files="prose.txt"), "JSON"),
    ]

    def attempt(number):
        source = cases[number][0]
        return run("prepare.py", preset(tmp_path / f"run{number}.py", {"mine": source}), "--data_dir", f"data{number}",
                   cwd=tmp_path)

    with ThreadPoolExecutor(2) as pool:
        for (source, *words), ended in zip(cases, pool.map(attempt, range(len(cases)))):
            refused(ended, "mine", *words)


def test_other_files_than_before_are_refused(rng, tmp_path, fine):
    """A file that comes in between two runs would shift every position: said in one line, and the bins stay."""
    sources, rows = two_sources(tmp_path, rng)
    file = preset(tmp_path / "run.py", sources)
    whole = make(file, tmp_path / "data", "--max_steps", 50)
    write_parquet(tmp_path / "web-.parquet", ["one more"] * 9, rng)
    with pytest.raises(BadInput, match="web.*files are others"):
        make(file, tmp_path / "data", "--max_steps", 500)
    (tmp_path / "web-.parquet").unlink()
    assert make(file, tmp_path / "data", "--max_steps", 50) == whole


def test_a_source_without_a_share_needs_no_training_text(rng, tmp_path, fine):
    """Not now, and not in the anneal: its documents are held out, and no more is read of it than that."""
    sources, rows = two_sources(tmp_path, rng)
    file = preset(tmp_path / "run.py", sources)
    none = ["--sources.web.ratio=1", "--sources.web.anneal_ratio=1", "--sources.code.ratio=0",
            "--sources.code.anneal_ratio=0"]
    files, counts = make(file, tmp_path / "data", *none)
    assert files["code.bin"] == b"" and files["code_val.bin"] and counts["code"]["read"] == HELD_OUT
    config = prepare.load([str(file), "--data_dir", str(tmp_path / "data"), *none])
    batches = Batches(config, "train")
    assert set(batches.order) == {0} and len(batches[0][0]) == 1


def test_a_run_keeps_its_order_when_text_is_added(rng, tmp_path, fine):
    """Batches limited to the tokens that were there at first are the same batches."""
    sources, rows = two_sources(tmp_path, rng)
    file = preset(tmp_path / "run.py", sources)
    make(file, tmp_path / "data", "--max_steps", 60)
    config = prepare.load([str(file), "--data_dir", str(tmp_path / "data"), "--max_steps", "60"])
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
# the network

COMMIT = "0123456789" * 4
IN_A_HURRY = f"import sys, time\nsys.path.insert(0, {str(ROOT)!r})\n" \
             "sleep = time.sleep\ntime.sleep = lambda seconds: sleep(min(seconds, 0.002))\n" \
             "import prepare\nprepare.CHUNK, prepare.SAVE_SECONDS = 30_000, -1\n" \
             "from config import script\nscript(prepare.main)\n"


class Hub(http.server.ThreadingHTTPServer):
    """The Hugging Face hub, as far as a dataset "someone/texts" of a few files goes.

    `trouble` is asked before each answer that holds a part of a file: None, a status, or "drop".
    """
    daemon_threads = True

    def __init__(self, directory, port=0):
        super().__init__(("127.0.0.1", port), Answer)
        self.files = {path.name: path.read_bytes() for path in sorted(directory.glob("*.parquet"))}
        self.trouble, self.served = lambda: None, 0
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, request, client_address):
        """A client that hangs up is no news."""

    def close(self):
        self.shutdown()
        self.server_close()


class Answer(http.server.BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        """Be quiet."""

    def send(self, status, data=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", len(data))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_file(self, data):
        trouble = self.server.trouble() if self.command == "GET" else None
        if isinstance(trouble, int):
            return self.send(trouble)
        headers = {"ETag": f'"{COMMIT}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        status, asked = 200, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(data)}"
            status, data = 206, data[first:last + 1]
        if trouble == "drop":  # half of what was promised, and then the line is dead
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", len(data))
            self.end_headers()
            return self.wfile.write(data[:len(data) // 2])
        self.server.served += len(data)
        self.send(status, data, **headers)

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        path, files = urllib.parse.unquote(self.path.partition("?")[0]), self.server.files
        entries = {name: {"type": "file", "path": name, "size": len(files[name]), "oid": COMMIT} for name in files}
        name, commit = path.rpartition("/")[2], {"sha": COMMIT, "id": "someone/texts", "_id": "1"}
        if name in files and path.startswith("/datasets/someone/texts/resolve/"):
            self.send_file(files[name])
        elif path in ("/api/datasets/someone/texts", f"/api/datasets/someone/texts/revision/{COMMIT}"):
            self.send(200, json.dumps({**commit, "siblings": [{"rfilename": name} for name in files]}).encode())
        elif path == f"/api/datasets/someone/texts/tree/{COMMIT}":
            self.send(200, json.dumps(list(entries.values())).encode())
        elif path == f"/api/datasets/someone/texts/paths-info/{COMMIT}":
            wanted = urllib.parse.parse_qs(body).get("paths") or json.loads(body)["paths"]
            self.send(200, json.dumps([entries[name] for name in wanted if name in entries]).encode())
        else:
            self.send(404, X_Error_Code="EntryNotFound" if "/someone/texts" in path else "RepoNotFound")

    do_HEAD = do_POST = do_GET


@pytest.fixture
def remote(rng, tmp_path):
    """A hub with a dataset of some shards, most of whose bytes are another column's; and what its bins must be."""
    directory = tmp_path / "served"
    directory.mkdir()
    rows = Text(rng).documents(1_500_000, (50, 500, 2000, 9000))
    pattern = write_shards(directory, "train", rows, rng, 6, width=12_000, largest=100)
    local = {"far": Source("parquet", data_files=pattern, held_out=HELD_OUT)}
    (tmp_path / "hurry.py").write_text(IN_A_HURRY)
    hub = Hub(directory)
    yield SimpleNamespace(hub=hub, directory=directory, path=tmp_path, port=hub.server_port,
                          whole=expected(local, {"far": rows}, {"far": math.inf}))
    hub.close()


def far(remote, dataset="someone/texts"):
    """The command for the remote dataset, its waits cut short -> (exit code, stdout, stderr)."""
    file = preset(remote.path / "run.py", {"far": Source(dataset)}, max_steps=10**6)
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{remote.port}", "HF_HOME": str(remote.path / "hf")}
    return run(remote.path / "hurry.py", file, "--data_dir", "data", cwd=remote.path, env=env)


def waits(out):
    """The seconds that it said it would wait."""
    return [int(seconds) for seconds in re.findall(r"trying again in (\d+) s", out)]


def test_a_server_in_trouble(rng, remote):
    """Errors and cut connections for a while, again and again: waited out, and nothing of it in the bins."""
    troubles = [503] * 22  # huggingface_hub tries 6 times, we 5 times that
    for _ in range(2):
        troubles += [None] * rng.randint(1, 6) + [rng.choice([503, 429, 500, "drop"])] * rng.randint(1, 3)
    remaining = iter(troubles)
    made = remote.path / "data" / "far.bin"  # something of which is there when the trouble begins
    remote.hub.trouble = lambda: next(remaining, None) if made.exists() and made.stat().st_size else None
    code, out, err = far(remote)
    assert code == 0, (out, err)
    assert result(remote.path / "data") == remote.whole
    assert waits(out)


def test_a_server_that_goes_away_and_comes_back(rng, remote):
    """All the waits, then one line; what was read is kept, and the same command ends with the same bins."""
    good, trouble = itertools.count(-rng.randint(0, 6)), rng.choice([503, "drop"])
    online = remote.path / "data" / "progress.json"
    remote.hub.trouble = lambda: trouble if online.exists() and next(good) >= 0 else None
    code, out, err = far(remote)
    assert waits(out)[-4:] == [2, 10, 30, 120], (out, err)
    refused((code, out, err), "far", "cannot be reached")
    safe = json.loads((remote.path / "data" / "progress.json").read_text())["sources"]["far"]
    assert safe["val"]["tokens"] and f"{safe['val']['tokens'] + safe['train']['tokens']:,} tokens are safe" in out
    remote.hub.trouble = lambda: None
    code, out, err = far(remote)
    assert code == 0 and not waits(out), (out, err)
    assert result(remote.path / "data") == remote.whole


def test_only_the_text_is_downloaded(rng, remote):
    """A Parquet file's other columns stay where they are."""
    path = remote.path / "wide.parquet"
    text = Text(rng)
    rows = [text.document(300) for _ in range(400)]
    write_parquet(path, rows, rng, smallest=100, width=200_000)  # 5 MB are read ahead for each row group, of 20 MB
    remote.hub.files = {"wide.parquet": path.read_bytes()}
    code, out, err = far(remote)
    assert code == 0, (out, err)
    assert remote.hub.served < len(remote.hub.files["wide.parquet"]) / 2


def test_what_a_server_does_not_have(remote):
    """One line, at once; and one that names the quickstart where there is no server at all."""
    ended = far(remote, "someone/nothing")
    refused(ended, "far", "someone/nothing")
    assert not waits(ended[1])
    remote.hub.close()
    ended = far(remote)
    refused(ended, "far", "network", "python prepare.py", "quickstart")
    assert not waits(ended[1])


def test_which_errors_are_the_networks():
    """By what they are and by the answer they carry, in the hub's library and in aiohttp."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    base = next(cls for cls in HfHubHTTPError.__mro__ if not cls.__module__.startswith("huggingface_hub"))
    http_library = sys.modules[base.__module__.partition(".")[0]]  # requests, httpx or what comes after them
    Refusal = type("ClientResponseError", (Exception,), {"__module__": "aiohttp.client_exceptions"})

    def answered(status):
        """An error of the hub's library and one as aiohttp's, for a server's answer."""
        if hasattr(http_library, "Client"):
            response = http_library.Response(status, request=http_library.Request("GET", "http://localhost"))
        else:
            response = http_library.Response()
            response.status_code = status
        error = Refusal("no")
        error.status = status
        return HfHubHTTPError("no", response=response), error

    for status in (400, 401, 403, 404, 410, 416):
        assert not any(map(prepare.is_network_error, answered(status))), status
    for status in (408, 429, 500, 502, 503, 504):
        assert all(map(prepare.is_network_error, answered(status))), status
    for name in ("ConnectError", "ReadTimeout", "RemoteProtocolError", "ConnectionError", "Timeout"):
        if hasattr(http_library, name):
            assert prepare.is_network_error(getattr(http_library, name)("no")), name
    for error in (ConnectionError(), ConnectionResetError(), TimeoutError(), OfflineModeIsEnabled()):
        assert prepare.is_network_error(error), error
    for error in (FileNotFoundError(), PermissionError(), OSError(28, "No space left on device"), ValueError(),
                  KeyError(), pyarrow.ArrowInvalid(), BadInput()):
        assert not prepare.is_network_error(error), error
