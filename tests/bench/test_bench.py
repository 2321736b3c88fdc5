"""python -m bench as a command: what it cannot do is said in one line."""
import importlib
import sys
from dataclasses import fields

import pytest

from bench.__main__ import SECTIONS, main
from cli import BadInput
from tests.commands import refused, run_module

# An option of some other section.
FOREIGN = {"tokenizer": "--megabytes", "prepare": "--tokens", "training": "--samples", "prefill": "--shapes",
           "decoding": "--shapes", "start": "--config", "t4": "--documents", "qat": "--rounds"}


@pytest.mark.parametrize("section", ["training", "prefill", "decoding"])
def test_without_the_peer(section, monkeypatch):
    """Where transformers is not installed, as after `make demo`, a line says what installs it."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    shapes = ["--shapes", "1x8"] if section == "training" else []
    with pytest.raises(BadInput, match="transformers need it: pip install transformers"):
        main([section, "--config", "quickstart", *shapes])


def test_refused(tmp_path):
    """A config that is not there, from another folder."""
    refused(run_module("bench", "prefill", "--config", "nope", cwd=tmp_path), "no config file", "stentor3_20m")


@pytest.mark.parametrize("section", SECTIONS)
def test_options_of_a_section(section, in_process):
    """Each tells of its own options, and refuses those of another section."""
    code, out, err = in_process(main, section, "--help")
    assert out.startswith(f"usage: python -m bench {section} [")
    options = [f"--{field.name}" for field in fields(importlib.import_module(f"bench.{section}").Options)]
    assert code == 0 and not err and "--markdown" in options and all(option in out for option in options)
    foreign = FOREIGN[section]
    assert foreign not in out
    refused(in_process(main, section, foreign, "1"), "Unrecognized options", foreign)


def test_every_section_has_an_option_to_refuse():
    assert set(FOREIGN) == set(SECTIONS)


def test_the_list_of_sections(in_process):
    code, listed, err = in_process(main, "--help")
    assert code == 0 and not err and all(f"python -m bench {section} " in listed for section in SECTIONS)
    assert in_process(main) == (2, listed, "")
    refused(in_process(main, "nope", "--rounds", "1"), "no section nope", *SECTIONS)


@pytest.mark.parametrize("arguments, words", [
    (["tokenizer", "--rounds", "0"], ["rounds is 0", "at least 1"]),
    (["prepare", "--documents", "1"], ["documents is 1", "at least 2"]),
    (["training", "--config", "quickstart", "--shapes", "1x8", "8by256"], ["--shapes 8by256", "like 8x256"]),
    (["training", "--config", "quickstart", "--shapes", "1x0"], ["--shapes 1x0", "like 8x256"]),
    (["training", "--config", "quickstart", "--shapes", "1x257"], ["--shapes 1x257", "context is 256"]),
    (["training", "--config", "quickstart", "--shapes"], ["--shapes", "at least one"]),
    (["t4", "--capability", "turing"], ["--capability turing", "like 7.5"]),
])
def test_a_value_that_cannot_be(arguments, words, in_process):
    refused(in_process(main, *arguments), *words)


def test_without_data(tmp_path, monkeypatch, in_process):
    """What waits for the quickstart's data says how to make it."""
    monkeypatch.chdir(tmp_path)
    refused(in_process(main, "start"), "no prepared data", "prepare.py")


def test_a_table(in_process):
    """The smallest: of each kind of text a row for each thing that is timed, as a Markdown table."""
    code, out, _ = in_process(main, "tokenizer", "--documents", "1", "--rounds", "1", "--markdown")
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert code == 0 and len({line.count("|") for line in table}) == 1
    for kind in ("prose", "code"):
        for what in ("encode, plain Python", "decode"):
            assert [line for line in table if line.startswith(f"| {kind}") and f"| {what} " in line]
