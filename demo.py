"""Look inside tiny models in the browser: python demo.py [--checkpoint out/NAME ...] [--hf PATH_OR_NAME ...]

Six tabs over the runs under out/, and over causal models of transformers: text as it comes, what else each token could
have been, temperatures side by side, two models against each other, a chat, and the attention inside. The page is
served to this machine alone and asks nothing of any other.

What is shown, and the HTML of it, is made in exhibits.py. Here is what each tab does, as plain generators of what to
show, and then the page that calls them.
"""

import math
import os
import random
import secrets
import sqlite3
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Literal

import torch

import backend
import checkpoint
import exhibits
import sample
from config import BadInput, brief, parse, script
from exhibits import Loaded, Shelf, card, cards, label, safe, size, tail
from model import Llama

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # it is read when gradio is imported
try:
    import gradio as gr
except ImportError:  # an optional extra: main says how to get it
    gr = None

LONGEST_PROMPT = 200_000  # characters
EXPLORED = 512  # tokens that the explorer colours
INSPECTED = 24  # tokens that the Inside tab draws
VOTES = Path("out/arena.sqlite")
PRESETS = {"Creative": (1.0, 0.95, 200), "Balanced": (0.8, 0.9, 150), "Focused": (0.5, 0.8, 80)}
"""Temperature, top-p and length. The Stentor3 card has the names; its advice is a temperature of 0.5 to 0.8."""


@dataclass
class Options:
    """Look inside models in the browser."""

    checkpoint: tuple[Path, ...] = ()
    """Runs (out/NAME) or step directories; if none, every run under out/."""
    hf: tuple[str, ...] = ()
    """Models beside them: folders, or OWNER/NAME on the hub, that transformers loads."""
    trust_remote_code: bool = False
    """Let --hf run the code that comes with a model, as the exact tokenizer of an export needs."""
    port: int = 7860
    """Of 127.0.0.1, where the page will be."""
    backend: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to run the models on."""

    def __post_init__(self):
        """Raises ValueError for a port that there is not."""
        if not 1 <= self.port < 2**16:
            raise ValueError(f"port is {self.port}; it must be from 1 to 65535")


# ---------------------------------------------------------------------------------------------------------------
# The models that there are, and what they write


def find_models(options: Options) -> Shelf:
    """The models of the command line. Of all runs, one that cannot be used is left out, with a note."""
    device = backend.pick(options.backend, "float32", tpu=False).device
    entries = [exhibits.our_entry(path, device) for path in options.checkpoint]
    if not entries:
        for pointer in sorted(Path("out").glob("*/latest")):
            try:
                entries.append(exhibits.our_entry(pointer.parent, device))
            except (ValueError, OSError) as error:  # ValueError: BadInput, and what is not even text
                print(f"[{pointer.parent} is left out: {brief(error)}]", file=sys.stderr)
    entries += [exhibits.their_entry(name, options.trust_remote_code, device) for name in options.hf]
    if not entries:
        checkpoint.newest_run()  # says what to do where there is none
        raise BadInput("none of the runs under out/ can be used")
    return Shelf(entries)


def completions(loaded: Loaded, ids: list[int], o: sample.Options) -> Iterator[list[int | None]]:
    """The next token of o.num_samples texts that begin with ids, and so on; None where one has ended."""
    return sample.generate_batch(
        loaded.model, ids, o.num_samples, o.max_new_tokens, o.temperature, o.top_k, o.top_p, o.repetition_penalty,
        loaded.vocabulary.eos_id, loaded.vocabulary.vocab_size, torch.Generator().manual_seed(o.seed))


def side_by_side(loaded: list[Loaded], ids: list[list[int]], options: list[sample.Options]) -> Iterator[list]:
    """The same of texts that differ in more than chance: one of each model, prompt and options."""
    rows = zip_longest(*map(completions, loaded, ids, options), fillvalue=[None])
    return ([token for [token] in row] for row in rows)


def decoder(loaded: Loaded, ids: list[int]):
    """A stream that decodes what follows ids: the last of them decide whether it begins with a space."""
    stream = loaded.vocabulary.stream()
    for token in ids[-4:]:
        stream.push(token)
    return stream


def figures(count: int, started: float, halt: list, *more: str) -> str:
    """Tokens, seconds and speed, as a line."""
    seconds = time.monotonic() - started
    return " · ".join([*(["Stopped"] if halt else []), f"{count:,} token{'s' * (count != 1)}", f"{seconds:.1f} s",
                       f"{count / max(seconds, 1e-9):,.0f} tokens/s", *more])


# ---------------------------------------------------------------------------------------------------------------
# What each tab does: generators of what to show. The last thing that each yields is the whole of it.


def settings(prompt: str, length: float, temperature: float, top_p: float | None = None, top_k: float | None = None,
             penalty: float = 1.1, samples: float = 1, seed: str = "") -> sample.Options:
    """The options of sample.py from what a page sends: an empty seed draws one, top_k 0 is off.

    Raises ValueError for a prompt that nobody has written by hand, and for values out of range.
    """
    if len(prompt) > LONGEST_PROMPT:
        raise ValueError(f"the prompt has {len(prompt):,} characters; {LONGEST_PROMPT:,} are the most")
    if seed and not seed.isdecimal():
        raise ValueError("a seed is a whole number, or nothing for a new one")
    return sample.Options(prompt=sample.clean_prompt(prompt), max_new_tokens=int(length), temperature=temperature,
                          top_p=top_p, top_k=int(top_k) if top_k else None, repetition_penalty=penalty,
                          num_samples=int(samples), seed=int(seed or secrets.randbelow(2**32)))


def unroll(rows: Iterator, streams: list, halt: list = (),
           seconds: float = 0.1) -> Iterator[tuple[list[list[int]], list[str]]]:
    """Decode texts that grow side by side: yields their new ids and new text so far, every so many seconds and last.

    rows      a token of each text at a time, None where one has ended
    streams   the decoder of each
    halt      empty until somebody presses Stop
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


