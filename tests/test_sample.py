"""The filters are transformers', generation draws from what they leave, and the command says what it did."""
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
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation.logits_process import (RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper,
                                                    TopKLogitsWarper, TopPLogitsWarper)

import checkpoint
import sample
import tokenizer
from config import Config
from model import Llama, ModelConfig

VOCABULARY = tokenizer.load("quickstart-2048")
EOS = VOCABULARY.eos_id


def llama(**changes):
    """A tiny model with weights so large that its likeliest tokens change from place to place."""
    model = Llama(ModelConfig(**dict(vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                     num_attention_heads=4, max_position_embeddings=32) | changes))
    for p in model.parameters():
        p.data.uniform_(0.5, 1.5) if p.dim() == 1 else p.data.normal_(0, 1.5 * p.size(1) ** -0.5)
    return model


def greedy_slowly(model, ids, count):
    """Greedy generation without a cache: a text that outgrows the context is seen from its newest half on."""
    context, ids = model.config.max_position_embeddings, list(ids)
    start = max(0, len(ids) - context)
    for _ in range(count):
        if len(ids) - start > context:
            start = len(ids) - max(1, context // 2)
        ids.append(int(model(torch.tensor([ids[start:]]))[0][0, -1].argmax()))
    return ids[-count:]


# -----------------------------------------------------------------------------
# the filters

@pytest.mark.parametrize("case", range(20))
def test_penalty_is_that_of_transformers(rng, case):
    """Seen tokens lose what they lose in transformers, on both sides of 0 to the bit; others nothing."""
    logits, penalty = torch.randn(50) * 5, rng.uniform(0.5, 3)
    ids = [rng.randrange(50) for _ in range(rng.randint(1, 80))]
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids]), logits[None])[0]
    assert torch.equal(sample.penalize_repetition(logits, torch.tensor(sorted(set(ids))), penalty), theirs)
    assert (theirs != logits).sum() == len(set(ids))


@pytest.mark.parametrize("top_k", [None, 1, 3, 20, 500])
@pytest.mark.parametrize("top_p", [None, 1.0, 0.9, 0.3, 1e-6])
def test_filters_are_those_of_transformers(rng, top_k, top_p):
    """Temperature, top-k and top-p, alone or together, leave the logits that transformers leaves."""
    logits, temperature = torch.randn(50) * rng.uniform(0.1, 5), rng.uniform(0.2, 3)
    theirs = TemperatureLogitsWarper(temperature)(None, logits[None])
    if top_k is not None:
        theirs = TopKLogitsWarper(top_k)(None, theirs)
    if top_p is not None and top_p < 1:
        theirs = TopPLogitsWarper(top_p)(None, theirs)
    assert torch.equal(sample.filter_logits(logits, temperature, top_k, top_p), theirs[0])


# -----------------------------------------------------------------------------
# generation

@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_is_that_of_transformers(rng, penalty):
    """Greedy generation gives transformers' tokens, with a penalty too; they may part at a rounded tie."""
    model, prompt = llama(max_position_embeddings=64), [rng.randrange(60) for _ in range(rng.randint(1, 20))]
    c = model.config
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=c.rms_norm_eps, bos_token_id=None,
        eos_token_id=None, rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta})).eval()
    theirs.load_state_dict(model.state_dict())
    wanted = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)),
                             generation_config=GenerationConfig(
                                 do_sample=False, repetition_penalty=penalty, max_new_tokens=40,
                                 output_scores=True, return_dict_in_generate=True))
    ours, tokens = list(sample.generate(model, prompt, 40, repetition_penalty=penalty)), wanted.sequences[0]
    for token, their_token, scores in zip(ours, tokens[len(prompt):].tolist(), wanted.scores, strict=True):
        if token != their_token:
            assert scores.max() - scores[0, token] < 1e-5
            break


