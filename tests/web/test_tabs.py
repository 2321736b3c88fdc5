"""What the tabs show is what the model says, and nothing that is put in comes out as HTML."""
import json
import math
import sqlite3
from functools import partial
from html import unescape
from itertools import zip_longest

import pytest
import torch
import transformers
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from cli import BadInput
from decoding.choice import Sampler
from decoding.generate import clean_prompt, generate, generate_batch, prompt_ids
from formats.peers import PeerTokenizer
from tests.web.models import CONTEXT, EOS, VOCABULARY, Page, in_float64, last, shelf_of, some_text
from web import arena, html, inside, tabs
from web.shelf import Loaded

HOSTILE = ["<img src=x onerror=alert(1)> & <b>bold</b> </p></div>", "a\0b\x07c\x1b[31md\x7f", "\ud800 lone",
           "{{value}} ${1+1} `x` '\"", "long words " * 10_000, "\u202eright to left"]


# -----------------------------------------------------------------------------
# the token explorer

@pytest.mark.parametrize("case", range(4))
def test_colours_are_the_models_probabilities(rng, shelf, case):
    """Every token of a text, generated or pasted, has the colour of its probability in float64, and lists the eight
    likeliest; the average surprise is theirs."""
    if case % 2:
        steps = tabs.explore(shelf, "a", some_text(rng, 5), 40, rng.uniform(0.1, 1), 0.9, 0,
                             str(rng.randrange(2**32)))
    else:
        steps = tabs.survey(shelf, "a", some_text(rng, 30))
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
    state = last(tabs.survey(shelf, "b", some_text(rng)))[2]
    place = rng.randrange(1, len(state["ids"]))
    page = Page(last(tabs.pick(shelf, state, place, temperature, top_p, top_k)))
    token, p = state["ids"][place], in_float64(shelf.get("b").model, state["ids"])[place - 1]
    order = p.argsort(descending=True).tolist()
    rank = order.index(token) + 1
    wanted = order[:8] + ([token] if rank > 8 else [])
    rows = [row[2] for row in page.all("tr")[1:]]
    cells = [cell[2] for cell in page.all("td")]
    assert len(rows) == len(wanted)
    assert [float(text[:-1]) / 100 for text in cells[2::6]] == pytest.approx([float(p[i]) for i in wanted], abs=6e-4)
    loaded = shelf.get("b")
    assert cells[1::6] == [unescape(html.label(loaded.vocabulary, i)) for i in wanted]
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
    """The explorer's text is decoding.generate's with that seed, and stays within the context."""
    prompt, seed, length = some_text(rng, rng.choice([3, 100])), rng.randrange(2**32), rng.choice([10, 500])
    state = last(tabs.explore(shelf, "a", prompt, length, 0.7, 0.8, 30, str(seed)))[2]
    length = min(length, CONTEXT - 1)
    ids = prompt_ids(VOCABULARY, prompt)[-(CONTEXT - length):]
    sampler = Sampler(0.7, 30, 0.8, generator=torch.Generator().manual_seed(seed), vocab_size=2048)
    new = list(generate(shelf.get("a").model, ids, length, sampler, EOS))
    assert (state["ids"], state["start"]) == (ids + new, len(ids)) and len(state["ids"]) <= CONTEXT


def test_a_long_text_is_read_from_its_beginning(rng, shelf):
    """Of a pasted text that is longer than the context, the first part is coloured, and the page says so."""
    text = some_text(rng, 300)
    _, note, state = last(tabs.survey(shelf, "a", text))
    ids = prompt_ids(VOCABULARY, text)
    assert state["ids"] == ids[:CONTEXT] and f"the first {CONTEXT - 1} tokens of {len(ids) - 1}" in note


# -----------------------------------------------------------------------------
# generation, the sweep and the chat

@pytest.mark.parametrize("count", [1, 3, 5])
def test_completions(rng, shelf, count):
    """So many texts stream in, those that generate_batch gives; the history holds them with their settings and a
    seed that gives them again."""
    prompt, ask = some_text(rng, 6), partial(tabs.write, shelf, "a")
    steps = list(ask(prompt, 0.9, 0.95, 0, 1.1, 30, count, "", []))
    texts = [card[2] for card in Page(steps[-1][0]).all("p", "text")]
    assert len(texts) == count == len(set(texts))
    [entry] = steps[-1][2]
    assert [f"{clean_prompt(prompt)}{text}" for text in entry["texts"]] == texts
    ids = prompt_ids(VOCABULARY, prompt)
    sampler = Sampler(0.9, None, 0.95, 1.1, torch.Generator().manual_seed(entry["seed"]), 2048)
    rows = generate_batch(shelf.get("a").model, ids, count, 30, sampler, EOS)
    lines = [[token for token in line if token is not None] for line in zip(*rows)]
    assert entry["texts"] == [VOCABULARY.decode(line) for line in lines]
    size = sum(map(len, lines))
    assert entry["tokens"] == size and f"{size} tokens" in steps[-1][1]
    assert "temperature 0.9, top-p 0.95" in entry["settings"]
    again = last(ask(prompt, 0.9, 0.95, 0, 1.1, 30, count, str(entry["seed"]), steps[-1][2]))
    assert again[0] == steps[-1][0] and [e["texts"] for e in again[2]] == [entry["texts"]] * 2
    assert last(ask(prompt, 0.9, 0.95, 0, 1.1, 30, count, str(entry["seed"] + 9), []))[0] != again[0]
    history = html.past(again[2])
    assert len(Page(history).all("details")) == 2 and str(entry["seed"]) in history


