"""What the demo shows is what the model says, every vote is kept, and nothing that is put in comes out as HTML."""
import html.parser
import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from functools import partial
from itertools import zip_longest

import pytest
import torch
import transformers
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

import checkpoint
import demo
import exhibits
import sample
import tokenizer
from config import BadInput, Config
from exhibits import Entry, Loaded, Shelf
from model import Llama, ModelConfig, expand_heads
from tests import test_sample
from tests.commands import ROOT

VOCABULARY = tokenizer.load("quickstart-2048")
EOS = VOCABULARY.eos_id
CONTEXT = 64
HOSTILE = ["<img src=x onerror=alert(1)> & <b>bold</b> </p></div>", "a\0b\x07c\x1b[31md\x7f", "\ud800 lone",
           "{{value}} ${1+1} `x` '\"", "long words " * 10_000, "\u202eright to left"]


def llama(**changes):
    """A tiny model with weights so large that it is sometimes sure and sometimes not."""
    return test_sample.llama(**dict(vocab_size=2050, num_hidden_layers=3, max_position_embeddings=CONTEXT) | changes)


def shelf_of(*models, names="abcdefgh"):
    """A shelf of these models, each ready at once."""
    return Shelf([Entry(name, model.num_parameters(), 3, True, partial(Loaded, name, model, VOCABULARY))
                  for name, model in zip(names, models)])


@pytest.fixture
def shelf(rng):
    """Two models of similar size, which seldom end a text."""
    models = [llama(), llama(hidden_size=24)]
    for model in models:
        model.lm_head.weight.data[EOS] = 0
    return shelf_of(*models)


def last(steps):
    """What a tab shows in the end."""
    return list(steps)[-1]


def some_text(rng, count=30):
    """Random tokens as text."""
    return VOCABULARY.decode([rng.choice([i for i in range(200, 2048)]) for _ in range(count)])


