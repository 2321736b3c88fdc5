"""The family's configs from text on a hub to bins, whatever the hub's troubles."""
import itertools
import json
import os
import random
import re
import shutil
import threading
from types import SimpleNamespace

import pytest
import tokenizers

import tokenizer
from config import Source, load
from tests.commands import ROOT, ended, start_python
from tests.hub import COMMIT, Hub
from tests.sources.texts import Text, expected, needed, preset, write_shards

FAMILY = sorted(path.stem for path in (ROOT / "config").glob("*.py") if path.stem not in ("__init__", "quickstart"))
FEW = 7  # documents held out of each source
OTHER_COMMIT = "f" * 40

# Runs prepare.py once for each line of arguments, two at a time, in processes that need not import anything again. Its
# waits are cut short, and there are more of them: here ten different requests in a row may meet trouble. It works in
# small chunks. The published vocabularies cannot be here: another stands in.
COMMAND = f"""
import contextlib, json, os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import datasets, prepare, tokenizer
from cli import script
from pathlib import Path
from sources import streams
from tokenizer import hub
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.002))
hub.WAITS *= 5
streams.CHUNK, prepare.SAVE_SECONDS = 8000, -1
for name in tokenizer.VOCABULARIES:
    tokenizer.VOCABULARIES[name] = (tokenizer.VOCABULARIES["quickstart-2048"][0], 2)
commands, working, codes = json.loads(sys.argv[1]), dict(), dict()
while commands or working:
    while commands and len(working) < 2:
        log, arguments = commands.pop(0)
        child = os.fork()
        if not child:
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
            os.dup2(1, 2)
            sys.argv = ["prepare.py", *arguments]
            try:
                script(prepare.main)
            except SystemExit as end:
                sys.stdout.flush()
                os._exit(end.code or 0)
            finally:
                os._exit(99)
        working[child] = log
    child, status = os.wait()
    codes[working.pop(child)] = os.waitstatus_to_exitcode(status)
print(json.dumps(codes))
"""


def readme(folder, subsets):
    """A README.md that names a data set's subsets."""
    lines = [line for name, pattern in subsets.items() for line in (
        f"- config_name: {name}", "  data_files:", "  - split: train", f"    path: {pattern}")]
    (folder / "README.md").write_text("\n".join(["---", "license: other", "configs:", *lines, "---", "# Texts", ""]))


