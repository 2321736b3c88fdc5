"""The HTML of what the page shows: texts, tokens in colours, tables and pictures, made from plain figures.

All text of a user or of a model goes through `safe` on its way into HTML.
"""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

import torch

from tokenizer import Tokenizer

CSS = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
PICTURES = {code: 0x2400 + code for code in range(32)} | {127: 0x2421}  # Unicode's own pictures of control characters


# ---------------------------------------------------------------------------------------------------------------
# Words


def safe(text: str) -> str:
    """Text as HTML: no tag in it counts, and control characters are visible."""
    text = text.encode("utf-8", "replace").decode()
    return escape(text.translate(PICTURES | {9: "\t", 10: "\n"}))


def label(vocabulary: Tokenizer, token: int) -> str:
    """One token as HTML, with visible spaces and line breaks; a long one is cut."""
    if token == vocabulary.eos_id:
        return "⟨end⟩"
    text = vocabulary.decode([token]).replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    return safe(text if len(text) <= 14 else text[:13] + "…") or "·"


def tail(text: str, length: int = 600) -> str:
    """The end of a prompt, enough to see what follows it."""
    return text if len(text) <= length else "… " + text[-length:]


def size(parameters: int) -> str:
    """A number of parameters, in short."""
    return f"{parameters / 1e6:.1f}M" if parameters >= 1e6 else f"{parameters / 1e3:.0f}K"


# ---------------------------------------------------------------------------------------------------------------
# Texts


def continued(prompt: str, text: str, marked: int | None = None) -> str:
    """A prompt and the text that follows it, with a mark after the first `marked` characters of the text."""
    text = (f"<span class='shared'>{safe(text[:marked])}</span><span class='parting' title='here they part'></span>"
            f"{safe(text[marked:])}" if marked is not None else safe(text))
    return f"<p class='text'><span class='given'>{safe(tail(prompt))}</span>{text}</p>"


def card(title: str, prompt: str, text: str, marked: int | None = None) -> str:
    """The same, under a title."""
    return f"<article class='card'><h4>{safe(title)}</h4>{continued(prompt, text, marked)}</article>"


def cards(titles: list[str], prompt: str, texts: list[str], marked: int | None = None) -> str:
    """Several texts that follow one prompt, side by side."""
    items = [card(title, prompt, text, marked) for title, text in zip(titles, texts)]
    return f"<div class='cards'>{''.join(items)}</div>"


def past(history: list[dict]) -> str:
    """The history of a session."""
    return "".join(
        f"<details><summary><b>{entry['at']}</b> {safe(entry['model'])}: <q>{safe(tail(entry['prompt'], 60))}</q>"
        f"</summary><p class='note'>{safe(entry['settings'])}, seed {entry['seed']}; {entry['tokens']} tokens</p>"
        f"{cards([str(i + 1) for i in range(len(entry['texts']))], entry['prompt'], entry['texts'])}</details>"
        for entry in history) or "<p class='note'>Nothing yet.</p>"


def bubbles(turns: list[tuple[str, str]]) -> str:
    """A conversation of (message, reply)."""
    spoken = "".join(f"<p class='text user'>{safe(tail(message))}</p><p class='text reply'>{safe(reply)}</p>"
                     for message, reply in turns)
    return f"<div class='chat'>{spoken}</div>"


# ---------------------------------------------------------------------------------------------------------------
# The token explorer


def shade(probability: float) -> str:
    """The CSS class that colours a token of this probability."""
    return "sure" if probability >= 0.8 else "unsure" if probability >= 0.35 else "surprised"


def coloured(vocabulary: Tokenizer, ids: list[int], start: int, logits: torch.Tensor) -> str:
    """The text of ids. From ids[start] on, each token is coloured by what the model expected there, and hovering over
    it shows the likeliest.

    logits (T - 1, V)    row i is what the model expected as ids[i + 1] (inside.expectations)
    """
    stream, parts = vocabulary.stream(), []
    pieces = [stream.push(token) for token in ids]
    pieces[-1] += stream.finish()
    probabilities = logits.softmax(-1)
    own = probabilities.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]  # (T - 1,)
    best = probabilities.topk(min(8, probabilities.size(1)))
    for i in range(start, len(ids)):
        others = "\n".join(f"{p:6.1%}  {label(vocabulary, token)}"
                           for p, token in zip(best.values[i - 1].tolist(), best.indices[i - 1].tolist()))
        parts.append(f"<span class='token {shade(own[i - 1])}' role='button' tabindex='0' data-pick='{i}' "
                     f"title='{others}'>{safe(pieces[i].replace(chr(10), '⏎' + chr(10))) or '·'}</span>")
    return f"<p class='text'><span class='given'>{safe(''.join(pieces[:start]))}</span>{''.join(parts)}</p>"


