"""Options come from a dataclass, what is wrong is one line, and Ctrl-C waits until stopping loses nothing."""
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest

from cli import BadInput, StopRequest, brief, parse, script, spell_out
from tests.commands import ROOT


@dataclass
class Options:
    """Options of a command."""

    steps: int = 3
    """How many."""
    resume: bool = False
    """Go on."""
    compile: bool | None = None
    """Compile."""


# -----------------------------------------------------------------------------
# options

@pytest.mark.parametrize("words, spelled", [
    ("", ""), ("--resume", "--resume True"), ("--resume False", "--resume False"), ("--resume True", "--resume True"),
    ("--compile --steps 4", "--compile True --steps 4"), ("--steps --resume", "--steps --resume True"),
    ("--resume=False", "--resume=False"), ("--other", "--other"),
])
def test_spell_out(words, spelled):
    """A yes-or-no option alone means yes; no other word is touched."""
    assert spell_out(Options, words.split()) == spelled.split()


def test_parse():
    """The command line has the last word, then the default, then the dataclass."""
    assert parse(Options, []) == Options()
    assert parse(Options, ["--compile", "--resume"]) == Options(resume=True, compile=True)
    assert parse(Options, ["--steps", "5"], Options(7, True)) == Options(5, True)
    for words in ("--stepz 3", "--steps three", "stray"):
        with pytest.raises(BadInput) as refusal:
            parse(Options, words.split())
        assert not re.search("\n|│|─|\x1b|Options", str(refusal.value)) and words.split()[-1] in str(refusal.value)


# -----------------------------------------------------------------------------
# refusals

@pytest.mark.parametrize("error, text", [
    (ValueError("two\n  lines"), "two lines"), (ValueError("x" * 1000), "x" * 300), (ValueError(), "ValueError"),
    (KeyError("key"), "'key'"), (TimeoutError(" \n"), "TimeoutError"),
])
def test_brief(error, text):
    """One line, of readable length, that says something."""
    assert brief(error) == text


def test_refusal_of_a_command(tmp_path):
    """As a command, a refusal is one line on stderr and exit code 2, and nothing is written."""
    done = subprocess.run([sys.executable, ROOT / "train.py", "--block_sizes", "4"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and list(tmp_path.iterdir()) == []
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "--block_size " in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="opens a pseudo-terminal")
def test_refusal_on_a_terminal(tmp_path):
    """On a narrow terminal, for which the parser would draw coloured frames, it is the same plain line."""
    import pty
    reader, terminal = pty.openpty()
    done = subprocess.run([sys.executable, ROOT / "train.py", "--block_sizes", "4"], cwd=tmp_path,
                          env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "40"},
                          stdin=terminal, stdout=terminal, stderr=terminal)
    shown = os.read(reader, 10_000).decode()
    os.close(terminal)
    os.close(reader)
    assert done.returncode == 2 and re.match("error: .*--block_size INT", shown), shown
    assert not re.search("\x1b|│|─|--help", shown) and shown.count("\n") == 1, shown


@pytest.mark.parametrize("error, code, line", [
    (BadInput("two\n  lines"), 2, "error: two lines"),
    (OSError(28, "No space left"), 2, "error: [Errno 28] No space left"),
    (KeyboardInterrupt(), 130, "interrupted"), (None, None, None), (SystemExit(1), 1, None),
])
def test_script(capsys, monkeypatch, error, code, line):
    """script ends a command with its exit code and at most one line on stderr, and gives it the arguments."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--name", "x"])

    def main(argv):
        assert argv == ["--name", "x"]
        if error:
            raise error
    with pytest.raises(SystemExit) as leaving:
        script(main)
    assert leaving.value.code == code and capsys.readouterr().err == (f"{line}\n" if line else "")


def test_a_bug_is_not_bad_input():
    """What is the program's own fault keeps its traceback."""
    with pytest.raises(ZeroDivisionError):
        script(lambda argv: 1 / 0)


# -----------------------------------------------------------------------------
# Ctrl-C

def test_a_signal_is_noted():
    """Nothing is raised before the work asks."""
    with StopRequest(signal.SIGINT, signal.SIGTERM) as stop:
        stop.check()
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == [signal.SIGTERM]
        with pytest.raises(KeyboardInterrupt):
            stop.check()
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == [signal.SIGTERM, signal.SIGTERM]


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_interrupts(first):
    with StopRequest(signal.SIGINT, signal.SIGTERM) as stop:
        signal.raise_signal(first)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.received == [first]


def test_one_that_does_not_insist():
    """However often Ctrl-C is pressed, the work goes on until it asks."""
    with StopRequest(signal.SIGINT, insistent=False) as stop:
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
        assert stop.received == [signal.SIGINT] * 3
        with pytest.raises(KeyboardInterrupt):
            stop.check()


@pytest.mark.parametrize("insistent", [True, False])
@pytest.mark.parametrize("pressed", [0, 1, 2])
def test_the_earlier_handlers_come_back(insistent, pressed):
    """However the work ends; a signal that was not asked for keeps its own throughout."""
    before = {number: lambda *_: None for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        signal.signal(number, handler)
    with pytest.raises((KeyboardInterrupt, ZeroDivisionError)):
        with StopRequest(signal.SIGINT, insistent=insistent):
            assert signal.getsignal(signal.SIGTERM) is before[signal.SIGTERM]
            for _ in range(pressed):
                signal.raise_signal(signal.SIGINT)
            raise ZeroDivisionError
    assert all(signal.getsignal(number) is handler for number, handler in before.items())
