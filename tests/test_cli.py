"""Options come from a dataclass, what is wrong is one line, and Ctrl-C waits until stopping loses nothing."""
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest

from cli import NARROWEST, BadInput, StopRequest, brief, is_count, is_number, parse, parse_json, script, spell_out
from tests.commands import ROOT, start_python


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
    (BadInput("\x1b[31mred\0" + "x" * 5000), 2, "error: [31mred " + "x" * 1485),
    (MemoryError(), 2, "error: there is not enough memory"),
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
# streams

COMMAND = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from cli import STOP_SIGNALS, BadInput, StopRequest, script
def main(argv):
    {}
script(main)
"""


def command(body, root=ROOT, **options):
    """Start a command with this body."""
    return start_python("-c", COMMAND.format(body), root, cwd=root, **options)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "cp1252:strict", "utf-8", "latin-1"])
def test_any_text_can_be_printed(encoding):
    """To a file or a pipe goes UTF-8, whatever the locale says, and stderr takes any text too."""
    text = "a \u2192 b \U0001f600"
    process = command(f"print({text!r}, '\\udc80'); raise BadInput({text!r})", env={"PYTHONIOENCODING": encoding})
    out, err = process.communicate()
    assert process.returncode == 2 and out.startswith(text) and err == f"error: {text}\n", (out, err)


def test_input_that_is_not_text():
    process = start_python("-c", COMMAND.format("print(ascii(input()))"), ROOT, cwd=ROOT, stdin=subprocess.PIPE,
                           env={"PYTHONIOENCODING": "utf-8:strict"})
    process.stdin.buffer.write(b"a\xffb\n")
    assert process.communicate()[0] == "'a\\ufffdb'\n"


@pytest.mark.skipif(sys.platform == "win32", reason="closes a file by its number")
def test_closed_streams():
    """A command that begins without standard streams works, and no file gets their numbers."""
    body = "file = open(sys.argv[0] or '/dev/null'); print('x'); sys.exit(file.fileno())"
    process = command(body.replace("sys.argv[0] or ", ""), preexec_fn=lambda: os.closerange(0, 3))
    assert process.communicate() == ("", "") and process.returncode > 2


@pytest.mark.parametrize("body, code", [("[print('x' * 1000) for _ in range(1000)]", 1), ("print('x')", 1)])
def test_a_reader_who_leaves(body, code):
    """`| head`: no traceback, also where the text is still in a buffer at the end."""
    process = command(f"import time; time.sleep(0.3); {body}", env={"PYTHONUNBUFFERED": ""})
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == code


def test_a_reader_who_leaves_asks_to_stop(capsys):
    """Under a StopRequest it is a wish like Ctrl-C, and what is printed from then on is dropped."""
    reader, writer = os.pipe()
    before, sys.stdout = sys.stdout, os.fdopen(writer, "w", buffering=1)
    try:
        with StopRequest() as stop:
            print("first")
            stop.check()
            assert os.read(reader, 100) == b"first\n"
            os.close(reader)
            for _ in range(3):
                print("second", flush=True)
            assert stop.received == [signal.SIGPIPE] and sys.stdout.isatty() is False
        sys.stdout.close()  # what was left in its buffer is dropped too
    finally:
        sys.stdout = before


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no hangup")
def test_nohup():
    """A hangup that was ignored before stays so; another signal is heard all the same."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest(signal.SIGHUP, signal.SIGTERM) as stop:
        signal.raise_signal(signal.SIGHUP)
        stop.check()
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with StopRequest(signal.SIGHUP) as stop:
        signal.raise_signal(signal.SIGHUP)
        assert stop.received == [signal.SIGHUP]


@pytest.mark.parametrize("columns", [1, 5, 39])
def test_help_in_a_narrow_terminal(columns):
    """It ends, with the lines that a terminal of 40 columns gets."""
    shown = [subprocess.run([sys.executable, ROOT / "sizing.py", "--help"], capture_output=True, timeout=60, check=True,
                            env=os.environ | {"COLUMNS": str(width)}).stdout for width in (columns, NARROWEST)]
    assert shown[0] == shown[1] and b"--block_size" in shown[0]


# -----------------------------------------------------------------------------
# JSON

FORM = {"step": is_count, "loss?": is_number, "names?": {str: str}, "more?": dict}


@pytest.mark.parametrize("text, word", [
    (b'{"step": 3}', None), (b'\xef\xbb\xbf{"step": 3, "loss": Infinity, "names": {"a": "b"}, "other": null}', None),
    (b"", "Expecting value"), (b"null", "it is no object"), (b"[]", "it is no object"), (b"{}", "step is missing"),
    (b'{"step": -1}', "step cannot be -1"), (b'{"step": 3.5}', "step cannot be 3.5"),
    (b'{"step": true}', "step cannot be a bool"), (b'{"step": "3"}', "step cannot be a str"),
    (b'{"step": 9223372036854775808}', "step cannot be"), (b'{"step": 1, "loss": NaN}', "loss cannot be"),
    (b'{"step": 1, "names": []}', "names is no object"), (b'{"step": 1, "names": {"a": 1}}', "a cannot be 1"),
    (b'{"step": 1, "more": null}', "more cannot be a NoneType"), (b"\xff", "can't decode byte"),
    (b"[" * 100_000, "nested too deeply"), (b'{"a":' * 100_000, "nested too deeply"), (b"9" * 5000, "digits"),
    (b'{"step": "' + b"x" * 43_000 + b'"}', "step cannot be a str"), (b'{"' + b"x" * 43_000, "Unterminated")])
def test_parse_json(text, word):
    """What is wrong with a file is said in a few words, however long the file is."""
    if word is None:
        assert parse_json(text, FORM)["step"] == 3
        return
    with pytest.raises(ValueError, match=word) as error:
        parse_json(text, FORM)
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


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
