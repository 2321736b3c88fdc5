"""The demo as people meet it: every tab in a headless Chromium (make test-web), and not one request to elsewhere."""
import contextlib
import http.client
import json
import re
import shutil
import socket
import sqlite3
import time
import urllib.request
from dataclasses import asdict
from urllib.parse import urlsplit

import pytest
import torch

import checkpoint
import tokenizer
from config import Config
from decoding.choice import Sampler
from decoding.generate import generate, prompt_ids
from model import Llama, ModelConfig
from tests.commands import ROOT, refused, run, start
from web import arena, inside

sync_api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("gradio")
pytestmark = pytest.mark.browser

expect = sync_api.expect
VOCABULARY = tokenizer.load("quickstart-2048")
CONTEXT = 256

# Starts the demo with a note of every address that this process tries to reach, and with models that write as slowly
# as larger ones: a tiny one's text would be there at once.
WATCHED = """
import runpy, sys, time
from web import tabs
quickly = tabs.generate_batch
def slowly(*arguments):
    for tokens in quickly(*arguments):
        time.sleep(0.003)
        yield tokens
tabs.generate_batch = slowly
log = open("connections", "a", buffering=1)
def note(event, arguments):
    if event in ("socket.connect", "socket.sendto"):
        print(event, arguments[1], file=log)
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        print(event, arguments[0], file=log)
sys.addaudithook(note)
sys.argv = ["demo.py", *sys.argv[1:]]
runpy.run_path("demo.py", run_name="__main__")
"""


def save_run(folder, **changes):
    """The checkpoint of a tiny model with large weights, which seldom ends a text."""
    model = Llama(ModelConfig(**dict(vocab_size=2048, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
                                     num_attention_heads=4, max_position_embeddings=CONTEXT) | changes))
    for p in model.parameters():
        p.data.uniform_(0.5, 1.5) if p.dim() == 1 else p.data.normal_(0, 1.5 * p.size(1) ** -0.5)
    model.lm_head.weight.data[VOCABULARY.eos_id] = 0
    config = Config(name=folder.name, model=model.config, block_size=32, tokens_per_step=32)
    checkpoint.save(folder, model, None, {"step": 7, "tokenizer_sha256": VOCABULARY.sha256, "config": json.loads(
        json.dumps(asdict(config), default=str))}, True, 1)
    return model