class Page(html.parser.HTMLParser):
    """The elements of a piece of HTML, each as (tag, attributes, text inside); and all of its text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert not self.open, "a tag was never closed"

    def handle_starttag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), ""])
        self.open.append(self.elements[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.text += data
        for element in self.open:
            element[2] += data

    def all(self, tag, kind=""):
        """The elements of a tag that are of a CSS class."""
        return [element for element in self.elements
                if element[0] == tag and (not kind or kind in element[1].get("class", "").split())]


# -----------------------------------------------------------------------------
# the token explorer

def in_float64(model, ids):
    """Probabilities (T - 1, 2048) of what follows each of ids but the last, from a model of float64."""
    exact = Llama(ModelConfig(**asdict(model.config) | {"fp32_norms": False, "fp32_blocks": ()}))
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        return exact.double()(torch.tensor([ids[:-1]]))[0][0, :, :2048].softmax(-1)


def test_shades():
    """Green from 80%, red under 35%."""
    assert [exhibits.shade(p) for p in (1, 0.8, 0.7999, 0.35, 0.3499, 0)] == [
        "sure", "sure", "unsure", "unsure", "surprised", "surprised"]


@pytest.mark.parametrize("case", range(4))
def test_colours_are_the_models_probabilities(rng, shelf, case):
    """Every token of a text, generated or pasted, has the colour of its probability in float64, and lists the eight
    likeliest; the average surprise is theirs."""
    if case % 2:
        steps = demo.explore(shelf, "a", some_text(rng, 5), 40, rng.uniform(0.1, 1), 0.9, 0,
                             str(rng.randrange(2**32)))
    else:
        steps = demo.survey(shelf, "a", some_text(rng, 30))
    shown, note, state = last(steps)
    ids, start = state["ids"], state["start"]
    expected, tokens = in_float64(shelf.get("a").model, ids), Page(shown).all("span", "token")
    assert [int(token[1]["data-pick"]) for token in tokens] == list(range(start, len(ids)))
    for token in tokens:
        place = int(token[1]["data-pick"])
        p = float(expected[place - 1, ids[place]])
        if min(abs(p - 0.8), abs(p - 0.35)) > 1e-4:
            assert token[1]["class"].split()[1] == ("sure" if p >= 0.8 else "unsure" if p >= 0.35 else "surprised")
        shares = [float(line.split("%")[0]) / 100 for line in token[1]["title"].splitlines()]
        assert shares == pytest.approx(expected[place - 1].topk(8).values.tolist(), abs=6e-4)
    bits = [-math.log2(expected[i - 1, ids[i]]) for i in range(start, len(ids))]
    assert float(note.split(" bits")[0].split()[-1]) == pytest.approx(sum(bits) / len(bits), abs=0.006)
    assert Page(shown).text.replace("⏎", "").replace("·", "") == VOCABULARY.decode(ids)


@pytest.mark.parametrize("case", range(6))
def test_alternatives_are_the_models(rng, shelf, case):
    """A picked token shows its probability and rank, the eight likeliest, the entropy, and what transformers' top-k and
    top-p keep, all of float64."""
    temperature, top_p, top_k = rng.uniform(0.3, 2), rng.uniform(0.3, 1), rng.choice([0, 1, 5, 100])
    state = last(demo.survey(shelf, "b", some_text(rng)))[2]
    place = rng.randrange(1, len(state["ids"]))
    page = Page(last(demo.pick(shelf, state, place, temperature, top_p, top_k)))
    token, p = state["ids"][place], in_float64(shelf.get("b").model, state["ids"])[place - 1]
    order = p.argsort(descending=True).tolist()
    rank = order.index(token) + 1
    wanted = order[:8] + ([token] if rank > 8 else [])
    rows = [row[2] for row in page.all("tr")[1:]]
    cells = [cell[2] for cell in page.all("td")]
    assert len(rows) == len(wanted)
    assert [float(text[:-1]) / 100 for text in cells[2::6]] == pytest.approx([float(p[i]) for i in wanted], abs=6e-4)
    loaded = shelf.get("b")
    assert cells[1::6] == [html.parser.unescape(exhibits.label(loaded, i)) for i in wanted]
    assert f"rank {rank:,}:" in page.text
    entropy = -sum(x * math.log2(x) for x in p.tolist() if x)
    assert abs(float(page.all("b")[0][2].removesuffix(" bits")) - entropy) < 0.006
    logits = (p.log() / temperature)[None]
    by_k = TopKLogitsWarper(top_k)(None, logits) if top_k else logits
    by_both = (TopPLogitsWarper(top_p)(None, by_k) if top_p < 1 else by_k)[0].isfinite()
    by_k = by_k[0].isfinite()
    assert cells[4::6] == ["✓" if by_k[i] else "–" for i in wanted]
    assert cells[5::6] == ["✓" if by_both[i] else "–" for i in wanted]
    assert f"keeps {int(by_k.sum()):,}," in page.text and f"keeps {int(by_both.sum()):,}." in page.text


def test_explorer_generates_what_sample_does(rng, shelf):
    """The explorer's text is sample.generate's with that seed, and stays within the context."""
    prompt, seed, length = some_text(rng, rng.choice([3, 100])), rng.randrange(2**32), rng.choice([10, 500])
    state = last(demo.explore(shelf, "a", prompt, length, 0.7, 0.8, 30, str(seed)))[2]
    length = min(length, CONTEXT - 1)
    ids = sample.prompt_ids(VOCABULARY, prompt)[-(CONTEXT - length):]
    new = list(sample.generate(shelf.get("a").model, ids, length, 0.7, 30, 0.8, eos_id=EOS, vocab_size=2048,
                               generator=torch.Generator().manual_seed(seed)))
    assert (state["ids"], state["start"]) == (ids + new, len(ids)) and len(state["ids"]) <= CONTEXT


def test_a_long_text_is_read_from_its_beginning(rng, shelf):
    """Of a pasted text that is longer than the context, the first part is coloured, and the page says so."""
    text = some_text(rng, 300)
    _, note, state = last(demo.survey(shelf, "a", text))
    ids = sample.prompt_ids(VOCABULARY, text)
    assert state["ids"] == ids[:CONTEXT] and f"the first {CONTEXT - 1} tokens of {len(ids) - 1}" in note


# -----------------------------------------------------------------------------
# generation, the sweep and the chat

@pytest.mark.parametrize("count", [1, 3, 5])
def test_completions(rng, shelf, count):
    """So many texts stream in, those that sample.generate_batch gives; the history holds them with their settings and a
    seed that gives them again."""
    prompt, ask = some_text(rng, 6), partial(demo.write, shelf, "a")
    steps = list(ask(prompt, 0.9, 0.95, 0, 1.1, 30, count, "", []))
    texts = [card[2] for card in Page(steps[-1][0]).all("p", "text")]
    assert len(texts) == count == len(set(texts))
    [entry] = steps[-1][2]
    assert [f"{sample.clean_prompt(prompt)}{text}" for text in entry["texts"]] == texts
    ids = sample.prompt_ids(VOCABULARY, prompt)
    rows = sample.generate_batch(shelf.get("a").model, ids, count, 30, 0.9, None, 0.95, 1.1, EOS, 2048,
                                 torch.Generator().manual_seed(entry["seed"]))
    lines = [[token for token in line if token is not None] for line in zip(*rows)]
    assert entry["texts"] == [VOCABULARY.decode(line) for line in lines]
    size = sum(map(len, lines))
    assert entry["tokens"] == size and f"{size} tokens" in steps[-1][1]
    assert "temperature 0.9, top-p 0.95" in entry["settings"]
    again = last(ask(prompt, 0.9, 0.95, 0, 1.1, 30, count, str(entry["seed"]), steps[-1][2]))
    assert again[0] == steps[-1][0] and [e["texts"] for e in again[2]] == [entry["texts"]] * 2
    assert last(ask(prompt, 0.9, 0.95, 0, 1.1, 30, count, str(entry["seed"] + 9), []))[0] != again[0]
    history = demo.past(again[2])
    assert len(Page(history).all("details")) == 2 and str(entry["seed"]) in history


def test_history_forgets(rng, shelf):
    """Twenty entries are kept, the newest first."""
    history = []
    for number in range(23):
        history = last(demo.write(shelf, "a", f"prompt {number}", 1.0, 1.0, 0, 1.0, 1, 1, "0", history))[2]
    assert [entry["prompt"] for entry in history] == [f"prompt {number}" for number in range(22, 2, -1)]


def test_streams(rng):
    """Texts that grow side by side decode to what they are whole, however often they are shown, broken characters and
    texts of other lengths included."""
    lines = [VOCABULARY.encode("naïve 😀 " + some_text(rng, rng.randrange(9))).tolist()[:rng.randint(0, 12)]
             for _ in range(4)]
    for seconds in (0, 1000):
        steps = list(demo.unroll(zip_longest(*lines), [VOCABULARY.stream() for _ in lines], [], seconds))
        assert steps[-1] == (lines, [VOCABULARY.decode(line) for line in lines])
        assert len(steps) == 1 + (min(1, max(map(len, lines))) if seconds else max(map(len, lines)))
        for (_, texts), (_, later) in zip(steps, steps[1:]):
            assert all(text.startswith(before) for before, text in zip(texts, later))


def test_stop(rng, shelf):
    """A stopped stream ends soon with the text that it has, says so, and a stopped match cannot be voted on."""
    for call in (partial(demo.write, shelf, "a", "x", 1, 1, 0, 1.1, 900, 2, "", []),
                 partial(demo.explore, shelf, "a", "x", 60, 1, 1, 0, ""),
                 partial(demo.sweep, shelf, "a", "x", 1, 1, 1, 3, 900, ""),
                 partial(demo.meet, shelf, "Show", "a", "b", "x", 900),
                 partial(demo.chat, shelf, "a", "x", "User:", "Assistant:", 1, 32, [])):
        halt = []
        steps = call(halt=halt)
        shown = [next(steps), next(steps)]
        halt.append(True)
        shown += steps
        assert len(shown) <= 4 and any("Stopped" in part for part in shown[-1] if isinstance(part, str))
        assert call.func is not demo.meet or shown[-1][2] is None
        assert call.func is not demo.write or 0 < shown[-1][2][0]["tokens"] < 100


def test_begin_again_in_the_middle_of_a_reply(shelf):
    """The reply that was on its way does not bring the conversation back."""
    halt = []
    steps = demo.chat(shelf, "a", "x", "User:", "Assistant:", 1, 32, [("a", "b")], halt)
    assert [len(next(steps)[3]) for _ in range(2)] == [1, 2]
    halt.append("again")
    assert last(steps) == (exhibits.bubbles([]), "", "", [])


@pytest.mark.parametrize("count", [2, 3])
def test_sweep_marks_where_they_part(rng, shelf, count):
    """Each column is sample.generate's text at its temperature, with the same seed; the mark stands behind the last
    token that all have in common."""
    prompt, seed, temperatures = some_text(rng, 4), rng.randrange(2**32), [0.1, 0.15, rng.uniform(0.2, 2)]
    shown, note = last(demo.sweep(shelf, "a", prompt, *temperatures, count, 30, str(seed)))
    ids = sample.prompt_ids(VOCABULARY, prompt)
    lines = [list(sample.generate(shelf.get("a").model, ids, 30, t, repetition_penalty=1.1, eos_id=EOS, vocab_size=2048,
                                  generator=torch.Generator().manual_seed(seed)))
             for t in (temperatures if count == 3 else temperatures[::2])]
    same = 0
    while all(line[:same + 1] == lines[0][:same + 1] for line in lines) and same < 30:
        same += 1
    page, prefix = Page(shown), sample.clean_prompt(prompt)
    assert [text[2] for text in page.all("p", "text")] == [prefix + VOCABULARY.decode(line) for line in lines]
    if same < 30:
        assert f"part at token {same + 1}" in note and len(page.all("span", "parting")) == count
        together = VOCABULARY.decode(lines[0][:same]).rstrip("\ufffd")  # a character may have been begun, not shared
        assert {shared[2].rstrip("\ufffd") for shared in page.all("span", "shared")} == {together}
    else:
        assert "same so far" in note and not page.all("span", "parting")


def test_sweep_without_a_parting(rng, shelf):
    """Equal temperatures give equal texts, and no mark."""
    shown, note = last(demo.sweep(shelf, "a", "a", 0.7, 1.0, 0.7, 2, 20, "5"))
    assert "same so far" in note and not Page(shown).all("span", "parting")


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 9, 40])
def test_chat_prompt(rng, shelf, monkeypatch, count):
    """The prompt is the turns under their tags, as many of the newest as the context holds with room for the reply; the
    reply ends before the model speaks for somebody."""
    turns = [("is it " * rng.randint(0, 3) + "so?", f"{rng.randrange(100)} times") for _ in range(count)]
    seen = []

    def speak(loaded, ids, o):
        seen.append((ids, o.max_new_tokens))
        yield from ([token] for token in VOCABULARY.encode(" no, never\nUser: why? Assistant: so").tolist())

    monkeypatch.setattr(demo, "completions", speak)
    shown, prompt, note, now = last(demo.chat(shelf, "a", "and now?", "User:", "Assistant:", 0.7, 20, turns))
    [(ids, length)] = seen
    assert now == [*turns, ("and now?", "no, never")] and ids == sample.prompt_ids(VOCABULARY, prompt)
    lines = [f"User: {asked}\nAssistant: {answered}\n" for asked, answered in turns]
    whole = "".join(lines) + "User: and now?\nAssistant:"
    assert whole.endswith(prompt) and prompt.startswith("User: ") and len(ids) + length <= CONTEXT
    kept = prompt.count("User:") - 1
    if kept < count:  # one more would not have fitted
        more = sample.prompt_ids(VOCABULARY, "".join(lines[count - kept - 1:]) + "User: and now?\nAssistant:")
        assert len(more) + length > CONTEXT and f"turns left out: {count - kept}" in note
    assert "and now?" in Page(shown).text and "why" not in Page(shown).text


# -----------------------------------------------------------------------------
# inside

@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_and_lens_are_the_models(rng, kv_heads):
    """The patterns weigh the values to what each attention gives, and are those of transformers; the last lens is the
    model's output, and the others are its head on transformers' hidden states."""
    model = llama(num_key_value_heads=kv_heads)
    ids, c = [rng.randrange(2048) for _ in range(rng.randint(1, 20))], model.config
    patterns, lens = exhibits.look_inside(model, ids)
    T = len(ids)
    x = model.model.embed_tokens(torch.tensor([ids]))
    for pattern, block in zip(patterns, model.model.layers):
        h, attention = block.input_layernorm(x), block.self_attn
        v = expand_heads(attention.v_proj(h).view(1, T, kv_heads, c.head_dim).transpose(1, 2), 4)
        mixed = attention.o_proj((pattern @ v).transpose(1, 2).reshape(1, T, -1))
        cos, sin = model.model.cos[:T], model.model.sin[:T]
        torch.testing.assert_close(mixed, attention(h, cos, sin), atol=1e-5, rtol=1e-4)
        x = block(x, cos, sin)
    torch.testing.assert_close(lens[-1], model(torch.tensor([ids]))[0][0])
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=2050, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=kv_heads, max_position_embeddings=CONTEXT, rms_norm_eps=c.rms_norm_eps, bos_token_id=None,
        eos_token_id=None, attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta})).eval()
    theirs.load_state_dict(model.state_dict())
    output = theirs(torch.tensor([ids]), output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(patterns, torch.cat(output.attentions), atol=1e-5, rtol=1e-4)
    for ours, stream in zip(lens[:-1], output.hidden_states):
        torch.testing.assert_close(ours, theirs.lm_head(theirs.model.norm(stream))[0], atol=1e-3, rtol=1e-3)


def test_inside_shows_them(rng, shelf):
    """The picture of a head has a square for each pair of tokens, as dark as its weight; the lens has a row for each
    depth, of the likeliest tokens."""
    prompt, layer, head = some_text(rng, rng.choice([4, 60])), rng.randint(1, 3), rng.randrange(4)
    small, large, lens, note = last(demo.examine(shelf, "a", prompt, layer, head))
    loaded = shelf.get("a")
    ids = sample.prompt_ids(VOCABULARY, prompt)[-demo.INSPECTED:]
    patterns, logits = exhibits.look_inside(loaded.model, ids)
    squares = [float(rect[1]["fill-opacity"]) for rect in Page(large).all("rect")]
    assert squares == pytest.approx(
        [float(patterns[layer - 1, head, i, j]) for i in range(len(ids)) for j in range(i + 1)], abs=6e-4)
    assert len(Page(small).all("figure")) == 4 and f"layer {layer} of 3, head {head + 1} of 4" in note
    cells = [cell[2] for cell in Page(lens).all("td")]
    assert cells == [html.parser.unescape(exhibits.label(loaded, int(row[:2048].argmax())))
                     for depth in logits for row in depth]
    for bad in ((0, 0), (4, 0), (1, 4), (1, -1), (math.nan, 0)):
        with pytest.raises(ValueError, match="layers 1 to 3"):
            last(demo.examine(shelf, "a", "a", *bad))


# -----------------------------------------------------------------------------
# the arena

def log_likelihood(theta, points):
    """Of points under log-strengths theta, everybody's tie with a model of strength 1 included; up to a constant."""
    beats = torch.nn.functional.logsigmoid(theta[:, None] - theta)
    return (points * beats).sum() + 0.5 * (torch.nn.functional.logsigmoid(theta)
                                           + torch.nn.functional.logsigmoid(-theta)).sum()


