"""Generate text: python sample.py --prompt "..." [--checkpoint out/NAME]

A Llama is asked for one token at a time. The prompt is read in one pass; the keys and values of all tokens so far are
kept (the KV cache), so each step after it costs one token's work. Between the logits and the choice stand the usual
filters, in HF's order and with HF's definitions: repetition penalty, temperature, top-k, top-p.
"""

import json
import re
import shlex
import sys
import time
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

import backend
import checkpoint
import decode
from choice import Sampler
from config import BadInput, parse, script
from model import Llama


@dataclass
class Options:
    """Generate text from a trained model."""

    prompt: str = ""
    """Text to continue; empty begins a new document."""
    checkpoint: Path | None = None
    """A run (out/NAME) or one of its step directories; the newest run under out/ if None."""
    which: Literal["best", "latest"] = "best"
    """Which of a run's checkpoints."""
    max_new_tokens: int = 150
    """Tokens to generate at most; the end-of-document token ends a text sooner."""
    temperature: float = 0.8
    """Divides the logits: under 1 sharpens the distribution. The Stentor3 card recommends 0.5 to 0.8."""
    top_k: int | None = None
    """Keep the k likeliest tokens; all if None."""
    top_p: float | None = 0.9
    """Keep the likeliest tokens that together reach this probability; all if None."""
    repetition_penalty: float = 1.1
    """Divides positive logits of tokens seen before, multiplies negative ones (Keskar et al. 2019); 1 is off."""
    greedy: bool = False
    """Always take the likeliest token (of the penalised logits)."""
    num_samples: int = 1
    """Texts to generate, all at once."""
    seed: int | None = None
    """Of the random choices; a new one every time if None."""
    quiz: Path | None = None
    """Instead of a prompt, a JSONL file of {"prompt", "answer"}: print the share that the model gets right."""
    interactive: bool = False
    """Ask for prompts, one after the other. A line of options (--temperature 0.5) changes those; Ctrl-D ends."""
    backend: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to generate on."""
    dtype: Literal["fp32", "bf16", "fp16", "int8"] = "fp32"
    """What the weights of the matrix products are kept in (decode.py)."""
    int8_activations: bool = False
    """With int8, round what the weights are multiplied with too (dynamic quantization): quicker for prompts and
    batches, and on a CPU only."""
    compile: bool | None = None
    """Use torch.compile: seconds for each layer, the first time, and then several times the speed; if None, for
    --max_new_tokens from 4,000 on, or 8,000 with several samples."""
    speculative: str | None = None
    """Have tokens guessed, and several of them checked in one pass: by a smaller model of the same vocabulary (a run,
    out/DRAFT), or with "lookup" by what followed the same words earlier in the text."""
    draft_tokens: int = 4
    """Tokens to guess at a time."""

    def __post_init__(self):
        """Raises ValueError, in one line, for values that no distribution has."""
        checks = {"max_new_tokens": self.max_new_tokens >= 1, "temperature": self.temperature > 0,
                  "top_k": self.top_k is None or self.top_k >= 1, "top_p": self.top_p is None or 0 < self.top_p <= 1,
                  "repetition_penalty": self.repetition_penalty > 0, "num_samples": self.num_samples >= 1,
                  "draft_tokens": self.draft_tokens >= 1,
                  "seed": self.seed is None or 0 <= self.seed < 2**63}
        for name, good in checks.items():
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)}, which is out of range"
                                 + ("; --greedy takes the likeliest token" if name == "temperature" else ""))
        if self.int8_activations and self.dtype != "int8":
            raise ValueError("int8_activations is for --dtype int8")
        if self.interactive and (self.prompt or self.quiz):
            raise ValueError("interactive asks for prompts: leave out --prompt and --quiz")
        if self.speculative and self.num_samples > 1:
            raise ValueError("speculative writes one text at a time: leave out --num_samples")


def as_ids(input_ids) -> list[int]:
    """input_ids (T,), a list or tensor, as a list. Raises ValueError for an empty prompt."""
    ids = torch.as_tensor(input_ids, dtype=torch.int64).flatten().tolist()
    if not ids:
        raise ValueError("input_ids is empty; begin a document with the end-of-document token")
    return ids


class Reader:
    """A model that has read some texts of one length, and what it remembers of them (its cache)."""

    def __init__(self, model: Llama):
        self.model, self.context = model, model.config.max_position_embeddings
        self.device = model.lm_head.weight.device
        self.start, self.cache = 0, None  # where in the texts its memory begins

    def room(self, length: int) -> int:
        """How many tokens more than `length` can be read before the oldest have to be forgotten."""
        return max(0, self.start + self.context - length) if self.cache else self.context - length

    def unread(self, texts: list[list[int]], count: int = 1):
        """The ids (B, T) of B texts that have not been read, or of one if nothing has been and all are alike.

        The texts may differ from those read before in their last `count` ids, and be longer or shorter. One that
        outgrows the context is read again from its newest half on.
        """
        length = len(texts[0])
        if not self.cache or not count <= length - self.start <= self.context:
            keep = max(1, self.context // 2) if self.cache else self.context
            self.start, self.cache = max(0, length - keep), self.model.new_cache(self.context)
        self.cache.length = min(self.cache.length, length - self.start - count)
        fresh = [text[self.start + self.cache.length:] for text in texts]
        once = self.cache.length == 0 and all(text == fresh[0] for text in fresh)
        return torch.tensor(fresh[:1] if once else fresh, device=self.device)

    def read(self, texts: list[list[int]], count: int = 1):
        """The logits (B, count, V), FP32 on the CPU, that follow each of the last `count` ids of B texts (`unread`)."""
        ids = self.unread(texts, count)
        logits, _ = self.model(ids, cache=self.cache, logits_to_keep=count)
        self.cache.repeat(len(texts) // len(ids))
        return logits.float().cpu().expand(len(texts), -1, -1)

    def choose(self, texts: list[list[int]], sampler: Sampler, seen):
        """The token that each of B texts goes on with, (B,) int64. What is read gets its mark in `seen` (B, V) bool."""
        ids = self.unread(texts)
        seen.scatter_(1, ids.expand(len(texts), -1), True)
        chance = sampler.chance(len(texts)).to(self.device)
        if isinstance(self.model, decode.Compiled) and self.model.has_program(ids, self.cache):
            return self.model.choose(ids, self.cache, sampler, seen, chance)
        logits, _ = self.model(ids, cache=self.cache, logits_to_keep=1)
        self.cache.repeat(len(texts) // len(ids))
        return sampler.choose(logits[:, -1].float().expand(len(texts), -1), seen, chance)


@torch.no_grad()
def generate_batch(model: Llama, input_ids, num_samples: int, max_new_tokens: int, temperature: float = 0.0,
                   top_k: int | None = None, top_p: float | None = None, repetition_penalty: float = 1.0,
                   eos_id: int | None = None, vocab_size: int | None = None,
                   generator: torch.Generator | None = None) -> Iterator[list[int | None]]:
    """Yield num_samples ids at a time, the next of as many texts that begin with input_ids (T,), a list or tensor.

    A text that has come to eos_id goes on with None, until all have or max_new_tokens have been yielded. temperature 0
    takes the likeliest token. vocab_size leaves out the rows of the model that no token has. A text that outgrows the
    context goes on from the newest half of it. The generator must be on the CPU: so a seed gives the same text whatever
    device computed the logits. Raises ValueError for an empty prompt.
    """
    prompt = as_ids(input_ids)
    sampler = Sampler(temperature, top_k, top_p, repetition_penalty, generator, vocab_size)
    reader, texts = Reader(model), [list(prompt) for _ in range(num_samples)]
    seen = torch.zeros(num_samples, model.config.vocab_size, dtype=torch.bool, device=reader.device)
    seen[:, prompt] = True
    ended = set()
    for _ in range(max_new_tokens):
        for text, token in zip(texts, reader.choose(texts, sampler, seen).tolist()):
            text.append(token)
        ended |= {row for row, text in enumerate(texts) if text[-1] == eos_id}
        if len(ended) == num_samples:
            return
        yield [None if row in ended else text[-1] for row, text in enumerate(texts)]


def generate(model: Llama, input_ids, max_new_tokens: int, *settings, **more) -> Iterator[int]:
    """Yield up to max_new_tokens ids that follow input_ids (T,), one at a time, until eos_id comes.

    The settings, and what is raised, are those of `generate_batch`.
    """
    for [token] in generate_batch(model, input_ids, 1, max_new_tokens, *settings, **more):
        yield token


def clean_prompt(prompt: str) -> str:
    """The prompt normalised as the training text was, and without one space at its end.

    The vocabulary writes a space together with the word after it, so "1 + 1 = " would ask for a word without one.
    """
    prompt = prompt.encode("utf-8", "replace").decode()  # bytes that were no UTF-8 become "?"
    text = unicodedata.normalize("NFKC", prompt).replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(r"(?<=\S) \Z", "", text)


def prompt_ids(vocabulary, prompt: str) -> list[int]:
    """Token ids of a prompt, after the end-of-document id that every document of the training data follows."""
    return [vocabulary.eos_id, *vocabulary.encode(clean_prompt(prompt)).tolist()]


def run_quiz(path: Path, model: Llama, vocabulary):
    """Continue each prompt of a quiz greedily; print how many first words are the answer, and some of both kinds."""
    try:
        questions = [json.loads(line) for line in path.read_text().splitlines()]
        pairs = [(str(question["prompt"]), str(question["answer"])) for question in questions]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} is not a quiz, lines of {{\"prompt\": ..., \"answer\": ...}}: {error!r}") from error
    if not pairs:
        raise BadInput(f"{path} holds no questions")
    right, wrong = [], []
    for prompt, answer in pairs:
        new_ids = generate(model, prompt_ids(vocabulary, prompt), 8, eos_id=vocabulary.eos_id,
                           vocab_size=vocabulary.vocab_size)
        first_word = (vocabulary.decode(list(new_ids)).split() or [""])[0].rstrip(".,;")
        (right if first_word == answer else wrong).append(f"{prompt} {first_word}")
    print(f"{len(right)} of {len(pairs)} right ({path}).")
    for kind, answers in (("right", right), ("wrong", wrong)):
        if answers:
            print(f"  {kind}: " + ";  ".join(answers[:6]))


def note(text: str):
    """Say something about a text, and so not mixed with it: `python sample.py ... > text.txt` is the text."""
    print(text, file=sys.stderr, flush=True)


def continuations(options: Options, input_ids: list[int], model, draft, vocabulary,
                  generator) -> Iterator[list[int | None]]:
    """The ids that follow input_ids, for each sample one at a time. draft is another model, "lookup" or None."""
    settings = dict(temperature=0.0 if options.greedy else options.temperature, top_k=options.top_k,
                    top_p=options.top_p, repetition_penalty=options.repetition_penalty, eos_id=vocabulary.eos_id,
                    vocab_size=vocabulary.vocab_size, generator=generator)
    if draft is None:
        yield from generate_batch(model, input_ids, options.num_samples, options.max_new_tokens, **settings)
    else:
        import speculative  # which imports this file
        guessing = speculative.generate(model, draft, input_ids, options.max_new_tokens, options.draft_tokens,
                                        **settings)
        yield from ([token] for token in guessing)


def respond(options: Options, model, draft, vocabulary, generator: torch.Generator):
    """Print the prompt and how it goes on: the first sample as it is written, the others after it."""
    prompt, context = clean_prompt(options.prompt), model.config.max_position_embeddings
    input_ids = prompt_ids(vocabulary, prompt)
    if not options.prompt:
        note("[the prompt is empty: beginning a new document]")
    if len(input_ids) > context:
        note(f"[the prompt has {len(input_ids):,} tokens: the model sees the last {context:,} of them]")
    if options.num_samples > 1:
        note(f"[sample 1 of {options.num_samples}]")
    started, count = time.monotonic(), 0
    streams = [vocabulary.stream() for _ in range(options.num_samples)]
    texts = [""] * options.num_samples
    print(prompt, end="", flush=True)
    for tokens in continuations(options, input_ids, model, draft, vocabulary, generator):
        pieces = ["" if token is None else stream.push(token) for stream, token in zip(streams, tokens)]
        texts = [text + piece for text, piece in zip(texts, pieces)]
        print(pieces[0], end="", flush=True)
        count += sum(token is not None for token in tokens)
    print(streams[0].finish(), flush=True)
    for number in range(1, options.num_samples):
        note(f"[sample {number + 1} of {options.num_samples}]")
        print(prompt + texts[number] + streams[number].finish(), flush=True)
    seconds = time.monotonic() - started
    note(f"[{count} tokens, {count / seconds:.0f} tokens/s"
         + (", ended by itself]" if count < options.num_samples * options.max_new_tokens else "]"))


def converse(options: Options, *rest):
    """Ask for prompts and continue them, until the end of the input. Ctrl-C ends a text."""
    try:
        import readline  # noqa: F401 (input() edits lines and remembers them where this is there)
    except ImportError:
        pass
    fixed = ("checkpoint", "which", "quiz", "interactive", "backend", "dtype", "int8_activations", "compile",
             "speculative")
    note('[a prompt, or options such as --temperature 0.5; Ctrl-C ends a text, Ctrl-D ends all]')
    while True:
        try:
            line = input("> ")
        except EOFError:
            return print()
        try:
            if line.startswith("--"):
                changed = parse(Options, shlex.split(line), default=replace(options, seed=None))
                stuck = [name for name in fixed if getattr(changed, name) != getattr(options, name)]
                if stuck:
                    raise BadInput(f"--{stuck[0]} is for the start: leave, and give it on the command line")
                if changed.seed is not None:
                    rest[-1].manual_seed(changed.seed)
                options = changed
            else:
                respond(replace(options, prompt=line, interactive=False), *rest)
        except KeyboardInterrupt:
            note("\n[stopped]")
        except SystemExit:  # --help
            pass
        except ValueError as error:  # BadInput, and shlex's about quotation marks
            note(f"error: {error}")


def load_model(path: Path, options: Options, device: backend.Backend, lengths: tuple[int, ...]):
    """A checkpoint's model as the options want it, and its tokenizer: (model, vocabulary). Says what it is.

    If it is to be compiled, so it will be for inputs of these lengths.
    """
    step_dir = checkpoint.find(path, options.which)
    model, state = checkpoint.load_model(step_dir)
    vocabulary = checkpoint.load_tokenizer(step_dir, state)
    bits = f", {state['bits_per_byte']:.4f} bits per byte held out" if "bits_per_byte" in state else ""
    curves = checkpoint.run_dir(step_dir) / "curves.png"
    note(f"[{step_dir}: {model.num_parameters():,} parameters, {state['step']:,} steps{bits}"
         + (f"; curves in {curves}]" if curves.is_file() else "]"))
    model = decode.narrow(model.to(device.device), options.dtype, options.int8_activations)
    pays_from = decode.COMPILE_FROM if options.num_samples == 1 else decode.COMPILE_SEVERAL_FROM
    if options.compile or options.compile is None and options.max_new_tokens >= pays_from:
        started = time.monotonic()
        model, reason = decode.compile(model, options.num_samples, lengths)
        seconds = time.monotonic() - started
        note(f"[torch.compile failed, going on without it: {reason}]" if reason else f"[compiled in {seconds:.0f} s]")
    return model, vocabulary


def main(argv: list[str]):
    options = parse(Options, argv)
    device = backend.pick(options.backend, "float32", tpu=False)
    if options.int8_activations and device.device.type != "cpu":
        raise BadInput("--int8_activations is for CPUs: add --backend cpu, or leave it out")
    draft = options.speculative
    model, vocabulary = load_model(options.checkpoint or checkpoint.newest_run(), options, device,
                                   (1, options.draft_tokens + 1) if draft else (1,))
    if draft not in (None, "lookup"):
        draft, theirs = load_model(Path(draft), options, device, (1, 2))
        if theirs.sha256 != vocabulary.sha256:
            raise BadInput(f"--speculative {options.speculative}: it has another vocabulary, {theirs.name}, than the "
                           f"model, {vocabulary.name}")
    if options.quiz:
        return run_quiz(options.quiz, model, vocabulary)
    generator = torch.Generator()
    generator.seed() if options.seed is None else generator.manual_seed(options.seed)
    (converse if options.interactive else respond)(options, model, draft, vocabulary, generator)


if __name__ == "__main__":
    from sample import main  # that of the module that speculative.py imports, not of this second copy of it
    script(main)