def free_port():
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A served demo over two runs, in a network with a proxy that does not answer: its folder, address and models."""
    folder = tmp_path_factory.mktemp("site")
    models = {name: save_run(folder / "out" / name, hidden_size=width)
              for name, width in (("first", 16), ("second", 24))}
    (folder / "watched.py").write_text(WATCHED.replace('"demo.py", run', f"{str(ROOT / 'demo.py')!r}, run"))
    port = free_port()
    server = start(folder / "watched.py", "--port", port, cwd=folder, env={
        "PYTHONPATH": str(ROOT), "http_proxy": "http://127.0.0.1:9", "no_proxy": ""})
    line = server.stdout.readline()
    assert f"http://127.0.0.1:{port}" in line, server.communicate()
    yield folder, f"http://127.0.0.1:{port}", models
    server.kill()
    server.communicate()


@pytest.fixture(scope="module")
def browser():
    """A Chromium that finds no other machine."""
    chromium = shutil.which("chromium")
    assert chromium, "there is no chromium: apt-get install chromium"
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=[
            "--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"])
        yield browser
        browser.close()


class Window:
    """A browser window of its own user on the demo; it remembers what it has asked for."""

    def __init__(self, browser, address):
        self.page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
        self.page.set_default_timeout(10_000)
        self.requests, self.errors = [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.errors.append(dialog.message), dialog.dismiss()))
        self.page.goto(address)
        self.page.get_by_role("tab", name="Generate", exact=True).wait_for()

    def tab(self, name):
        """Open a tab -> what is on it."""
        self.page.get_by_role("tab", name=name, exact=True).click()
        self.panel = self.page.locator("[role=tabpanel]:visible")
        return self.panel

    def fill(self, **values):
        """Fill boxes, or the number beside a slider, by the beginning of their labels."""
        for label, value in values.items():
            slider = self.panel.get_by_role("spinbutton", name=re.compile(rf"^\s*(number input for )?{label}", re.I))
            box = slider if slider.count() else self.panel.get_by_label(re.compile(rf"^\s*{label}"))
            box.first.fill(str(value))
            box.first.blur()

    def press(self, name):
        self.panel.get_by_role("button", name=name, exact=True).click()

    def status(self, text):
        """Wait until the status says this (a regular expression)."""
        expect(self.panel.locator(".block.status")).to_contain_text(re.compile(text), timeout=20_000)

    def refused(self, text):
        """Wait for an error in the page, of one line under its title and its cross, and close it."""
        toast = self.page.locator(".toast-body")
        expect(toast).to_contain_text(text, timeout=20_000)
        assert "Traceback" not in toast.inner_text() and len(toast.inner_text().strip().splitlines()) == 3
        toast.get_by_test_id("toast-close").click()
        expect(toast).to_have_count(0)


@pytest.fixture
def window(browser, site):
    """A window; at the end it has had no error, and every request was to the demo itself."""
    folder, address, _ = site
    window = Window(browser, address)
    yield window
    elsewhere = [url for url in window.requests if not url.startswith((address + "/", "data:", "blob:" + address))]
    assert window.requests and not elsewhere and not window.errors
    window.page.context.close()


def generated(model, prompt, count, temperature, top_p, seed):
    """Text of decoding.generate, as the Generate tab asks for it."""
    sampler = Sampler(temperature, None, top_p, 1.1, torch.Generator().manual_seed(seed), VOCABULARY.vocab_size)
    return VOCABULARY.decode(list(generate(model, prompt_ids(VOCABULARY, prompt), count, sampler, VOCABULARY.eos_id)))


def test_generate(window, site, rng):
    """Text appears as it streams, and is decoding.generate's; presets set the sliders; the history has the settings."""
    panel, seed = window.tab("Generate"), rng.randrange(2**32)
    panel.get_by_label("Focused").check()
    expect(panel.get_by_role("spinbutton", name=re.compile("Temperature"))).to_have_value("0.5")
    expect(panel.get_by_role("spinbutton", name=re.compile("Top-p"))).to_have_value("0.8")
    window.fill(Prompt="Once upon", Tokens=900, Seed=seed)
    window.press("Generate")
    text = panel.locator("#texts p.text")
    expect(text).to_contain_text("Once upon", timeout=20_000)
    lengths, deadline = {len(text.inner_text())}, time.monotonic() + 60
    while not re.match(r"\s*900 tokens", panel.locator(".block.status").inner_text()):
        lengths.add(len(text.inner_text()))
        assert time.monotonic() < deadline
    assert len(lengths) > 3, "the text came all at once"
    assert text.evaluate("e => e.textContent") == "Once upon" + generated(
        site[2]["first"], "Once upon", 900, 0.5, 0.8, seed)
    window.status(r"900 tokens · [\d.]+ s · [\d,]+ tokens/s")
    entry = panel.locator("#history details")
    expect(entry).to_have_count(1)
    expect(entry).to_contain_text(str(seed))
    expect(entry).to_contain_text("temperature 0.5, top-p 0.8")


def test_five_completions_and_a_stop(window, rng):
    """Five completions of one prompt stand side by side; a stopped stream keeps its text and says that it stopped."""
    panel = window.tab("Generate")
    window.fill(Prompt="a", Tokens=4, Completions=5)
    window.press("Generate")
    expect(panel.locator("#texts .card")).to_have_count(5, timeout=20_000)
    window.status("20 tokens")
    window.fill(Tokens=1000)
    window.press("Generate")
    window.status(r"^\s*[\d,]{3,} tokens")
    window.press("Stop")
    window.status("Stopped")
    before = panel.locator("#texts").inner_text()
    assert len(before) > 100
    expect(panel.locator("#history details")).to_have_count(2)
    window.fill(Tokens=3, Completions=1)
    window.press("Generate")  # and it goes on working
    window.status(r"^\s*3 tokens")
    expect(panel.locator("#history details")).to_have_count(3)
    seeds = re.findall(r"seed (\d+)", panel.locator("#history").text_content())
    assert len(set(seeds)) == 3, "an empty seed is a new one every time"


