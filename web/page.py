"""The page: what stands where on each tab, which button starts what, and the server. What the tabs do is in tabs.py.

gradio is optional; without it `gr` is None, and nothing here can be called.
"""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cli import BadInput, brief
from web import tabs
from web.arena import VERDICTS
from web.guard import Guard
from web.html import CSS, bubbles, past, safe, size
from web.shelf import Shelf

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported
try:
    import gradio as gr
    from gradio import queueing
    from starlette.middleware import Middleware
except ImportError:  # demo.py says how to get it
    gr = None

HEADER = ("<h2>nanoStentor</h2><p class='note'>Look inside a tiny language model. It means nothing by what it writes."
          "</p>")
LEGEND = ("<p class='note legend'><span class='sure'>80% and more</span><span class='unsure'>35% and more</span>"
          "<span class='surprised'>less</span> is what the model gave each token; "
          "a · is one without letters of its own.</p>")
# Reports which element with a data-pick was clicked, or had the focus when Enter was pressed.
PICK = """
element.addEventListener('click', event => {
    const picked = event.target.closest('[data-pick]');
    if (picked) trigger('click', {number: Number(picked.dataset.pick)});
});
element.addEventListener('keydown', event => { if (event.key === 'Enter') event.target.click(); });
"""
Choices = list[tuple[str, str]]  # what a menu of models shows, and the name that it stands for


# ---------------------------------------------------------------------------------------------------------------
# Buttons and sliders


def in_page(function: Callable[..., Iterator], *first: Any) -> Callable[..., Iterator]:
    """A tab's generator as gradio calls it, with its first arguments filled in. An error in it is a line on the page.
    """
    def handler(*arguments: Any) -> Iterator:
        try:
            yield from function(*first, *arguments)
        except Exception as error:  # of any kind: a traceback is no use to the reader of a page
            kind = "" if isinstance(error, (BadInput, ValueError)) else f"{type(error).__name__}: "
            raise gr.Error(safe(kind + brief(error)), print_exception=False) from None

    return handler


def starts(button: "gr.Button", stop: "gr.Button", handler: Callable[..., Iterator], inputs: list, outputs: list,
           enter: tuple = (), halt: "gr.State | None" = None) -> Any:
    """Let a button start a handler, and Enter in the boxes of `enter` too, and another button stop it; returns the
    event.

    What stops it is a list of this user's own, which the handler looks at. (gradio can cancel an event too, but text
    on its way to the page then still arrives after the news that it has stopped.)
    """
    halt = halt or gr.State([])

    def begin(*arguments: Any) -> Iterator:
        arguments[-1].clear()
        yield from handler(*arguments)

    stop.click(lambda halt: halt.append(True), halt, None, show_progress="hidden")
    return gr.on([button.click, *(box.submit for box in enter)], begin, [*inputs, halt], outputs,
                 show_progress="hidden")


def buttons(first: str, *others: str) -> "list[gr.Button]":
    """A row of buttons; the first is the one to press."""
    with gr.Row():
        return [gr.Button(name, variant="primary" if name == first else "secondary", min_width=100)
                for name in (first, *others)]


def sliders(temperature: float = 0.8, top_p: float = 0.9, length: int = 150, top_k: int = 0) -> "list[gr.Slider]":
    """Temperature, top-p, length and top-k."""
    return [gr.Slider(0.05, 2, temperature, step=0.05, label="Temperature"),
            gr.Slider(0.05, 1, top_p, step=0.01, label="Top-p"),
            gr.Slider(1, 1000, length, step=1, label="Tokens"),
            gr.Slider(0, 200, top_k, step=1, label="Top-k (0 keeps all)")]


# ---------------------------------------------------------------------------------------------------------------
# The tabs


def generate_tab(shelf: Shelf, choices: Choices):
    """Text as it is written, and the history."""
    with gr.Row():
        with gr.Column(scale=1, min_width=380):
            model = gr.Dropdown(choices, label="Model")
            prompt = gr.Textbox("def read(", lines=3, max_lines=10, label="Prompt")
            preset = gr.Radio(list(tabs.PRESETS), value="Balanced", label="Preset")
            go, stop = buttons("Generate", "Stop")
            samples = gr.Slider(1, 5, 1, step=1, label="Completions")
            temperature, top_p, length, top_k = sliders()
            penalty = gr.Slider(1, 2, 1.1, step=0.05, label="Repetition penalty (1 is off)")
            seed = gr.Textbox(label="Seed (empty: a new one)", max_lines=1)
        with gr.Column(scale=2):
            status, texts = gr.HTML(elem_classes="status"), gr.HTML(elem_id="texts")
            gr.HTML("<h4>History of this session</h4>")
            history, shown = gr.State([]), gr.HTML(past([]), elem_id="history")
    preset.input(tabs.PRESETS.get, preset, [temperature, top_p, length], show_progress="hidden")
    event = starts(go, stop, in_page(tabs.write, shelf),
                   [model, prompt, temperature, top_p, top_k, penalty, length, samples, seed, history],
                   [texts, status, history])
    event.then(past, history, shown, show_progress="hidden")


