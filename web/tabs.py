"""What each tab does, as generators of what to show. The last thing that each yields is the whole of it.

The page hands a tab the values of its boxes and sliders one by one, hence the long lists of parameters. A request can
hold values that no slider has, so each tab has them checked (`read_settings`).
"""

import math
import random
import secrets
import sqlite3
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from cli import BadInput, brief
from decoding.choice import Sampler
from decoding.generate import clean_prompt, generate_batch, prompt_ids
from model import Llama
from tokenizer import Tokenizer
from web import arena, html, inside
from web.shelf import Loaded, Shelf

LONGEST_PROMPT = 200_000  # characters
EXPLORED = 512  # tokens that the explorer colours
INSPECTED = 24  # tokens that the Inside tab draws
PRESETS = {"Creative": (1.0, 0.95, 200), "Balanced": (0.8, 0.9, 150), "Focused": (0.5, 0.8, 80)}
"""Temperature, top-p and length. The names are from the Stentor3 card, which advises a temperature of 0.5 to 0.8."""


# ---------------------------------------------------------------------------------------------------------------
# Settings, and the texts that come of them


@dataclass
class Settings:
    """A prompt, how much text is to follow it, and how its tokens are chosen."""

    prompt: str
    max_new_tokens: int
    temperature: float
    top_p: float | None
    top_k: int | None
    repetition_penalty: float
    num_samples: int
    seed: int

    def __post_init__(self):
        """Raises ValueError, in one line, for values that no distribution has."""
        checks = {"max_new_tokens": self.max_new_tokens >= 1, "temperature": self.temperature > 0,
                  "top_k": self.top_k is None or self.top_k >= 1, "top_p": self.top_p is None or 0 < self.top_p <= 1,
                  "repetition_penalty": self.repetition_penalty > 0, "num_samples": self.num_samples >= 1,
                  "seed": 0 <= self.seed < 2**63}
        for name, good in checks.items():
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)}, which is out of range"
                                 + ("; --greedy takes the likeliest token" if name == "temperature" else ""))

    def sampler(self, vocabulary: Tokenizer) -> Sampler:
        """A sampler whose random numbers begin at the seed."""
        return Sampler(self.temperature, self.top_k, self.top_p, self.repetition_penalty,
                       torch.Generator().manual_seed(self.seed), vocabulary.vocab_size)


def read_settings(prompt: str, length: float, temperature: float, top_p: float | None = None,
                  top_k: float | None = None, penalty: float = 1.1, samples: float = 1, seed: str = "") -> Settings:
    """Settings from the values that a page sends: an empty seed draws one, and a top_k of 0 is off.

    Raises ValueError for a prompt that is too long and for values out of range.
    """
    if len(prompt) > LONGEST_PROMPT:
        raise ValueError(f"the prompt has {len(prompt):,} characters; {LONGEST_PROMPT:,} are the most")
    if seed and not seed.isdecimal():
        raise ValueError("a seed is a whole number, or nothing for a new one")
    return Settings(clean_prompt(prompt), int(length), temperature, top_p, int(top_k) if top_k else None, penalty,
                    int(samples), int(seed or secrets.randbelow(2**32)))


def completions(loaded: Loaded, ids: list[int], settings: Settings) -> Iterator[list[int | None]]:
    """The tokens of settings.num_samples texts that continue ids, one of each at a time; None once a text has ended."""
    return generate_batch(loaded.writer, ids, settings.num_samples, settings.max_new_tokens,
                          settings.sampler(loaded.vocabulary), loaded.vocabulary.ends)


def side_by_side(loaded: list[Loaded], ids: list[list[int]],
                 settings: list[Settings]) -> Iterator[list[int | None]]:
    """The same for texts that differ in more than chance: one for each model, prompt and settings."""
    rows = zip_longest(*map(completions, loaded, ids, settings), fillvalue=[None])
    return ([token for [token] in row] for row in rows)