@pytest.mark.parametrize("case", range(8))
def test_bradley_terry(rng, case):
    """Scores are the maximum that Newton's method finds, from their mean, and errors those of its Hessian, for any
    votes: of models that never met, or of one that has always lost."""
    n = rng.randint(2, 6)
    points = torch.tensor([[rng.choice([0, 0, 0.5, 1, 4, 30]) * (i != j) for j in range(n)] for i in range(n)]).double()
    if case % 2:
        points[0] = 0
    theta = torch.zeros(n, dtype=torch.float64)
    for _ in range(200):
        gradient = torch.autograd.functional.jacobian(partial(log_likelihood, points=points), theta)
        hessian = torch.autograd.functional.hessian(partial(log_likelihood, points=points), theta)
        step = torch.linalg.solve(hessian, gradient)
        theta = theta - step / max(1, float(step.abs().max()))
    covariance = (-hessian).inverse()
    from_mean = [covariance[i, i] - 2 * covariance[i].mean() + covariance.mean() for i in range(n)]
    strengths, errors = exhibits.bradley_terry(points.numpy())
    assert strengths == pytest.approx((theta - theta.mean()).tolist(), abs=1e-6)
    assert errors == pytest.approx([math.sqrt(variance) for variance in from_mean], rel=1e-5)