def test_history_forgets(rng, shelf):
    """Twenty entries are kept, the newest first."""
    history = []
    for number in range(23):
        history = last(tabs.write(shelf, "a", f"prompt {number}", 1.0, 1.0, 0, 1.0, 1, 1, "0", history))[2]
    assert [entry["prompt"] for entry in history] == [f"prompt {number}" for number in range(22, 2, -1)]


def test_streams(rng):
    """Texts that grow side by side decode to what they are whole, however often they are shown, broken characters and
    texts of other lengths included."""
    lines = [VOCABULARY.encode("naïve 😀 " + some_text(rng, rng.randrange(9))).tolist()[:rng.randint(0, 12)]
             for _ in range(4)]
    for seconds in (0, 1000):
        steps = list(tabs.unroll(zip_longest(*lines), [VOCABULARY.stream() for _ in lines], [], seconds))
        assert steps[-1] == (lines, [VOCABULARY.decode(line) for line in lines])
        assert len(steps) == 1 + (min(1, max(map(len, lines))) if seconds else max(map(len, lines)))
        for (_, texts), (_, later) in zip(steps, steps[1:]):
            assert all(text.startswith(before) for before, text in zip(texts, later))


def test_space_between_prompt_and_text(offline, tmp_path, rng):
    """Where a decoder drops the space at a text's beginning (SentencePiece's does), what follows a prompt keeps it."""
    import tokenizers
    words = {"<eos>": 0, "▁once": 1, "▁upon": 2}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<eos>"))
    library.pre_tokenizer, library.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=library, eos_token="<eos>")
    loaded = Loaded("words", None, PeerTokenizer("words", words))
    assert loaded.vocabulary.decode([2]) == "upon"
    stream = tabs.decoder(loaded, prompt_ids(loaded.vocabulary, "once"))
    assert stream.push(2) + stream.finish() == " upon"


def test_stop(rng, shelf):
    """A stopped stream ends soon with the text that it has, says so, and a stopped match cannot be voted on."""
    for call in (partial(tabs.write, shelf, "a", "x", 1, 1, 0, 1.1, 900, 2, "", []),
                 partial(tabs.explore, shelf, "a", "x", 60, 1, 1, 0, ""),
                 partial(tabs.sweep, shelf, "a", "x", 1, 1, 1, 3, 900, ""),
                 partial(tabs.meet, shelf, "Show", "a", "b", "x", 900),
                 partial(tabs.chat, shelf, "a", "x", "User:", "Assistant:", 1, 32, [])):
        halt = []
        steps = call(halt=halt)
        shown = [next(steps), next(steps)]
        halt.append(True)
        shown += steps
        assert len(shown) <= 4 and any("Stopped" in part for part in shown[-1] if isinstance(part, str))
        assert call.func is not tabs.meet or shown[-1][2] is None
        assert call.func is not tabs.write or 0 < shown[-1][2][0]["tokens"] < 100


def test_begin_again_in_the_middle_of_a_reply(shelf):
    """The reply that was on its way does not bring the conversation back."""
    halt = []
    steps = tabs.chat(shelf, "a", "x", "User:", "Assistant:", 1, 32, [("a", "b")], halt)
    assert [len(next(steps)[3]) for _ in range(2)] == [1, 2]
    halt.append("again")
    assert last(steps) == (html.bubbles([]), "", "", [])