def loading(shelf: Shelf, *names: str) -> str:
    """What to say while the models are fetched. Raises BadInput for a name that is not there."""
    missing = [shelf.entry(name).name for name in names if name not in shelf.loaded]
    return safe(f"Loading {' and '.join(missing)} …") if missing else "Reading the prompt …"


def write(shelf: Shelf, name: str, prompt: str, temperature: float, top_p: float, top_k: float, penalty: float,
          length: float, samples: float, seed: str, history: list[dict], halt: list = ()):
    """Generate: yields (texts, figures, history). The history of a session begins with the newest."""
    yield "", loading(shelf, name), history
    o, loaded = settings(prompt, length, temperature, top_p, top_k, penalty, samples, seed), shelf.get(name)
    if not 1 <= o.num_samples <= 5:
        raise ValueError(f"{o.num_samples} completions are out of range: choose 1 to 5")
    ids, started = sample.prompt_ids(loaded.vocabulary, o.prompt), time.monotonic()
    context = loaded.model.config.max_position_embeddings
    cut = [f"the prompt has {len(ids):,} tokens: the model sees the last {context:,}"] if len(ids) > context else []
    entry = {"at": time.strftime("%H:%M:%S"), "model": name, "prompt": tail(o.prompt), "seed": o.seed,
             "settings": f"temperature {o.temperature:g}, top-p {o.top_p:g}, top-k {o.top_k or 'off'}, penalty "
                         f"{o.repetition_penalty:g}, at most {o.max_new_tokens} tokens"}
    streams = [decoder(loaded, ids) for _ in range(o.num_samples)]
    for new, texts in unroll(completions(loaded, ids, o), streams, halt):
        count = sum(map(len, new))
        titles = [f"{i} of {len(texts)}" if len(texts) > 1 else name for i in range(1, len(texts) + 1)]
        yield (cards([card(title, o.prompt, text) for title, text in zip(titles, texts)]),
               figures(count, started, halt, *cut), [entry | {"texts": texts, "tokens": count}, *history[:19]])