def test_standings(rng):
    """A table counts every verdict on both sides; a tie is half a win for each, and "both bad" moves no score."""
    votes = [(*rng.sample("abc", 2), rng.choice(exhibits.VERDICTS)) for _ in range(60)]
    table = {row.name: row for row in exhibits.standings(votes)}
    for name, row in table.items():
        mine = [(a == name, verdict) for a, b, verdict in votes if name in (a, b)]
        assert row.won == sum(verdict == ("A" if first else "B") for first, verdict in mine)
        assert row.lost == sum(verdict == ("B" if first else "A") for first, verdict in mine)
        assert (row.tied, row.both_bad) == tuple(sum(v == x for _, v in mine) for x in ("tie", "both bad"))
    plain = [vote for vote in votes if vote[2] != "both bad"]
    assert {row.name: (row.score, row.margin) for row in exhibits.standings(plain)} == {
        name: (row.score, row.margin) for name, row in table.items()}
    swapped = [(b, a, {"A": "B", "B": "A"}.get(verdict, verdict)) for a, b, verdict in votes]
    for row in exhibits.standings(swapped):
        assert row.score == pytest.approx(table[row.name].score)
    assert sum(row.score for row in table.values()) / len(table) == pytest.approx(1000)
    ties = exhibits.standings([("a", "b", "tie")] * 2)
    halves = exhibits.standings([("a", "b", "A"), ("a", "b", "B")])
    assert [(row.score, row.margin) for row in ties] == [(row.score, row.margin) for row in halves]
    scores = [row.score for row in table.values()]
    assert scores == sorted(scores, reverse=True) and exhibits.standings([]) == []
    page = Page(exhibits.score_table(exhibits.standings(votes)))
    assert [bold[2] for bold in page.all("b")] == list(table)


