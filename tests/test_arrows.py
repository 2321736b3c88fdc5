"""Who imports whom: commands call rooms, rooms call what lies below them, and nothing calls back.

Each rule is a function of a folder that returns its complaints, one line for each offending import. It is tried on the
project, where it must have none, and on a made-up folder that breaks it.
"""
import ast
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.commands import ROOT

COMMANDS = ("train", "sample", "prepare", "eval", "export", "demo")
FLOORS = (  # from the roof to the cellar; a folder is one room
    COMMANDS,
    ("web", "formats", "bench", "suite"),
    ("run", "decoding", "sources", "data", "checkpoint", "sizing"),
    ("config", "backend", "quant_t4", "lora"),
    ("model", "tokenizer"),
    ("cli",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FOLDERS = ("config", "tokenizer", "sources", "decoding", "formats", "web", "bench")
AT_THE_ROOT = set(FLOOR) - set(FOLDERS)  # the root's files by name, without .py


@dataclass(frozen=True)
class Import:
    """An import of a file of ours in a file of ours, both as paths from the root ("web/page.py")."""

    file: str
    line: int
    imported: str

    def __str__(self):
        return f"{self.file}, line {self.line}, imports {self.imported}"


def room(file: str) -> str:
    """The room a file is in: its folder, or for a file at the root its name."""
    return Path(file).parts[0].removesuffix(".py")


def source_files(root: Path) -> dict[str, Path]:
    """The sources: all Python files at the root and in the project's folders, by their paths from the root."""
    found = [*root.glob("*.py"), *(path for folder in FOLDERS for path in (root / folder).rglob("*.py"))]
    return {path.relative_to(root).as_posix(): path for path in sorted(found)}


def modules(root: Path) -> dict[str, str]:
    """The files by the names they are imported by: {"web.page": "web/page.py", "web": "web/__init__.py"}."""
    return {file.removesuffix(".py").removesuffix("/__init__").replace("/", "."): file for file in source_files(root)}


def imported_names(node: ast.AST, file: str) -> list[str]:
    """The dotted names that a statement imports; "a.b" of "from a import b", which may be a module or not."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        above = Path(file).parts[:-node.level] if node.level else ()  # the folder that "from . import b" means
        return [".".join([*above, *filter(None, [node.module]), alias.name]) for alias in node.names]
    return []


def files_of(name: str, file: str, known: dict[str, str]) -> list[str]:
    """The files that are read when `file` imports a dotted name.

    That is the module itself, and every package it is in, but not the package that `file` is in too: that has been
    read, at least in part, before any of its files.
    """
    parts = name.split(".")
    prefixes = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    found = [prefix for prefix in prefixes if prefix in known]
    own = ".".join(Path(file).parts[:-1])
    return [known[prefix] for prefix in found if prefix == found[-1] or not f"{own}.".startswith(f"{prefix}.")]


def imports(root: Path) -> list[Import]:
    """All imports of ours in ours, those inside functions too."""
    known, found = modules(root), []
    for file, path in source_files(root).items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
            for name in imported_names(node, file):
                found += [Import(file, node.lineno, imported) for imported in files_of(name, file, known)]
    return list(dict.fromkeys(found))  # each once, though several names come from one file


# -----------------------------------------------------------------------------
# the rules

def circles(root: Path) -> list[str]:
    """No file imports itself by way of others."""
    graph = {}
    for arrow in imports(root):
        graph.setdefault(arrow.file, set()).add(arrow.imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return ["a circle of imports: " + " -> ".join(reversed(error.args[1]))]
    return []


def imported_commands(root: Path) -> list[str]:
    """A command is not a library: nothing imports one, nor what `python -m` starts."""
    return [f"{arrow}, which is a command" for arrow in imports(root)
            if arrow.imported.endswith("/__main__.py") or arrow.imported in {f"{name}.py" for name in COMMANDS}]


def unfounded(root: Path) -> list[str]:
    """The model and the tokenizers stand on the command line's errors alone."""
    allowed = {"model": ("cli",), "tokenizer": ("cli", "tokenizer")}
    return [f"{arrow}; a file there imports nothing of ours but {', '.join(allowed[room(arrow.file)])}"
            for arrow in imports(root)
            if room(arrow.file) in allowed and room(arrow.imported) not in allowed[room(arrow.file)]]


def upward(root: Path) -> list[str]:
    """What a file imports is on its own floor or below."""
    placed = [arrow for arrow in imports(root) if {room(arrow.file), room(arrow.imported)} <= set(FLOOR)]
    return [f"{arrow}, which is on a floor above" for arrow in placed
            if FLOOR[room(arrow.imported)] < FLOOR[room(arrow.file)]]


def strangers(root: Path) -> list[str]:
    """The root holds the 16 files of the plan and no other; a seventeenth would need a room."""
    files = sorted(path.stem for path in root.glob("*.py"))
    complaints = [f"{name}.py is at the root, and is not one of {', '.join(sorted(AT_THE_ROOT))}"
                  for name in files if name not in AT_THE_ROOT]
    if len(files) > 16:
        complaints.append(f"{len(files)} Python files are at the root; 16 are enough")
    return complaints


# -----------------------------------------------------------------------------
# the project keeps them

RULES = [circles, imported_commands, unfounded, upward, strangers]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_project_keeps_the_rule(rule):
    complaints = rule(ROOT)
    assert not complaints, "\n".join([rule.__doc__, *complaints])


def test_the_project_is_read():
    """The rules have something to look at: every room of the plan, and imports of every form."""
    files, arrows = source_files(ROOT), {(arrow.file, arrow.imported) for arrow in imports(ROOT)}
    assert {room(file) for file in files} >= set(FLOOR) - {"lora"}
    assert {("train.py", "model.py"), ("checkpoint.py", "tokenizer/__init__.py"), ("config/__init__.py", "cli.py"),
            ("config/quickstart.py", "config/__init__.py"),
            ("tokenizer/__init__.py", "tokenizer/portable.py")} <= arrows


# -----------------------------------------------------------------------------
# and a folder that breaks them is found out

@pytest.fixture
def tree(tmp_path):
    """Writes a folder of Python files from {path: text}."""
    def write(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path
    return write


@pytest.mark.parametrize("files, circle", [
    ({"data.py": "import run", "run.py": "import data"}, {"data.py", "run.py"}),
    ({"run.py": "def late():\n    from decoding import choice", "sources/embedded.py": "from run import x",
      "decoding/choice.py": "if True:\n    import sources.embedded as text"},
     {"run.py", "decoding/choice.py", "sources/embedded.py"}),
    ({"web/__init__.py": "from web.page import x", "web/page.py": "from web import y"},
     {"web/__init__.py", "web/page.py"}),
    ({"web/page.py": "from . import tabs", "web/tabs.py": "from .page import x"}, {"web/page.py", "web/tabs.py"}),
    # Whoever imports a file of a package reads its __init__ before.
    ({"tokenizer/__init__.py": "import cli", "tokenizer/portable.py": "", "cli.py": "import tokenizer.portable"},
     {"tokenizer/__init__.py", "cli.py"}),
    ({"config/a.py": "from config.a import config"}, {"config/a.py"}),
])
def test_a_circle(tree, files, circle):
    [complaint] = circles(tree(files))
    named = complaint.removeprefix("a circle of imports: ").split(" -> ")
    assert named[0] == named[-1] and set(named) == circle and len(named) == len(circle) + 1
    for file, imported in zip(named, named[1:]):  # in the direction of the imports
        assert (file, imported) in [(arrow.file, arrow.imported) for arrow in imports(tree(files))]


def test_no_circle(tree):
    """Files of a package may import each other, and the package its files; a name that we have not is no file."""
    assert circles(tree({
        "tokenizer/__init__.py": "from tokenizer import portable\nfrom tokenizer.tokenmonster import A",
        "tokenizer/portable.py": "from tokenizer.tokenmonster import A", "tokenizer/tokenmonster.py": "import numpy",
        "config/__init__.py": "", "config/a.py": "from config import Config", "config/b.py": "from config.a import x",
        "run.py": "import tokenizer, datasets\nfrom config import data_missing"})) == []


def test_a_command_that_is_imported(tree):
    root = tree({"train.py": "", "eval.py": "import re\nimport train, data", "run.py": "import data", "data.py": "",
                 "bench/__main__.py": "from bench import start", "web/page.py": "from bench.__main__ import main",
                 "bench/start.py": "def f():\n    from eval import x, y",
                 "tokenizer/__main__.py": "", "tokenizer/reference.py": "from . import __main__"})
    assert imported_commands(root) == [
        "bench/start.py, line 2, imports eval.py, which is a command",
        "eval.py, line 2, imports train.py, which is a command",
        "tokenizer/reference.py, line 1, imports tokenizer/__main__.py, which is a command",
        "web/page.py, line 1, imports bench/__main__.py, which is a command"]


def test_a_model_that_knows_too_much(tree):
    root = tree({"model.py": "import torch\nfrom cli import BadInput\nimport backend", "backend.py": "import helpers",
                 "tokenizer/__init__.py": "from tokenizer import portable\nfrom cli import BadInput",
                 "tokenizer/portable.py": "def f():\n    from config import load", "config/__init__.py": "",
                 "cli.py": "", "helpers.py": ""})
    assert unfounded(root) == [
        "model.py, line 3, imports backend.py; a file there imports nothing of ours but cli",
        "tokenizer/portable.py, line 2, imports config/__init__.py; a file there imports nothing of ours but cli, "
        "tokenizer"]


def test_an_arrow_that_points_up(tree):
    """On a floor and downwards all is well."""
    root = tree({"demo.py": "import web.page", "web/page.py": "import run\nimport suite", "suite.py": "",
                 "run.py": "import checkpoint\nfrom formats import card", "formats/card.py": "import run, helpers",
                 "checkpoint.py": "import backend", "model.py": "", "cli.py": "import run", "helpers.py": "",
                 "backend.py": "import model\nif 1:\n    from decoding.choice import x",
                 "decoding/choice.py": "import cli"})
    assert upward(root) == [
        "backend.py, line 3, imports decoding/choice.py, which is on a floor above",
        "cli.py, line 1, imports run.py, which is on a floor above",
        "run.py, line 2, imports formats/card.py, which is on a floor above"]


def test_a_stranger_at_the_root(tree):
    """One more file than the plan has; and too many, whatever they are called."""
    root = tree({"model.py": "", "helpers.py": "", "web/helpers.py": ""})
    [complaint] = strangers(root)
    assert complaint.startswith("helpers.py is at the root") and "quant_t4" in complaint
    assert len(AT_THE_ROOT) == 16
    complaints = strangers(tree({f"{name}.py": "" for name in AT_THE_ROOT}))  # beside the stranger
    assert complaints[1:] == ["17 Python files are at the root; 16 are enough"]
