"""What several of these tests need."""
from functools import partial

import pytest

import export
from tests.formats.exports import export_both


@pytest.fixture
def command(in_process, tmp_path, monkeypatch):
    """export.py in tmp_path."""
    monkeypatch.chdir(tmp_path)
    return partial(in_process, export.main)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with a run and its exports: out/tiny, hf (exact) and plain/hf (portable)."""
    return export_both(tmp_path_factory.mktemp("exported"))