def past(history: list[dict]) -> str:
    """The history of a session as HTML."""
    return "".join(
        f"<details><summary><b>{entry['at']}</b> {safe(entry['model'])}: <q>{safe(tail(entry['prompt'], 60))}</q>"
        f"</summary><p class='note'>{safe(entry['settings'])}, seed {entry['seed']}; {entry['tokens']} tokens</p>"
        + cards([card(f"{i}", entry["prompt"], text) for i, text in enumerate(entry["texts"], 1)]) + "</details>"
        for entry in history) or "<p class='note'>Nothing yet.</p>"


def explore(shelf: Shelf, name: str, prompt: str, length: float, temperature: float, top_p: float, top_k: float,
            seed: str, halt: list = ()):
    """Token explorer: continue a prompt; yields (coloured text, figures, what is picked from)."""
    yield "", loading(shelf, name), None
    o, loaded = settings(prompt, length, temperature, top_p, top_k, 1.0, 1, seed), shelf.get(name)
    room = min(loaded.model.config.max_position_embeddings, EXPLORED)  # one pass has to see it all
    o.max_new_tokens = min(o.max_new_tokens, room - 1)
    ids, started = sample.prompt_ids(loaded.vocabulary, o.prompt)[o.max_new_tokens - room:], time.monotonic()
    for [new], [text] in unroll(completions(loaded, ids, o), [decoder(loaded, ids)], halt):
        yield f"<p class='text'><span class='given'>{safe(tail(o.prompt))}</span>{safe(text)}</p>", \
            figures(len(new), started, halt), None
    if new:
        yield from colour(loaded, ids + new, len(ids), figures(len(new), started, halt, f"seed {o.seed}"))


def survey(shelf: Shelf, name: str, text: str):
    """Token explorer: colour a pasted text; yields as `explore` does."""
    yield "", loading(shelf, name), None
    loaded = shelf.get(name)
    ids = sample.prompt_ids(loaded.vocabulary, settings(text, 1, 1.0).prompt)
    seen = ids[:min(loaded.model.config.max_position_embeddings, EXPLORED)]
    if len(seen) < 2:
        raise ValueError("there is no text to read")
    whole = len(seen) == len(ids)
    yield from colour(loaded, seen, 1, f"{'' if whole else 'the first '}{len(seen) - 1:,} tokens"
                                       f"{'' if whole else f' of {len(ids) - 1:,}'}")


def colour(loaded: Loaded, ids: list[int], start: int, note: str):
    """The last step of both: ids from number `start` on, coloured, and how surprising they were together."""
    logits = exhibits.expectations(loaded, ids)
    losses = -logits[start - 1:].log_softmax(-1).gather(1, torch.tensor(ids[start:])[:, None])
    yield (exhibits.coloured(loaded, ids, start, logits),
           f"{note} · {float(losses.mean()) / math.log(2):.2f} bits of surprise a token · pick one to see the others",
           {"name": loaded.name, "ids": ids, "start": start})


def pick(shelf: Shelf, looked_at: dict | None, number: int, temperature: float, top_p: float, top_k: float):
    """Token explorer: what the model expected where token `number` of the text stands; yields HTML."""
    o = settings("", 1, temperature, top_p, top_k)
    if looked_at is None or not looked_at["start"] <= number < len(looked_at["ids"]):
        raise ValueError("there is no such token; continue or read a text first")
    loaded, ids = shelf.get(looked_at["name"]), looked_at["ids"]
    logits = exhibits.expectations(loaded, ids[:number + 1])[-1]
    yield exhibits.alternatives(loaded, logits, ids[number], o.temperature, o.top_k, o.top_p)


def sweep(shelf: Shelf, name: str, prompt: str, cool: float, middle: float, hot: float, count: float, length: float,
          seed: str, halt: list = ()):
    """Temperature sweep: the same seed at two or three temperatures, no token cut off; yields (texts, figures)."""
    yield "", loading(shelf, name)
    loaded, seed = shelf.get(name), seed or str(secrets.randbelow(2**32))
    temperatures = (cool, middle, hot) if int(count) == 3 else (cool, hot)
    options = [settings(prompt, length, temperature, seed=seed) for temperature in temperatures]
    prompt = options[0].prompt
    ids, started = sample.prompt_ids(loaded.vocabulary, prompt), time.monotonic()
    rows = side_by_side([loaded] * len(options), [ids] * len(options), options)
    for new, texts in unroll(rows, [decoder(loaded, ids) for _ in options], halt):
        same = next((i for i, tokens in enumerate(zip(*new)) if len(set(tokens)) > 1), min(map(len, new)))
        parted = any(len(line) > same for line in new)
        stream = decoder(loaded, ids)
        shared = len("".join(stream.push(token) for token in new[0][:same]))
        titles = [f"temperature {o.temperature:g}" for o in options]
        yield (cards([card(title, prompt, text, shared if parted else None) for title, text in zip(titles, texts)]),
               figures(sum(map(len, new)), started, halt, f"seed {options[0].seed}",
                       f"they part at token {same + 1}" if parted else "the same so far"))


