"""The command line: options from a dataclass, errors in one line, and Ctrl-C as a question.

Every command is a function `main(argv)`, and `script(main)` runs it. An error that the user can fix is a BadInput: one
line on stderr, and exit code 2. The tyro library makes the options from a dataclass, so `--help` lists every field with
its docstring.
"""

import contextlib
import io
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import TypeVar

import tyro

Options = TypeVar("Options")


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


def parse(cls: type[Options], argv: list[str], default: Options | None = None) -> Options:
    """Make a `cls` (a dataclass) from the command line `argv`. Fields that it does not name come from `default`.

    Raises BadInput with tyro's own message on one line; it suggests the nearest option that exists.
    """
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            return tyro.cli(cls, args=spell_out(cls, argv), default=default, use_underscores=True,
                            config=(tyro.conf.FlagConversionOff,))
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        plain = re.sub(r"\x1b\[[\d;]*m", "", message.getvalue())  # on a terminal the message is in colour
        lines = [line.strip("│╭╮╰╯─ \n") for line in plain.splitlines()[1:]]  # the first line is the frame's title
        text = " ".join(line for line in lines if line).partition("For full helptext")[0]
        raise BadInput(text.strip().removeprefix(f"Error parsing {cls.__name__}: ")) from None


class StopRequest:
    """Ctrl-C and other signals as a question, which the work answers at a moment when stopping loses nothing.

    An exception raised at any moment may land in an object's destructor or in a fork, where Python drops it, or in the
    middle of an optimizer step. So the handler only takes a note, and the work looks at `received` between two steps. A
    second Ctrl-C interrupts at once, unless `insistent` is False: with several processes, one must not leave the others
    waiting in the middle of a step.
    """

    def __init__(self, *signals: signal.Signals, insistent: bool = True):
        self.received: list[signal.Signals] = []
        self.insistent = insistent
        self.earlier = {number: signal.signal(number, self.take_note) for number in signals}

    def take_note(self, number: int, frame: object):
        """The signal handler."""
        self.received.append(signal.Signals(number))
        if self.insistent:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def check(self):
        """Raise KeyboardInterrupt if somebody has asked to stop."""
        if self.received:
            raise KeyboardInterrupt

    def __enter__(self) -> "StopRequest":
        return self

    def __exit__(self, *_: object):
        for number, handler in self.earlier.items():
            signal.signal(number, handler)


def script(main: Callable[[list[str]], int | None]):
    """Run main(argv) as a command. An error that the user can fix is one line on stderr, and exit code 2."""
    try:
        sys.exit(main(sys.argv[1:]))
    except (BadInput, OSError) as error:
        if isinstance(error, BrokenPipeError):  # `| head` has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