@torch.no_grad()
@pytest.mark.parametrize("context, length", [(8, 3), (8, 8), (8, 9), (7, 30), (2, 1), (1, 1), (1, 5)])
def test_past_the_context(rng, context, length):
    """A text or a prompt that outgrows the context goes on from its newest half, or prompt's last part."""
    model = llama(max_position_embeddings=context, fp32_norms=False, fp32_blocks=()).double()  # no near ties
    prompt = [rng.randrange(60) for _ in range(length)]
    assert list(sample.generate(model, prompt, 40)) == greedy_slowly(model, prompt, 40)


def test_stops_at_eos(rng):
    """Generation ends before the end-of-document token, and after max_new_tokens."""
    model = llama()
    free = list(sample.generate(model, [5], 20))
    for eos_id in set(free):
        assert list(sample.generate(model, [5], 20, eos_id=eos_id)) == free[:free.index(eos_id)]
    assert list(sample.generate(model, [5], 4)) == free[:4]


def test_rows_without_a_token(rng):
    """Rows beyond vocab_size are never generated, however likely; it is as if they were not there."""
    model = llama()
    model.lm_head.weight.data[40:] *= 100
    assert max(sample.generate(model, [1], 20)) >= 40
    for temperature in (0.0, 2.0):
        assert max(sample.generate(model, [1], 100, temperature, vocab_size=40)) < 40
    shorter = llama(vocab_size=40)
    weights = model.state_dict()
    weights |= {name: weights[name][:40] for name in ("lm_head.weight", "model.embed_tokens.weight")}
    shorter.load_state_dict(weights)
    drawn = [list(sample.generate(m, [1], 30, 1.0, generator=torch.Generator().manual_seed(3), vocab_size=40))
             for m in (model, shorter)]
    assert drawn[0] == drawn[1]


def test_seed(rng):
    """A seed gives the same text again, and another seed another."""
    model = llama()
    drawn = [list(sample.generate(model, [1], 30, 1.0, generator=torch.Generator().manual_seed(seed)))
             for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.6}])
def test_frequencies(rng, filters):
    """Of 4,000 tokens drawn each comes as often as its probability says, by chi-square.

    The model's embeddings are all alike, and so are its logits at every place.
    """
    model = llama(vocab_size=8)
    model.model.embed_tokens.weight.data[:] = model.model.embed_tokens.weight.data[0].clone()
    temperature = rng.uniform(0.7, 2)
    with torch.no_grad():
        p = (model(torch.tensor([[0]]))[0][0, 0].double() / temperature).exp()
    p = p / p.sum()
    likeliest = p.argsort(descending=True).tolist()
    if filters:
        before = p[likeliest].cumsum(0) - p[likeliest]  # what the likelier tokens have together
        left = likeliest[:3] if "top_k" in filters else [t for t, b in zip(likeliest, before) if b < 0.6]
        p[[t for t in range(8) if t not in left]] = 0
        p = p / p.sum()
    drawn = torch.tensor(list(sample.generate(model, [0], 4000, temperature, **filters)))
    counts = torch.bincount(drawn, minlength=8)
    assert not counts[p == 0].any()
    common = 4000 * p > 5  # chi-square is not for rare ones
    chi_square = ((counts - 4000 * p)[common] ** 2 / (4000 * p)[common]).sum()
    assert chi_square < 60, (counts, 4000 * p)  # 7 degrees of freedom


def test_empty_prompt_is_refused():
    """generate has nothing to begin with."""
    with pytest.raises(ValueError, match="empty"):
        next(sample.generate(llama(), [], 5))


@pytest.mark.parametrize("prompt, normal", [
    ("", ""), ("Hello", "Hello"), ("1 + 1 = ", "1 + 1 ="), ("a  ", "a  "), (" ", " "), ("    ", "    "),
    ("if x:\n    ", "if x:\n    "), ("a\r\nb\rc", "a\nb\nc"), ("\ufb01ne", "fine"), ("a \n", "a \n"),
])
def test_prompt_ids(prompt, normal):
    """A prompt follows an end of document, is normalised as the training text, and loses one last space."""
    assert sample.prompt_ids(VOCABULARY, prompt) == [EOS, *VOCABULARY.encode(normal).tolist()]


