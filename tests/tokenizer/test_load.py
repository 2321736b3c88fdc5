"""A vocabulary is found by its name, its path or its repository, and what cannot be used is refused in one line."""
import socket
import sys

import pytest

import tokenizer as T
from tests.tokenizer.vocabularies import ENGLISH, QUICKSTART, TINY, refused, vocab_file


def test_load_by_path(tmp_path):
    assert T.load(str(QUICKSTART)).eos_id == T.load(QUICKSTART).eos_id == 2
    renamed = tmp_path / "mine.vocab"
    renamed.write_bytes(QUICKSTART.read_bytes())
    assert (T.load(renamed).name, T.load(renamed).eos_id) == ("quickstart-2048", 2)
    (tmp_path / "mine.vocab").write_bytes(vocab_file(TINY))
    assert T.load(renamed).name == "mine"


def test_load_refusals(tmp_path, monkeypatch):
    refused(lambda: T.load("no-such-vocabulary"), "vocabs/NAME.vocab")
    refused(lambda: T.load(tmp_path), "no such vocabulary")
    refused(lambda: T.load("x" * 5000), "no such vocabulary")
    refused(lambda: T.load(__file__), "test_load")
    impostor = tmp_path / "quickstart-2048.vocab"
    impostor.write_bytes(vocab_file(TINY))
    refused(lambda: T.load(impostor), "sha256", f"delete {impostor}")
    monkeypatch.setattr(T, "MAX_FILE", 1000)
    refused(lambda: T.load(QUICKSTART), "too many")
    monkeypatch.undo()
    monkeypatch.setattr(sys.modules["tokenizer.tokenmonster"], "MAX_NODES", 1000)
    refused(lambda: T.load(QUICKSTART), "too large")


def test_load_from_the_hub(library_bpe, tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked, fetched = [], tmp_path / "blob"

    def download(repo_id, filename):
        asked.append((repo_id, filename))
        return str(fetched)

    monkeypatch.setattr(T, "VOCABULARY_FOLDER", tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    fetched.write_bytes(QUICKSTART.read_bytes())
    assert T.load("quickstart-2048").name == "quickstart-2048"
    assert asked == [("alasdairforsythe/tokenmonster", "vocabs/quickstart-2048.vocab")]
    refused(lambda: T.load(ENGLISH[0]), "sha256")  # sound, but another vocabulary
    fetched.write_bytes(QUICKSTART.read_bytes()[:-1])
    refused(lambda: T.load("quickstart-2048"), "sha256")

    library_bpe.save(str(fetched.with_name("tokenizer.json")))
    fetched = fetched.with_name("tokenizer.json")
    assert T.load("owner/a-bpe.v3").name == "owner/a-bpe.v3" and asked[-1] == ("owner/a-bpe.v3", "tokenizer.json")
    refused(lambda: T.load("owner/missing.vocab"), "no such vocabulary")

    def offline(repo_id, filename):
        raise OSError("no route to host\nand a long story")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    refused(lambda: T.load("quickstart-2048"), "put it at", "python prepare.py")
    refused(lambda: T.load("owner/a-bpe.v3"), "tokenizer.json of owner/a-bpe.v3", "python prepare.py")


def test_what_is_cached_is_not_asked_for_again(tmp_path, monkeypatch):
    """A vocabulary that the hub's cache holds is read from there, and nobody is asked anything."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    snapshot = tmp_path / "models--alasdairforsythe--tokenmonster" / "snapshots" / ("0" * 40) / "vocabs"
    snapshot.mkdir(parents=True)
    (snapshot.parents[2] / "refs").mkdir()
    (snapshot.parents[2] / "refs" / "main").write_text("0" * 40)
    (snapshot / "quickstart-2048.vocab").write_bytes(QUICKSTART.read_bytes())
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(T, "VOCABULARY_FOLDER", tmp_path / "nothing")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: pytest.fail("it asked for an address"))
    assert T.load("quickstart-2048").name == "quickstart-2048"
