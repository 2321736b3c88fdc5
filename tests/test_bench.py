"""bench.py as a command: what it cannot do is said in one line."""
import sys

import pytest

import bench
from config import BadInput
from tests.commands import refused, run


@pytest.mark.parametrize("section", ["train", "prefill", "decode"])
def test_without_the_peer(section, monkeypatch):
    """Where transformers is not installed, as after `make demo`, a line says what installs it."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BadInput, match="transformers: pip install -r requirements-export.txt"):
        bench.main([section, "--config", "quickstart", "--shapes", "1x8"])


def test_refused(tmp_path):
    """A config that is not there, from another folder."""
    refused(run("bench.py", "prefill", "--config", "nope", cwd=tmp_path), "no config file", "stentor3_20m")