def meet(shelf: Shelf, mode: str, left: str, right: str, prompt: str, length: float,
         halt: list = ()):
    """Arena: two models continue one prompt; yields (texts, status, the match when it is over)."""
    sizes = {name: entry.parameters for name, entry in shelf.entries.items()}
    if len(sizes) < 2:
        raise BadInput("the arena needs two models: train another one, or add one with --hf")
    if mode == "Random":
        left, right = exhibits.draw_pair(sizes, {name for name in sizes if shelf.entries[name].ours}, random)
    elif mode == "Blind":
        left, right = random.sample([left, right], 2)
    if shelf.entry(left) is shelf.entry(right):
        raise BadInput("choose two different models")
    yield "", loading(shelf, left, right) if mode == "Show" else "The models get ready …", None
    options = [settings(prompt, length, *PRESETS["Balanced"][:2]) for _ in range(2)]
    loaded, prompt = [shelf.get(left), shelf.get(right)], options[0].prompt
    names = [f"{side} · {name} ({size(sizes[name])})" if mode == "Show" else side
             for side, name in (("A", left), ("B", right))]
    ids = [sample.prompt_ids(model.vocabulary, prompt) for model in loaded]
    for new, texts in unroll(side_by_side(loaded, ids, options), list(map(decoder, loaded, ids)), halt):
        shown = cards([card(name, prompt, text) for name, text in zip(names, texts)])
        yield shown, f"{'Stopped · ' if halt else ''}{sum(map(len, new)):,} tokens", None
    if halt:
        return
    match = {"match": secrets.token_hex(8), "mode": mode, "prompt": prompt, "model_a": left, "model_b": right,
             "text_a": texts[0], "text_b": texts[1]}
    yield shown, "Which is better?", match


def scores(votes: Path) -> str:
    """Arena: the table of all votes as HTML, or why there is none."""
    try:
        return exhibits.score_table(exhibits.standings(exhibits.read(votes)))
    except (sqlite3.Error, OSError) as error:
        return f"<p>{safe(f'{votes} cannot be read: {brief(error)}')}</p>"


def vote(shelf: Shelf, votes: Path, match: dict | None, verdict: str):
    """Arena: keep a verdict and reveal the names; yields (texts, status, no match, standings)."""
    if match is None:
        raise ValueError("there is nothing to vote on; start a match first")
    exhibits.record(votes, exhibits.Vote(**match, verdict=verdict))
    names = [f"{side} · {name} ({size(shelf.entry(name).parameters)})"
             for side, name in (("A", match["model_a"]), ("B", match["model_b"]))]
    shown = cards([card(name, match["prompt"], text) for name, text in zip(names, (match["text_a"], match["text_b"]))])
    yield shown, f"Your vote is kept: {verdict}.", None, scores(votes)


def dialogue(turns: list[tuple[str, str]], message: str, user: str, model: str) -> str:
    """The prompt of a chat: each line under the tag of who says it, the model's tag last. A base model has read such
    texts, and goes on with the answer."""
    lines = [line for asked, answered in turns for line in (f"{user} {asked}", f"{model} {answered}")]
    return "\n".join([*lines, f"{user} {message}", model])


