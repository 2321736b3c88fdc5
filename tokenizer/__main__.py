"""Compare our ids with the tokenmonster package's: python -m tokenizer check FILE... [--vocab NAME]

The exit code is 0 if all ids are the same, 1 if some differ, 2 if they cannot be compared.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from cli import parse, script
from tokenizer.reference import check


@dataclass
class Options:
    """Compare the ids of texts with the tokenmonster package's, paragraph by paragraph."""

    command: tyro.conf.Positional[Literal["check"]]
    """The only command so far."""
    files: tyro.conf.Positional[tuple[Path, ...]]
    """Text in UTF-8."""
    vocab: str = "quickstart-2048"
    """Name or path of a .vocab file."""


def main(argv: list[str]) -> int:
    options = parse(Options, argv, command="python -m tokenizer")
    return 1 if check(options.vocab, options.files) else 0


if __name__ == "__main__":
    script(main)
