"""A vocabulary of the hub comes through every trouble of its server, once; and what a server lacks is said at once."""
import json
import shutil

import pytest

from tests.commands import ROOT, ended, start_python
from tests.hub import Hub
from tests.tokenizer.vocabularies import QUICKSTART
from tokenizer.hub import WAITS

# Loads vocabularies by their names -> for each the id of its end token, or why not. Waits are cut short.
LOAD = f"""
import json, sys, time
sys.path.insert(0, {str(ROOT)!r})
import tokenizer
from pathlib import Path
time.sleep = lambda seconds: None
tokenizer.VOCABULARY_FOLDER = Path("nowhere")
results = []
for name in sys.argv[1:]:
    try:
        results.append(tokenizer.load(name).eos_id)
    except tokenizer.BadInput as error:
        results.append(str(error))
print(json.dumps(results))
"""


@pytest.fixture
def hub(library_bpe, tmp_path):
    """A hub with one of the published vocabularies, and with a BPE whose config.json says that <s> ends its texts."""
    vocabs, bpe = tmp_path / "hub/models/alasdairforsythe/tokenmonster/vocabs", tmp_path / "hub/models/owner/bpe"
    vocabs.mkdir(parents=True)
    shutil.copy(QUICKSTART, vocabs / "quickstart-2048.vocab")
    bpe.mkdir(parents=True)
    library_bpe.save(str(bpe / "tokenizer.json"))
    (bpe / "config.json").write_text('{"eos_token_id": 0}')
    hub = Hub(tmp_path / "hub")
    yield hub
    hub.close()


def load(hub, tmp_path, *names):
    """Load these -> (what came of each, how often it waited)."""
    environment = {**hub.environment, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    code, out, err = ended(start_python("-c", LOAD, *names, cwd=tmp_path, env=environment))
    assert code == 0, err
    return json.loads(out), err.count("; trying again in ")


def test_a_server_in_trouble(rng, hub, tmp_path):
    """The first question about any file is dropped, and the next two get some trouble; then nobody is asked again."""
    asked = {}

    def trouble(method, path):
        asked[path] = asked.get(path, 0) + 1
        kinds = {1: ["reset"], 2: [500, 502, 503, 504, 429, "reset"], 3: [500, 502, 503, 504, 429, "reset", "cut"]}
        return rng.choice(kinds.get(asked[path], [None]))

    hub.trouble = trouble
    ends, waited = load(hub, tmp_path, "quickstart-2048", "owner/bpe")
    assert ends == [2, 0] and waited
    before = len(hub.asked)
    assert load(hub, tmp_path, "quickstart-2048", "owner/bpe") == ([2, 0], 0) and len(hub.asked) == before


def test_a_server_that_stays_in_trouble(hub, tmp_path):
    """Not even with a file that only says what ends a text: without it another token would. Later all is well."""
    hub.trouble = lambda method, path: 503 if path.endswith("config.json") else None
    [refusal], waited = load(hub, tmp_path, "owner/bpe")
    assert waited == len(WAITS) and "tokenizer.json of owner/bpe cannot be downloaded" in refusal
    hub.trouble = lambda method, path: None
    assert load(hub, tmp_path, "owner/bpe") == ([0], 0)


def test_what_a_server_does_not_have(hub, tmp_path):
    """Nobody waits for that; nor where there is no server."""
    refusals, waited = load(hub, tmp_path, "owner/nothing", "english-4096-strict-nocapcode-v1")
    assert all("cannot be downloaded" in refusal for refusal in refusals) and not waited
    hub.close()
    [refusal], waited = load(hub, tmp_path, "owner/bpe")
    assert "cannot be downloaded" in refusal and not waited
