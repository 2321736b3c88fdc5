"""The Hugging Face hub: a file of a repository, from its cache if it is there, and patience with a server in trouble.

What reads data sets (sources/streams.py) and imports models (formats/llama.py) is as patient.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from cli import BadInput, brief
from tokenizer.delimiters import FILES

Answer = TypeVar("Answer")
WAITS = (2, 10, 30, 120)  # seconds before each new attempt after a network error


def status_of(error: BaseException | None) -> int | None:
    """The status with which a server has answered, as the error or one that caused it says."""
    while error is not None:
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", getattr(error, "status", None))  # httpx's and requests'; aiohttp's
        if isinstance(status, int):
            return status
        error = error.__cause__ or error.__context__
    return None


def was_reached(error: BaseException | None) -> bool:
    """Whether a server was there when this error came: it has answered, or taken the call and dropped it."""
    dropped = {"ConnectionResetError", "RemoteDisconnected", "ReadError", "ReadTimeout", "RemoteProtocolError",
               "ServerDisconnectedError", "IncompleteRead"}  # in the libraries in use over the years
    return error is not None and (status_of(error) is not None or type(error).__name__ in dropped
                                  or was_reached(error.__cause__ or error.__context__))


def is_network_error(error: BaseException | None) -> bool:
    """Whether trying again later may help: after a lost connection or a server in trouble, not a wrong name or address.

    The error itself may say so, or the one that caused it: the libraries in between give it other names.
    """
    if error is None:
        return False
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", getattr(error, "status", None))  # httpx's and requests'; aiohttp's
    if isinstance(status, int) and 400 <= status < 500:
        return status in (408, 429)
    libraries = ("httpx", "httpcore", "aiohttp", "requests", "urllib3", "asyncio")  # those in use over the years
    return (isinstance(error, (ConnectionError, TimeoutError))
            or any(base.__module__.startswith(libraries) for base in type(error).__mro__)
            or is_network_error(error.__cause__ or error.__context__))


class Patience:
    """How long to wait after a network error: each of WAITS in turn, from the first again once something has arrived.

    Where there is no network we do not wait. `online` says whether this process has had one; a server that answers,
    even with an error, is one.
    """

    def __init__(self, online: bool = False):
        self.online, self.attempt = online, 0

    def arrived(self):
        """Something has arrived."""
        self.online, self.attempt = True, 0

    def seconds(self, error: BaseException) -> int | None:
        """How long to wait before the next attempt; None if there should be none."""
        self.online = self.online or was_reached(error)
        if not self.online or self.attempt == len(WAITS) or not is_network_error(error):
            return None
        self.attempt += 1
        return WAITS[self.attempt - 1]


def patiently(ask: Callable[[], Answer], what: str) -> Answer:
    """What `ask` returns. After a network error it is called again, in a while; the last error is raised."""
    patience = Patience()
    while True:
        try:
            return ask()
        except Exception as error:
            seconds = patience.seconds(error)
            if seconds is None:
                raise
            reason = brief(error.__cause__ or error)
            print(f"{what}: {reason}; trying again in {seconds} s", file=sys.stderr, flush=True)
            time.sleep(seconds)


def download(repository: str, file: str, otherwise: str) -> Path:
    """The path, in the hub's cache, of a file of a repository. If it is there already, the hub is not asked.

    Before a tokenizer.json come the files that say which token ends a text. So they are there where it is. Raises
    BadInput, saying what to do `otherwise`.
    """
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # one line says it all, not one for each attempt
    try:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache  # here, as it takes a while to import
        cached = try_to_load_from_cache(repository, file)
        if isinstance(cached, str):
            return Path(cached)

        def fetch(name: str) -> Path:
            return Path(patiently(lambda: hf_hub_download(repository, name), f"{name} of {repository}"))

        for beside in FILES if file == "tokenizer.json" else ():
            try:
                fetch(beside)
            except Exception as error:
                if status_of(error) != 404:  # a repository may lack some
                    raise
        return fetch(file)
    except Exception as error:  # no library, no network, no such file: the way out is the same
        raise BadInput(f"{file} of {repository} cannot be downloaded ({brief(error)}); get it from "
                       f"huggingface.co/{repository} and {otherwise}. The quickstart needs no download: "
                       f"python prepare.py") from None