def test_two_users(browser, site, window):
    """Two users at once see their own texts and history, and nothing of the other's."""
    other = Window(browser, site[1])
    for user, prompt in ((window, "alpha"), (other, "omega")):
        user.tab("Generate")
        user.fill(Prompt=prompt, Tokens=300)
    for user in (window, other):
        user.press("Generate")
    for user, own, strange in ((window, "alpha", "omega"), (other, "omega", "alpha")):
        user.status("300 tokens")
        expect(user.panel.locator("#history details")).to_have_count(1)
        shown = user.panel.inner_text() + user.panel.locator("#history").text_content()
        assert own in shown and strange not in shown
    other.page.context.close()


def test_explorer(window, site, rng):
    """Colours are those of the model's own probabilities, and a picked token shows its alternatives."""
    panel, model = window.tab("Token explorer"), site[2]["first"]
    text = VOCABULARY.decode([rng.randrange(200, 2048) for _ in range(40)])
    window.fill(Prompt=text)
    window.press("Read it: what surprises the model?")
    window.status("bits of surprise")
    ids = prompt_ids(VOCABULARY, text)
    with torch.no_grad():
        p = model(torch.tensor([ids]))[0][0].double().softmax(-1)
    tokens = panel.locator("#explored .token")
    kinds = tokens.evaluate_all("all => all.map(e => [e.className, getComputedStyle(e).backgroundColor])")
    assert len(kinds) == len(ids) - 1
    greens = {"sure": "rgba(22, 163, 74", "unsure": "rgba(234, 179, 8", "surprised": "rgba(220, 38, 38"}
    for (name, colour), x in zip(kinds, [float(p[i, ids[i + 1]]) for i in range(len(ids) - 1)]):
        if min(abs(x - 0.8), abs(x - 0.35)) > 1e-4:
            wanted = "sure" if x >= 0.8 else "unsure" if x >= 0.35 else "surprised"
            assert name.split()[1] == wanted and colour.startswith(greens[wanted])
    place = rng.randrange(1, len(ids))
    tokens.nth(place - 1).click()
    rows = panel.locator("#alternatives tr:has(td)")
    expect(rows.first).to_be_visible(timeout=20_000)
    best = p[place - 1].topk(8)
    shares = [row.split("\t") for row in rows.all_inner_texts()]
    assert [float(row[2].strip("%")) for row in shares[:8]] == pytest.approx((best.values * 100).tolist(), abs=0.06)
    entropy = float(-(p[place - 1] * p[place - 1].log2()).sum())
    assert abs(float(panel.locator("#alternatives b").first.inner_text().split()[0]) - entropy) < 0.006
    window.press("Continue it")
    window.status("tokens/s.*bits of surprise")
    expect(panel.locator("#alternatives table")).to_have_count(0)
    tokens.first.focus()
    window.page.keyboard.press("Enter")
    expect(panel.locator("#alternatives table")).to_have_count(1, timeout=20_000)


def test_sweep(window):
    """Three temperatures stand side by side, and the mark stands where they part."""
    panel = window.tab("Temperature sweep")
    window.fill(Prompt="The", Seed=3, Tokens=30)
    window.press("Compare")
    window.status("90 tokens.*part at token")
    expect(panel.locator("#swept .card")).to_have_count(3)
    assert len(set(panel.locator("#swept .shared").all_text_contents())) == 1
    after = panel.locator("#swept .text").evaluate_all(
        "all => all.map(e => { let s = e.querySelector('.parting').nextSibling; return s ? s.textContent : '' })")
    assert len(set(after)) > 1
    panel.get_by_label("2", exact=True).check()
    window.press("Compare")
    expect(panel.locator("#swept .card")).to_have_count(2, timeout=20_000)


