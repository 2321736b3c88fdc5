"""The scripts as a user runs them: whole processes, in a directory of their own."""
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def start_python(*arguments, cwd, **options):
    """Start Python with these arguments; its output is collected as text."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *map(str, arguments)], cwd=cwd, text=True,
                            env={**os.environ, "PYTHONUNBUFFERED": "1", **options.pop("env", {})}, **streams | options)


def start(script, *arguments, cwd, **options):
    """Start a script of the project."""
    return start_python(ROOT / script, *arguments, cwd=cwd, **options)


def start_module(name, *arguments, cwd, **options):
    """Start `python -m name`, a package of the project, from any directory."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return start_python("-m", name, *arguments, cwd=cwd, env={"PYTHONPATH": path, **options.pop("env", {})}, **options)


def ended(process):
    """Wait for a process that was started here -> (exit code, stdout, stderr)."""
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def run(script, *arguments, cwd, **options):
    """Run a script to its end -> (exit code, stdout, stderr)."""
    return ended(start(script, *arguments, cwd=cwd, **options))


def run_module(name, *arguments, cwd, **options):
    """Run `python -m name` to its end -> (exit code, stdout, stderr)."""
    return ended(start_module(name, *arguments, cwd=cwd, **options))


def refused(result, *words):
    """Assert that a script ended as on bad input: code 2, one line on stderr that says these words, no traceback."""
    code, _, err = result
    assert code == 2, result
    assert len(err.strip().splitlines()) == 1 and err.startswith("error: "), err
    for word in words:
        assert word in err, (word, err)


def metrics(run_dir):
    """metrics.jsonl of a run, without the one figure that depends on the clock."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "tokens_per_second"} for line in lines]
