"""The command line: options from a dataclass, errors in one line, JSON that may be damaged, and Ctrl-C as a question.

Every command is a function `main(argv)`, and `script(main)` runs it. An error that the user can fix is a BadInput: one
line on stderr, and exit code 2. The tyro library makes the options from a dataclass, so `--help` lists every field with
its docstring.
"""

import contextlib
import errno
import io
import json
import math
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TextIO, TypeVar

import tyro

Options = TypeVar("Options")
NARROWEST = 40  # columns; in a few of them tyro would never end
# Ctrl-C, the end of a batch job, and the end of an ssh session. (Windows has no SIGHUP.)
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class BadInput(ValueError):
    """An error that the user can fix. `script` prints it as one line and exits with code 2."""


def brief(error: BaseException) -> str:
    """Another library's exception on one line, cut to a readable length; its type if it has no message."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def spell_out(cls: type, argv: list[str]) -> list[str]:
    """Write a bare `--resume` as `--resume True`, and so every other yes-or-no field of `cls`."""
    switches = {f"--{f.name}" for f in fields(cls) if f.type in (bool, bool | None)}
    spelled = []
    for word, following in zip(argv, [*argv[1:], ""]):
        spelled += [word, "True"] if word in switches and following not in ("True", "False") else [word]
    return spelled


def parse(cls: type[Options], argv: list[str], default: Options | None = None, command: str | None = None) -> Options:
    """Make a `cls` (a dataclass) from the command line `argv`. Fields that it does not name come from `default`.

    `command` is what people type to run it, which --help shows; if None, the name of the script.

    Raises BadInput with tyro's own message on one line; it suggests the nearest option that exists.
    """
    if shutil.get_terminal_size().columns < NARROWEST:
        os.environ["COLUMNS"] = str(NARROWEST)
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            return tyro.cli(cls, args=spell_out(cls, argv), prog=command, default=default, use_underscores=True,
                            config=(tyro.conf.FlagConversionOff,))
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        plain = re.sub(r"\x1b\[[\d;]*m", "", message.getvalue())  # on a terminal the message is in colour
        lines = [line.strip("│╭╮╰╯─ \n") for line in plain.splitlines()[1:]]  # the first line is the frame's title
        text = " ".join(line for line in lines if line).partition("For full helptext")[0]
        raise BadInput(text.strip().removeprefix(f"Error parsing {cls.__name__}: ")) from None


# ---------------------------------------------------------------------------------------------------------------
# Reading JSON that a broken disk, or a person, may have changed


def is_count(value: Any) -> bool:
    """Whether it is a whole number from 0 on, of a size that other programs can hold too."""
    return type(value) is int and 0 <= value < 2**63


def is_positive(value: Any) -> bool:
    """Whether it is such a number, and not 0."""
    return is_count(value) and value > 0


def is_number(value: Any) -> bool:
    """Whether it is a number, whole or not, and not NaN."""
    return is_count(abs(value)) if type(value) is int else type(value) is float and not math.isnan(value)


def misfit(value: Any, form: Any, name: str = "it") -> str | None:
    """What is wrong with a value from a JSON file, in a few words; None if it has the form.

    form    a type; a function that says whether a value is good; {key: form}, an object with these keys, of which those
            that end in "?" may be missing; or {str: form}, an object in which every value has that form
    """
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return f"{name[:40]} is no object"
        for key, inner in form.items():
            for each in list(value) if key is str else [key.removesuffix("?")]:
                if each in value:
                    wrong = misfit(value[each], inner, each)
                else:
                    wrong = None if key.endswith("?") else f"{each} is missing"
                if wrong:
                    return wrong
        return None
    good = isinstance(value, form) if isinstance(form, type) else form(value)
    return None if good else f"{name[:40]} cannot be {value if is_number(value) else f'a {type(value).__name__}'}"


def parse_json(data: bytes, form: Any) -> Any:
    """The value that JSON text holds. Raises ValueError, in one short line, if it is not JSON or not of the form."""
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(brief(error)) from None
    if wrong := misfit(value, form):
        raise ValueError(wrong)
    return value


# ---------------------------------------------------------------------------------------------------------------
# Being asked to stop


def discard(stream: TextIO | None):
    """Send what is still written to a stream to nowhere: nobody can read it any more."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # it is closed, or has no number
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Output:
    """Standard output that may lose its reader: `| head` has read enough, or the terminal is gone.

    From then on it drops what is written. It calls `lost` once, so that the work can end in good order.
    """

    def __init__(self, stream: TextIO, lost: Callable[[], None]):
        self.stream, self.lost, self.gone = stream, lost, False

    def attempt(self, action: Callable, *arguments: str):
        """Call a method of the stream."""
        try:
            if not self.gone:
                action(*arguments)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            self.gone = True
            discard(self.stream)
            self.lost()

    def write(self, text: str) -> int:
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self):
        self.attempt(self.stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class StopRequest:
    """Ctrl-C and other signals as a question, which the work answers at a moment when stopping loses nothing.

    An exception raised at any moment may land in an object's destructor or in a fork, where Python drops it, or in the
    middle of an optimizer step. So the handler only takes a note, and the work looks at `received` between two steps. A
    second Ctrl-C interrupts at once, unless `insistent` is False: with several processes, one must not leave the others
    waiting in the middle of a step. A standard output that nobody reads any more (SIGPIPE) asks to stop too. A hangup
    does not if it was ignored before, as under nohup.
    """

    def __init__(self, *signals: signal.Signals, insistent: bool = True):
        self.received: list[signal.Signals] = []
        self.insistent = insistent
        self.earlier = {number: signal.signal(number, self.take_note) for number in signals
                        if not (number.name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN)}
        self.stdout = sys.stdout
        if sys.stdout is not None:  # it is None if the command began with a closed one
            sys.stdout = Output(sys.stdout, self.lose_reader)

    def take_note(self, number: int, frame: object):
        """The signal handler."""
        self.received.append(signal.Signals(number))
        if self.insistent:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def lose_reader(self):
        """Standard output has lost its reader."""
        self.received.append(getattr(signal, "SIGPIPE", signal.SIGTERM))

    def check(self):
        """Raise KeyboardInterrupt if somebody has asked to stop."""
        if self.received:
            raise KeyboardInterrupt

    def __enter__(self) -> "StopRequest":
        return self

    def __exit__(self, *_: object):
        sys.stdout = self.stdout
        for number, handler in self.earlier.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------------------
# A command


def settle_streams():
    """Make the standard streams take any text.

    Output to a file or a pipe is UTF-8, whatever the locale says: Windows' says cp1252. What a terminal cannot show is
    escaped, and input that is not text is replaced. The number of a closed stream goes to nowhere; otherwise the next
    file that is opened would get it, and with it what libraries print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has no such thing
            errors = "backslashreplace" if stream.errors == "strict" else stream.errors
            stream.reconfigure(encoding=stream.encoding if stream.isatty() else "utf-8", errors=errors)
    if hasattr(sys.stdin, "reconfigure") and sys.stdin.errors == "strict":
        sys.stdin.reconfigure(errors="replace")


def complain(words: str):
    """Print one line to stderr, of readable length and without control characters."""
    with contextlib.suppress(OSError):  # nobody reads that either
        print(" ".join(re.sub("[\x00-\x1f\x7f-\x9f]", " ", words).split())[:1500], file=sys.stderr, flush=True)


def script(main: Callable[[list[str]], int | None]):
    """Run main(argv) as a command. An error that the user can fix is one line on stderr, and exit code 2."""
    settle_streams()
    try:
        try:
            sys.exit(main(sys.argv[1:]))
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough
        discard(sys.stdout)
        sys.exit(1)
    except (BadInput, OSError, MemoryError) as error:
        complain(f"error: {str(error) or 'there is not enough memory'}")
        sys.exit(2)
    except KeyboardInterrupt:
        complain("interrupted")
        sys.exit(130)