def decoder(loaded: Loaded, ids: list[int]) -> Any:
    """A stream that decodes what follows ids. It knows the last few: they decide whether a space comes first."""
    return loaded.vocabulary.stream(ids)


def unroll(rows: Iterator[Sequence[int | None]], streams: list, halt: Sequence = (),
           seconds: float = 0.1) -> Iterator[tuple[list[list[int]], list[str]]]:
    """Decode texts that grow side by side. Yields their new ids and new text so far, every few moments and at the end.

    rows      a token of each text at a time, None once a text has ended
    streams   the decoder of each text
    halt      empty until somebody presses Stop
    seconds   at least so long between two yields
    """
    new, texts, due = [[] for _ in streams], ["" for _ in streams], 0.0
    for row in rows:
        for i, token in enumerate(row):
            if token is not None:
                new[i].append(token)
                texts[i] += streams[i].push(token)
        if halt:
            break
        if time.monotonic() >= due:
            yield new, list(texts)
            due = time.monotonic() + seconds
    yield new, [text + stream.finish() for text, stream in zip(texts, streams)]


def figures(count: int, started: float, halt: Sequence, *more: str) -> str:
    """Tokens, seconds and speed, on one line."""
    seconds = time.monotonic() - started
    return " · ".join([*(["Stopped"] if halt else []), f"{count:,} token{'s' * (count != 1)}", f"{seconds:.1f} s",
                       f"{count / max(seconds, 1e-9):,.0f} tokens/s", *more])


def loading(shelf: Shelf, *names: str) -> str:
    """What to say while models are loaded. Raises BadInput if there is no model of a name."""
    missing = [shelf.entry(name).name for name in names if name not in shelf.loaded]
    return html.safe(f"Loading {' and '.join(missing)} …") if missing else "Reading the prompt …"


# ---------------------------------------------------------------------------------------------------------------
# Generate


def write(shelf: Shelf, name: str, prompt: str, temperature: float, top_p: float, top_k: float, penalty: float,
          length: float, samples: float, seed: str, history: list[dict],
          halt: Sequence = ()) -> Iterator[tuple[str, str, list[dict]]]:
    """Continue a prompt; yields (texts, figures, history). A session's history has the newest text first."""
    yield "", loading(shelf, name), history
    settings = read_settings(prompt, length, temperature, top_p, top_k, penalty, samples, seed)
    loaded = shelf.get(name)
    if not 1 <= settings.num_samples <= 5:
        raise ValueError(f"{settings.num_samples} completions are out of range: choose 1 to 5")
    ids, started = prompt_ids(loaded.vocabulary, settings.prompt), time.monotonic()
    context = loaded.model.config.max_position_embeddings
    cut = [f"the prompt has {len(ids):,} tokens: the model sees the last {context:,}"] if len(ids) > context else []
    told = (f"temperature {settings.temperature:g}, top-p {settings.top_p:g}, top-k {settings.top_k or 'off'}, penalty "
            f"{settings.repetition_penalty:g}, at most {settings.max_new_tokens} tokens")
    entry = {"at": time.strftime("%H:%M:%S"), "model": name, "prompt": html.tail(settings.prompt),
             "seed": settings.seed, "settings": told}
    streams = [decoder(loaded, ids) for _ in range(settings.num_samples)]
    for new, texts in unroll(completions(loaded, ids, settings), streams, halt):
        count = sum(map(len, new))
        titles = [f"{i} of {len(texts)}" if len(texts) > 1 else name for i in range(1, len(texts) + 1)]
        yield (html.cards(titles, settings.prompt, texts), figures(count, started, halt, *cut),
               [entry | {"texts": texts, "tokens": count}, *history[:19]])


# ---------------------------------------------------------------------------------------------------------------
# Token explorer


