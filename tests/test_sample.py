"""Generation draws from what the filters leave, and the command says what it did."""
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
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import checkpoint
import decode
import portable
import sample
import tokenizer
from choice import Sampler
from config import Config
from model import Llama, ModelConfig

VOCABULARY = tokenizer.load("quickstart-2048")
EOS = VOCABULARY.eos_id
INPUT = input


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


@torch.no_grad()
def batch_slowly(model, prompt, rows, count, sampler, vocab_size):
    """generate_batch without a cache or an end: each text is read anew at every step, with its newest half where it
    has outgrown the context. A list of rows of ids."""
    context, texts = model.config.max_position_embeddings, [list(prompt) for _ in range(rows)]
    start = max(0, len(prompt) - context)
    for _ in range(count):
        if len(texts[0]) - start > context:
            start = len(texts[0]) - max(1, context // 2)
        logits = torch.stack([model(torch.tensor([text[start:]]))[0][0, -1, :vocab_size].float() for text in texts])
        seen = torch.zeros(logits.shape, dtype=torch.bool).scatter(1, torch.tensor(texts), True)
        for text, token in zip(texts, sampler.choose(logits, seen, sampler.chance(len(texts))).tolist()):
            text.append(token)
    return [text[-count:] for text in texts]


IN_FLOAT64 = {"fp32_norms": False, "fp32_blocks": ()}  # where no two logits are equal but for rounding


@pytest.mark.parametrize("context, length", [(64, 5), (16, 3), (8, 20), (2, 1), (1, 3)])
def test_batch(rng, context, length):
    """All texts of a batch are what they are without a cache and a shared beginning, past the context too; one that
    comes to its end goes on as None, and with the last of them the batch ends."""
    model, prompt = llama(max_position_embeddings=context, **IN_FLOAT64).double(), [7] * (length - 1) + [3]
    settings = dict(temperature=1.5, top_k=rng.choice([None, 9]), top_p=rng.choice([None, 0.9]),
                    repetition_penalty=rng.choice([1.0, 1.5]))
    seed, vocab_size = rng.randrange(2**31), rng.choice([None, 40])
    sampler = Sampler(**settings, generator=torch.Generator().manual_seed(seed))
    rows = batch_slowly(model, prompt, 3, 30, sampler, vocab_size)
    for eos_id in (None, rows[0][0], rows[1][-1], rng.randrange(40)):
        generator = torch.Generator().manual_seed(seed)
        ours = list(sample.generate_batch(model, prompt, 3, 30, eos_id=eos_id, vocab_size=vocab_size,
                                          generator=generator, **settings))
        ends = [row.index(eos_id) if eos_id in row else 30 for row in rows]
        assert ours == [[row[i] if i < end else None for row, end in zip(rows, ends)] for i in range(max(ends))]


def test_greedy_batch(rng):
    """Greedy, every row of a batch is what generate writes."""
    model = llama(**IN_FLOAT64).double()
    for eos_id in (None, rng.randrange(60)):
        one = list(sample.generate(model, [1, 2, 3], 70, eos_id=eos_id))
        assert list(sample.generate_batch(model, [1, 2, 3], 4, 70, eos_id=eos_id)) == [[token] * 4 for token in one]


def shapes_of(model):
    """A list that grows with every call of the model: the shape of its input."""
    shapes = []
    model.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    return shapes


def test_what_is_read(rng):
    """A prompt is read once for all texts, and then one token of each; past the context the newest half of each. The
    head sees the last token alone."""
    model = llama()  # of 32
    shapes, of_the_head = shapes_of(model), shapes_of(model.lm_head)
    list(sample.generate_batch(model, list(range(30)), 3, 22, 3.0, generator=torch.Generator().manual_seed(1)))
    assert shapes == [(1, 30), (3, 1), (3, 1), (3, 16)] + 16 * [(3, 1)] + [(3, 16), (3, 1)]
    assert [shape[:-1] for shape in of_the_head] == [(rows, 1) for rows, _ in shapes]
    shapes.clear()
    list(sample.generate(model, range(50), 3))
    assert shapes == [(1, 32), (1, 16), (1, 1)]


@torch.no_grad()
@pytest.mark.parametrize("case", range(5))
def test_reader(rng, case):
    """A Reader reads what is new and what has changed, and nothing else, and its logits are those of the whole text."""
    model, rows = llama(**IN_FLOAT64).double(), rng.randint(1, 3)
    shapes, reader = shapes_of(model), sample.Reader(model)
    texts = [[rng.randrange(60) for _ in range(rng.randint(1, 8))]] * rows
    reader.read(texts)
    for _ in range(20):
        kept, count = rng.randint(max(1, len(texts[0]) - 4), len(texts[0])), rng.randint(1, 5)
        if kept + count > 32:
            continue
        texts = [text[:kept] + [rng.randrange(60) for _ in range(count)] for text in texts]
        shapes.clear()
        logits = reader.read(texts, count)
        assert shapes == [(rows, count)] and reader.room(len(texts[0])) == 32 - len(texts[0])
        assert logits.dtype == torch.float32 and logits.shape == (rows, count, 60)
        assert (logits - model(torch.tensor(texts))[0][:, -count:]).abs().max() < 1e-5


@torch.no_grad()
def test_room(rng):
    """room() more tokens are read with the others still in mind; one more, and the newest half is read again."""
    model = llama()
    shapes = shapes_of(model)
    for length in (5, 32, 45):
        reader, text = sample.Reader(model), [rng.randrange(60) for _ in range(80)]
        assert max(0, reader.room(length)) == max(0, 32 - length)
        reader.read([text[:length]])
        room = reader.room(length)
        assert room == max(0, 32 - length)
        shapes.clear()
        reader.read([text[:length + room]], 1)
        assert shapes == [(1, max(1, room))] and reader.room(length + room) == 0
        reader.read([text[:length + room + 1]])
        assert shapes[1:] == [(1, 16)] and reader.room(length + room + 1) == 16


def test_empty_prompt_is_refused():
    """generate has nothing to begin with."""
    with pytest.raises(ValueError, match="empty"):
        next(sample.generate(llama(), [], 5))
    with pytest.raises(ValueError, match="empty"):
        next(sample.generate_batch(llama(), torch.tensor([]), 2, 5))


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


def by_hand(run, prompt, count=12, dtype="fp32", round_inputs=False):
    """The greedy continuation of a prompt: its ids and their text."""
    model, _ = checkpoint.load_model(checkpoint.find(run / "out" / "tiny"))
    model = decode.narrow(model, dtype, round_inputs)
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


def test_command_prints_every_sample(run, command):
    """All texts of a seed go to stdout, one after the other, each with the prompt: those of generate_batch."""
    code, out, _ = command("--prompt", "Once upon", "--num_samples", 3, "--seed", 8, "--max_new_tokens", 20)
    model, _ = checkpoint.load_model(checkpoint.find(run / "out" / "tiny"))
    steps = list(sample.generate_batch(
        decode.narrow(model, "fp32"), sample.prompt_ids(VOCABULARY, "Once upon"), 3, 20, 0.8, None, 0.9, 1.1, EOS, 2048,
        torch.Generator().manual_seed(8)))
    texts = [VOCABULARY.decode([step[row] for step in steps if step[row] is not None]) for row in range(3)]
    assert code == 0 and out == "".join(f"Once upon{text}\n" for text in texts) and len(set(texts)) == 3


GREEDILY = "--prompt", "Once upon", "--greedy", "--repetition_penalty", 1, "--max_new_tokens"


@pytest.mark.parametrize("options, narrowed", [
    (["--dtype", "bf16"], ["bf16"]), (["--dtype", "fp16"], ["fp16"]), (["--dtype", "int8"], ["int8"]),
    (["--dtype", "int8", "--int8_activations", "--backend", "cpu"], ["int8", True]),
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


def test_command_compiles(run, command, monkeypatch, tmp_path):
    """--compile compiles, and so does a long text without being told, several texts that are longer; where that fails,
    a line says why. The text is the same."""
    text = "Once upon" + by_hand(run, "Once upon", 40)[1] + "\n"
    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", partial(torch_compile, backend="eager"))
    monkeypatch.setattr(decode, "COMPILE_FROM", 41)
    for options, compiles in ((["--compile"], True), ([], False), (["--compile", "False"], False)):
        code, out, err = command(*GREEDILY, 40, *options)
        assert code == 0 and out == text and len(re.findall(r"^\[compiled in \d+ s\]$", err, re.M)) == compiles
    monkeypatch.setattr(decode, "COMPILE_FROM", 40)
    code, out, err = command(*GREEDILY, 40)
    assert code == 0 and out == text and "[compiled in " in err
    for pays_from in (40, 41):
        monkeypatch.setattr(decode, "COMPILE_SEVERAL_FROM", pays_from)
        code, out, err = command(*GREEDILY, 40, "--num_samples", 2)
        assert code == 0 and out == 2 * text and ("[compiled in " in err) == (pays_from == 40)
    monkeypatch.setattr(torch, "compile", partial(torch_compile, backend=lambda *_: open(tmp_path / "nowhere")))
    code, out, err = command(*GREEDILY, 40)
    assert code == 0 and out == text
    assert re.search(r"^\[torch.compile failed, going on without it: .+\]$", err, re.M)


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
    refused = {"--dtype int8": "--dtype is for the start", "--compile": "--compile is for the start",
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
    (["--int8_activations"], "int8_activations is for --dtype int8"), (["--dtype", "int4"], "int4"),
    (["--int8_activations", "--dtype", "bf16"], "int8_activations is for --dtype int8"),
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