def test_arena(window, site):
    """A blind match hides the names until the vote, which lands in the file and in the table."""
    panel, votes = window.tab("Arena"), site[0] / "out" / "arena.sqlite"
    window.press("Tie")
    window.refused("nothing to vote on")
    before = len(arena.read(votes))
    window.fill(Prompt="One day", Tokens=10)
    window.press("Let them write")
    window.status("Which is better")
    match = panel.locator("#match")
    assert "first" not in match.inner_text() and "second" not in match.inner_text()
    texts = match.locator(".text").evaluate_all("all => all.map(e => e.textContent)")
    window.press("B is better")
    window.status("Your vote is kept: B")
    names = [title.split(" · ")[1].split(" (")[0] for title in match.locator("h4").all_inner_texts()]
    assert sorted(names) == ["first", "second"]
    assert arena.read(votes)[before:] == [(*names, "B")]
    row = sqlite3.connect(votes).execute("SELECT prompt, text_a, text_b FROM votes ORDER BY id DESC").fetchone()
    assert [row[0] + text for text in row[1:]] == texts
    expect(panel.locator("#standings tr:has(td)").first).to_contain_text(names[1])
    for mode in ("Show", "Random"):
        panel.get_by_label(mode).check()
        window.press("Let them write")
        window.status("Which is better")
        assert ("first" in match.inner_text()) == (mode == "Show")
        window.press("Tie")
        window.status("Your vote is kept: tie")


def test_chat(window):
    """A conversation grows by turns, the full prompt can be read, and it can begin again."""
    panel = window.tab("Chat")
    window.fill(Tokens=10)
    for number, message in enumerate(("Hello there", "How are you?"), 1):
        panel.get_by_label("Message").fill(message)
        panel.get_by_label("Message").press("Enter")
        expect(panel.locator("#talk p.user")).to_have_count(number, timeout=20_000)
        window.status("tokens/s")
        expect(panel.get_by_label("Message")).to_have_value("", timeout=20_000)
    panel.get_by_text("The full prompt").click()
    prompt = panel.locator("#full textarea").input_value()
    assert prompt.startswith("User: Hello there\nAssistant:") and prompt.endswith("\nUser: How are you?\nAssistant:")
    window.press("Begin again")
    expect(panel.locator("#talk p")).to_have_count(0)


def test_inside(window, site):
    """The heads of a layer, one of them large, and the lens; picking another head shows that one."""
    panel = window.tab("Inside")
    window.fill(Prompt="One two three")
    window.press("Look inside")
    window.status("layer 1 of 3, head 1 of 4")
    ids = prompt_ids(VOCABULARY, "One two three")
    patterns, lens = inside.look_inside(site[2]["first"], ids)
    panel.locator("#heads figure").nth(2).click()
    window.status("head 3 of 4")
    squares = panel.locator("#pattern rect").evaluate_all("all => all.map(e => Number(e.getAttribute('fill-opacity')))")
    weights = [float(patterns[0, 2, i, j]) for i in range(len(ids)) for j in range(i + 1)]
    assert squares == pytest.approx(weights, abs=6e-4)
    expect(panel.locator("#lens tr:has(td)")).to_have_count(4)


def test_hostile_input(window):
    """HTML, templates and control characters are shown as text; 100 KB is cut with a word; nonsense is refused."""
    panel = window.tab("Generate")
    hostile = "<img src=x onerror=alert(1)> {{value}} ${alert(2)} \x01 <script>alert(3)</script>"
    window.fill(Prompt=hostile, Tokens=5)
    window.press("Generate")
    window.status("5 tokens")
    assert hostile.replace("\x01", "␁") in panel.locator("#texts .given").text_content()
    assert panel.locator("#texts img, #texts script").count() == 0
    window.fill(Prompt="many words " * 10_000)
    window.press("Generate")
    window.status("the model sees the last 256")
    window.fill(Prompt="x" * 200_001)
    window.press("Generate")
    window.refused("200,001 characters")
    window.fill(Prompt="x", Tokens=-5)
    window.press("Generate")
    window.status(r"^\s*1 token ")  # the slider takes no such number; what goes around it is refused (test_tabs.py)


