"""Streams: the same documents from whatever holds them, cleaned, and patience with a network in trouble."""
import gzip
import itertools
import json
import math
import re
import shutil
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pyarrow
import pytest

from cli import BadInput
from config import Source
from sources.streams import clean_text
from tests.commands import ROOT, refused, run
from tests.hub import Hub
from tests.sources.texts import HELD_OUT, Text, expected, make, preset, result, two_sources, write_parquet, write_shards
from tokenizer.hub import is_network_error

# -----------------------------------------------------------------------------
# cleaning

@pytest.mark.parametrize("text, prose, code", [
    ("a  b\tc", "a b c", "a  b\tc"),
    (" x \r\n  y\r z  ", "x y z", "x\n  y\n z"),
    ("ﬁne １２ Å", "fine 12 Å", "fine 12 Å"),
    ("\n\n  \n", "", ""),
    ("def f():\n\n    return 1   \n", "def f(): return 1", "def f():\n\n    return 1"),
])
def test_clean_text(text, prose, code):
    """By hand, from the Stentor3 card's function."""
    assert clean_text(text) == prose
    assert clean_text(text, preserve_linebreaks=True) == code


def test_clean_text_settles(rng):
    """Cleaning clean text changes nothing, whatever the text, and leaves neither \\r nor a space at an end."""
    for _ in range(300):
        text = "".join(chr(rng.choice([rng.randrange(0x250), rng.randrange(0xD800), 10, 13, 32])) for _ in range(40))
        for keep in (False, True):
            clean = clean_text(text, keep)
            assert clean == unicodedata.normalize("NFKC", clean) == clean_text(clean, keep)
            assert "\r" not in clean and clean == clean.strip()


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
        for (_, *words), ended in zip(cases, pool.map(attempt, range(len(cases)))):
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


# -----------------------------------------------------------------------------
# the network

IN_A_HURRY = f"import sys, time\nsys.path.insert(0, {str(ROOT)!r})\n" \
             "sleep = time.sleep\ntime.sleep = lambda seconds: sleep(min(seconds, 0.002))\n" \
             "import prepare\nfrom cli import script\nfrom sources import streams\n" \
             "streams.CHUNK, prepare.SAVE_SECONDS = 30_000, -1\nscript(prepare.main)\n"


def for_parts(trouble):
    """Trouble for the answers that hold a part of a file; the hub's others are in order."""
    return lambda method, path: trouble() if method == "GET" and "/resolve/" in path else None


@pytest.fixture
def remote(rng, tmp_path):
    """A hub with a dataset of some shards, most of whose bytes are another column's; and what its bins must be."""
    directory = tmp_path / "served" / "datasets" / "someone" / "texts"
    directory.mkdir(parents=True)
    rows = Text(rng).documents(1_500_000, (50, 500, 2000, 9000))
    pattern = write_shards(directory, "train", rows, rng, 6, width=12_000, largest=100)
    local = {"far": Source("parquet", data_files=pattern, held_out=HELD_OUT)}
    (tmp_path / "hurry.py").write_text(IN_A_HURRY)
    hub = Hub(tmp_path / "served")
    yield SimpleNamespace(hub=hub, directory=directory, path=tmp_path,
                          whole=expected(local, {"far": rows}, {"far": math.inf}))
    hub.close()


def far(remote, dataset="someone/texts"):
    """The command for the remote dataset, its waits cut short -> (exit code, stdout, stderr)."""
    file = preset(remote.path / "run.py", {"far": Source(dataset)}, max_steps=10**6)
    env = {**remote.hub.environment, "HF_HOME": str(remote.path / "hf")}
    return run(remote.path / "hurry.py", file, "--data_dir", "data", cwd=remote.path, env=env)


def waits(out):
    """The seconds that it said it would wait."""
    return [int(seconds) for seconds in re.findall(r"trying again in (\d+) s", out)]


def test_a_server_in_trouble(rng, remote):
    """Errors and cut connections for a while, again and again: waited out, and nothing of it in the bins."""
    troubles = [503] * 22  # huggingface_hub tries 6 times, we 5 times that
    for _ in range(2):
        troubles += [None] * rng.randint(1, 6) + [rng.choice([503, 429, 500, "cut"])] * rng.randint(1, 3)
    remaining = iter(troubles)
    made = remote.path / "data" / "far.bin"  # something of which is there when the trouble begins
    remote.hub.trouble = for_parts(
        lambda: next(remaining, None) if made.exists() and made.stat().st_size else None)
    code, out, err = far(remote)
    assert code == 0, (out, err)
    assert result(remote.path / "data") == remote.whole
    assert waits(out)


def test_a_server_that_goes_away_and_comes_back(rng, remote):
    """All the waits, then one line; what was read is kept, and the same command ends with the same bins."""
    good, trouble = itertools.count(-rng.randint(0, 6)), rng.choice([503, "cut"])
    online = remote.path / "data" / "progress.json"
    remote.hub.trouble = for_parts(lambda: trouble if online.exists() and next(good) >= 0 else None)
    code, out, err = far(remote)
    assert waits(out)[-4:] == [2, 10, 30, 120], (out, err)
    refused((code, out, err), "far", "cannot be reached")
    safe = json.loads((remote.path / "data" / "progress.json").read_text())["sources"]["far"]
    assert safe["val"]["tokens"] and f"{safe['val']['tokens'] + safe['train']['tokens']:,} tokens are safe" in out
    remote.hub.trouble = for_parts(lambda: None)
    code, out, err = far(remote)
    assert code == 0 and not waits(out), (out, err)
    assert result(remote.path / "data") == remote.whole


def test_only_the_text_is_downloaded(rng, remote):
    """A Parquet file's other columns stay where they are."""
    path = remote.directory / "wide.parquet"
    for shard in remote.directory.iterdir():
        shard.unlink()
    text = Text(rng)
    rows = [text.document(300) for _ in range(400)]
    write_parquet(path, rows, rng, smallest=100, width=200_000)  # 5 MB are read ahead for each row group, of 20 MB
    code, out, err = far(remote)
    assert code == 0, (out, err)
    assert remote.hub.served < path.stat().st_size / 2


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
        assert not any(map(is_network_error, answered(status))), status
    for status in (408, 429, 500, 502, 503, 504):
        assert all(map(is_network_error, answered(status))), status
    for name in ("ConnectError", "ReadTimeout", "RemoteProtocolError", "ConnectionError", "Timeout"):
        if hasattr(http_library, name):
            assert is_network_error(getattr(http_library, name)("no")), name
    for error in (ConnectionError(), ConnectionResetError(), TimeoutError(), OfflineModeIsEnabled()):
        assert is_network_error(error), error
    for error in (FileNotFoundError(), PermissionError(), OSError(28, "No space left on device"), ValueError(),
                  KeyError(), pyarrow.ArrowInvalid(), BadInput()):
        assert not is_network_error(error), error