@pytest.mark.parametrize("count", [2, 3])
def test_sweep_marks_where_they_part(rng, shelf, count):
    """Each column is decoding.generate's text at its temperature, with the same seed; the mark stands behind the last
    token that all have in common."""
    prompt, seed, temperatures = some_text(rng, 4), rng.randrange(2**32), [0.1, 0.15, rng.uniform(0.2, 2)]
    shown, note = last(tabs.sweep(shelf, "a", prompt, *temperatures, count, 30, str(seed)))
    ids = prompt_ids(VOCABULARY, prompt)
    samplers = [Sampler(t, repetition_penalty=1.1, generator=torch.Generator().manual_seed(seed), vocab_size=2048)
                for t in (temperatures if count == 3 else temperatures[::2])]
    lines = [list(generate(shelf.get("a").model, ids, 30, sampler, EOS)) for sampler in samplers]
    same = 0
    while all(line[:same + 1] == lines[0][:same + 1] for line in lines) and same < 30:
        same += 1
    page, prefix = Page(shown), clean_prompt(prompt)
    assert [text[2] for text in page.all("p", "text")] == [prefix + VOCABULARY.decode(line) for line in lines]
    if same < 30:
        assert f"part at token {same + 1}" in note and len(page.all("span", "parting")) == count
        together = VOCABULARY.decode(lines[0][:same]).rstrip("\ufffd")  # a character may have been begun, not shared
        assert {shared[2].rstrip("\ufffd") for shared in page.all("span", "shared")} == {together}
    else:
        assert "same so far" in note and not page.all("span", "parting")


def test_sweep_without_a_parting(rng, shelf):
    """Equal temperatures give equal texts, and no mark."""
    shown, note = last(tabs.sweep(shelf, "a", "a", 0.7, 1.0, 0.7, 2, 20, "5"))
    assert "same so far" in note and not Page(shown).all("span", "parting")


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 9, 40])
def test_chat_prompt(rng, shelf, monkeypatch, count):
    """The prompt is the turns under their tags, as many of the newest as the context holds with room for the reply; the
    reply ends before the model speaks for somebody."""
    turns = [("is it " * rng.randint(0, 3) + "so?", f"{rng.randrange(100)} times") for _ in range(count)]
    seen = []

    def speak(loaded, ids, settings):
        seen.append((ids, settings.max_new_tokens))
        yield from ([token] for token in VOCABULARY.encode(" no, never\nUser: why? Assistant: so").tolist())

    monkeypatch.setattr(tabs, "completions", speak)
    shown, prompt, note, now = last(tabs.chat(shelf, "a", "and now?", "User:", "Assistant:", 0.7, 20, turns))
    [(ids, length)] = seen
    assert now == [*turns, ("and now?", "no, never")] and ids == prompt_ids(VOCABULARY, prompt)
    lines = [f"User: {asked}\nAssistant: {answered}\n" for asked, answered in turns]
    whole = "".join(lines) + "User: and now?\nAssistant:"
    assert whole.endswith(prompt) and prompt.startswith("User: ") and len(ids) + length <= CONTEXT
    kept = prompt.count("User:") - 1
    if kept < count:  # one more would not have fitted
        more = prompt_ids(VOCABULARY, "".join(lines[count - kept - 1:]) + "User: and now?\nAssistant:")
        assert len(more) + length > CONTEXT and f"turns left out: {count - kept}" in note
    assert "and now?" in Page(shown).text and "why" not in Page(shown).text


# -----------------------------------------------------------------------------
# inside

def test_inside_shows_them(rng, shelf):
    """The picture of a head has a square for each pair of tokens, as dark as its weight; the lens has a row for each
    depth, of the likeliest tokens."""
    prompt, layer, head = some_text(rng, rng.choice([4, 60])), rng.randint(1, 3), rng.randrange(4)
    small, large, lens, note = last(tabs.examine(shelf, "a", prompt, layer, head))
    loaded = shelf.get("a")
    ids = prompt_ids(VOCABULARY, prompt)[-tabs.INSPECTED:]
    patterns, logits = inside.look_inside(loaded.model, ids)
    squares = [float(rect[1]["fill-opacity"]) for rect in Page(large).all("rect")]
    assert squares == pytest.approx(
        [float(patterns[layer - 1, head, i, j]) for i in range(len(ids)) for j in range(i + 1)], abs=6e-4)
    assert len(Page(small).all("figure")) == 4 and f"layer {layer} of 3, head {head + 1} of 4" in note
    cells = [cell[2] for cell in Page(lens).all("td")]
    assert cells == [unescape(html.label(loaded.vocabulary, int(row[:2048].argmax())))
                     for depth in logits for row in depth]
    for bad in ((0, 0), (4, 0), (1, 4), (1, -1), (math.nan, 0)):
        with pytest.raises(ValueError, match="layers 1 to 3"):
            last(tabs.examine(shelf, "a", "a", *bad))


# -----------------------------------------------------------------------------
# the arena