def explore(shelf: Shelf, name: str, prompt: str, length: float, temperature: float, top_p: float, top_k: float,
            seed: str, halt: Sequence = ()) -> Iterator[tuple[str, str, dict | None]]:
    """Continue a prompt; yields (coloured text, figures, what `pick` needs)."""
    yield "", loading(shelf, name), None
    settings, loaded = read_settings(prompt, length, temperature, top_p, top_k, 1.0, 1, seed), shelf.get(name)
    room = min(loaded.model.config.max_position_embeddings, EXPLORED)  # one pass has to see it all
    settings.max_new_tokens = min(settings.max_new_tokens, room - 1)
    ids = prompt_ids(loaded.vocabulary, settings.prompt)[settings.max_new_tokens - room:]
    started = time.monotonic()
    for [new], [text] in unroll(completions(loaded, ids, settings), [decoder(loaded, ids)], halt):
        yield html.continued(settings.prompt, text), figures(len(new), started, halt), None
    if new:
        yield colour(loaded, ids + new, len(ids), figures(len(new), started, halt, f"seed {settings.seed}"))


def survey(shelf: Shelf, name: str, text: str) -> Iterator[tuple[str, str, dict | None]]:
    """Colour a pasted text; yields as `explore` does."""
    yield "", loading(shelf, name), None
    loaded = shelf.get(name)
    ids = prompt_ids(loaded.vocabulary, read_settings(text, 1, 1.0).prompt)
    seen = ids[:min(loaded.model.config.max_position_embeddings, EXPLORED)]
    if len(seen) < 2:
        raise ValueError("there is no text to read")
    whole = len(seen) == len(ids)
    yield colour(loaded, seen, 1, f"{'' if whole else 'the first '}{len(seen) - 1:,} tokens"
                                  f"{'' if whole else f' of {len(ids) - 1:,}'}")


def colour(loaded: Loaded, ids: list[int], start: int, note: str) -> tuple[str, str, dict]:
    """The last step of both: ids[start:] in colours, how surprising they were on average, and what `pick` needs."""
    logits = inside.expectations(loaded, ids)
    losses = -logits[start - 1:].log_softmax(-1).gather(1, torch.tensor(ids[start:])[:, None])
    return (html.coloured(loaded.vocabulary, ids, start, logits),
            f"{note} · {float(losses.mean()) / math.log(2):.2f} bits of surprise a token · pick one to see the others",
            {"name": loaded.name, "ids": ids, "start": start})


def pick(shelf: Shelf, looked_at: dict | None, number: int, temperature: float, top_p: float,
         top_k: float) -> Iterator[str]:
    """What the model expected in the place of token `number` of the text; yields HTML."""
    settings = read_settings("", 1, temperature, top_p, top_k)
    if looked_at is None or not looked_at["start"] <= number < len(looked_at["ids"]):
        raise ValueError("there is no such token; continue or read a text first")
    loaded, ids = shelf.get(looked_at["name"]), looked_at["ids"]
    logits = inside.expectations(loaded, ids[:number + 1])[-1]  # (V,)
    temperature, top_k, top_p = settings.temperature, settings.top_k, settings.top_p
    filters = [(f"top-k {top_k}" if top_k else "no top-k", inside.kept(logits, temperature, top_k, None)),
               (f"{f'top-p {top_p:g}' if top_p else 'no top-p'}, at temperature {temperature:g},",
                inside.kept(logits, temperature, top_k, top_p))]
    p = logits.softmax(-1)
    yield html.alternatives(loaded.vocabulary, ids[number], p, float(inside.entropy(p)), filters)


# ---------------------------------------------------------------------------------------------------------------
# Temperature sweep