def explorer_tab(shelf: Shelf, choices: Choices):
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
    starts(go, stop, in_page(tabs.explore, shelf), [model, prompt, length, *filters, seed], outputs)
    read.click(in_page(tabs.survey, shelf), [model, prompt], outputs, show_progress="hidden")
    gr.on([go.click, read.click], lambda: "", None, panel, show_progress="hidden")

    def picked(looked_at: dict | None, temperature: float, top_p: float, top_k: float, event: gr.EventData) -> Iterator:
        yield from in_page(tabs.pick, shelf)(looked_at, event.number, temperature, top_p, top_k)

    text.click(picked, [looked_at, *filters], panel, show_progress="hidden")


def sweep_tab(shelf: Shelf, choices: Choices):
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
    starts(go, stop, in_page(tabs.sweep, shelf), [model, prompt, cool, middle, hot, count, length, seed],
           [texts, status])


def arena_tab(shelf: Shelf, choices: Choices, votes: Path):
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
    table = gr.HTML(lambda: tabs.scores(votes), elem_id="standings")
    starts(go, stop, in_page(tabs.meet, shelf), [mode, left, right, prompt, length], [texts, status, match])
    for button, verdict in zip(verdicts, VERDICTS):
        button.click(in_page(tabs.vote, shelf, votes), [match, gr.State(verdict)], [texts, status, match, table],
                     show_progress="hidden")


def chat_tab(shelf: Shelf, choices: Choices):
    """A conversation, and the prompt that the model really sees."""
    with gr.Row():
        with gr.Column(scale=1, min_width=380):
            model = gr.Dropdown(choices, label="Model")
            user, reply = gr.Textbox("User:", label="The user's tag"), gr.Textbox("Assistant:", label="The model's tag")
            temperature = gr.Slider(0.05, 2, 0.7, step=0.05, label="Temperature")
            length = gr.Slider(1, 1000, 60, step=1, label="Tokens")
        with gr.Column(scale=2):
            turns, talk = gr.State([]), gr.HTML(bubbles([]), elem_id="talk")
            status = gr.HTML(elem_classes="status")
            message = gr.Textbox("What does this function do?", label="Message", lines=1, max_lines=8)
            go, stop, clear = buttons("Send", "Stop", "Begin again")
            with gr.Accordion("The full prompt", open=False):
                prompt = gr.Textbox(show_label=False, lines=4, max_lines=20, interactive=False, elem_id="full")
    halt = gr.State([])
    event = starts(go, stop, in_page(tabs.chat, shelf), [model, message, user, reply, temperature, length, turns],
                   [talk, prompt, status, turns], (message,), halt)
    event.success(lambda: "", None, message, show_progress="hidden")

    def again(halt: list) -> tuple[str, str, str, list]:
        halt.append("again")
        return bubbles([]), "", "", []

    clear.click(again, halt, [talk, prompt, status, turns], show_progress="hidden")


def inside_tab(shelf: Shelf, choices: Choices):
    """Attention and the logit lens."""
    own = [choice for choice in choices if shelf.entries[choice[1]].ours]
    if not own:
        gr.HTML("<p>This tab knows only the insides of our own models, and there is none here.</p>")
        return
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

    def picked(name: str, prompt: str, layer: float, event: gr.EventData) -> Iterator:
        yield from in_page(tabs.examine, shelf)(name, prompt, layer, int(event.number))

    first = in_page(lambda *arguments: tabs.examine(shelf, *arguments, 0))
    go.click(first, [model, prompt, layer], outputs, show_progress="hidden")
    layer.release(first, [model, prompt, layer], outputs, show_progress="hidden")
    heads.click(picked, [model, prompt, layer], outputs, show_progress="hidden")


# ---------------------------------------------------------------------------------------------------------------
# The whole


def page(shelf: Shelf, votes: Path) -> "gr.Blocks":
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


class OneLine:
    """In place of the module `traceback`, with which gradio would print whole requests to the terminal."""

    @staticmethod
    def print_exc():
        """Print the exception that is being handled, on one line."""
        print(f"a request failed: {brief(sys.exc_info()[1])}", file=sys.stderr, flush=True)


def serve(shelf: Shelf, votes: Path, port: int):
    """Serve the page to this machine until Ctrl-C. Raises BadInput if the port is in use."""
    blocks = page(shelf, votes)
    theme = gr.themes.Default(primary_hue="teal", neutral_hue="slate", font=["system-ui", "sans-serif"],
                              font_mono=["ui-monospace", "monospace"])  # no fonts from elsewhere
    # gradio asks its own server whether it is up, which must not go through the network's proxy.
    os.environ["no_proxy"] = f"{os.environ.get('no_proxy') or os.environ.get('NO_PROXY', '')},127.0.0.1"
    queueing.traceback = OneLine
    try:
        blocks.launch(server_name="127.0.0.1", server_port=port, share=False, ssr_mode=False, run_history=False,
                      footer_links=[], theme=theme, css=CSS, quiet=True, prevent_thread_lock=True,
                      app_kwargs={"middleware": [Middleware(Guard)]})
    except OSError:
        raise BadInput(f"port {port} is in use; choose another with --port") from None
    print(f"The demo is at http://127.0.0.1:{port}; Ctrl-C ends it.", flush=True)
    blocks.block_thread()
