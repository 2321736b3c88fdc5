"""A small Hugging Face hub on this machine: what `datasets` and huggingface_hub ask of the real one, and its troubles.

A folder holds its repositories, datasets/OWNER/NAME and models/OWNER/NAME, as they are at one commit.
"""
import http.server
import json
import re
import socket
import struct
import threading
import time
import urllib.parse
from hashlib import sha256
from pathlib import Path

COMMIT = "0123456789" * 4
STALL = 3  # seconds: longer than the clients here wait (WAITING)
WAITING = {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1"}


class Hub(http.server.ThreadingHTTPServer):
    """Serves the folder of each commit, the last of which is the newest.

    trouble(method, path) is asked before each answer. It gives None, or a status, "reset" (the connection, before an
    answer), "cut" (after half of it), or "stall" (after half of it, for a while). `gated` are data sets that want a
    token. `asked` lists the requests, and `served` counts the bytes of answers.
    """
    daemon_threads = True

    def __init__(self, folder, commit=COMMIT, port=0):
        super().__init__(("127.0.0.1", port), Answer)
        self.commits, self.gated, self.asked, self.served = {commit: Path(folder)}, set(), [], 0
        self.trouble = lambda method, path: None
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def environment(self):
        """Variables for a process that is to use it."""
        return {"HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}", **WAITING}

    def handle_error(self, request, client_address):
        """A client that hangs up is no news."""

    def close(self):
        self.shutdown()
        self.server_close()


class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        """Be quiet."""

    def go(self):
        """Answer a request, or make the trouble that is due."""
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        self.server.asked.append((self.command, self.path))
        self.due = self.server.trouble(self.command, self.path)
        if isinstance(self.due, int):
            return self.send(self.due, b"in trouble")
        if self.due == "reset":
            return self.reset()
        url = urllib.parse.urlsplit(self.path)
        path, query = urllib.parse.unquote(url.path), urllib.parse.parse_qs(url.query)
        if match := re.fullmatch(r"/api/(datasets|models)/([^/]+/[^/]+)(?:/(.*))?", path):
            return self.api(*match.groups(), query)
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.*)", path):
            kind, name, revision, file = match.groups()
            return self.file(kind and "datasets" or "models", name, revision, file)
        return self.refuse(404, "EntryNotFound")

    do_GET = do_HEAD = do_POST = go

    def folder(self, kind, name, revision):
        """(commit, folder) of a repository; refuses, and returns None, if there is none."""
        commit = list(self.server.commits)[-1] if revision == "main" else revision
        if commit not in self.server.commits:
            return self.refuse(404, "RevisionNotFound")
        folder = self.server.commits[commit] / kind / name
        return (commit, folder) if folder.is_dir() else self.refuse(401, "RepoNotFound")

    def api(self, kind, name, rest, query):
        """What a repository holds."""
        match = re.fullmatch(r"(revision|tree|paths-info)/([^/]+)(?:/(.*))?", rest or "revision/main")
        found = match and self.folder(kind, name, match[2])
        if not found:
            return None if match else self.refuse(404, "EntryNotFound")
        commit, folder = found
        if match[1] == "revision":
            files = [{"rfilename": str(path.relative_to(folder))} for path in sorted(folder.rglob("*"))
                     if path.is_file()]
            return self.send_json({"sha": commit, "id": name, "_id": "1", "siblings": files, "gated": False,
                                   "private": False, "tags": [], "downloads": 0, "likes": 0}, commit)
        if match[1] == "paths-info":
            asked = json.loads(self.body) if self.body.startswith("{") else urllib.parse.parse_qs(self.body)
            paths = [folder / path for path in asked["paths"]]
        else:
            base = folder / (match[3] or "")
            if not base.is_dir():
                return self.refuse(404, "EntryNotFound")
            every = query.get("recursive", [""])[0].lower() in ("true", "1")
            paths = sorted(base.rglob("*") if every else base.iterdir())
        return self.send_json([self.entry(path, folder) for path in paths if path.exists()], commit)

    def entry(self, path, folder):
        """A line of a repository's tree."""
        place = {"path": str(path.relative_to(folder)), "oid": sha256(str(path).encode()).hexdigest()[:40]}
        if path.is_dir():
            return {"type": "directory", "size": 0, **place}
        return {"type": "file", "size": path.stat().st_size, **place}

    def file(self, kind, name, revision, file):
        """A file, or the part of it that is asked for."""
        found = self.folder(kind, name, revision)
        if not found:
            return
        commit, folder = found
        if name in self.server.gated and "Authorization" not in self.headers:
            self.refuse(401, "GatedRepo", f"Access to dataset {name} is restricted. You must have access to it")
        elif not (folder / file).is_file():
            self.refuse(404, "EntryNotFound")
        else:
            data = (folder / file).read_bytes()
            headers = {"ETag": f'"{sha256(data).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if asked:
                first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
                data = data[first:last + 1]
            self.send(206 if asked else 200, data, headers)

    def refuse(self, status, code, message="not here"):
        """An error as the hub words it."""
        self.send(status, b"", {"X-Error-Code": code, "X-Error-Message": message})

    def send_json(self, value, commit):
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json", "X-Repo-Commit": commit})

    def send(self, status, data, headers=None):
        """An answer: whole, or with the trouble that is due in its midst."""
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.due in ("cut", "stall"):
            self.wfile.write(data[:len(data) // 2])
            self.wfile.flush()
            time.sleep(STALL if self.due == "stall" else 0)
            return self.reset()
        self.server.served += len(data)
        self.wfile.write(data)

    def reset(self):
        """Drop the connection as a crashed server does."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()
