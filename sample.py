"""Generate text: python sample.py --prompt "..." [--checkpoint out/NAME]

A Llama is asked for one token at a time. The keys and values of the tokens before it are kept (the KV cache), so
each step costs one token's work. Between the logits and the choice stand the usual filters, in HF's order and with
HF's definitions: repetition penalty, temperature, top-k, top-p.
"""

import json
import re
import sys
import time
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import backend
import checkpoint
from config import BadInput, parse, script
from model import KVCache, Llama


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
    """Texts to generate."""
    seed: int | None = None
    """Of the random choices; a new one every time if None."""
    quiz: Path | None = None
    """Instead of a prompt, a JSONL file of {"prompt", "answer"}: print the share that the model gets right."""
    backend: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to generate on."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the matrix products."""

    def __post_init__(self):
        """Raises ValueError, in one line, for values that no distribution has."""
        checks = {"max_new_tokens": self.max_new_tokens >= 1, "temperature": self.temperature > 0,
                  "top_k": self.top_k is None or self.top_k >= 1, "top_p": self.top_p is None or 0 < self.top_p <= 1,
                  "repetition_penalty": self.repetition_penalty > 0, "num_samples": self.num_samples >= 1,
                  "seed": self.seed is None or 0 <= self.seed < 2**63}
        for name, good in checks.items():
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)}, which is out of range"
                                 + ("; --greedy takes the likeliest token" if name == "temperature" else ""))


def penalize_repetition(logits, seen, penalty: float):
    """Make the tokens `seen` (n,) int64 less likely in logits (V,): x / penalty if x > 0, else x * penalty."""
    x = logits[seen]
    return logits.index_put((seen,), torch.where(x > 0, x / penalty, x * penalty))


def filter_logits(logits, temperature: float, top_k: int | None, top_p: float | None):
    """Logits (V,) to those of the distribution to draw from; what is cut off becomes -inf."""
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.numel())).values[-1]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        # Cut a token when those before it already reach top_p; so the first always stays.
        cut = probabilities.cumsum(-1) - probabilities >= top_p
        logits = logits.masked_fill(cut[order.argsort()], -torch.inf)
    return logits


@torch.no_grad()
def generate(model: Llama, input_ids, max_new_tokens: int, temperature: float = 0.0,
             top_k: int | None = None, top_p: float | None = None, repetition_penalty: float = 1.0,
             eos_id: int | None = None, vocab_size: int | None = None,
             generator: torch.Generator | None = None) -> Iterator[int]:
    """Yield up to max_new_tokens ids that follow input_ids (T,), a list or tensor, one at a time, until eos_id comes.

    temperature 0 takes the likeliest token. vocab_size leaves out the rows of the model that no token has. A text
    that outgrows the context goes on from the newest half of it. The generator must be on the CPU: so a seed gives
    the same text whatever device computed the logits. Raises ValueError for an empty prompt.
    """
    ids = torch.as_tensor(input_ids, dtype=torch.int64).flatten().tolist()
    if not ids:
        raise ValueError("input_ids is empty; begin a document with the end-of-document token")
    context, device = model.config.max_position_embeddings, model.lm_head.weight.device
    cache = None
    for _ in range(max_new_tokens):
        if cache is None or cache.length == context:
            # Prefill: what fits of the prompt or, when the cache is full, the newest half of it, in one pass
            keep = context if cache is None else max(1, context // 2)
            fresh, cache = ids[-keep:], KVCache(context)
        else:
            fresh = ids[-1:]
        logits, _ = model(torch.tensor([fresh], device=device), cache=cache)
        logits = logits[0, -1, :vocab_size].float().cpu()  # (V,)
        if repetition_penalty != 1.0:
            logits = penalize_repetition(logits, torch.tensor(sorted(set(ids))), repetition_penalty)
        if temperature == 0:
            token = int(logits.argmax())
        else:
            probabilities = filter_logits(logits, temperature, top_k, top_p).softmax(-1)
            token = int(torch.multinomial(probabilities, 1, generator=generator))
        if token == eos_id:
            return
        ids.append(token)
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


def main(argv: list[str]):
    options = parse(Options, argv)
    run = options.checkpoint or checkpoint.newest_run()
    step_dir = checkpoint.find(run, options.which)
    model, state = checkpoint.load_model(step_dir)
    vocabulary = checkpoint.load_tokenizer(step_dir, state)
    device = backend.pick(options.backend, options.dtype, tpu=False)
    model.to(device.device)

    def note(text: str):  # about the text, and so not mixed with it: `python sample.py ... > text.txt` is the text
        print(text, file=sys.stderr, flush=True)

    bits = f", {state['bits_per_byte']:.4f} bits per byte held out" if "bits_per_byte" in state else ""
    curves = checkpoint.run_dir(step_dir) / "curves.png"
    note(f"[{step_dir}: {model.num_parameters():,} parameters, {state['step']:,} steps{bits}"
         + (f"; curves in {curves}]" if curves.is_file() else "]"))
    with device.autocast():
        if options.quiz:
            return run_quiz(options.quiz, model, vocabulary)

        input_ids = prompt_ids(vocabulary, options.prompt)
        context = model.config.max_position_embeddings
        if not options.prompt:
            note("[the prompt is empty: beginning a new document]")
        if len(input_ids) > context:
            note(f"[the prompt has {len(input_ids):,} tokens: the model sees the last {context:,} of them]")
        generator = torch.Generator()
        generator.seed() if options.seed is None else generator.manual_seed(options.seed)
        for number in range(options.num_samples):
            if options.num_samples > 1:
                note(f"[sample {number + 1} of {options.num_samples}]")
            started, count = time.monotonic(), 0
            stream = vocabulary.stream()
            print(clean_prompt(options.prompt), end="", flush=True)
            temperature = 0.0 if options.greedy else options.temperature
            for token in generate(model, input_ids, options.max_new_tokens, temperature, options.top_k, options.top_p,
                                  options.repetition_penalty, vocabulary.eos_id, vocabulary.vocab_size, generator):
                print(stream.push(token), end="", flush=True)
                count += 1
            print(stream.finish(), flush=True)
            seconds = time.monotonic() - started
            note(f"[{count} tokens, {count / seconds:.0f} tokens/s"
                 + (", ended by itself]" if count < options.max_new_tokens else "]"))


if __name__ == "__main__":
    script(main)
