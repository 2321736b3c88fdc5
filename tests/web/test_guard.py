"""The guard before the page's server: what is not for the page, or not from this machine's browser, is refused."""
import asyncio
import json
import string

import pytest

from web import guard
from web.guard import LONGEST, Guard, host_of, is_plain

JSON = (b"content-type", b"application/json")
JOIN = "/gradio_api/queue/join"


def ask(method="GET", path="/", headers=(), parts=(), host=b"127.0.0.1:7860", kind="http", app=None):
    """Send a request through a guard: (its status or the WebSocket's code, the text, what the app behind it read)."""
    read, sent, left = [], [], [{"type": "http.request", "body": part, "more_body": True} for part in parts]

    async def behind(scope, receive, send):
        message = await receive() if method == "POST" else {}
        read.append(message.get("body"))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"fine"})

    async def receive():
        return left.pop(0) if left else {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {"type": kind, "method": method, "path": path,
             "headers": [*([(b"host", host)] if host is not None else []), *headers]}
    asyncio.run(Guard(app or behind)(scope, receive, send))
    return sent[0].get("status", sent[0].get("code")), sent[-1].get("body", b"").decode(), read


@pytest.mark.parametrize("host, good", [
    (b"127.0.0.1", True), (b"127.0.0.1:7860", True), (b"localhost:7860", True), (b"LOCALHOST", True),
    (b"evil.com", False), (b"evil.com:7860", False), (b"127.0.0.1.evil.com", False), (b"localhost.evil.com", False),
    (b"127.0.0.1@evil.com", False), (b"", False), (b"[::1", False), (None, False), (b"\xff", False)])
def test_only_this_machine_is_a_host(host, good):
    """DNS rebinding: a foreign name that leads to this machine gets nothing, whatever it asks for."""
    for method, path, parts in (("GET", "/", []), ("POST", JOIN, [b'{"data": []}'])):
        status, text, read = ask(method, path, [JSON], parts, host)
        assert (status, len(read)) == ((200, 1) if good else (403, 0)), text


def test_two_hosts_are_none():
    assert ask(headers=[(b"Host", b"evil.com")])[0] == 403


@pytest.mark.parametrize("origin, good", [(b"http://127.0.0.1:7860", True), (b"http://localhost:7860", True),
                                          (b"https://evil.com", False), (b"null", False)])
def test_another_page_may_not_ask(origin, good):
    assert ask("POST", JOIN, [JSON, (b"origin", origin)], [b"{}"])[0] == (200 if good else 403)


@pytest.mark.parametrize("method, path", [
    ("POST", "/gradio_api/upload"), ("GET", "/gradio_api/file=http://evil.com/x"), ("GET", "/gradio_api/file=/x/y"),
    ("HEAD", "/gradio_api/file=http://evil.com"), ("GET", "/gradio_api/proxy=http://evil.com"), ("PUT", "/"),
    ("GET", "/gradio_api/file/x"), ("POST", "/gradio_api/run/predict"), ("POST", "/gradio_api/call/write"),
    ("POST", "/gradio_api/stream/1"), ("POST", "/gradio_api/component_server"), ("POST", "/"), ("GET", "/monitoring"),
    ("GET", "/gradio_api/upload_progress"), ("POST", "/login"), ("GET", "//gradio_api/file=http://evil.com")])
def test_what_the_page_does_not_need(method, path):
    """No uploads, no files, no addresses that the server would fetch."""
    assert ask(method, path, [JSON], [b"{}"])[::2] == (404, [])


def test_paths_by_chance(rng):
    """Whatever is asked for, it is on the list or refused."""
    for _ in range(500):
        path = "/" + "".join(rng.choice([*string.ascii_lowercase, "/", "=", ".", "gradio_api/", "assets/"])
                             for _ in range(rng.randint(0, 9)))
        assert ask(path=path)[0] == (200 if path in guard.PATHS or path.startswith(guard.FOLDERS) else 404)


def test_long_bodies_are_not_read(rng):
    """One that says how long it is is refused at once; one that does not, when it has grown too long."""
    assert ask("POST", JOIN, [JSON, (b"content-length", str(60_000_000).encode())])[::2] == (413, [])
    assert ask("POST", JOIN, [JSON, (b"content-length", b"9" * 5000)])[0] == 413
    assert ask("POST", JOIN, [JSON, (b"content-length", b"-1")])[0] == 413
    assert ask("POST", JOIN, [JSON], [b" " * 2**20] * 60)[::2] == (413, [])
    body = json.dumps({"data": ["x" * rng.randrange(LONGEST - 100)]}).encode()
    place = rng.randrange(len(body))
    assert ask("POST", JOIN, [JSON], [body[:place], body[place:]])[::2] == (200, [body])  # whole, for the app


@pytest.mark.parametrize("body", [
    b"", b"{" * 1000, b"[" * 100_000, b"null", b"[]", b"\xff", b'{"data": {}}', b'{"data": "x"}',
    b'{"data": [{"path": "http://evil.com/x", "meta": {"_type": "gradio.FileData"}}]}',
    b'{"data": [[{"path": "http://evil.com/x"}]]}', b'{"data": ["a", {"url": "http://evil.com"}]}'])
def test_requests_that_no_page_sends(body):
    """What is not JSON, and objects among the inputs: gradio would fetch the address in one."""
    assert not is_plain(body) and ask("POST", JOIN, [JSON], [body])[::2] == (400, [])


def test_only_json():
    """A form of another page can send text to any address without asking first."""
    assert ask("POST", JOIN, [(b"content-type", b"text/plain")], [b'{"data": []}'])[0] == 415


def test_no_websocket_and_the_server_may_start():
    assert ask(kind="websocket")[0] == 1008
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["type"])
        await send({"status": 0})

    ask(kind="lifespan", app=app)
    assert seen == ["lifespan"]


def test_an_error_is_one_short_line(capsys):
    """Where the app fails, the request is not echoed."""
    async def app(scope, receive, send):
        raise RuntimeError("secret\n" * 10_000)

    assert ask(app=app)[0] == 500
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and len(err) < 400


def test_host_of():
    addresses = {"a:1": "a", "http://A:1/x": "a", "http://[::1]:5": "::1", "[": "", "": ""}
    assert {address: host_of(address) for address in addresses} == addresses