def family_hub(folder, rng):
    """The data sets of all configs, with their layouts and columns, and their vocabularies."""
    text = Text(rng)

    def put(name, place, column="text", shards=2, size=15_000):
        directory = folder / "datasets" / name / place
        directory.mkdir(parents=True, exist_ok=True)
        write_shards(directory, "train", text.documents(size), rng, shards, column=column, largest=30, width=700)
        return folder / "datasets" / name

    for place in ("data/CC-MAIN-2024-51", "data/CC-MAIN-2024-46"):
        put("epfml/FineWeb-HQ", place, shards=3)
    readme(put("epfml/FineWeb-HQ", "data/CC-MAIN-2024-10"), {"default": "data/*/*"})
    put("HuggingFaceFW/fineweb-edu", "data/CC-MAIN-2024-10")
    readme(put("HuggingFaceFW/fineweb-edu", "sample/10BT"), {"default": "data/*/*", "sample-10BT": "sample/10BT/*"})
    put("Cyrile/dataset-the-stack-v2-dedup-sub", "data/Java", "content")
    readme(put("Cyrile/dataset-the-stack-v2-dedup-sub", "data/Python", "content"),
           {"Java": "data/Java/train-*", "Python": "data/Python/train-*"})
    put("HuggingFaceTB/finemath", "finemath-3plus")
    readme(put("HuggingFaceTB/finemath", "finemath-4plus"),
           {"finemath-3plus": "finemath-3plus/train-*", "finemath-4plus": "finemath-4plus/train-*"})
    put("HuggingFaceTB/smollm-corpus", "python-edu", "blob_id")
    readme(put("HuggingFaceTB/smollm-corpus", "cosmopedia-v2"),
           {"cosmopedia-v2": "cosmopedia-v2/train-*", "python-edu": "python-edu/train-*"})
    put("bigcode/starcoderdata", "python", "content")
    put("bigcode/starcoderdata", "java", "content")
    vocabs = folder / "models" / tokenizer.HUB_REPOSITORY / "vocabs"
    vocabs.mkdir(parents=True)
    for name in tokenizer.VOCABULARIES:
        shutil.copy(tokenizer.find("quickstart-2048"), vocabs / f"{name}.vocab")
    mistral = folder / "models" / "Xenova" / "mistral-tokenizer-v3"
    mistral.mkdir(parents=True)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator([text.document(9000)], tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    bpe.save(str(mistral / "tokenizer.json"))


def arguments_for(name, data_dir):
    """prepare.py's for a small preparation with a config of the family."""
    path = str(ROOT / "config" / f"{name}.py")
    few = [f"--sources.{source}.held_out={FEW}" for source in load([path]).sources]
    return [path, "--data_dir", data_dir, "--max_steps", "2", *few]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A hub with the family's text; and all eight configs, prepared from it while it is in good order."""
    seed = int(os.environ.get("TEST_SEED") or random.SystemRandom().randrange(2**32))
    print(f"TEST_SEED={seed}")
    folder = tmp_path_factory.mktemp("family")
    family_hub(folder / "hub", random.Random(seed))
    hub = Hub(folder / "hub")
    hub.gated.add("bigcode/starcoderdata")
    made = SimpleNamespace(hub=hub, folder=folder)
    codes = prepare(made, FAMILY, "whole")
    assert set(codes.values()) == {0}, logs(made, "whole")
    made.whole = {name: bins(folder / f"whole-{name}") for name in FAMILY}
    yield made
    hub.close()


def prepare(family, names, label, home="hf"):
    """Prepare these configs -> name -> exit code. `home` is where the hub's cache is."""
    commands = [(f"{label}-{name}.log", arguments_for(name, f"{label}-{name}")) for name in names]
    environment = {**family.hub.environment, "HF_HOME": str(family.folder / home), "HF_TOKEN": "hf_token"}
    code, out, err = ended(start_python("-c", COMMAND, json.dumps(commands), cwd=family.folder,
                                         env=environment))
    assert code == 0, err
    return {name: json.loads(out)[f"{label}-{name}.log"] for name in names}


def logs(family, label):
    """What the commands have said."""
    return "\n".join(path.read_text() for path in sorted(family.folder.glob(f"{label}-*.log")))


def bins(data_dir):
    """The bins' bytes and the counts; and every document is accounted for."""
    meta = json.loads((data_dir / "meta.json").read_text())
    for source in meta["sources"].values():
        assert source["commit"] == COMMIT and source["files"] and source["val"]["tokens"] and source["train"]["tokens"]
        assert source["read"] == sum(source[split][kind] for split in ("train", "val")
                                     for kind in ("documents", "empty", "copies", "bad_rows", "special"))
    return {path.name: path.read_bytes() for path in data_dir.glob("*.bin")}, {
        name: (source["train"], source["val"], source["read"]) for name, source in meta["sources"].items()}


def test_the_whole_family_in_good_order(family):
    """Each source came from where its config says, and says so."""
    for name in FAMILY:
        said = (family.folder / f"whole-{name}.log").read_text()
        for source in load([str(ROOT / "config" / f"{name}.py")]).sources.values():
            assert re.search(rf"reads \d files? of {source.dataset} at commit 01234567: ", said), said
    stentor3 = json.loads((family.folder / "whole-stentor3_20m" / "meta.json").read_text())["sources"]
    assert all("CC-MAIN-2024-51" in file for file in stentor3["web"]["files"]) and len(stentor3["web"]["files"]) == 3
    assert all("finemath-4plus" in file for file in stentor3["math"]["files"])


def test_the_whole_family_in_trouble(rng, family):
    """Every kind of trouble, from the first request on: the same bins to the last byte."""
    kinds, asked, stalls = [500, 502, 503, 504, 429, "reset", "cut"], {}, iter(range(6))

    def trouble(method, path):
        """The first request for anything fails, and one in six for a part of a file, but not three in a row."""
        place = path.partition("?")[0], method
        asked[place] = asked.get(place, 0) + 1
        if len(asked) % 40 == 0 and next(stalls, None) is not None:
            return "stall"
        again = "/resolve/" in path and asked[place] % 3 and rng.random() < 1 / 6
        return rng.choice(kinds) if asked[place] == 1 or again else None

    family.hub.trouble = trouble
    codes = prepare(family, FAMILY, "trouble", home="other")  # which has no vocabulary in its cache
    family.hub.trouble = lambda method, path: None
    assert set(codes.values()) == {0}, logs(family, "trouble")
    assert "trying again in 2 s" in logs(family, "trouble")
    assert {name: bins(family.folder / f"trouble-{name}") for name in FAMILY} == family.whole


def test_a_server_that_is_gone_for_a_while(rng, family):
    """One line, and code 2; when it is back, the same command ends with the same bins."""
    names, number = rng.sample(FAMILY, 2), itertools.count()
    gone = threading.Event()

    def trouble(method, path):
        if next(number) == after:
            gone.set()
        return "reset" if gone.is_set() else None

    after = rng.randint(10, 60)
    family.hub.trouble = trouble
    codes = prepare(family, names, "gone")
    said = logs(family, "gone")
    assert 2 in codes.values() and "cannot be reached" in said and "Traceback" not in said, said
    family.hub.trouble = lambda method, path: None
    assert set(prepare(family, names, "gone").values()) == {0}, logs(family, "gone")
    assert all(bins(family.folder / f"gone-{name}") == family.whole[name] for name in names)


def made(hub, folder, sources, *options):
    """prepare.py with each of these sources of the hub -> label -> (code, what it said, its counts)."""
    commands = []
    for label, source in sources.items():
        file = preset(folder / f"run_{label}.py", {"mine": source}, max_steps=50)
        commands.append((f"{label}.log", [str(file), "--data_dir", label, *options]))
    environment = {**hub.environment, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    code, out, err = ended(start_python("-c", COMMAND, json.dumps(commands), cwd=folder, env=environment))
    assert code == 0, err
    results = {}
    for label in sources:
        meta = folder / label / "meta.json"
        results[label] = (json.loads(out)[f"{label}.log"], (folder / f"{label}.log").read_text(),
                          json.loads(meta.read_text())["sources"]["mine"] if meta.exists() else None)
    return results


def test_gated_and_missing_data_sets(tmp_path, family):
    """The message says what to do; a missing one is not taken for a missing network."""
    ends = made(family.hub, tmp_path, {
        "gated": Source("bigcode/starcoderdata", data_files="python/*", column="content"),
        "missing": Source("someone/nothing"), "folder": Source("some/folder/of/mine")})
    for label, words in (("gated", ["starcoderdata", "terms", "hf auth login"]),
                         ("missing", ["someone/nothing", "hf auth login"]), ("folder", ["there is no some/folder"])):
        code, said, _ = ends[label]
        assert code == 2 and "network" not in said and said.count("error: ") == 1, said
        assert all(word in said for word in words), said


def test_a_commit_is_kept_for_a_preparation(rng, tmp_path):
    """A longer run reads the commit with which the first began, though the hub has a newer one; and says so if that
    is no more."""
    rows = Text(rng).documents(60_000)
    for number in range(2):
        directory = tmp_path / str(number) / "datasets" / "someone" / "texts"
        directory.mkdir(parents=True)
        write_shards(directory, "train", rows if number == 0 else rows[::-1], rng, 3)
    hub, texts = Hub(tmp_path / "0"), Source("someone/texts", held_out=FEW)
    (code, said, meta), = made(hub, tmp_path, {"two": texts}).values()
    assert code == 0 and meta["commit"] == COMMIT, said
    hub.commits[OTHER_COMMIT] = tmp_path / "1"
    (code, said, meta), = made(hub, tmp_path, {"two": texts}, "--max_steps", "200").values()
    assert code == 0 and meta["commit"] == COMMIT, said
    del hub.commits[OTHER_COMMIT]
    goal = needed(tmp_path / "run_two.py", 200)
    assert bins(tmp_path / "two")[0] == expected({"mine": texts}, {"mine": rows}, goal)[0]
    hub.commits = {OTHER_COMMIT: tmp_path / "1"}
    (code, said, _), = made(hub, tmp_path, {"two": texts}, "--max_steps", "4000").values()
    hub.close()
    assert code == 2 and said.count("error: ") == 1 and "--data_dir" in said, said


def test_rows_on_the_hub_are_read_like_those_here(rng, tmp_path):
    """Keys that come and go, a bad row, words such as NA: by our own readers, and from any place."""
    rows = {"jsonl": [json.dumps({"text": f"row {number}", rng.choice("xyz"): rng.choice([1, "a", None])})
                      for number in range(400)],
            "csv": ["text,n"] + [rng.choice([f"NA {number},1", f'"two\n{number} lines",2', f"null{number},3"])
                                 for number in range(400)],
            "txt": [f"word {number}\n \n" for number in range(400)]}
    rows["jsonl"][200] = '{"text": 5}'
    for form, lines in rows.items():
        directory = tmp_path / "hub" / "datasets" / "someone" / form
        directory.mkdir(parents=True)
        (directory / f"train.{form}").write_text("\n".join(lines))
    hub = Hub(tmp_path / "hub")
    ends = made(hub, tmp_path, {form: Source(f"someone/{form}", held_out=FEW) for form in rows}, "--max_steps", "9999")
    hub.close()
    for form, (code, said, meta) in ends.items():
        assert code == 0 and meta["read"] == 400, said
        assert meta["train"]["bad_rows"] == (form == "jsonl")
        assert ("train.jsonl, line 201," in said) == (form == "jsonl")