def test_ten_to_one():
    """400 points are odds of ten to one, once there are so many games that the imaginary one does not count."""
    first, second = exhibits.standings([("a", "b", "A")] * 10_000 + [("a", "b", "B")] * 1000)
    assert first.name == "a" and first.score - second.score == pytest.approx(400, abs=0.5)


def test_pairs_are_of_similar_size(rng):
    """A drawn pair is of two models, one of ours and one of theirs where there are both, no more than twice as large or
    the nearest that there is; every fair pair comes up, on both sides."""
    sizes = {"a": 10, "b": 15, "c": 200, "x": 12, "y": 19, "z": 390, "huge": 10**6}
    pairs = {exhibits.draw_pair(sizes, set("abc"), rng) for _ in range(600)}
    fair = {("a", "x"), ("a", "y"), ("b", "x"), ("b", "y"), ("c", "z")}
    assert pairs == fair | {(b, a) for a, b in fair}
    assert {frozenset(exhibits.draw_pair({"a": 1, "b": 9, "c": 50}, set("abc"), rng)) for _ in range(200)} == {
        frozenset("ab"), frozenset("bc")}
    assert {frozenset(exhibits.draw_pair({"x": 1, "y": 2}, set(), rng)) for _ in range(20)} == {frozenset("xy")}


@pytest.mark.parametrize("mode", ["Show", "Blind", "Random"])
def test_a_match_and_its_vote(rng, shelf, tmp_path, mode):
    """Names are hidden in a blind or a random match, until the vote; it lands in the file with the texts, once."""
    shelf = shelf_of(*(shelf.get(name).model for name in "ab"), names=["first-model", "other-model"])
    *steps, (shown, status, match) = demo.meet(shelf, mode, "first-model", "other-model", "Hello", 12)
    told = any("-model" in part for step in [*steps, (shown, status)] for part in step[:2])
    assert told == (mode == "Show") and all(step[2] is None for step in steps)
    verdict, votes = rng.choice(exhibits.VERDICTS), tmp_path / "arena.sqlite"
    revealed, status, after, table = last(demo.vote(shelf, votes, match, verdict))
    assert match["model_a"] in Page(revealed).all("h4")[0][2] and match["model_b"] in Page(revealed).all("h4")[1][2]
    assert verdict in status and after is None and "first-model" in table
    last(demo.vote(shelf, votes, match, rng.choice(exhibits.VERDICTS)))  # a second press, at the same time
    assert exhibits.read(votes) == [(match["model_a"], match["model_b"], verdict)]
    row = sqlite3.connect(votes).execute("SELECT mode, prompt, text_a, text_b FROM votes").fetchone()
    assert row == (mode, "Hello", match["text_a"], match["text_b"])
    assert {match["model_a"], match["model_b"]} == {"first-model", "other-model"}


def test_a_blind_match_has_two_sides(shelf):
    """Who of two chosen models is A is drawn by chance in a blind match, and as chosen in an open one."""
    for mode, wanted in (("Blind", {"a", "b"}), ("Show", {"a"})):
        assert {last(demo.meet(shelf, mode, "a", "b", "x", 1))[2]["model_a"] for _ in range(40)} == wanted


def test_a_match_needs_two(shelf, tmp_path):
    """One model alone, or one twice, is refused in a line; so is a vote on nothing, or of no kind."""
    with pytest.raises(BadInput, match="needs two models"):
        last(demo.meet(shelf_of(shelf.get("a").model), "Random", "a", "a", "x", 3))
    with pytest.raises(BadInput, match="two different"):
        last(demo.meet(shelf, "Blind", "a", "a", "x", 3))
    with pytest.raises(ValueError, match="nothing to vote on"):
        last(demo.vote(shelf, tmp_path / "votes", None, "A"))
    match = last(demo.meet(shelf, "Show", "a", "b", "x", 3))[2]
    with pytest.raises(sqlite3.Error):
        last(demo.vote(shelf, tmp_path / "votes", match, "C"))
    assert exhibits.read(tmp_path / "votes") == []


VOTER = """
import sys
from pathlib import Path
from exhibits import Vote, record
for number in range(10**6):
    record(Path("arena.sqlite"), Vote(f"{sys.argv[1]} {number}", "Blind", "p", "a", "b", "x", "y", "A"))
    print(number, flush=True)
"""


def test_killed_processes_lose_no_vote(rng, tmp_path):
    """Of two processes that vote at once and are killed, every vote that was said to be kept is in the file."""
    voters = [subprocess.Popen([sys.executable, "-c", VOTER, name], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT)}) for name in "ab"]
    wanted = {voter: rng.randint(1, 30) for voter in voters}
    said = {}
    for voter in voters:
        heard = [voter.stdout.readline() for _ in range(wanted[voter])]
        voter.send_signal(signal.SIGKILL)
        said[voter] = heard + voter.stdout.readlines()
        voter.wait()
    kept = {match for match, in sqlite3.connect(tmp_path / "arena.sqlite").execute("SELECT match FROM votes")}
    for name, voter in zip("ab", voters):
        assert len(said[voter]) >= wanted[voter]
        assert {f"{name} {number.strip()}" for number in said[voter] if number.endswith("\n")} <= kept


