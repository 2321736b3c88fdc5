"""Who may ask the page's server, and for what: this machine's own browser, for what the page needs.

A name of somebody else's can lead to 127.0.0.1 (DNS rebinding), any page in the browser can send requests to it, and
gradio has routes that fetch addresses, take files and run functions. None of that gets past `Guard`, which stands
before gradio's app (ASGI). It knows nothing of gradio but the paths.
"""

import json
import sys
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from cli import brief

HOSTS = ("127.0.0.1", "localhost")
LONGEST = 4 * 2**20  # bytes in the body of a request; a prompt of 200,000 characters takes 1.2 million at most
PATHS = ("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt", "/pwa_icon",
         "/gradio_api/theme.css", "/gradio_api/info", "/gradio_api/app_id", "/gradio_api/login_check",
         "/gradio_api/startup-events", "/gradio_api/queue/data")
FOLDERS = ("/assets/", "/static/", "/svelte/", "/gradio_api/heartbeat/")
POSTS = ("/gradio_api/queue/join", "/gradio_api/cancel", "/gradio_api/reset")
ASGI = Callable[[], Awaitable[dict]]


def host_of(address: str) -> str:
    """The host of "HOST:PORT" or "http://HOST:PORT", in small letters; "" if it is no address."""
    try:
        return urlsplit(address if "//" in address else f"//{address}").hostname or ""
    except ValueError:
        return ""


def refusal(method: str, path: str, headers: list[tuple[bytes, bytes]]) -> tuple[int, str] | None:
    """Why a request is not for the page: (status, reason). None if it is."""
    def values(name: bytes) -> list[str]:
        return [value.decode("latin-1") for key, value in headers if key.lower() == name]

    hosts, origins, lengths = values(b"host"), values(b"origin"), values(b"content-length")
    if len(hosts) != 1 or host_of(hosts[0]) not in HOSTS:
        return 403, "this page is only for the machine that serves it: http://127.0.0.1"
    if any(host_of(origin) not in HOSTS for origin in origins):
        return 403, "another page may not ask this one"
    allowed = (path in POSTS if method == "POST" else
               method in ("GET", "HEAD") and (path in PATHS or path.startswith(FOLDERS)))
    if not allowed:
        return 404, "the page needs no such thing"
    if method == "POST" and not any(value.startswith("application/json") for value in values(b"content-type")):
        return 415, "only JSON is taken"
    if any(not length.isdecimal() or int(length[:20]) > LONGEST for length in lengths):
        return 413, f"the request is longer than {LONGEST:,} bytes"
    return None


def is_plain(body: bytes) -> bool:
    """Whether a body is a JSON object whose `data` are words and numbers: gradio fetches what an object there names."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return False
    values = data.get("data", []) if isinstance(data, dict) else None
    return isinstance(values, list) and all(value is None or isinstance(value, (str, int, float)) for value in values)


class Guard:
    """An ASGI app that passes on to another what is meant for the page."""

    def __init__(self, app: Callable):
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: ASGI, send: Callable):
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # the page opens no WebSocket
            return await send({"type": "websocket.close", "code": 1008})
        wrong, body = refusal(scope["method"], scope["path"], scope["headers"]), b""
        if not wrong and scope["method"] == "POST":
            body = await read_body(receive)
            if len(body) > LONGEST:
                wrong = 413, f"the request is longer than {LONGEST:,} bytes"
            elif not is_plain(body):
                wrong = 400, "this is no request of the page"
        if wrong:
            return await refuse(send, *wrong)
        begun = []

        async def answer(message: dict):
            begun.append(message)
            await send(message)

        try:
            await self.app(scope, receive if scope["method"] != "POST" else replay(body, receive), answer)
        except Exception as error:  # one line: the server would print a page, with all of the request in it
            print(f"a request failed: {brief(error)}", file=sys.stderr, flush=True)
            if not begun:
                await refuse(send, 500, "this request failed")


async def read_body(receive: ASGI) -> bytes:
    """The body of a request, or so much of it that it is known to be too long."""
    parts, size, more = [], 0, True
    while more and size <= LONGEST:
        message = await receive()
        part = message.get("body", b"")
        parts.append(part)
        size += len(part)
        more = message.get("more_body", False)  # a client that has gone away sends no more
    return b"".join(parts)


def replay(body: bytes, receive: ASGI) -> ASGI:
    """A `receive` that gives a body that has been read already, and then what comes after it."""
    left = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> dict:
        return left.pop() if left else await receive()

    return again


async def refuse(send: Callable, status: int, reason: str):
    """Answer with a line of text, and end the connection."""
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"{reason}\n".encode()})
