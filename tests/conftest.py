"""What the tests share: inputs drawn afresh on every run, with a seed to repeat them by."""
import json
import os
import random
import signal
import sys

import numpy as np
import pytest
import torch

from cli import STOP_SIGNALS, script
from tests.commands import run

# The threads of a process that is started here sleep while they wait for each other: where they spin, busy cores make
# them twice as slow.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")
torch.set_num_threads(1)  # the models here are too small for more, and the cores may be busy


@pytest.fixture
def rng():
    """A random.Random, torch seeded with it. A failing test shows the seed; TEST_SEED=... draws it again."""
    seed = int(os.environ.get("TEST_SEED") or random.SystemRandom().randrange(2**32))
    print(f"TEST_SEED={seed}")  # pytest shows it where the test fails
    torch.manual_seed(seed)
    return random.Random(seed)


@pytest.fixture(autouse=True)
def signal_handlers():
    """The scripts answer Ctrl-C, SIGTERM and SIGHUP; after a test they are pytest's again."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def in_process(monkeypatch, capsys):
    """Runs a script's main in this process: what `run` gives, without the seconds that importing torch takes."""
    def call(main, *arguments):
        monkeypatch.setattr(sys, "argv", [main.__module__, *map(str, arguments)])
        with pytest.raises(SystemExit) as leaving:
            script(main)
        return leaving.value.code or 0, *capsys.readouterr()

    return call


@pytest.fixture
def in_tmp_path(in_process, tmp_path, monkeypatch):
    """As in_process, in a directory of the test's own."""
    monkeypatch.chdir(tmp_path)
    return in_process


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """transformers asks no hub, and keeps the code that it loads out of the home directory."""
    import huggingface_hub
    from transformers import dynamic_module_utils
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(sys, "path", list(sys.path))  # it adds that folder
        yield


@pytest.fixture(scope="session")
def quickstart_data(tmp_path_factory):
    """The embedded data, prepared once by the real command; tests only read it."""
    directory = tmp_path_factory.mktemp("prepared")
    code, out, err = run("prepare.py", "--data_dir", "quickstart", cwd=directory)
    assert code == 0, (out, err)
    return directory / "quickstart"


@pytest.fixture(scope="session")
def quickstart_bins(quickstart_data):
    """(source, split) -> its documents in the bins of the embedded data as arrays of ids, each with its eos."""
    eos = json.loads((quickstart_data / "meta.json").read_text())["eos_id"]
    documents = {}
    for source in ("web", "code", "math"):
        for split, suffix in (("train", ""), ("val", "_val")):
            ids = np.fromfile(quickstart_data / f"{source}{suffix}.bin", np.uint16)
            assert ids[-1] == eos
            documents[source, split] = np.split(ids, np.flatnonzero(ids == eos) + 1)[:-1]
    return documents


@pytest.fixture(scope="session")
def quickstart_texts(quickstart_bins):
    """(source, split) -> its documents as text."""
    import tokenizer
    vocabulary = tokenizer.load("quickstart-2048")
    return {key: [vocabulary.decode(ids) for ids in documents] for key, documents in quickstart_bins.items()}


@pytest.fixture
def fine(monkeypatch):
    """prepare.py works in chunks of a few documents and saves after each: many positions in little text."""
    import prepare
    from sources import streams
    monkeypatch.setattr(streams, "CHUNK", 3000)
    monkeypatch.setattr(prepare, "SAVE_SECONDS", -1)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with a run and its exports: out/tiny, hf (exact) and plain/hf (portable)."""
    from tests.formats.exports import export_both  # here, as few tests need what it imports
    return export_both(tmp_path_factory.mktemp("exported"))
