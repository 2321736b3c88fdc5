"""The command prints the text and says what it did; what it cannot do is one line."""
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch

import checkpoint
import sample
import tokenizer
from config import Config
from decoding import loops, ready
from decoding.choice import Sampler
from decoding.generate import generate, generate_batch, prompt_ids
from tests.decoding.models import EOS, VOCABULARY, llama
from tokenizer import portable

INPUT = input


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A directory with the checkpoint of a tiny model in out/tiny, as train.py leaves it, and that of a smaller one in
    drafts/small."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(1)  # always the same, for no likeliest token to be so by a rounding
    for path, layers in (("out/tiny", 2), ("drafts/small", 1)):
        model = llama(vocab_size=2050, num_hidden_layers=layers)
        model.lm_head.weight.data[EOS] = 0  # so that it is never the likeliest
        config = Config(name="tiny", model=model.config, block_size=32, tokens_per_step=32)
        state = {"step": 1200, "best_loss": 1.5, "bits_per_byte": 1.25, "tokenizer_sha256": VOCABULARY.sha256,
                 "config": json.loads(json.dumps(asdict(config), default=str))}
        optimizer = torch.optim.AdamW(model.parameters())
        checkpoint.save(folder / path, model, optimizer, state, True, 1)
    return folder


@pytest.fixture
def command(in_process, run, monkeypatch):
    """sample.py in the run's directory."""
    monkeypatch.chdir(run)
    return partial(in_process, sample.main)


def by_hand(run, prompt, count=12, dtype="fp32"):
    """The greedy continuation of a prompt: its ids and their text. In FP32 it is that of the model itself."""
    model = checkpoint.open_trained(run / "out" / "tiny", "latest").model
    model = model if dtype == "fp32" else ready(model, dtype)[0]
    ids = list(generate(model, prompt_ids(VOCABULARY, prompt), count, Sampler(vocab_size=2048)))
    return ids, VOCABULARY.decode(ids)


def test_command(run):
    """In a process of its own the text, and only it, goes to stdout, and what is said of it to stderr."""
    done = subprocess.run([sys.executable, Path(sample.__file__), "--prompt", "Once upon", "--greedy", "True",
                           "--max_new_tokens", "12", "--repetition_penalty", "1"], cwd=run,
                          env=os.environ | {"PYTHONUTF8": "1"}, capture_output=True, encoding="utf-8")
    assert done.returncode == 0 and done.stdout == f"Once upon{by_hand(run, 'Once upon')[1]}\n", done.stderr
    notes = [line for line in done.stderr.splitlines() if not line.startswith("[compiled the loops for fp32 in ")]
    assert len(notes) == 2 and all(note.startswith("[") and note.endswith("]") for note in notes)
    assert str(Path("out", "tiny", "step_00001200")) in notes[0]
    assert "1,200 steps, 1.2500 bits per byte" in notes[0]
    assert re.fullmatch(r"\[12 tokens, \d+ tokens/s\]", notes[1])


@pytest.mark.parametrize("prompt", ["Sum: 1 + 1 = ", "if x:\n    ", "a  ", " "])
def test_command_shows_the_prompt_that_the_model_sees(run, command, prompt):
    """stdout is the prompt, without the space that is left off its end, and the text that follows."""
    code, out, _ = command("--prompt", prompt, "--greedy", "--max_new_tokens", 12, "--repetition_penalty", 1)
    shown = VOCABULARY.decode(prompt_ids(VOCABULARY, prompt)[1:])
    assert code == 0 and out == shown + by_hand(run, prompt)[1] + "\n"


def test_command_notes(command):
    """An empty prompt, one longer than the context, and the number of a sample are notes."""
    code, out, err = command("--max_new_tokens", 3)
    assert code == 0 and out.strip("\n") and "prompt is empty" in err
    long = "many words " * 40
    step_dir = "out/tiny/step_00001200"
    code, out, err = command("--prompt", long, "--checkpoint", step_dir, "--max_new_tokens", 40)
    assert code == 0 and out.startswith(long.strip()) and re.search(r"the prompt has \d+ tokens.* 32\b", err)
    code, out, err = command("--prompt", "a", "--num_samples", 2, "--seed", 5, "--max_new_tokens", 9)
    assert code == 0 and "[sample 1 of 2]" in err and "[sample 2 of 2]" in err
    assert command("--prompt", "a", "--num_samples", 2, "--seed", 5, "--max_new_tokens", 9)[1] == out
    assert command("--prompt", "a", "--num_samples", 2, "--seed", 6, "--max_new_tokens", 9)[1] != out