# -----------------------------------------------------------------------------
# what people put in

@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_harmless(shelf, tmp_path, text):
    """On every tab, a prompt of 100 KB, of HTML, control characters or half a surrogate gives a page in which it is
    text, and which can be sent as JSON."""
    calls = [demo.write(shelf, "a", text, 0.8, 0.9, 0, 1.1, 3, 2, "0", []),
             demo.explore(shelf, "a", text, 3, 0.8, 0.9, 0, "0"), demo.survey(shelf, "a", text),
             demo.sweep(shelf, "a", text, 0.5, 0.7, 1, 3, 3, "0"),
             demo.meet(shelf, "Show", "a", "b", text, 3), demo.examine(shelf, "a", text, 1, 0),
             demo.chat(shelf, "a", text, text[:50] if "img" in text else "User:", "Assistant:", 0.7, 3, [])]
    first, *others = map(list, calls)
    match = others[3][-1][2]
    steps = [step for shown in (first, *others) for step in shown]
    for step in [*steps, *demo.vote(shelf, tmp_path / "votes", match, "tie"), [demo.past(first[-1][2])]]:
        json.dumps(step, ensure_ascii=False).encode()  # raises for what no page can be sent
        for part in step:
            if isinstance(part, str) and part.startswith("<"):
                page = Page(part)
                assert not page.all("img") and not any("onerror" in element[1] for element in page.elements)
                assert not set(part) & {chr(c) for c in [*range(9), *range(11, 32), 127]}
                assert len(part) < 100_000


def test_html_in_the_output_is_text(shelf, monkeypatch):
    """What the model writes is text too."""
    written = VOCABULARY.encode("<b>bold</b> & <script>").tolist()
    monkeypatch.setattr(demo, "completions", lambda *_: iter([token] for token in written))
    for call in (demo.write(shelf, "a", "", 0.8, 0.9, 0, 1.1, 30, 1, "0", []),
                 demo.sweep(shelf, "a", "", 1, 1, 1, 2, 30, "0"),
                 demo.meet(shelf, "Show", "a", "b", "", 30), demo.explore(shelf, "a", "", 30, 1, 1, 0, "0"),
                 demo.chat(shelf, "a", "x", "User:", "Assistant:", 0.7, 30, [])):
        page = Page(last(call)[0])
        assert "<b>bold</b> & <script>" in page.text.replace("·", "")
        assert not page.all("script") and not page.all("b")


@pytest.mark.parametrize("values, word", [
    ({"length": -5}, "max_new_tokens is -5"), ({"length": 0}, "max_new_tokens"), ({"temperature": -1.0}, "temperature"),
    ({"temperature": math.nan}, "temperature"), ({"top_p": 7.0}, "top_p"), ({"top_k": -3}, "top_k"),
    ({"penalty": 0.0}, "repetition_penalty"), ({"samples": 6}, "completions"), ({"samples": 0}, "num_samples"),
    ({"seed": "-1"}, "seed"), ({"seed": "x"}, "seed"), ({"seed": "9" * 20}, "seed"),
    ({"prompt": "x" * 200_001}, "200,001 characters"), ({"name": "none"}, "choose a model"),
    ({"name": None}, "choose a model")])
def test_values_out_of_range(shelf, values, word):
    """A value that the page's own controls could not send is refused in one line."""
    good = dict(name="a", prompt="x", temperature=0.8, top_p=0.9, top_k=0, penalty=1.1, length=5, samples=1, seed="0",
                history=[])
    with pytest.raises((ValueError, BadInput), match=word) as error:
        last(demo.write(shelf, **good | values))
    assert "\n" not in str(error.value)


def test_nothing_to_look_at(shelf):
    """An empty text, a token that is not there, a chat without a message: each is said in a line."""
    for call, word in ((demo.survey(shelf, "a", ""), "no text"), (demo.pick(shelf, None, 1, 1, 1, 0), "no such token"),
                       (demo.pick(shelf, {"name": "a", "ids": [EOS, 5], "start": 1}, 2, 1, 1, 0), "no such token"),
                       (demo.pick(shelf, {"name": "a", "ids": [EOS, 5], "start": 1}, 0, 1, 1, 0), "no such token"),
                       (demo.chat(shelf, "a", " ", "User:", "A:", 1, 5, []), "message"),
                       (demo.chat(shelf, "a", "x", "", "A:", 1, 5, []), "tags")):
        with pytest.raises(ValueError, match=word):
            last(call)


# -----------------------------------------------------------------------------
# models of transformers

