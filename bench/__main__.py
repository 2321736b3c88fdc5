"""The command: python -m bench SECTION [options]"""

import importlib

import bench
from cli import BadInput, parse, script

SECTIONS = ("tokenizer", "prepare", "training", "prefill", "decoding", "start", "t4", "qat")


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print("\n\n".join(bench.__doc__.split("\n\n")[:3]))  # what it is, the sections, their options
        return 0 if argv else 2
    name, *rest = argv
    if name not in SECTIONS:
        raise BadInput(f"there is no section {name}; there are {', '.join(SECTIONS)}")
    section = importlib.import_module(f"bench.{name}")  # here, as most import torch, and a line of help should not
    options = parse(section.Options, rest, command=f"python -m bench {name}")
    header, rows = section.measure(options)
    bench.show(header, rows, options.markdown)
    return 0


if __name__ == "__main__":
    script(main)