def test_command_prints_every_sample(run, command):
    """All texts of a seed go to stdout, one after the other, each with the prompt: those of generate_batch."""
    code, out, _ = command("--prompt", "Once upon", "--num_samples", 3, "--seed", 8, "--max_new_tokens", 20)
    model = checkpoint.open_trained(run / "out" / "tiny", "latest").model
    sampler = Sampler(0.8, None, 0.9, 1.1, torch.Generator().manual_seed(8), 2048)
    steps = list(generate_batch(model, prompt_ids(VOCABULARY, "Once upon"), 3, 20, sampler, EOS))
    texts = [VOCABULARY.decode([step[row] for step in steps if step[row] is not None]) for row in range(3)]
    assert code == 0 and out == "".join(f"Once upon{text}\n" for text in texts) and len(set(texts)) == 3


GREEDILY = "--prompt", "Once upon", "--greedy", "--repetition_penalty", 1, "--max_new_tokens"


@pytest.mark.parametrize("options, narrowed", [
    (["--dtype", "bf16"], ["bf16"]), (["--dtype", "fp16"], ["fp16"]), (["--dtype", "int8"], ["int8"]),
    (["--dtype", "int4"], ["int4"]), (["--threads", 1], []), (["--threads", 99, "--dtype", "fp32"], []),
    (["--speculative", "lookup"], []), (["--speculative", "drafts/small", "--draft_tokens", 2], []),
    (["--speculative", "drafts/small", "--dtype", "bf16"], ["bf16"]),
])
def test_command_with_narrow_weights_and_guesses(run, command, options, narrowed):
    """With other types the text is that of the narrowed model; with guesses that of the model alone."""
    code, out, err = command(*GREEDILY, 12, *options)
    assert code == 0 and err.count("1,200 steps") == 1 + ("drafts/small" in options)
    if "--speculative" not in options or not narrowed:  # five rows in bfloat16 are summed in another order than one
        assert out == "Once upon" + by_hand(run, "Once upon", 12, *narrowed)[1] + "\n"
    else:
        assert out.startswith("Once upon") and "[12 tokens" in err


def test_command_without_the_loops(run, command, monkeypatch):
    """Where numba is missing, a line says what would be faster, and the text is the same."""
    monkeypatch.setattr(loops, "missing", lambda: "numba is not installed: pip install numba")
    code, out, err = command(*GREEDILY, 12)
    assert code == 0 and out == "Once upon" + by_hand(run, "Once upon")[1] + "\n"
    assert len([line for line in err.splitlines() if "slower: numba is not installed: pip install numba]" in line]) == 1