def their_model(folder, kind, rng):
    """A tiny random model of transformers with a byte-level tokenizer, in a folder -> the model."""
    import tokenizers
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    library.train_from_iterator([some_text(rng, 300)], tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    transformers.PreTrainedTokenizerFast(tokenizer_object=library, eos_token="<eos>").save_pretrained(folder)
    shape = dict(vocab_size=304, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
                 max_position_embeddings=48, initializer_range=0.3, bos_token_id=None, eos_token_id=0)
    config, model = {"gpt_neox": (transformers.GPTNeoXConfig, transformers.GPTNeoXForCausalLM),
                     "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM)}[kind]
    model = model(config(**shape)).eval()
    model.save_pretrained(folder)
    return model, library


@pytest.mark.parametrize("kind", ["gpt_neox", "llama"])
def test_models_of_transformers(offline, tmp_path, rng, kind):
    """Such a model, loaded from a folder, generates through sample.generate what transformers generates, streams it as
    its tokenizer decodes it, and is coloured by its own probabilities; its insides are not shown, in a line."""
    theirs, library = their_model(tmp_path / kind, kind, rng)
    entry = exhibits.their_entry(str(tmp_path / kind), False, torch.device("cpu"))
    assert (entry.name, entry.parameters, entry.ours) == (kind, theirs.num_parameters(), False)
    shelf = Shelf([entry])
    loaded, prompt = shelf.get(kind), some_text(rng, 4)
    ids = sample.prompt_ids(loaded.vocabulary, prompt)
    assert ids == [0, *library.encode(sample.clean_prompt(prompt)).ids] and loaded.vocabulary.vocab_size == 300
    ours = list(sample.generate(loaded.model, ids[:20], 20, vocab_size=300, eos_id=0))
    wanted = theirs.generate(torch.tensor([ids[:20]]), attention_mask=torch.ones(1, len(ids[:20])), generation_config=(
        transformers.GenerationConfig(do_sample=False, max_new_tokens=20, eos_token_id=0, pad_token_id=0,
                                      suppress_tokens=[300, 301, 302, 303])))[0, len(ids[:20]):].tolist()
    assert ours == (wanted[:wanted.index(0)] if 0 in wanted else wanted)
    with torch.no_grad():  # one text goes on as three; then what is newest is forgotten, and read in another way
        cache = loaded.model.new_cache(48)
        loaded.model(torch.tensor([ids[:9]]), cache)
        cache.repeat(3)
        for count in (2, 3):
            cache.length = 9
            more = torch.tensor([[rng.randrange(300) for _ in range(count)] for _ in range(3)])
            logits, _ = loaded.model(more, cache)
            wanted = theirs(torch.cat((torch.tensor([ids[:9]] * 3), more), 1)).logits[:, 9:]
            torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
            assert cache.length == 9 + count
    texts = list(sample.generate_batch(loaded.model, ids[:20], 2, 60, temperature=1.0, vocab_size=300))  # of 48
    assert len(texts) == 60 and max(map(max, texts)) < 300
    shown, _, state = last(demo.explore(shelf, kind, prompt, 15, 1.0, 1.0, 0, "3"))
    with torch.no_grad():
        p = theirs(torch.tensor([state["ids"]])).logits[0, :-1, :300].double().softmax(-1)
    for token in Page(shown).all("span", "token"):
        place = int(token[1]["data-pick"])
        if min(abs(x := float(p[place - 1, state["ids"][place]])) - 0.8, abs(x - 0.35)) > 1e-4:
            assert token[1]["class"].split()[1] == exhibits.shade(x)
    with pytest.raises(BadInput, match="only the insides of our own"):
        last(demo.examine(shelf, kind, "x", 1, 0))


def test_space_between_prompt_and_text(offline, tmp_path, rng):
    """Where a decoder drops the space at a text's beginning (SentencePiece's does), what follows a prompt keeps it."""
    import tokenizers
    words = {"<eos>": 0, "▁once": 1, "▁upon": 2}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<eos>"))
    library.pre_tokenizer, library.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=library, eos_token="<eos>")
    loaded = Loaded("words", None, exhibits.TheirTokens("words", words))
    assert loaded.vocabulary.decode([2]) == "upon"
    stream = demo.decoder(loaded, sample.prompt_ids(loaded.vocabulary, "once"))
    assert stream.push(2) + stream.finish() == " upon"


def test_no_such_model(offline, tmp_path):
    """A folder that is not there, or holds no model, is one line."""
    (tmp_path / "empty").mkdir()
    for name in (tmp_path / "empty", tmp_path / "nothing"):
        with pytest.raises(BadInput, match="cannot load") as error:
            exhibits.their_entry(str(name), False, torch.device("cpu"))
        assert "\n" not in str(error.value)


# -----------------------------------------------------------------------------
# the shelf and the command

def save_run(folder, rng):
    """The checkpoint of a tiny model, as train.py leaves it."""
    model = llama()
    config = Config(name=folder.name, model=model.config, block_size=32, tokens_per_step=32)
    state = {"step": rng.randrange(1, 999), "tokenizer_sha256": VOCABULARY.sha256,
             "config": json.loads(json.dumps(asdict(config), default=str))}
    checkpoint.save(folder, model, None, state, True, 1)
    return model


def test_find_models(tmp_path, rng, monkeypatch, capsys):
    """Every run under out/ is found, and gives its own logits; a damaged one is left out with a note; a step directory
    and a name that comes twice are told apart."""
    monkeypatch.chdir(tmp_path)
    models = {name: save_run(tmp_path / "out" / name, rng) for name in ("one", "two")}
    save_run(tmp_path / "other" / "one", rng)
    (tmp_path / "out" / "broken").mkdir()
    (tmp_path / "out" / "broken" / "latest").write_text("step_00000007")
    (tmp_path / "out" / "noise").mkdir()
    (tmp_path / "out" / "noise" / "latest").write_bytes(b"\xff\0")
    shelf = demo.find_models(demo.Options())
    left_out = capsys.readouterr().err
    assert list(shelf.entries) == ["one", "two"] and "out/broken" in left_out and "out/noise" in left_out
    ids = torch.tensor([[rng.randrange(2048) for _ in range(9)]])
    for name, model in models.items():
        assert torch.equal(shelf.get(name).model(ids)[0], model(ids)[0])
        assert shelf.entry(name).parameters == model.num_parameters()
    step_dir = checkpoint.find(tmp_path / "out" / "one")
    chosen = demo.find_models(demo.Options(checkpoint=(tmp_path / "out" / "one", tmp_path / "other" / "one", step_dir)))
    assert list(chosen.entries) == ["one", "one (2)", f"one/{step_dir.name}"]


def test_shelf_loads_once(rng):
    """Users who ask for a model at the same time wait for one loading; those used last stay in memory."""
    model, loads = llama(), []

    def load(name):
        loads.append(name)
        time.sleep(0.02)
        return Loaded(name, model, VOCABULARY)

    names = [f"model {i}" for i in range(exhibits.IN_MEMORY + 2)]
    shelf = Shelf([Entry(name, 1, 1, True, partial(load, name)) for name in names])
    users = [threading.Thread(target=shelf.get, args=(names[0],)) for _ in range(4)]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert loads == [names[0]]
    assert names[1] in demo.loading(shelf, *names[:2]) and names[0] not in demo.loading(shelf, *names[:2])
    for name in names[1:]:
        shelf.get(name)
        shelf.get(names[0])
    assert loads == names and set(shelf.loaded) == {names[0], *names[-exhibits.IN_MEMORY + 1:]}


def test_a_slow_load_keeps_nobody_else_waiting(rng):
    """While one model is loading, another can be had."""
    done, model = threading.Event(), llama()

    def load(name):
        assert name == "b" or done.wait(10), "the other user had to wait"
        return Loaded(name, model, VOCABULARY)

    shelf = Shelf([Entry(name, 1, 1, True, partial(load, name)) for name in "ab"])
    slow = threading.Thread(target=shelf.get, args=("a",))
    slow.start()
    quick = threading.Thread(target=lambda: (shelf.get("b"), done.set()))
    quick.start()
    for user in (quick, slow):
        user.join()
    assert set(shelf.loaded) == set("ab")


def test_models_of_one_name(rng):
    """Of two runs of one name, a picked token shows the alternatives of the model that has read the text."""
    models = [llama(), llama()]
    shelf = shelf_of(*models, names=["run", "run"])
    for name, model in zip(("run", "run (2)"), models):
        state = last(demo.survey(shelf, name, "def read(self):"))[2]
        p = in_float64(model, state["ids"])[0]
        shown = Page(last(demo.pick(shelf, state, 1, 1, 1, 0))).all("td")[2][2]
        assert abs(float(shown[:-1]) / 100 - float(p.max())) < 6e-4


def test_a_run_that_goes_on_training(tmp_path, rng, monkeypatch):
    """A run whose checkpoint was replaced after the demo had started gives the newer one."""
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / "out" / "one", rng)
    shelf = demo.find_models(demo.Options())
    old = checkpoint.find(tmp_path / "out" / "one")
    model, state = llama(), checkpoint.read_state(old)
    checkpoint.save(tmp_path / "out" / "one", model, None, state | {"step": 1000}, True, 1)
    assert not old.exists()
    ids = torch.tensor([[rng.randrange(2048) for _ in range(9)]])
    assert torch.equal(shelf.get("one").model(ids)[0], model(ids)[0])