def chat(shelf: Shelf, name: str, message: str, user: str, model: str, temperature: float, length: float,
         turns: list[tuple[str, str]], halt: list = ()):
    """Chat: yields (conversation, the full prompt, status, turns). What the context cannot hold is left out, the oldest
    first; the reply ends where the model begins to speak for the user."""
    turns = turns[-49:]
    yield exhibits.bubbles(turns), "", loading(shelf, name), turns
    o, loaded = settings(message, length, temperature, PRESETS["Balanced"][1]), shelf.get(name)
    message, user, model = o.prompt.strip(), sample.clean_prompt(user).strip(), sample.clean_prompt(model).strip()
    if not (message and user and model):
        raise ValueError("write a message first; neither it nor the tags can be empty")
    context = loaded.model.config.max_position_embeddings
    o.max_new_tokens, left_out = min(o.max_new_tokens, context // 2), 0
    room = context - o.max_new_tokens
    while True:
        prompt = dialogue(turns[left_out:], message, user, model)
        ids = sample.prompt_ids(loaded.vocabulary, prompt)
        if len(ids) <= room or left_out == len(turns):
            break
        left_out += 1
    if len(ids) > room:  # one message that is too long: its end, and the model's tag
        prompt, ids = loaded.vocabulary.decode(ids[-room:]), ids[-room:]
    note, started = [f"turns left out: {left_out}"] if left_out else [], time.monotonic()
    for [new], [text] in unroll(completions(loaded, ids, o), [decoder(loaded, ids)], halt):
        if "again" in halt:  # this comes last, after whatever was on its way to the page
            yield exhibits.bubbles([]), "", "", []
            return
        ends = [at for tag in (user, model) if (at := text.find("\n" + tag)) >= 0]
        reply = text[:min(ends, default=len(text))].strip()
        status = figures(len(new), started, halt, f"prompt of {len(ids):,} tokens", *note)
        yield exhibits.bubbles([*turns, (message, reply)]), prompt, status, [*turns, (message, reply)]
        if ends:
            return


def examine(shelf: Shelf, name: str, prompt: str, layer: float, head: int):
    """Inside: yields (patterns of a layer, one pattern large, logit lens, status)."""
    yield "", "", "", loading(shelf, name)
    loaded = shelf.get(name)
    if not isinstance(loaded.model, Llama):
        raise BadInput(f"{name} is a model of transformers; this tab knows only the insides of our own")
    ids = sample.prompt_ids(loaded.vocabulary, settings(prompt, 1, 1.0).prompt)
    seen = ids[-min(INSPECTED, loaded.model.config.max_position_embeddings):]
    patterns, lens = exhibits.look_inside(loaded.model, seen)
    layers, heads = patterns.shape[:2]
    if not (1 <= layer <= layers and 0 <= head < heads):
        raise ValueError(f"{name} has layers 1 to {layers}, of {heads} heads each")
    layer = int(layer)
    names = [label(loaded, token) for token in seen]
    small = "".join(f"<figure class='{'picked' if i == head else ''}' role='button' tabindex='0' data-pick='{i}'>"
                    f"{exhibits.heat_map(pattern)}<figcaption>head {i + 1}</figcaption></figure>"
                    for i, pattern in enumerate(patterns[layer - 1]))
    note = f"the last {len(seen)} of {len(ids):,} tokens" if len(seen) < len(ids) else f"{len(seen)} tokens"
    yield (f"<div class='heads'>{small}</div>", exhibits.heat_map(patterns[layer - 1, head], names),
           exhibits.lens_table(loaded, lens, names), f"layer {layer} of {layers}, head {head + 1} of {heads} · {note}")


# ---------------------------------------------------------------------------------------------------------------
# The page

HEADER = ("<h2>nanoStentor</h2><p class='note'>Look inside a tiny language model. It means nothing by what it writes."
          "</p>")
LEGEND = ("<p class='note legend'><span class='sure'>80% and more</span><span class='unsure'>35% and more</span>"
          "<span class='surprised'>less</span> is what the model gave each token; "
          "a · is one without letters of its own.</p>")
PICK = """
element.addEventListener('click', event => {
    const picked = event.target.closest('[data-pick]');
    if (picked) trigger('click', {number: Number(picked.dataset.pick)});
});
element.addEventListener('keydown', event => { if (event.key === 'Enter') event.target.click(); });
"""


def in_page(function, *first):
    """A tab's generator for gradio, given its first arguments: what goes wrong in it is said in the page, in a line."""
    def handler(*arguments):
        try:
            yield from function(*first, *arguments)
        except Exception as error:  # whatever it is, the reader of a page can do nothing with a traceback
            kind = "" if isinstance(error, (BadInput, ValueError)) else f"{type(error).__name__}: "
            raise gr.Error(safe(kind + brief(error)), print_exception=False) from None

    return handler


def starts(button, stop, handler, inputs: list, outputs: list, enter: list = (), halt=None):
    """Let a button start a handler, or the Enter key in some boxes, and another button stop it; returns the event.

    What stops it is a list, this user's own, that the handler looks at. (gradio can cancel an event too, but what was
    on its way to the page then still arrives after the news that it has stopped.)
    """
    halt = halt or gr.State([])

    def begin(*arguments):
        arguments[-1].clear()
        yield from handler(*arguments)

    stop.click(lambda halt: halt.append(True), halt, None, show_progress="hidden")
    return gr.on([button.click, *(box.submit for box in enter)], begin, [*inputs, halt], outputs,
                 show_progress="hidden")


def buttons(first: str, *others: str):
    """Buttons in a row, the first of which is the one to press."""
    with gr.Row():
        return [gr.Button(name, variant="primary" if name == first else "secondary", min_width=100)
                for name in (first, *others)]


def sliders(temperature: float = 0.8, top_p: float = 0.9, length: int = 150, top_k: int = 0):
    """Temperature, top-p, length and top-k."""
    return (gr.Slider(0.05, 2, temperature, step=0.05, label="Temperature"),
            gr.Slider(0.05, 1, top_p, step=0.01, label="Top-p"),
            gr.Slider(1, 1000, length, step=1, label="Tokens"),
            gr.Slider(0, 200, top_k, step=1, label="Top-k (0 keeps all)"))


def generate_tab(shelf: Shelf, choices: list):
    """Text as it comes, and what came before."""
    with gr.Row():
        with gr.Column(scale=1, min_width=380):
            model = gr.Dropdown(choices, label="Model")
            prompt = gr.Textbox("def read(", lines=3, max_lines=10, label="Prompt")
            preset = gr.Radio(list(PRESETS), value="Balanced", label="Preset")
            go, stop = buttons("Generate", "Stop")
            samples = gr.Slider(1, 5, 1, step=1, label="Completions")
            temperature, top_p, length, top_k = sliders()
            penalty = gr.Slider(1, 2, 1.1, step=0.05, label="Repetition penalty (1 is off)")
            seed = gr.Textbox(label="Seed (empty: a new one)", max_lines=1)
        with gr.Column(scale=2):
            status, texts = gr.HTML(elem_classes="status"), gr.HTML(elem_id="texts")
            gr.HTML("<h4>History of this session</h4>")
            history, shown = gr.State([]), gr.HTML(past([]), elem_id="history")
    preset.input(PRESETS.get, preset, [temperature, top_p, length], show_progress="hidden")
    event = starts(go, stop, in_page(write, shelf),
                   [model, prompt, temperature, top_p, top_k, penalty, length, samples, seed, history],
                   [texts, status, history])
    event.then(past, history, shown, show_progress="hidden")


def explorer_tab(shelf: Shelf, choices: list):
    """Tokens in colours, and what else each could have been."""
    with gr.Row():
        with gr.Column(scale=1, min_width=380):
            model = gr.Dropdown(choices, label="Model")
            prompt = gr.Textbox("This function returns", lines=4, max_lines=12, label="Prompt, or a text to read")
            go, stop = buttons("Continue it", "Stop")
            read = gr.Button("Read it: what surprises the model?")
            temperature, top_p, length, top_k = sliders(length=80, top_k=40)
            seed = gr.Textbox(label="Seed (empty: a new one)", max_lines=1)
        with gr.Column(scale=2):
            gr.HTML(LEGEND)
            status, text = gr.HTML(elem_classes="status"), gr.HTML(elem_id="explored", js_on_load=PICK)
            panel = gr.HTML(elem_id="alternatives")
    looked_at, filters = gr.State(None), [temperature, top_p, top_k]
    outputs = [text, status, looked_at]
    starts(go, stop, in_page(explore, shelf), [model, prompt, length, *filters, seed], outputs)
    read.click(in_page(survey, shelf), [model, prompt], outputs, show_progress="hidden")
    gr.on([go.click, read.click], lambda: "", None, panel, show_progress="hidden")

    def picked(looked_at, temperature, top_p, top_k, event: gr.EventData):
        yield from in_page(pick, shelf)(looked_at, event.number, temperature, top_p, top_k)

    text.click(picked, [looked_at, *filters], panel, show_progress="hidden")


def sweep_tab(shelf: Shelf, choices: list):
    """Temperatures side by side."""
    with gr.Row():
        model = gr.Dropdown(choices, label="Model")
        prompt = gr.Textbox("def __init__(self", lines=1, max_lines=10, label="Prompt", scale=2)
        seed = gr.Textbox(label="Seed (empty: a new one)", max_lines=1)
    with gr.Row():
        cool = gr.Slider(0.05, 2, 0.2, step=0.05, label="Cool")
        middle = gr.Slider(0.05, 2, 0.7, step=0.05, label="Warm")
        hot = gr.Slider(0.05, 2, 1.2, step=0.05, label="Hot")
        count = gr.Radio([2, 3], value=3, label="How many")
        length = gr.Slider(1, 1000, 100, step=1, label="Tokens")
    go, stop = buttons("Compare", "Stop")
    status, texts = gr.HTML(elem_classes="status"), gr.HTML(elem_id="swept")
    starts(go, stop, in_page(sweep, shelf), [model, prompt, cool, middle, hot, count, length, seed],
           [texts, status])


def arena_tab(shelf: Shelf, choices: list, votes: Path):
    """Two models, four buttons, and the scores so far."""
    with gr.Row():
        mode = gr.Radio(["Show", "Blind", "Random"], value="Blind", label="Names", scale=2)
        left = gr.Dropdown(choices, label="One model")
        right = gr.Dropdown(choices, value=choices[min(1, len(choices) - 1)][1], label="Another")
        length = gr.Slider(1, 1000, 80, step=1, label="Tokens")
    prompt = gr.Textbox("The result of", lines=2, max_lines=10, label="Prompt")
    go, stop = buttons("Let them write", "Stop")
    status, texts, match = gr.HTML(elem_classes="status"), gr.HTML(elem_id="match"), gr.State(None)
    with gr.Row():
        verdicts = [gr.Button(name) for name in ("A is better", "B is better", "Tie", "Both bad")]
    gr.HTML("<h4>All votes so far</h4>")
    table = gr.HTML(lambda: scores(votes), elem_id="standings")
    starts(go, stop, in_page(meet, shelf), [mode, left, right, prompt, length], [texts, status, match])
    for button, verdict in zip(verdicts, exhibits.VERDICTS):
        button.click(in_page(vote, shelf, votes), [match, gr.State(verdict)], [texts, status, match, table],
                     show_progress="hidden")


def chat_tab(shelf: Shelf, choices: list):
    """A conversation, and the prompt that it really is."""
    with gr.Row():
        with gr.Column(scale=1, min_width=380):
            model = gr.Dropdown(choices, label="Model")
            user, reply = gr.Textbox("User:", label="The user's tag"), gr.Textbox("Assistant:", label="The model's tag")
            temperature = gr.Slider(0.05, 2, 0.7, step=0.05, label="Temperature")
            length = gr.Slider(1, 1000, 60, step=1, label="Tokens")
        with gr.Column(scale=2):
            turns, talk = gr.State([]), gr.HTML(exhibits.bubbles([]), elem_id="talk")
            status = gr.HTML(elem_classes="status")
            message = gr.Textbox("What does this function do?", label="Message", lines=1, max_lines=8)
            go, stop, clear = buttons("Send", "Stop", "Begin again")
            with gr.Accordion("The full prompt", open=False):
                prompt = gr.Textbox(show_label=False, lines=4, max_lines=20, interactive=False, elem_id="full")
    halt = gr.State([])
    starts(go, stop, in_page(chat, shelf), [model, message, user, reply, temperature, length, turns],
           [talk, prompt, status, turns], [message], halt).success(lambda: "", None, message, show_progress="hidden")

    def again(halt):
        halt.append("again")
        return exhibits.bubbles([]), "", "", []

    clear.click(again, halt, [talk, prompt, status, turns], show_progress="hidden")


def inside_tab(shelf: Shelf, choices: list):
    """Attention and the logit lens."""
    own = [choice for choice in choices if shelf.entries[choice[1]].ours]
    if not own:
        return gr.HTML("<p>This tab knows only the insides of our own models, and there is none here.</p>")
    with gr.Row():
        model = gr.Dropdown(own, label="Model")
        prompt = gr.Textbox("if name is None: raise ValueError(name", lines=1, max_lines=4, label="Prompt", scale=2)
        layer = gr.Slider(1, max(2, *(shelf.entries[name].layers for _, name in own)), 1, step=1, label="Layer")
    go = gr.Button("Look inside", variant="primary")
    status = gr.HTML(elem_classes="status")
    with gr.Row():
        with gr.Column(scale=1, min_width=200):
            gr.HTML("<h4>Attention of each head: pick one</h4>")
            heads = gr.HTML(elem_id="heads", js_on_load=PICK)
        with gr.Column(scale=2):
            gr.HTML("<h4>Each row is a token, and what it takes from those before it</h4>")
            large = gr.HTML(elem_id="pattern")
    gr.HTML("<h4>Logit lens: the likeliest next token, if the model stopped after so many blocks</h4>")
    lens = gr.HTML(elem_id="lens")
    outputs = [heads, large, lens, status]

    def picked(name, prompt, layer, event: gr.EventData):
        yield from in_page(examine, shelf)(name, prompt, layer, int(event.number))

    first = in_page(lambda *arguments: examine(shelf, *arguments, 0))
    go.click(first, [model, prompt, layer], outputs, show_progress="hidden")
    layer.release(first, [model, prompt, layer], outputs, show_progress="hidden")
    heads.click(picked, [model, prompt, layer], outputs, show_progress="hidden")


def page(shelf: Shelf, votes: Path):
    """The app. Each browser window has a history, a conversation and a match of its own (gr.State)."""
    choices = [(f"{entry.name} ({size(entry.parameters)})", entry.name) for entry in shelf.entries.values()]
    with gr.Blocks(title="nanoStentor", analytics_enabled=False) as blocks:
        gr.HTML(HEADER)
        with gr.Tab("Generate"):
            generate_tab(shelf, choices)
        with gr.Tab("Token explorer"):
            explorer_tab(shelf, choices)
        with gr.Tab("Temperature sweep"):
            sweep_tab(shelf, choices)
        with gr.Tab("Arena"):
            arena_tab(shelf, choices, votes)
        with gr.Tab("Chat"):
            chat_tab(shelf, choices)
        with gr.Tab("Inside"):
            inside_tab(shelf, choices)
    return blocks.queue(default_concurrency_limit=8, api_open=False)


def main(argv: list[str]):
    options = parse(Options, argv)
    if gr is None:
        raise BadInput("the demo needs gradio: pip install -r requirements-demo.txt")
    blocks = page(find_models(options), VOTES)
    theme = gr.themes.Default(primary_hue="teal", neutral_hue="slate", font=["system-ui", "sans-serif"],
                              font_mono=["ui-monospace", "monospace"])  # no fonts from elsewhere
    # gradio asks itself whether it is there: a network's proxy would not know.
    os.environ["no_proxy"] = f"{os.environ.get('no_proxy') or os.environ.get('NO_PROXY', '')},127.0.0.1"
    try:
        blocks.launch(server_name="127.0.0.1", server_port=options.port, share=False, ssr_mode=False,
                      run_history=False, footer_links=[], theme=theme, css=exhibits.CSS, quiet=True,
                      prevent_thread_lock=True)
    except OSError:
        raise BadInput(f"port {options.port} is in use; choose another with --port") from None
    print(f"The demo is at http://127.0.0.1:{options.port}; Ctrl-C ends it.", flush=True)
    blocks.block_thread()


if __name__ == "__main__":
    script(main)