def converse(command, monkeypatch, *lines, options=()):
    """sample.py --interactive with these lines as its input: (code, what is written after each, stderr)."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    monkeypatch.setattr("builtins.input", lambda prompt: INPUT(f"\0{prompt}\0"))  # no text has that
    code, out, err = command("--interactive", "--repetition_penalty", 1, "--max_new_tokens", 12, *options)
    begin, *answers, end = out.split("\0> \0")
    assert (begin, end) == ("", "\n")
    return code, answers, err


def test_interactive(run, command, monkeypatch):
    """Prompts are continued, an empty one too, and options change what comes after; refused ones change nothing and
    are one line each. The end of the input is a good end."""
    refused = {"--dtype int8": "--dtype is for the start", "--threads 1": "--threads is for the start",
               "--checkpoint out/tiny": "--checkpoint is for the start", "--colour red": "--colour",
               '--prompt "a': "quotation", "--temperature 0": "temperature is 0", "--max_new_tokens": "max_new_tokens"}
    code, answers, err = converse(command, monkeypatch, "Once upon", "--max_new_tokens 3", "Once upon", *refused, "",
                                  "1 + 1 = ", "--dtype fp32", "--max_new_tokens 5 --greedy False", options=["--greedy"])
    texts = {(prompt, count): prompt + by_hand(run, prompt, count)[1] + "\n"
             for prompt, count in (("Once upon", 12), ("Once upon", 3), ("", 3), ("1 + 1 =", 3))}
    assert code == 0 and answers == [texts["Once upon", 12], "", texts["Once upon", 3], *[""] * len(refused),
                                     texts["", 3], texts["1 + 1 =", 3], "", ""]
    errors = [line for line in err.splitlines() if not line.startswith("[")]
    for line, (given, word) in zip(errors, refused.items(), strict=True):
        assert line.startswith("error: ") and word.lower() in line.lower(), given


def test_interactive_help_and_samples(command, monkeypatch):
    """--help in the conversation lists the options and goes on; more samples can be asked for, not with guesses."""
    code, answers, err = converse(command, monkeypatch, "--help", "--num_samples 2", "a")
    assert code == 0 and "--temperature" in answers[0] and "[sample 2 of 2]" in err and answers[2].count("\n") >= 2
    code, answers, err = converse(command, monkeypatch, "--num_samples 2", "a", options=["--speculative", "lookup"])
    assert code == 0 and "error: " in err and "speculative" in err and "sample 2" not in err and answers[1]


def test_interactive_seed(command, monkeypatch):
    """The same seed given again gives the same text again."""
    code, answers, err = converse(command, monkeypatch, "--seed 5", "a", "--seed 5", "a", "a")
    assert code == 0 and "error" not in err and answers[1] == answers[3] != answers[4]


def test_interactive_command(run):
    """In a process of its own, with its input from a pipe."""
    done = subprocess.run([sys.executable, Path(sample.__file__), "--interactive", "--greedy", "--repetition_penalty",
                           "1"], cwd=run, env=os.environ | {"PYTHONUTF8": "1"}, encoding="utf-8", capture_output=True,
                          input="--max_new_tokens 12\nOnce upon\n--dtype int8\nOnce upon")
    text = "Once upon" + by_hand(run, "Once upon")[1] + "\n"
    assert done.returncode == 0 and done.stdout == f"> > {text}> > {text}> \n", done.stderr
    assert done.stderr.count("error: ") == 1


def test_quiz(command, tmp_path):
    """--quiz counts what the model, taught three answers here, has right, and shows both kinds."""
    model = llama(vocab_size=2048, hidden_size=32)
    taught = ["1 + 2 = 3. So", "2 + 2 = 4\n", "one and one is two; and"]
    texts = [torch.tensor(prompt_ids(VOCABULARY, text) + [EOS]) for text in taught]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        for ids in texts:
            model(ids[None, :-1], ids[None, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {"step": 60, "tokenizer_sha256": VOCABULARY.sha256,
             "config": {"tokenizer": "quickstart-2048", "model": asdict(model.config)}}
    checkpoint.save(tmp_path, model, optimizer, state, False, 1)
    quiz = tmp_path / "quiz.jsonl"
    quiz.write_text('{"prompt": "1 + 2 =", "answer": "3"}\n{"prompt": "2 + 2 =", "answer": "5"}\n'
                    '{"prompt": "one and one is", "answer": "two"}\n')
    code, out, _ = command("--quiz", quiz, "--checkpoint", tmp_path)
    assert code == 0 and out.startswith(f"2 of 3 right ({quiz}).\n")
    assert "right: 1 + 2 = 3;  one and one is two\n" in out and "wrong: 2 + 2 = 4\n" in out


QUESTION = b'{"prompt": "1 + 2 =", "answer": "3"}'


@pytest.mark.parametrize("text, count", [
    (b"\xef\xbb\xbf" + QUESTION + b"\n\n" + QUESTION, 2), (QUESTION + b"\r\n \t\r\n" + QUESTION + b"\r\n", 2),
    (b'{"prompt": "a\xe2\x80\xa8b", "answer": 3}\n\n\n', 1), (b'\n{"prompt": "\\ud800", "answer": "x"}', 1)])
def test_quizzes_of_other_editors(command, tmp_path, text, count):
    """A mark of Windows at the beginning, blank lines, separators within a text, and half a surrogate."""
    (tmp_path / "quiz.jsonl").write_bytes(text)
    code, out, err = command("--quiz", tmp_path / "quiz.jsonl")
    assert code == 0 and f"of {count} right" in out, err


@pytest.mark.parametrize("text, word", [
    (b"", "no questions"), (b"\xef\xbb\xbf\n \n", "no questions"), (QUESTION + b"\nnull", "line 2"), (b"{}", "line 1"),
    (QUESTION + b"\n\xff", "line 2"), (b"[" * 100_000, "nested"), (QUESTION.decode().encode("utf-16"), "line 1"),
    (b'\n\n{"prompt": [], "answer": "3"}', "line 3: prompt")])
def test_no_quiz(command, tmp_path, text, word):
    (tmp_path / "quiz.jsonl").write_bytes(text)
    code, out, err = command("--quiz", tmp_path / "quiz.jsonl")
    assert code == 2 and word in err.splitlines()[-1] and "quiz.jsonl" in err and len(err.splitlines()[-1]) < 500


def test_a_file_that_is_not_utf_8_loses_nothing(run):
    """What Windows does when the output goes to a file: its own encoding has no arrow."""
    done = subprocess.run([sys.executable, Path(sample.__file__), "--prompt", "a \u2192 b", "--max_new_tokens", "3"],
                          cwd=run, env=os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"},
                          capture_output=True)
    assert done.returncode == 0 and done.stdout.decode().startswith("a \u2192 b"), done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="closes a file by its number")
def test_interactive_without_input(run):
    """A closed standard input is one line, an empty one a good end."""
    for stream, code in ((None, 2), (subprocess.DEVNULL, 0)):
        done = subprocess.run([sys.executable, Path(sample.__file__), "--interactive"], cwd=run, capture_output=True,
                              text=True, stdin=stream, preexec_fn=None if stream else lambda: os.close(0))
        assert done.returncode == code and "Traceback" not in done.stderr
        assert code == 0 or "standard input" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("arguments, word", [
    (["--checkpoint", "out/nothing"], "no checkpoint in out"), (["--prompts", "x"], "--prompt"),
    (["--temperature", "0"], "temperature is 0"), (["--top_p", "1.5"], "top_p is 1.5"),
    (["--top_k", "0"], "top_k is 0"), (["--repetition_penalty", "0"], "repetition_penalty"),
    (["--max_new_tokens", "0"], "max_new_tokens"), (["--num_samples", "0"], "num_samples"),
    (["--temperature", "warm"], "--temperature"), (["--quiz", "none.jsonl"], "none.jsonl"),
    (["--quiz", "out/tiny/latest"], "not a quiz"), (["--which", "worst"], "worst"), (["Hello"], "Hello"),
    (["--threads", "0"], "threads is 0"), (["--dtype", "int2"], "int2"),
    (["--speculative", "lookup", "--num_samples", "2"], "one text at a time"),
    (["--draft_tokens", "0"], "draft_tokens is 0"), (["--seed", "-1"], "seed is -1"),
    (["--speculative", "out/nothing"], "no checkpoint in out"),
])
def test_command_refusals(command, arguments, word):
    """What the user can put right is one line on stderr and exit code 2."""
    code, out, err = command(*arguments)
    errors = [line for line in err.splitlines() if not line.startswith("[")]
    assert code == 2 and out == "" and len(errors) == 1
    assert errors[0].startswith("error: ") and word in errors[0]


def test_no_run_and_another_vocabulary(run, command, tmp_path, monkeypatch):
    """No run at all, and a checkpoint of another vocabulary than the one here, are said in one line."""
    step_dir = run / "out" / "tiny" / "step_00001200"
    (tmp_path / "copy").mkdir()
    for file in step_dir.iterdir():
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    state = json.loads((tmp_path / "copy" / "state.json").read_text())
    (tmp_path / "copy" / "state.json").write_text(json.dumps(state | {"tokenizer_sha256": "0"}))
    code, out, err = command("--checkpoint", tmp_path / "copy")
    assert code == 2 and out == "" and err.count("\n") == 1 and "another vocabulary" in err
    monkeypatch.chdir(tmp_path)
    code, out, err = command()
    assert code == 2 and out == "" and err.count("\n") == 1 and "prepare.py" in err


def test_a_draft_of_another_vocabulary(run, command, tmp_path):
    """A draft must have the model's own vocabulary: one whose pieces are others, by a tokenizer.json beside it, is
    refused in one line that names both."""
    step_dir = run / "drafts" / "small" / "step_00001200"
    for file in step_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_bytes(portable.tokenizer_json(VOCABULARY, lossless=True))
    other = tokenizer.load(tmp_path / "tokenizer.json")
    state = json.loads((tmp_path / "state.json").read_text())
    state |= {"tokenizer_sha256": other.sha256, "config": state["config"] | {"tokenizer": "tokenizer.json"}}
    (tmp_path / "state.json").write_text(json.dumps(state))
    code, out, err = command("--speculative", tmp_path)
    errors = [line for line in err.splitlines() if not line.startswith("[")]
    assert code == 2 and out == "" and len(errors) == 1
    assert "another vocabulary" in errors[0] and VOCABULARY.name in errors[0] and other.name in errors[0]