@pytest.mark.parametrize("arguments, word", [
    ([], "no trained model under out/"), (["--checkpoint", "out/none"], "no checkpoint in out"),
    (["--hf", "none/such/model"], "cannot load none/such/model"), (["--port", "0"], "port is 0"),
    (["--port", "70000"], "port is 70000"), (["--ports", "1"], "--port"), (["--port", "x"], "port")])
def test_command_refusals(in_process, tmp_path, monkeypatch, offline, arguments, word):
    """What the user can put right is one line on stderr and exit code 2."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "gr", demo.gr or object())
    code, out, err = in_process(demo.main, *arguments)
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("error: ") and word in err


def test_gradio_is_missing(in_process, monkeypatch):
    """Without gradio there is one line, and it says what to install."""
    monkeypatch.setattr(demo, "gr", None)
    code, out, err = in_process(demo.main)
    assert code == 2 and out == "" and err.count("\n") == 1 and "pip install -r requirements-demo.txt" in err


@pytest.mark.skipif(demo.gr is None, reason="gradio is not installed")
@pytest.mark.parametrize("damage", ["no database " * 9, None], ids=["text", "folder"])
def test_damaged_votes(shelf, tmp_path, damage):
    """A file of votes that cannot be read does not keep the page from opening, and is said there in a line."""
    votes = tmp_path / "<b>"
    votes.mkdir() if damage is None else votes.write_text(damage)
    demo.page(shelf, votes)
    [line] = Page(demo.scores(votes)).elements
    assert line[0] == "p" and "<b> cannot be read: " in line[2]


@pytest.mark.skipif(demo.gr is None, reason="gradio is not installed")
def test_errors_are_one_line_of_the_page(shelf):
    """Whatever goes wrong in a tab becomes gradio's own error, on one line and escaped."""
    def broken():
        yield 1
        raise KeyError("<b>\nline")

    steps = demo.in_page(broken)()
    assert next(steps) == 1
    with pytest.raises(demo.gr.Error) as error:
        next(steps)
    assert "\n" not in error.value.message and "<" not in error.value.message and "KeyError" in error.value.message
    with pytest.raises(demo.gr.Error, match="max_new_tokens is -1"):
        list(demo.in_page(demo.sweep, shelf)("a", "x", 0.5, 0.7, 1, 2, -1, "0"))
