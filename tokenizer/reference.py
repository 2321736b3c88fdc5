"""The reference: what the `tokenmonster` package, a server in Go behind a few lines of Python, makes of a text."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import tokenizer
from cli import BadInput
from tokenizer.tokenmonster import TokenMonster

# In a process of its own, so that a server that hangs can be ended.
PROGRAM = """
import json, sys, tokenmonster
vocabulary = tokenmonster.load(sys.argv[1])
print(json.dumps([vocabulary.tokenize(text).tolist() for text in json.load(sys.stdin)]))
"""


def reference_encode(path: str | Path, texts: list[str], timeout: float = 600) -> list[list[int]]:
    """The ids that the package gives to non-empty texts.

    Raises BadInput if the package, or the server that it downloads, cannot be had or gives no answer in `timeout`
    seconds.
    """
    try:
        answer = subprocess.run([sys.executable, "-c", PROGRAM, str(Path(path).resolve())],
                                input=json.dumps(texts), capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise BadInput(f"the tokenmonster package gave no answer in {timeout} s") from None
    if answer.returncode:
        reason = (answer.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise BadInput("the tokenmonster package does not run (pip install tokenmonster; it downloads "
                       f"its server at first use): {reason}")
    return json.loads(answer.stdout.splitlines()[-1])


def check(vocabulary: str, files: Sequence[Path]) -> int:
    """Compare our ids with the reference's, document by document; print each first difference, return how many differ.

    A document is a paragraph of a file with the blank lines after it, so a difference is small to look at. Raises
    BadInput for what is not a .vocab file, and OSError for a file that cannot be read.
    """
    path, ours = tokenizer.find(vocabulary), tokenizer.load(vocabulary)
    if not isinstance(ours, TokenMonster):
        raise BadInput(f"{vocabulary}: only a .vocab file can be checked")
    places, texts = [], []
    for file in files:
        line = 1
        for text in re.split(r"(?<=\n\n)(?!\n)", file.read_bytes().decode("utf-8", "replace")):
            if text:
                places.append(f"{file}:{line}")
                texts.append(text)
                line += text.count("\n")
    their_ids = reference_encode(path, texts)
    our_ids = [ids.tolist() for ids in ours.encode_batch(texts)]
    differing = 0
    for place, our, their in zip(places, our_ids, their_ids):
        if our != their:
            differing += 1
            at = len(os.path.commonprefix([our, their]))
            print(f"{place}: after {ours.decode(our[:at])[-40:]!r}: ours {our[at:at + 5]}, theirs {their[at:at + 5]}")
    print(f"{ours.name}: {len(texts)} documents, {sum(len(text.encode()) for text in texts)} bytes, "
          f"{sum(map(len, their_ids))} ids: {differing or 'none'} differ")
    return differing