def sweep(shelf: Shelf, name: str, prompt: str, cool: float, middle: float, hot: float, count: float, length: float,
          seed: str, halt: Sequence = ()) -> Iterator[tuple[str, str]]:
    """One seed at two or three temperatures, with no token cut off; yields (texts, figures)."""
    yield "", loading(shelf, name)
    loaded, seed = shelf.get(name), seed or str(secrets.randbelow(2**32))
    temperatures = (cool, middle, hot) if int(count) == 3 else (cool, hot)
    settings = [read_settings(prompt, length, temperature, seed=seed) for temperature in temperatures]
    titles, prompt = [f"temperature {each.temperature:g}" for each in settings], settings[0].prompt
    ids, started = prompt_ids(loaded.vocabulary, prompt), time.monotonic()
    rows = side_by_side([loaded] * len(settings), [ids] * len(settings), settings)
    for new, texts in unroll(rows, [decoder(loaded, ids) for _ in settings], halt):
        same = next((i for i, tokens in enumerate(zip(*new)) if len(set(tokens)) > 1), min(map(len, new)))
        parted = any(len(line) > same for line in new)
        stream = decoder(loaded, ids)
        shared = len("".join(stream.push(token) for token in new[0][:same]))
        yield (html.cards(titles, prompt, texts, shared if parted else None),
               figures(sum(map(len, new)), started, halt, f"seed {settings[0].seed}",
                       f"they part at token {same + 1}" if parted else "the same so far"))


# ---------------------------------------------------------------------------------------------------------------
# Arena


def meet(shelf: Shelf, mode: str, left: str, right: str, prompt: str, length: float,
         halt: Sequence = ()) -> Iterator[tuple[str, str, dict | None]]:
    """Two models continue one prompt; yields (texts, status, the match once it is over)."""
    sizes = {name: entry.parameters for name, entry in shelf.entries.items()}
    if len(sizes) < 2:
        raise BadInput("the arena needs two models: train another one, or add one with --hf")
    if mode == "Random":
        left, right = arena.draw_pair(sizes, {name for name in sizes if shelf.entries[name].ours}, random.Random())
    elif mode == "Blind":
        left, right = random.sample([left, right], 2)
    if shelf.entry(left) is shelf.entry(right):
        raise BadInput("choose two different models")
    yield "", loading(shelf, left, right) if mode == "Show" else "The models get ready …", None
    settings = [read_settings(prompt, length, *PRESETS["Balanced"][:2]) for _ in range(2)]
    loaded, prompt = [shelf.get(left), shelf.get(right)], settings[0].prompt
    names = [f"{side} · {name} ({html.size(sizes[name])})" if mode == "Show" else side
             for side, name in (("A", left), ("B", right))]
    ids = [prompt_ids(model.vocabulary, prompt) for model in loaded]
    for new, texts in unroll(side_by_side(loaded, ids, settings), list(map(decoder, loaded, ids)), halt):
        shown = html.cards(names, prompt, texts)
        yield shown, f"{'Stopped · ' if halt else ''}{sum(map(len, new)):,} tokens", None
    if halt:
        return
    match = {"match": secrets.token_hex(8), "mode": mode, "prompt": prompt, "model_a": left, "model_b": right,
             "text_a": texts[0], "text_b": texts[1]}
    yield shown, "Which is better?", match


def scores(votes: Path) -> str:
    """The table of all votes as HTML, or why there is none."""
    try:
        return html.score_table(arena.standings(arena.read(votes)))
    except (sqlite3.Error, OSError) as error:
        return f"<p>{html.safe(f'{votes} cannot be read: {brief(error)}')}</p>"


def vote(shelf: Shelf, votes: Path, match: dict | None, verdict: str) -> Iterator[tuple[str, str, None, str]]:
    """Keep a verdict and reveal the names; yields (texts, status, no match, standings)."""
    if match is None:
        raise ValueError("there is nothing to vote on; start a match first")
    arena.record(votes, arena.Vote(**match, verdict=verdict))
    names = [f"{side} · {name} ({html.size(shelf.entry(name).parameters)})"
             for side, name in (("A", match["model_a"]), ("B", match["model_b"]))]
    shown = html.cards(names, match["prompt"], [match["text_a"], match["text_b"]])
    yield shown, f"Your vote is kept: {verdict}.", None, scores(votes)


# ---------------------------------------------------------------------------------------------------------------
# Chat


