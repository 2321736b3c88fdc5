"""Generate text: python sample.py --prompt "..." [--checkpoint out/NAME]

Here are the options, and what is printed: a text while it is being written, a quiz, a conversation. decoding/ makes the
text: generate.py has the loop, choice.py the filters, engine.py a token's step in
plain loops, speculative.py guesses.
"""

import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

import backend
import checkpoint
import decoding
from cli import BadInput, parse, parse_json, script
from decoding import speculative
from decoding.choice import Sampler
from decoding.generate import clean_prompt, generate, generate_batch, prompt_ids
from model import Llama
from tokenizer import Tokenizer

if TYPE_CHECKING:
    from decoding.engine import Engine


@dataclass
class Options:
    """Generate text from a trained model."""

    prompt: str = ""
    """Text to continue; if empty, the model begins a new document."""
    checkpoint: Path | None = None
    """A run (out/NAME) or one of its step directories; the newest run under out/ if None."""
    which: Literal["best", "latest"] = "best"
    """Which of a run's checkpoints."""
    max_new_tokens: int = 150
    """Tokens to generate at most. The end-of-document token ends a text sooner."""
    temperature: float = 0.8
    """Divides the logits; below 1 it sharpens the distribution. The Stentor3 card recommends 0.5 to 0.8."""
    top_k: int | None = None
    """Keep the k likeliest tokens; all if None."""
    top_p: float | None = 0.9
    """Keep the likeliest tokens that together reach this probability; all if None."""
    repetition_penalty: float = 1.1
    """Divides the positive logits of tokens seen before, multiplies the negative (Keskar et al. 2019); 1 is off."""
    greedy: bool = False
    """Always take the likeliest token (after the repetition penalty)."""
    num_samples: int = 1
    """Texts to generate, all at once."""
    seed: int | None = None
    """Seed of the random choices; a new one every time if None."""
    quiz: Path | None = None
    """A JSONL file of {"prompt", "answer"} instead of a prompt: print how many the model gets right."""
    interactive: bool = False
    """Ask for one prompt after the other. A line of options (--temperature 0.5) changes them; Ctrl-D ends."""
    backend: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to generate on."""
    dtype: Literal["fp32", "bf16", "fp16", "int8", "int4"] | None = None
    """Precision of the weights (decoding/narrow.py). If None, fp32, or what an exported checkpoint was rounded to."""
    threads: int | None = None
    """Threads to write with at most; as many as there are cores if None."""
    speculative: str | None = None
    """Guess several tokens and check them in one pass. The guesses come from a smaller model with the same vocabulary
    (a run, out/DRAFT), or with "lookup" from what followed the same words earlier in the text."""
    draft_tokens: int = 4
    """Tokens to guess at a time."""

    def __post_init__(self):
        """Raises ValueError, in one line, for values out of range and options that exclude each other."""
        checks = {"max_new_tokens": self.max_new_tokens >= 1, "temperature": self.temperature > 0,
                  "top_k": self.top_k is None or self.top_k >= 1, "top_p": self.top_p is None or 0 < self.top_p <= 1,
                  "repetition_penalty": self.repetition_penalty > 0, "num_samples": self.num_samples >= 1,
                  "draft_tokens": self.draft_tokens >= 1, "threads": self.threads is None or self.threads >= 1,
                  "seed": self.seed is None or 0 <= self.seed < 2**63}
        for name, good in checks.items():
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)}, which is out of range"
                                 + ("; --greedy takes the likeliest token" if name == "temperature" else ""))
        if self.interactive and (self.prompt or self.quiz):
            raise ValueError("interactive asks for the prompts: leave out --prompt and --quiz")
        if self.speculative and self.num_samples > 1:
            raise ValueError("speculative writes one text at a time: leave out --num_samples")


def read_quiz(path: Path) -> list[tuple[str, str]]:
    """The questions and answers of a quiz. Raises BadInput, and names the line, if it is none."""
    def word(value: object) -> bool:
        return isinstance(value, (str, int, float))

    pairs = []
    for place, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            if line.strip(b"\xef\xbb\xbf \t\r"):  # Windows' editors put such a mark at the beginning
                question = parse_json(line, {"prompt": word, "answer": word})
                pairs.append((str(question["prompt"]), str(question["answer"])))
        except ValueError as error:
            raise BadInput(f"{path} is not a quiz, lines of {{\"prompt\": ..., \"answer\": ...}}: line {place}: "
                           f"{error}") from error
    if not pairs:
        raise BadInput(f"{path} holds no questions")
    return pairs


def run_quiz(path: Path, model: Llama, vocabulary: Tokenizer):
    """Continue each prompt of a quiz greedily. Print how often the first word is the answer, with some examples."""
    pairs = read_quiz(path)
    right, wrong, greedy = [], [], Sampler(vocab_size=vocabulary.vocab_size)
    for prompt, answer in pairs:
        new_ids = generate(model, prompt_ids(vocabulary, prompt), 8, greedy, vocabulary.ends)
        first_word = (vocabulary.decode(list(new_ids)).split() or [""])[0].rstrip(".,;")
        (right if first_word == answer else wrong).append(f"{prompt} {first_word}")
    print(f"{len(right)} of {len(pairs)} right ({path}).")
    for kind, answers in (("right", right), ("wrong", wrong)):
        if answers:
            print(f"  {kind}: " + ";  ".join(answers[:6]))


def note(text: str):
    """Print a remark to stderr, so that `python sample.py ... > text.txt` holds only the text."""
    print(text, file=sys.stderr, flush=True)


@dataclass
class Writer:
    """All it takes to write: a model, its tokenizer, what guesses (a model, "lookup" or None), and a generator."""

    model: "Llama | Engine"
    vocabulary: Tokenizer
    draft: "Llama | Engine | str | None"
    generator: torch.Generator

    def continuations(self, options: Options, input_ids: list[int]) -> Iterator[list[int | None]]:
        """The ids that follow input_ids, one for each sample at a time."""
        sampler = Sampler(0.0 if options.greedy else options.temperature, options.top_k, options.top_p,
                          options.repetition_penalty, self.generator, self.vocabulary.vocab_size)
        if self.draft is None:
            return generate_batch(self.model, input_ids, options.num_samples, options.max_new_tokens, sampler,
                                  self.vocabulary.ends)
        ids = speculative.generate(self.model, self.draft, input_ids, options.max_new_tokens, options.draft_tokens,
                                   sampler, self.vocabulary.ends)
        return ([token] for token in ids)


def respond(options: Options, writer: Writer):
    """Print the prompt and its continuation: the first sample while it is being written, the others after it."""
    prompt, context = clean_prompt(options.prompt), writer.model.config.max_position_embeddings
    input_ids = prompt_ids(writer.vocabulary, prompt)
    if not options.prompt:
        note("[the prompt is empty: beginning a new document]")
    if len(input_ids) > context:
        note(f"[the prompt has {len(input_ids):,} tokens: the model sees the last {context:,} of them]")
    if options.num_samples > 1:
        note(f"[sample 1 of {options.num_samples}]")
    started, count = time.monotonic(), 0
    streams = [writer.vocabulary.stream(input_ids) for _ in range(options.num_samples)]
    texts = [""] * options.num_samples
    print(prompt, end="", flush=True)
    for tokens in writer.continuations(options, input_ids):
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


def converse(options: Options, writer: Writer):
    """Ask for prompts and continue them, until the input ends. Ctrl-C ends one text."""
    try:
        import readline  # noqa: F401 (with it, input() can edit lines and remembers them)
    except ImportError:
        pass
    fixed = ("checkpoint", "which", "quiz", "interactive", "backend", "dtype", "threads", "speculative")
    note('[type a prompt, or options such as --temperature 0.5; Ctrl-C ends a text, Ctrl-D ends all]')
    while True:
        try:
            line = input("> ")
        except EOFError:
            return print()
        except RuntimeError:  # Python's word for a stream that was closed before it began
            raise BadInput("--interactive reads standard input, and that is closed; use --prompt") from None
        try:
            if line.startswith("--"):
                changed = parse(Options, shlex.split(line), default=replace(options, seed=None))
                stuck = [name for name in fixed if getattr(changed, name) != getattr(options, name)]
                if stuck:
                    raise BadInput(f"--{stuck[0]} is for the start: leave, and give it on the command line")
                if changed.seed is not None:
                    writer.generator.manual_seed(changed.seed)
                options = changed
            else:
                respond(replace(options, prompt=line, interactive=False), writer)
        except KeyboardInterrupt:
            note("\n[stopped]")
        except SystemExit:  # --help
            pass
        except ValueError as error:  # BadInput, or shlex's complaint about quotation marks
            note(f"error: {error}")


def open_model(path: Path | None, options: Options, device: backend.Backend) -> tuple["Llama | Engine", Tokenizer]:
    """A checkpoint's model, as the options ask for it, and its tokenizer. Says on stderr what it has opened."""
    trained = checkpoint.open_trained(path, options.which, device)
    state, curves = trained.state, checkpoint.run_dir(trained.step_dir) / "curves.png"
    bits = f", {state['bits_per_byte']:.4f} bits per byte held out" if "bits_per_byte" in state else ""
    note(f"[{trained.step_dir}: {trained.model.num_parameters():,} parameters, {state['step']:,} steps{bits}"
         + (f"; curves in {curves}]" if curves.is_file() else "]"))
    for remark in trained.vocabulary.notes:
        note(f"[{remark}]")
    options.dtype = options.dtype or state.get("rounded_to", "fp32")
    started = time.monotonic()
    model, remark = decoding.ready(trained.model, options.dtype, options.threads)
    if remark:
        note(f"[{remark}]")
    if (seconds := time.monotonic() - started) > 2:
        note(f"[compiled the loops for {options.dtype} in {seconds:.0f} s; the next run finds them on disk]")
    return model, trained.vocabulary


def main(argv: list[str]):
    options = parse(Options, argv)
    device = backend.pick(options.backend, "fp32", tpu=False)
    if options.threads:
        torch.set_num_threads(min(options.threads, torch.get_num_threads()))
    draft = options.speculative
    model, vocabulary = open_model(options.checkpoint, options, device)
    if draft not in (None, "lookup"):
        draft, theirs = open_model(Path(draft), options, device)
        if theirs.sha256 != vocabulary.sha256:
            raise BadInput(f"--speculative {options.speculative}: it has another vocabulary ({theirs.name}) than the "
                           f"model ({vocabulary.name})")
    if options.quiz:
        return run_quiz(options.quiz, model, vocabulary)
    generator = torch.Generator()
    generator.seed() if options.seed is None else generator.manual_seed(options.seed)
    (converse if options.interactive else respond)(options, Writer(model, vocabulary, draft, generator))


if __name__ == "__main__":
    script(main)