@pytest.mark.parametrize("mode", ["Show", "Blind", "Random"])
def test_a_match_and_its_vote(rng, shelf, tmp_path, mode):
    """Names are hidden in a blind or a random match, until the vote; it lands in the file with the texts, once."""
    shelf = shelf_of(*(shelf.get(name).model for name in "ab"), names=["first-model", "other-model"])
    *steps, (shown, status, match) = tabs.meet(shelf, mode, "first-model", "other-model", "Hello", 12)
    told = any("-model" in part for step in [*steps, (shown, status)] for part in step[:2])
    assert told == (mode == "Show") and all(step[2] is None for step in steps)
    verdict, votes = rng.choice(arena.VERDICTS), tmp_path / "arena.sqlite"
    revealed, status, after, table = last(tabs.vote(shelf, votes, match, verdict))
    assert match["model_a"] in Page(revealed).all("h4")[0][2] and match["model_b"] in Page(revealed).all("h4")[1][2]
    assert verdict in status and after is None and "first-model" in table
    last(tabs.vote(shelf, votes, match, rng.choice(arena.VERDICTS)))  # a second press, at the same time
    assert arena.read(votes) == [(match["model_a"], match["model_b"], verdict)]
    row = sqlite3.connect(votes).execute("SELECT mode, prompt, text_a, text_b FROM votes").fetchone()
    assert row == (mode, "Hello", match["text_a"], match["text_b"])
    assert {match["model_a"], match["model_b"]} == {"first-model", "other-model"}


def test_a_blind_match_has_two_sides(shelf):
    """Who of two chosen models is A is drawn by chance in a blind match, and as chosen in an open one."""
    for mode, wanted in (("Blind", {"a", "b"}), ("Show", {"a"})):
        assert {last(tabs.meet(shelf, mode, "a", "b", "x", 1))[2]["model_a"] for _ in range(40)} == wanted


def test_a_match_needs_two(shelf, tmp_path):
    """One model alone, or one twice, is refused in a line; so is a vote on nothing, or of no kind."""
    with pytest.raises(BadInput, match="needs two models"):
        last(tabs.meet(shelf_of(shelf.get("a").model), "Random", "a", "a", "x", 3))
    with pytest.raises(BadInput, match="two different"):
        last(tabs.meet(shelf, "Blind", "a", "a", "x", 3))
    with pytest.raises(ValueError, match="nothing to vote on"):
        last(tabs.vote(shelf, tmp_path / "votes", None, "A"))
    match = last(tabs.meet(shelf, "Show", "a", "b", "x", 3))[2]
    with pytest.raises(sqlite3.Error):
        last(tabs.vote(shelf, tmp_path / "votes", match, "C"))
    assert arena.read(tmp_path / "votes") == []


# -----------------------------------------------------------------------------
# what people put in

@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_harmless(shelf, tmp_path, text):
    """On every tab, a prompt of 100 KB, of HTML, control characters or half a surrogate gives a page in which it is
    text, and which can be sent as JSON."""
    calls = [tabs.write(shelf, "a", text, 0.8, 0.9, 0, 1.1, 3, 2, "0", []),
             tabs.explore(shelf, "a", text, 3, 0.8, 0.9, 0, "0"), tabs.survey(shelf, "a", text),
             tabs.sweep(shelf, "a", text, 0.5, 0.7, 1, 3, 3, "0"),
             tabs.meet(shelf, "Show", "a", "b", text, 3), tabs.examine(shelf, "a", text, 1, 0),
             tabs.chat(shelf, "a", text, text[:50] if "img" in text else "User:", "Assistant:", 0.7, 3, [])]
    first, *others = map(list, calls)
    match = others[3][-1][2]
    steps = [step for shown in (first, *others) for step in shown]
    for step in [*steps, *tabs.vote(shelf, tmp_path / "votes", match, "tie"), [html.past(first[-1][2])]]:
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
    monkeypatch.setattr(tabs, "completions", lambda *_: iter([token] for token in written))
    for call in (tabs.write(shelf, "a", "", 0.8, 0.9, 0, 1.1, 30, 1, "0", []),
                 tabs.sweep(shelf, "a", "", 1, 1, 1, 2, 30, "0"),
                 tabs.meet(shelf, "Show", "a", "b", "", 30), tabs.explore(shelf, "a", "", 30, 1, 1, 0, "0"),
                 tabs.chat(shelf, "a", "x", "User:", "Assistant:", 0.7, 30, [])):
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
        last(tabs.write(shelf, **good | values))
    assert "\n" not in str(error.value)


def test_nothing_to_look_at(shelf):
    """An empty text, a token that is not there, a chat without a message: each is said in a line."""
    for call, word in ((tabs.survey(shelf, "a", ""), "no text"), (tabs.pick(shelf, None, 1, 1, 1, 0), "no such token"),
                       (tabs.pick(shelf, {"name": "a", "ids": [EOS, 5], "start": 1}, 2, 1, 1, 0), "no such token"),
                       (tabs.pick(shelf, {"name": "a", "ids": [EOS, 5], "start": 1}, 0, 1, 1, 0), "no such token"),
                       (tabs.chat(shelf, "a", " ", "User:", "A:", 1, 5, []), "message"),
                       (tabs.chat(shelf, "a", "x", "", "A:", 1, 5, []), "tags")):
        with pytest.raises(ValueError, match=word):
            last(call)