def test_a_killed_server_keeps_its_votes(browser, tmp_path):
    """A vote that the page has confirmed is in the file after the server was killed, and in the next one's table."""
    for name in ("first", "second"):
        save_run(tmp_path / "out" / name)
    for count in (1, 2):
        port = free_port()
        server = start("demo.py", "--port", port, cwd=tmp_path)
        assert str(port) in server.stdout.readline()
        window = Window(browser, f"http://127.0.0.1:{port}")
        panel = window.tab("Arena")
        assert count == 1 or "first" in panel.locator("#standings").inner_text()
        window.fill(Tokens=3)
        window.press("Let them write")
        window.status("Which is better")
        window.press("A is better")
        window.status("Your vote is kept")
        server.kill()
        server.communicate()
        window.page.context.close()
        assert len(arena.read(tmp_path / "out" / "arena.sqlite")) == count


def test_port_in_use(tmp_path):
    """A port that another program has is one line, and exit code 2."""
    save_run(tmp_path / "out" / "first")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        refused(run("demo.py", "--port", taken.getsockname()[1], cwd=tmp_path), "port", "is in use")


def request(address, method, path, host=None, body=None):
    """Ask the demo as any program can: (status, the answer's text)."""
    place = urlsplit(address).netloc
    connection = http.client.HTTPConnection(place, timeout=20)
    connection.putrequest(method, path, skip_host=True)
    headers = {"Host": host or place} | ({"Content-Type": "application/json"} if method == "POST" else {})
    for name, value in (headers | ({"Content-Length": len(body)} if body else {})).items():
        connection.putheader(name, str(value))
    connection.endheaders()
    with contextlib.suppress(OSError):  # it may be refused before all of it has been sent
        connection.send(body or b"")
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_foreign_hosts_uploads_and_addresses(site):
    """A name that leads here gets no page; nobody can upload, or have an address fetched or even looked up."""
    folder, address, _ = site
    assert request(address, "GET", "/")[0] == request(address, "GET", "/", "localhost")[0] == 200
    file = {"path": "http://elsewhere.example/x", "meta": {"_type": "gradio.FileData"}, "orig_name": "x"}
    for status, *asked in (
            (403, "GET", "/", "evil.com"), (403, "GET", "/config", f"evil.com:{urlsplit(address).port}"),
            (404, "POST", "/gradio_api/upload", None, b"x" * 1000), (404, "POST", "/gradio_api/run/write"),
            (404, "GET", "/gradio_api/file=http://elsewhere.example/x"), (404, "GET", "/gradio_api/proxy=http://a.b"),
            (400, "POST", "/gradio_api/queue/join", None,
             json.dumps({"data": [file], "fn_index": 0, "session_hash": "a"}).encode())):
        assert request(address, *asked)[0] == status, asked
    assert "elsewhere" not in (folder / "connections").read_text()


def test_requests_are_not_echoed(tmp_path):
    """Neither a body of 60 MB nor one that fits nothing comes back on the terminal."""
    save_run(tmp_path / "out" / "first")
    port = free_port()
    with (tmp_path / "errors").open("w") as errors:
        server = start("demo.py", "--port", port, cwd=tmp_path, stderr=errors)
    assert str(port) in server.stdout.readline()
    long, join = "secret" * 100_000, "/gradio_api/queue/join"
    for status, body in ((413, b"{" * 60_000_000), (400, b"secret" * 100_000),
                         (200, json.dumps({"data": [long], "fn_index": 0, "session_hash": "a"}).encode()),
                         (200, json.dumps({"data": [long], "fn_index": 1, "session_hash": "a"}).encode()),
                         (500, json.dumps({"data": [long], "fn_index": 9999, "session_hash": "a"}).encode())):
        assert request(f"http://127.0.0.1:{port}", "POST", join, None, body)[0] == status
    time.sleep(1)  # the queue works on them later
    server.terminate()
    server.communicate()
    assert len((tmp_path / "errors").read_text()) < 3000


def test_no_connection_to_elsewhere(site):
    """After all of that the server has tried to reach nobody but itself, nor asked for anybody's address."""
    urllib.request.urlopen(site[1]).read()
    lines = (site[0] / "connections").read_text().splitlines()
    assert all(re.search(r"127\.0\.0\.1|localhost|socket.getaddrinfo None", line) for line in lines), lines