# -----------------------------------------------------------------------------
# the command

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A directory with the checkpoint of a tiny model in out/tiny, as train.py leaves it."""
    folder = tmp_path_factory.mktemp("run")
    model = llama(vocab_size=2050)
    model.lm_head.weight.data[EOS] = 0  # so that it is never the likeliest
    config = Config(name="tiny", model=model.config, block_size=32, tokens_per_step=32)
    state = {"step": 1200, "best_loss": 1.5, "bits_per_byte": 1.25, "tokenizer_sha256": VOCABULARY.sha256,
             "config": json.loads(json.dumps(asdict(config), default=str))}
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint.save(folder / "out" / "tiny", model, optimizer, state, True, 1)
    return folder


@pytest.fixture
def command(in_process, run, monkeypatch):
    """sample.py in the run's directory."""
    monkeypatch.chdir(run)
    return partial(in_process, sample.main)


def by_hand(run, prompt, count=12):
    """The prompt and its greedy continuation."""
    model, _ = checkpoint.load_model(checkpoint.find(run / "out" / "tiny"))
    ids = list(sample.generate(model, sample.prompt_ids(VOCABULARY, prompt), count, vocab_size=2048))
    return ids, VOCABULARY.decode(ids)


def test_command(run):
    """In a process of its own the text, and only it, goes to stdout, and what is said of it to stderr."""
    done = subprocess.run([sys.executable, Path(sample.__file__), "--prompt", "Once upon", "--greedy", "True",
                           "--max_new_tokens", "12", "--repetition_penalty", "1"], cwd=run,
                          env=os.environ | {"PYTHONUTF8": "1"}, capture_output=True, encoding="utf-8")
    assert done.returncode == 0 and done.stdout == f"Once upon{by_hand(run, 'Once upon')[1]}\n", done.stderr
    notes = done.stderr.splitlines()
    assert len(notes) == 2 and all(note.startswith("[") and note.endswith("]") for note in notes)
    assert str(Path("out", "tiny", "step_00001200")) in notes[0]
    assert "1,200 steps, 1.2500 bits per byte" in notes[0]
    assert re.fullmatch(r"\[12 tokens, \d+ tokens/s\]", notes[1])


@pytest.mark.parametrize("prompt", ["Sum: 1 + 1 = ", "if x:\n    ", "a  ", " "])
def test_command_shows_the_prompt_that_the_model_sees(run, command, prompt):
    """stdout is the prompt, without the space that is left off its end, and the text that follows."""
    code, out, _ = command("--prompt", prompt, "--greedy", "--max_new_tokens", 12, "--repetition_penalty", 1)
    shown = VOCABULARY.decode(sample.prompt_ids(VOCABULARY, prompt)[1:])
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


def test_quiz(command, tmp_path):
    """--quiz counts what the model, taught three answers here, has right, and shows both kinds."""
    model = llama(vocab_size=2048, hidden_size=32)
    taught = ["1 + 2 = 3. So", "2 + 2 = 4\n", "one and one is two; and"]
    texts = [torch.tensor(sample.prompt_ids(VOCABULARY, text) + [EOS]) for text in taught]
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


@pytest.mark.parametrize("arguments, word", [
    (["--checkpoint", "out/nothing"], "no checkpoint in out"), (["--prompts", "x"], "--prompt"),
    (["--temperature", "0"], "temperature is 0"), (["--top_p", "1.5"], "top_p is 1.5"),
    (["--top_k", "0"], "top_k is 0"), (["--repetition_penalty", "0"], "repetition_penalty"),
    (["--max_new_tokens", "0"], "max_new_tokens"), (["--num_samples", "0"], "num_samples"),
    (["--temperature", "warm"], "--temperature"), (["--quiz", "none.jsonl"], "none.jsonl"),
    (["--quiz", "out/tiny/latest"], "not a quiz"), (["--which", "worst"], "worst"), (["Hello"], "Hello"),
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
