"""What the demo shows: models behind one face, what they expect of a text, what goes on inside, how people like them.

Figures first, and at the end the HTML that shows them; the page itself is demo.py. All text of a user or of a model
goes through `safe` on its way into HTML.
"""

import html
import math
import random
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import checkpoint
from choice import filter_logits
from config import BadInput, brief
from model import Llama, ModelConfig, apply_rope, expand_heads
from tokenizer import TokenizerJsonStream
from vocabulary import Tokenizer

LONGEST = 2048  # tokens that a model of transformers sees at once: some could see more than memory holds
IN_MEMORY = 4  # models
VERDICTS = ("A", "B", "tie", "both bad")
POINTS = 400 / math.log(10)  # of a score, per unit of log-strength: 400 points are odds of ten to one, as in chess
PICTURES = {code: 0x2400 + code for code in range(32)} | {127: 0x2421}  # Unicode's own pictures of control characters


# ---------------------------------------------------------------------------------------------------------------
# The models


class TheirTokens(Tokenizer):
    """The tokenizer of a transformers model, as one of ours. Documents follow its eos, as with evaluate.py."""

    def __init__(self, name: str, tokens):
        self.name, self._tokens, self.vocab_size = name, tokens, len(tokens)
        self.eos_id = tokens.eos_token_id if tokens.eos_token_id is not None else tokens.bos_token_id
        if self.eos_id is None:
            raise BadInput(f"{name} has no token to put between documents")

    def encode_counted(self, text: str):
        ids = self._tokens(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        return np.array(ids, np.int64), 0

    def decode(self, ids) -> str:
        return self._tokens.decode(self._checked(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def stream(self):
        return TokenizerJsonStream(self)


class Past:
    """A cache of transformers' own, with the face of our KVCache."""

    def __init__(self):
        self.past = None
        self.length = 0  # tokens that it holds; lower it to forget the newest

    def repeat(self, count: int):
        """Go on as `count` sequences that begin alike."""
        self.past.batch_repeat_interleave(count)


class Theirs:
    """A causal model of transformers with the face that sample.generate knows."""

    def __init__(self, model, context: int):
        self.model, self.lm_head = model, model.get_output_embeddings()
        self.config = SimpleNamespace(max_position_embeddings=context, vocab_size=model.config.vocab_size)

    def new_cache(self, length: int) -> Past:
        """An empty cache, which grows."""
        return Past()

    def __call__(self, input_ids, cache=None, logits_to_keep=0):
        """As Llama.forward: input_ids (B, T), taken to follow those in the cache -> (logits (B, T, V), None). (All
        logits are computed, whatever is kept: the option has had two names in transformers.)"""
        if cache is None:
            return self.model(input_ids=input_ids, use_cache=False).logits[:, -logits_to_keep:], None
        if cache.past is not None and cache.past.get_seq_length() > cache.length:
            cache.past.crop(cache.length - cache.past.get_seq_length())  # a negative number: so many of the newest
        output = self.model(input_ids=input_ids, past_key_values=cache.past, use_cache=True)
        cache.past, cache.length = output.past_key_values, cache.length + input_ids.size(1)
        return output.logits[:, -logits_to_keep:], None


@dataclass
class Loaded:
    """A model and its tokenizer, ready to run."""

    name: str
    model: Llama | Theirs
    vocabulary: Tokenizer


@dataclass
class Entry:
    """A model that can be chosen."""

    name: str
    parameters: int
    layers: int
    ours: bool
    load: Callable[[], Loaded]


def our_entry(path: Path, device: torch.device) -> Entry:
    """A run or a step directory. Raises BadInput where it is none."""
    step_dir = checkpoint.find(path, "best")
    run = checkpoint.run_dir(step_dir)
    name = run.name if step_dir != path else f"{run.name}/{step_dir.name}"
    try:
        with torch.device("meta"):  # shapes without numbers
            model = Llama(ModelConfig(**checkpoint.read_state(step_dir)["config"]["model"]))
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{step_dir / 'state.json'} does not describe a model: {error!r}") from error

    def load() -> Loaded:
        step_dir = checkpoint.find(path, "best")  # again: a run that is training has replaced it by now
        model, state = checkpoint.load_model(step_dir)
        return Loaded(name, model.to(device).eval(), checkpoint.load_tokenizer(step_dir, state))

    return Entry(name, model.num_parameters(), model.config.num_hidden_layers, True, load)


def their_entry(name: str, trust_remote_code: bool, device: torch.device) -> Entry:
    """A causal model of transformers. Raises BadInput where it cannot be loaded."""
    try:
        import transformers
    except ImportError:
        raise BadInput("--hf needs transformers: pip install transformers") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # A folder is all there is to it: nothing is asked of the hub.
    options = {"trust_remote_code": trust_remote_code, "local_files_only": Path(name).is_dir()}

    def call(what: Callable, *arguments, **more):
        try:
            return what(*arguments, **more)
        except Exception as error:  # of whatever library it goes wrong in
            if "trust_remote_code" in str(error):
                raise BadInput(f"{name} comes with code of its own; --trust_remote_code lets it run") from error
            raise BadInput(f"transformers cannot load {name}: {brief(error)}") from error

    config = call(transformers.AutoConfig.from_pretrained, name, **options)
    with torch.device("meta"):
        shape = call(transformers.AutoModelForCausalLM.from_config, config, trust_remote_code=trust_remote_code)

    def load() -> Loaded:
        tokens = call(transformers.AutoTokenizer.from_pretrained, name, **options)
        model = call(transformers.AutoModelForCausalLM.from_pretrained, name, **options).float().to(device).eval()
        context = min(getattr(config, "max_position_embeddings", 1024), LONGEST)
        return Loaded(name, Theirs(model, context), TheirTokens(name, tokens))

    return Entry(Path(name).name if Path(name).is_dir() else name, shape.num_parameters(),
                 getattr(config, "num_hidden_layers", 0), False, load)


class Shelf:
    """The models that can be chosen, by name. Those used last are kept in memory."""

    def __init__(self, entries: list[Entry]):
        self.entries = {}
        for entry in entries:
            name, again = entry.name, 2
            while entry.name in self.entries:  # out/a and other/a
                entry.name, again = f"{name} ({again})", again + 1
            self.entries[entry.name] = entry
        self.loaded, self.lock = {}, threading.Lock()
        self.loading = {name: threading.Lock() for name in self.entries}

    def entry(self, name: str) -> Entry:
        """Raises BadInput for a name that is not there."""
        if name not in self.entries:
            raise BadInput("choose a model")
        return self.entries[name]

    def get(self, name: str) -> Loaded:
        """A model, loaded if need be; users who ask for the same one at the same time wait for each other."""
        entry = self.entry(name)
        with self.loading[name]:
            loaded = self.loaded.get(name) or replace(entry.load(), name=name)
            with self.lock:
                self.loaded.pop(name, None)
                self.loaded[name] = loaded  # the last used is the last
                while len(self.loaded) > IN_MEMORY:
                    del self.loaded[next(iter(self.loaded))]
        return loaded


# ---------------------------------------------------------------------------------------------------------------
# What a model says of a text


@torch.no_grad()
def expectations(loaded: Loaded, ids: list[int]) -> torch.Tensor:
    """Logits (T - 1, V) in FP32 over the tokens that there are: row i is what was expected in the place of ids[i + 1].

    One pass over the finished text gives what generation saw, one token at a time, while it wrote it.
    """
    logits, _ = loaded.model(torch.tensor([ids[:-1]], device=loaded.model.lm_head.weight.device))
    return logits[0, :, :loaded.vocabulary.vocab_size].float().cpu()


def entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """Bits of each distribution, (..., V) -> (...): how many yes-or-no questions the next token is worth."""
    return -torch.special.xlogy(probabilities, probabilities).sum(-1) / math.log(2)


def kept(logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """Which of the tokens of logits (V,) sampling could have chosen: (V,) bool."""
    return filter_logits(logits, temperature, top_k, top_p).isfinite()


@torch.no_grad()
def look_inside(model: Llama, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention patterns (layers, H, T, T), and the logits (layers + 1, T, V) that the head reads before the first
    block and after each: the logit lens (nostalgebraist 2020). Row t of a pattern is what token t takes from which.

    Queries and keys are computed a second time, beside the blocks' own: attention kernels keep no pattern.
    """
    decoder, T = model.model, len(ids)
    cos, sin = decoder.cos[:T], decoder.sin[:T]
    x = decoder.embed_tokens(torch.tensor([ids], device=model.lm_head.weight.device))  # (1, T, C)
    future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
    patterns, streams = [], [x]
    for block in decoder.layers:
        attention, h = block.self_attn, block.input_layernorm(x)
        q = apply_rope(attention.q_proj(h).view(1, T, -1, attention.head_dim).transpose(1, 2), cos, sin)  # (1, H, T, D)
        k = apply_rope(attention.k_proj(h).view(1, T, -1, attention.head_dim).transpose(1, 2), cos, sin)  # (1, K, T, D)
        scores = q @ expand_heads(k, q.size(1)).mT / math.sqrt(attention.head_dim)  # (1, H, T, T)
        patterns.append(scores.masked_fill(future, -torch.inf).softmax(-1)[0])
        x = block(x, cos, sin)
        streams.append(x)
    lens = model.lm_head(decoder.norm(torch.cat(streams)))  # (layers + 1, T, V)
    return torch.stack(patterns).float().cpu(), lens.float().cpu()


# ---------------------------------------------------------------------------------------------------------------
# Votes: a vote is on the disk before anybody is told that it was counted


@dataclass
class Vote:
    """A verdict on two texts that continue one prompt, in a match of an id of its own."""

    match: str
    mode: str
    prompt: str
    model_a: str
    model_b: str
    text_a: str
    text_b: str
    verdict: str


def connect(path: Path) -> sqlite3.Connection:
    """Open the file of votes, which begins empty. Raises sqlite3.Error where it is something else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    database = sqlite3.connect(path, timeout=10)  # seconds to wait while another process writes
    # EXTRA: a commit returns when the vote and the end of its journal are on the disk, whatever happens next.
    database.execute("PRAGMA synchronous = EXTRA")
    database.execute("""CREATE TABLE IF NOT EXISTS votes (
        id INTEGER PRIMARY KEY, at TEXT DEFAULT CURRENT_TIMESTAMP, match TEXT UNIQUE, mode TEXT, prompt TEXT,
        model_a TEXT, model_b TEXT, text_a TEXT, text_b TEXT,
        verdict TEXT CHECK (verdict IN ('A', 'B', 'tie', 'both bad')))""")
    return database


def record(path: Path, vote: Vote):
    """Add a vote; when this returns, it is on the disk. A match that has one keeps the first.

    Raises sqlite3.Error where the file cannot be written, or for what is no verdict.
    """
    with closing(connect(path)) as database, database:
        database.execute("INSERT INTO votes (match, mode, prompt, model_a, model_b, text_a, text_b, verdict) VALUES "
                         "(:match, :mode, :prompt, :model_a, :model_b, :text_a, :text_b, :verdict) "
                         "ON CONFLICT (match) DO NOTHING", vars(vote))


def read(path: Path) -> list[tuple[str, str, str]]:
    """All votes, oldest first: (model A, model B, verdict)."""
    with closing(connect(path)) as database:
        return database.execute("SELECT model_a, model_b, verdict FROM votes ORDER BY id").fetchall()


# ---------------------------------------------------------------------------------------------------------------
# Scores: the odds between any two models, and how much of them is luck


def bradley_terry(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-strengths of n models, of mean 0, and their standard errors, (n,) each. points (n, n): [i, j] is what i has
    of j.

    i beats j with probability s_i / (s_i + s_j) (Bradley & Terry 1952, Rank Analysis of Incomplete Block Designs). A
    win is a point, a tie half a point for each. The likeliest strengths are found by Hunter's iteration (2004, MM
    Algorithms for Generalized Bradley-Terry Models), s_i <- points of i / sum_j (games of i and j) / (s_i + s_j), each
    step of which climbs. To begin with, everybody has tied once with an imaginary model of strength 1: so the strength
    of one that has lost every game is low, not 0, and models that never met can be compared. The errors are those of
    the Fisher information (of the imaginary games too), for the distance from the mean of all; counting a tie as two
    halves makes them a little too wide.
    """
    games, won = points + points.T, points.sum(1) + 0.5
    strength = np.ones(len(points))
    for _ in range(100_000):
        before = strength
        strength = won / ((games / (before[:, None] + before)).sum(1) + 1 / (before + 1))
        if np.abs(np.log(strength / before)).max(initial=0) < 1e-12:
            break
    chance = strength[:, None] / (strength[:, None] + strength)  # [i, j]: i beats j
    shared = games * chance * (1 - chance)
    information = np.diag(shared.sum(1) + strength / (strength + 1) ** 2) - shared
    # Only differences mean something: how good all are together nobody has voted on.
    centre = np.eye(len(points)) - 1 / max(1, len(points))
    return centre @ np.log(strength), np.sqrt(np.diag(centre @ np.linalg.inv(information) @ centre))


@dataclass
class Standing:
    """A model's votes, and its score with the half width of its 95% interval."""

    name: str
    score: float
    margin: float
    won: int
    tied: int
    lost: int
    both_bad: int


def standings(votes: list[tuple[str, str, str]]) -> list[Standing]:
    """Every model that was voted on, the best first. "Both bad" is counted, and moves no score: it prefers nobody."""
    names = sorted({name for a, b, _ in votes for name in (a, b)})
    number = {name: i for i, name in enumerate(names)}
    points, count = np.zeros((len(names), len(names))), {name: [0, 0, 0, 0] for name in names}
    for a, b, verdict in votes:
        share = {"A": 1.0, "B": 0.0, "tie": 0.5, "both bad": None}[verdict]
        for name, other, got in ((a, b, share), (b, a, share if share is None else 1 - share)):
            count[name][3 if got is None else round(2 - 2 * got)] += 1  # won, tied, lost, both bad
            points[number[name], number[other]] += got or 0
    table = [Standing(name, 1000 + POINTS * strength, 1.96 * POINTS * error, *count[name])
             for name, strength, error in zip(names, *bradley_terry(points))]
    return sorted(table, key=lambda standing: -standing.score)


def draw_pair(sizes: dict[str, int], ours: set[str], rng: random.Random) -> tuple[str, str]:
    """Two models of similar size, from {name: parameters}: one by chance, the other among those up to twice as large or
    small, or else the one nearest in size. Where there are models of ours and of others, it is one of each.
    """
    own = [name for name in sizes if name in ours] or list(sizes)
    first = rng.choice(own)
    others = [name for name in sizes if name not in ours] if ours else []
    others = others or [name for name in sizes if name != first]
    ratio = {name: abs(math.log(sizes[name] / sizes[first])) for name in others}
    near = [name for name in others if ratio[name] <= math.log(2)] or [min(others, key=ratio.get)]
    pair = [first, rng.choice(near)]
    rng.shuffle(pair)
    return pair[0], pair[1]


# ---------------------------------------------------------------------------------------------------------------
# HTML

CSS = """
.card { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 12px 16px; min-width: 0 }
.card h4 { margin: 0 0 6px; font-size: 13px; color: var(--body-text-color-subdued); font-weight: 600 }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 12px }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 !important; font: 14px/1.6 ui-monospace, monospace }
.given { color: var(--body-text-color-subdued) }
.shared { background: rgba(13, 148, 136, .16) }
.parting { display: inline-block; width: 3px; height: 1.2em; margin: 0 3px; vertical-align: text-bottom;
           background: #d97706; border-radius: 2px }
.token { border-radius: 3px; cursor: pointer; padding: 1px 0 }
.token:hover, .token:focus { outline: 2px solid var(--color-accent) }
.sure { background: rgba(22, 163, 74, .32) } .unsure { background: rgba(234, 179, 8, .30) }
.surprised { background: rgba(220, 38, 38, .24) }
.legend span { padding: 1px 8px; margin-right: 6px; border-radius: 3px; color: var(--body-text-color) }
.status, .note { color: var(--body-text-color-subdued); font-size: 13px; min-height: 20px }
.prose table { border-collapse: collapse; margin: 6px 0 } .prose table, .prose tr { border: 0 !important }
.prose td, .prose th { border: 0; border-bottom: 1px solid var(--border-color-primary); padding: 4px 14px 4px 6px }
.prose th { font-size: 12px; font-weight: 600; color: var(--body-text-color-subdued) }
.picked, tr.picked td { font-weight: 600 } tr.picked td { background: var(--color-accent-soft) }
td.wide { width: 260px; min-width: 160px }
.bar { display: block; height: 12px; min-width: 1px; border-radius: 2px; background: rgba(13, 148, 136, .75) }
.interval { display: block; height: 6px; border-radius: 3px; background: rgba(13, 148, 136, .6) }
.chat { display: flex; flex-direction: column; gap: 8px; min-height: 200px }
.chat p { padding: 8px 14px; border-radius: 12px; max-width: 80%; background: var(--background-fill-secondary) }
.chat p.user { align-self: flex-end; background: var(--color-accent-soft) } .chat p.reply { align-self: flex-start }
.heads { display: flex; flex-wrap: wrap; gap: 12px }
.heads figure { margin: 0; padding: 6px; border-radius: 6px; cursor: pointer; border: 1px solid transparent }
.heads figure.picked { border-color: var(--color-accent) }
.heads figcaption { font-size: 12px; text-align: center }
svg { max-width: 100%; height: auto } svg rect { fill: #0d9488; stroke: var(--border-color-primary); stroke-width: .5 }
svg text { font: 11px ui-monospace, monospace; fill: var(--body-text-color) }
.scroll { overflow-x: auto } .lens code { font-size: 11px; background: none; padding: 0; white-space: pre }
.lens td { background: color-mix(in srgb, #0d9488 calc(var(--p) * .7), transparent) }
.prose .lens td, .prose .lens th { padding: 3px 7px; white-space: nowrap; text-align: center }
"""


def safe(text: str) -> str:
    """Text as HTML: nothing in it is a tag, and control characters can be seen."""
    text = text.encode("utf-8", "replace").decode()
    return html.escape(text.translate(PICTURES | {9: "\t", 10: "\n"}))


def label(loaded: Loaded, token: int) -> str:
    """A token by itself as HTML, its spaces and line breaks visible; a long one is cut."""
    if token == loaded.vocabulary.eos_id:
        return "⟨end⟩"
    text = loaded.vocabulary.decode([token]).replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    return safe(text if len(text) <= 14 else text[:13] + "…") or "·"


def tail(text: str, length: int = 600) -> str:
    """The end of a prompt, enough to see what follows it."""
    return text if len(text) <= length else "… " + text[-length:]


def size(parameters: int) -> str:
    return f"{parameters / 1e6:.1f}M" if parameters >= 1e6 else f"{parameters / 1e3:.0f}K"


def card(title: str, prompt: str, text: str, marked: int | None = None) -> str:
    """A prompt and the text that follows it, under a title; with a mark after so many characters of the text."""
    text = (f"<span class='shared'>{safe(text[:marked])}</span><span class='parting' title='here they part'></span>"
            f"{safe(text[marked:])}" if marked is not None else safe(text))
    return (f"<article class='card'><h4>{safe(title)}</h4>"
            f"<p class='text'><span class='given'>{safe(tail(prompt))}</span>{text}</p></article>")


def cards(items: list[str]) -> str:
    return f"<div class='cards'>{''.join(items)}</div>"


def shade(probability: float) -> str:
    """The colour of a token of this probability, as a CSS class."""
    return "sure" if probability >= 0.8 else "unsure" if probability >= 0.35 else "surprised"


def coloured(loaded: Loaded, ids: list[int], start: int, logits: torch.Tensor) -> str:
    """The text of ids, from number `start` on coloured by what the model expected, with the likeliest on hovering."""
    stream, parts = loaded.vocabulary.stream(), []
    pieces = [stream.push(token) for token in ids]
    pieces[-1] += stream.finish()
    probabilities = logits.softmax(-1)
    own = probabilities.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]  # (T - 1,)
    best = probabilities.topk(min(8, probabilities.size(1)))
    for i in range(start, len(ids)):
        others = "\n".join(f"{p:6.1%}  {label(loaded, token)}"
                           for p, token in zip(best.values[i - 1].tolist(), best.indices[i - 1].tolist()))
        parts.append(f"<span class='token {shade(own[i - 1])}' role='button' tabindex='0' data-pick='{i}' "
                     f"title='{others}'>{safe(pieces[i].replace(chr(10), '⏎' + chr(10))) or '·'}</span>")
    return f"<p class='text'><span class='given'>{safe(''.join(pieces[:start]))}</span>{''.join(parts)}</p>"


def alternatives(loaded: Loaded, logits: torch.Tensor, token: int, temperature: float, top_k: int | None,
                 top_p: float | None) -> str:
    """What the model expected where `token` stands, from its logits (V,) there."""
    probabilities = logits.softmax(-1)
    order = probabilities.argsort(descending=True, stable=True)
    by_k, by_both = kept(logits, temperature, top_k, None), kept(logits, temperature, top_k, top_p)
    rank = int((order == token).nonzero()) + 1
    p = float(probabilities[token])
    rows = []
    for number, other in [*enumerate(order[:8].tolist(), 1), *([(rank, token)] if rank > 8 else [])]:
        share = float(probabilities[other])
        rows.append(f"<tr class='{'picked' if other == token else ''}'><td>{number}</td>"
                    f"<td><code>{label(loaded, other)}</code></td><td>{share:.1%}</td>"
                    f"<td class='wide'><span class='bar' style='width:{share:.1%}'></span></td>"
                    + "".join(f"<td>{'✓' if by[other] else '–'}</td>" for by in (by_k, by_both)) + "</tr>")
    return (f"<h4><code>{label(loaded, token)}</code> had {p:.1%}, rank {rank:,}: "
            f"a surprise of {-math.log2(max(p, 1e-45)):.2f} bits</h4>"
            f"<p>Entropy <b>{float(entropy(probabilities)):.2f} bits</b> of at most {math.log2(len(logits)):.2f}</p>"
            f"<table><tr><th></th><th>token</th><th>probability</th><th class='wide'></th><th>top-k</th>"
            f"<th>and top-p</th></tr>{''.join(rows)}</table>"
            f"<p>Of {len(logits):,} tokens {f'top-k {top_k}' if top_k else 'no top-k'} keeps {int(by_k.sum()):,}, and "
            f"of these {f'top-p {top_p:g}' if top_p else 'no top-p'}, at temperature {temperature:g}, keeps "
            f"{int(by_both.sum()):,}.</p>")


def heat_map(pattern: torch.Tensor, names: list[str] | None = None) -> str:
    """An attention pattern (T, T) as a picture: rows look at columns. With names of tokens, large."""
    T = len(pattern)
    cell, left, top = (22, 90, 80) if names else (7, 0, 0)
    width, height = left + cell * T + left // 2, top + cell * T  # the last name leans over the edge
    parts = [f"<svg viewBox='0 0 {width} {height}' width='{width}'>"]
    for i in range(T):
        if names:
            middle = cell * i + cell // 2 + 4
            parts.append(f"<text x='{left - 6}' y='{top + middle}' text-anchor='end'>{names[i]}</text><text "
                         f"transform='translate({left + middle},{top - 6}) rotate(-60)'>{names[i]}</text>")
        for j in range(i + 1):
            share = float(pattern[i, j])
            title = f"<title>{names[i]} takes {share:.1%} from {names[j]}</title>" if names else ""
            parts.append(f"<rect x='{left + cell * j}' y='{top + cell * i}' width='{cell}' height='{cell}' "
                         f"fill-opacity='{share:.3f}'>{title}</rect>")
    return "".join(parts) + "</svg>"


def lens_table(loaded: Loaded, lens: torch.Tensor, names: list[str]) -> str:
    """The likeliest next token at each place, read from the stream before the first block and after each."""
    best = lens[..., :loaded.vocabulary.vocab_size].softmax(-1).max(-1)
    rows = ["<tr><th></th>" + "".join(f"<th><code>{name}</code></th>" for name in names) + "</tr>"]
    for depth, (shares, tokens) in enumerate(zip(best.values.tolist(), best.indices.tolist())):
        cells = (f"<td style='--p:{p:.0%}' title='{p:.1%}'><code>{label(loaded, token)}</code></td>"
                 for p, token in zip(shares, tokens))
        rows.append(f"<tr><th>{f'block {depth}' if depth else 'embedding'}</th>{''.join(cells)}</tr>")
    return f"<div class='scroll'><table class='lens'>{''.join(rows)}</table></div>"


def score_table(table: list[Standing]) -> str:
    """The arena's standings, each score with its interval as a line."""
    if not table:
        return "<p>No votes yet.</p>"
    low = min(row.score - row.margin for row in table)
    span = max(row.score + row.margin for row in table) - low
    rows = [f"<tr><td><b>{safe(row.name)}</b></td><td>{row.score:.0f} ± {row.margin:.0f}</td><td class='wide'><span "
            f"class='interval' style='margin-left:{(row.score - row.margin - low) / span:.1%};"
            f"width:{2 * row.margin / span:.1%}'></span></td>"
            f"<td>{row.won}</td><td>{row.tied}</td><td>{row.lost}</td><td>{row.both_bad}</td></tr>" for row in table]
    return ("<table><tr><th>model</th><th>score, 95%</th><th class='wide'></th><th>won</th><th>tied</th><th>lost</th>"
            f"<th>both bad</th></tr>{''.join(rows)}</table><p class='note'>Bradley-Terry: 400 points more are odds of "
            "ten to one, 1000 is the average. A tie is half a win for each; “both bad” moves no score. Everybody has "
            "tied once with an imaginary model.</p>")


def bubbles(turns: list[tuple[str, str]]) -> str:
    """A conversation of (message, reply)."""
    spoken = "".join(f"<p class='text user'>{safe(tail(message))}</p><p class='text reply'>{safe(reply)}</p>"
                     for message, reply in turns)
    return f"<div class='chat'>{spoken}</div>"