def dialogue(turns: list[tuple[str, str]], message: str, user: str, model: str) -> str:
    """The prompt of a chat: each line under its speaker's tag, and the model's tag last. A base model has read such
    texts, and goes on with the answer."""
    lines = [line for asked, answered in turns for line in (f"{user} {asked}", f"{model} {answered}")]
    return "\n".join([*lines, f"{user} {message}", model])


def chat(shelf: Shelf, name: str, message: str, user: str, model: str, temperature: float, length: float,
         turns: list[tuple[str, str]],
         halt: Sequence = ()) -> Iterator[tuple[str, str, str, list[tuple[str, str]]]]:
    """Answer a message; yields (conversation, the full prompt, status, turns).

    The oldest turns are left out if the context cannot hold them all. The reply ends where the model begins to speak
    for the user.
    """
    turns = turns[-49:]
    yield html.bubbles(turns), "", loading(shelf, name), turns
    settings, loaded = read_settings(message, length, temperature, PRESETS["Balanced"][1]), shelf.get(name)
    message, user, model = settings.prompt.strip(), clean_prompt(user).strip(), clean_prompt(model).strip()
    if not (message and user and model):
        raise ValueError("write a message first; neither it nor the tags can be empty")
    context = loaded.model.config.max_position_embeddings
    settings.max_new_tokens = min(settings.max_new_tokens, context // 2)
    room = context - settings.max_new_tokens
    for left_out in range(len(turns) + 1):
        prompt = dialogue(turns[left_out:], message, user, model)
        ids = prompt_ids(loaded.vocabulary, prompt)
        if len(ids) <= room:
            break
    else:  # the message alone is too long: its end, and the model's tag
        prompt, ids = loaded.vocabulary.decode(ids[-room:]), ids[-room:]
    note, started = [f"turns left out: {left_out}"] if left_out else [], time.monotonic()
    for [new], [text] in unroll(completions(loaded, ids, settings), [decoder(loaded, ids)], halt):
        if "again" in halt:  # this comes last, after whatever was on its way to the page
            yield html.bubbles([]), "", "", []
            return
        ends = [at for tag in (user, model) if (at := text.find("\n" + tag)) >= 0]
        reply = text[:min(ends, default=len(text))].strip()
        status = figures(len(new), started, halt, f"prompt of {len(ids):,} tokens", *note)
        yield html.bubbles([*turns, (message, reply)]), prompt, status, [*turns, (message, reply)]
        if ends:
            return


# ---------------------------------------------------------------------------------------------------------------
# Inside


def examine(shelf: Shelf, name: str, prompt: str, layer: float, head: int) -> Iterator[tuple[str, str, str, str]]:
    """Look at a prompt from inside; yields (patterns of a layer, one pattern large, logit lens, status)."""
    yield "", "", "", loading(shelf, name)
    loaded = shelf.get(name)
    if not isinstance(loaded.model, Llama):
        raise BadInput(f"{name} is a model of transformers; this tab knows only the insides of our own")
    ids = prompt_ids(loaded.vocabulary, read_settings(prompt, 1, 1.0).prompt)
    seen = ids[-min(INSPECTED, loaded.model.config.max_position_embeddings):]
    patterns, lens = inside.look_inside(loaded.model, seen)
    layers, heads = patterns.shape[:2]
    if not (1 <= layer <= layers and 0 <= head < heads):
        raise ValueError(f"{name} has layers 1 to {layers}, of {heads} heads each")
    layer = int(layer)
    names = [html.label(loaded.vocabulary, token) for token in seen]
    note = f"the last {len(seen)} of {len(ids):,} tokens" if len(seen) < len(ids) else f"{len(seen)} tokens"
    yield (html.thumbnails(patterns[layer - 1], head), html.heat_map(patterns[layer - 1, head], names),
           html.lens_table(loaded.vocabulary, lens, names),
           f"layer {layer} of {layers}, head {head + 1} of {heads} · {note}")