def alternatives(vocabulary: Tokenizer, token: int, probabilities: torch.Tensor, entropy: float,
                 filters: list[tuple[str, torch.Tensor]]) -> str:
    """What the model expected in the place of `token`: the eight likeliest tokens, and `token` itself.

    probabilities (V,)   of all tokens in that place, and their entropy in bits
    filters              top-k, and top-k and top-p together: each in words, and which tokens it keeps, (V,) bool
    """
    order = probabilities.argsort(descending=True, stable=True)
    rank = int((order == token).nonzero()) + 1
    p, V = float(probabilities[token]), len(probabilities)
    (top_k, by_k), (top_p, by_both) = filters
    rows = []
    for number, other in [*enumerate(order[:8].tolist(), 1), *([(rank, token)] if rank > 8 else [])]:
        share = float(probabilities[other])
        rows.append(f"<tr class='{'picked' if other == token else ''}'><td>{number}</td>"
                    f"<td><code>{label(vocabulary, other)}</code></td><td>{share:.1%}</td>"
                    f"<td class='wide'><span class='bar' style='width:{share:.1%}'></span></td>"
                    + "".join(f"<td>{'✓' if by[other] else '–'}</td>" for by in (by_k, by_both)) + "</tr>")
    return (f"<h4><code>{label(vocabulary, token)}</code> had {p:.1%}, rank {rank:,}: "
            f"a surprise of {-math.log2(max(p, 1e-45)):.2f} bits</h4>"
            f"<p>Entropy <b>{entropy:.2f} bits</b> of at most {math.log2(V):.2f}</p>"
            f"<table><tr><th></th><th>token</th><th>probability</th><th class='wide'></th><th>top-k</th>"
            f"<th>and top-p</th></tr>{''.join(rows)}</table>"
            f"<p>Of {V:,} tokens {top_k} keeps {int(by_k.sum()):,}, and of these {top_p} keeps "
            f"{int(by_both.sum()):,}.</p>")


# ---------------------------------------------------------------------------------------------------------------
# The inside


def heat_map(pattern: torch.Tensor, names: list[str] | None = None) -> str:
    """An attention pattern (T, T) as a picture: rows look at columns. It is large if the tokens' names are given."""
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


def thumbnails(patterns: torch.Tensor, picked: int) -> str:
    """The patterns (H, T, T) of a layer's heads, small, to pick one from."""
    small = "".join(f"<figure class='{'picked' if i == picked else ''}' role='button' tabindex='0' data-pick='{i}'>"
                    f"{heat_map(pattern)}<figcaption>head {i + 1}</figcaption></figure>"
                    for i, pattern in enumerate(patterns))
    return f"<div class='heads'>{small}</div>"


def lens_table(vocabulary: Tokenizer, lens: torch.Tensor, names: list[str]) -> str:
    """The logit lens (layers + 1, T, V): the likeliest next token at each place, before the first block and after each.
    """
    best = lens[..., :vocabulary.vocab_size].softmax(-1).max(-1)
    rows = ["<tr><th></th>" + "".join(f"<th><code>{name}</code></th>" for name in names) + "</tr>"]
    for depth, (shares, tokens) in enumerate(zip(best.values.tolist(), best.indices.tolist())):
        cells = (f"<td style='--p:{p:.0%}' title='{p:.1%}'><code>{label(vocabulary, token)}</code></td>"
                 for p, token in zip(shares, tokens))
        rows.append(f"<tr><th>{f'block {depth}' if depth else 'embedding'}</th>{''.join(cells)}</tr>")
    return f"<div class='scroll'><table class='lens'>{''.join(rows)}</table></div>"


# ---------------------------------------------------------------------------------------------------------------
# The arena


def score_table(table: Sequence[tuple[str, float, float, int, int, int, int]]) -> str:
    """The arena's standings, each score with its interval as a line.

    table    for each model (name, score, half the interval, won, tied, lost, both bad), as arena.Standing has them
    """
    if not table:
        return "<p>No votes yet.</p>"
    low = min(score - margin for _, score, margin, *_ in table)
    span = max(score + margin for _, score, margin, *_ in table) - low
    rows = [f"<tr><td><b>{safe(name)}</b></td><td>{score:.0f} ± {margin:.0f}</td><td class='wide'><span "
            f"class='interval' style='margin-left:{(score - margin - low) / span:.1%};"
            f"width:{2 * margin / span:.1%}'></span></td>"
            + "".join(f"<td>{count}</td>" for count in counts) + "</tr>" for name, score, margin, *counts in table]
    return ("<table><tr><th>model</th><th>score, 95%</th><th class='wide'></th><th>won</th><th>tied</th><th>lost</th>"
            f"<th>both bad</th></tr>{''.join(rows)}</table><p class='note'>Bradley-Terry: 400 points more are odds of "
            "ten to one, 1000 is the average. A tie is half a win for each; “both bad” moves no score. Everybody has "
            "tied once with an imaginary model.</p>")
