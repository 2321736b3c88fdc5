"""python -m tokenizer check: it finds each difference from the reference, and says why where it cannot compare."""
import pytest

from cli import BadInput
from tests.commands import ROOT, run_module
from tests.commands import refused as refused_command
from tests.tokenizer.vocabularies import QUICKSTART
from tokenizer.reference import reference_encode

PACKAGE = """
import sys
sys.path.insert(0, {root!r})
import tokenizer
class load:
    def __init__(self, path): self.inner = tokenizer.load(path)
    def tokenize(self, text): return self.inner.encode(text){change}
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes a stand-in for the tokenmonster package, found before a real one."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return lambda source: (tmp_path / "tokenmonster.py").write_text(source)


def test_check(package, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("One paragraph,\nof two lines.\n\n\nAnd the other: na\u00efve.\n", encoding="utf-8")
    package(PACKAGE.format(root=str(ROOT), change=""))
    code, out, err = run_module("tokenizer", "check", file, cwd=tmp_path)
    assert code == 0, err
    assert "2 documents" in out
    package(PACKAGE.format(root=str(ROOT), change="[:3 if 'other' in text else None]"))
    code, out, err = run_module("tokenizer", "check", file, "--vocab", QUICKSTART, cwd=tmp_path)
    assert code == 1, err
    out = out.splitlines()
    assert len(out) == 2 and "text.txt:5: after" in out[0] and "1 differ" in out[1]


def test_help(tmp_path):
    """It says what to type."""
    code, out, err = run_module("tokenizer", "--help", cwd=tmp_path)
    assert code == 0 and not err and out.startswith("usage: python -m tokenizer [-h] {check} ")


def test_check_that_cannot_be_made(package, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("text")
    package("raise ImportError('no such package')")
    (tmp_path / "words.json").write_text("{}")
    for arguments in (["check", str(file)], ["check", str(tmp_path / "none.txt")], ["chekc", str(file)],
                      ["check"], ["check", str(file), "--vocab", "nothing"],
                      ["check", str(file), "--vocab", str(tmp_path / "words.json")]):
        result = run_module("tokenizer", *arguments, cwd=tmp_path)
        refused_command(result)
        assert result[1] == "", arguments


def test_check_gives_up_on_a_server_that_hangs(package):
    package("import time; time.sleep(60)")
    with pytest.raises(BadInput, match="no answer"):
        reference_encode(QUICKSTART, ["text"], timeout=1)
