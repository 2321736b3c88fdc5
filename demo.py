"""Look inside tiny models in the browser: python demo.py [--checkpoint out/NAME ...] [--hf PATH_OR_NAME ...]

The page has six tabs, over the runs under out/ and over causal models of transformers: text as it is written, what
else each token could have been, temperatures side by side, two models against each other, a chat, and the attention
inside. It is served to this machine alone and asks nothing of any other.

Here are the options; the page is web/page.py, and what each tab does is in web/tabs.py.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import backend
import checkpoint
from cli import BadInput, brief, parse, script
from web import page
from web.shelf import Shelf, our_entry, their_entry

VOTES = Path("out/arena.sqlite")


@dataclass
class Options:
    """Look inside models in the browser."""

    checkpoint: tuple[Path, ...] = ()
    """Runs (out/NAME) or step directories; every run under out/ if none."""
    hf: tuple[str, ...] = ()
    """Models to put beside them: folders, or OWNER/NAME on the hub, that transformers loads."""
    trust_remote_code: bool = False
    """Let --hf run the code that comes with a model, as the exact tokenizer of an export needs."""
    port: int = 7860
    """Port on 127.0.0.1 to serve the page at."""
    backend: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to run the models on."""

    def __post_init__(self):
        """Raises ValueError if the port is out of range."""
        if not 1 <= self.port < 2**16:
            raise ValueError(f"port is {self.port}; it must be from 1 to 65535")


def find_models(options: Options) -> Shelf:
    """The models that the command line names. If it names no run: every run under out/ that can be used, with a note
    about each that cannot. Raises BadInput if that leaves no model at all.
    """
    device = backend.pick(options.backend, "fp32", tpu=False)
    entries = [our_entry(path, device) for path in options.checkpoint]
    if not entries:
        for pointer in sorted(Path("out").glob("*/latest")):
            try:
                entries.append(our_entry(pointer.parent, device))
            except (ValueError, OSError) as error:  # ValueError: BadInput, and files that are not text
                print(f"[{pointer.parent} is left out: {brief(error)}]", file=sys.stderr)
    entries += [their_entry(name, options.trust_remote_code, device) for name in options.hf]
    if not entries:
        checkpoint.newest_run()  # if there is no run, this raises BadInput and says how to make one
        raise BadInput("none of the runs under out/ can be used")
    return Shelf(entries)


def main(argv: list[str]):
    """Serve the page until Ctrl-C."""
    options = parse(Options, argv)
    if page.gr is None:
        raise BadInput('the demo needs gradio: pip install ".[web]"')
    page.serve(find_models(options), VOTES, options.port)


if __name__ == "__main__":
    script(main)
