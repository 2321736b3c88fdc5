"""The models to choose from: runs of ours and models of transformers, loaded when somebody asks for one."""

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import checkpoint
import decoding
from backend import Backend
from cli import BadInput
from formats import peers
from model import Llama
from tokenizer import Tokenizer

if TYPE_CHECKING:
    from decoding.engine import Engine

LONGEST = 2048  # tokens that a model of transformers sees at once: a longer context may not fit in memory
IN_MEMORY = 4  # models


@dataclass
class Loaded:
    """A model and its tokenizer, ready to run. `writer` is the same model as it writes fastest."""

    name: str
    model: Llama | peers.Peer
    vocabulary: Tokenizer
    writer: "Llama | Engine | peers.Peer | None" = None

    def __post_init__(self):
        self.writer = self.writer or self.model


@dataclass
class Entry:
    """A model that can be chosen; `ours` if it is not one of transformers."""

    name: str
    parameters: int
    layers: int
    ours: bool
    load: Callable[[], Loaded]


def our_entry(path: Path, device: Backend) -> Entry:
    """A run or a step directory. Raises BadInput if it is neither, or is damaged."""
    step_dir = checkpoint.find(path, "best")
    run = checkpoint.run_dir(step_dir)
    name = run.name if step_dir != path else f"{run.name}/{step_dir.name}"
    shape = checkpoint.read_shape(step_dir, checkpoint.read_state(step_dir))
    parameters = sum(map(math.prod, shape.shapes().values()))

    def load() -> Loaded:
        trained = checkpoint.open_trained(path, "best", device)  # path: a run in training has a newer step by now
        return Loaded(name, trained.model.eval(), trained.vocabulary, decoding.ready(trained.model)[0])

    return Entry(name, parameters, shape.num_hidden_layers, True, load)


def their_entry(name: str, trust_remote_code: bool, device: Backend) -> Entry:
    """A causal model of transformers: a folder, or OWNER/NAME on the hub. Raises BadInput if it cannot be loaded."""
    config = peers.load_config(name, trust_remote_code)
    parameters = peers.count_parameters(config, name, trust_remote_code)

    def load() -> Loaded:
        vocabulary = peers.PeerTokenizer(name, peers.load_tokenizer(name, trust_remote_code))
        model = peers.load_model(name, trust_remote_code).to(device.device)
        return Loaded(name, peers.Peer(model, peers.context_of(config, LONGEST)), vocabulary)

    return Entry(Path(name).name if Path(name).is_dir() else name, parameters,
                 getattr(config, "num_hidden_layers", 0), False, load)


class Shelf:
    """The models to choose from, by name. The ones used last stay in memory."""

    def __init__(self, entries: list[Entry]):
        self.entries: dict[str, Entry] = {}
        for entry in entries:
            name, again = entry.name, 2
            while entry.name in self.entries:  # out/a and other/a
                entry.name, again = f"{name} ({again})", again + 1
            self.entries[entry.name] = entry
        self.loaded: dict[str, Loaded] = {}
        self.lock = threading.Lock()
        self.loading = {name: threading.Lock() for name in self.entries}

    def entry(self, name: str) -> Entry:
        """Raises BadInput if there is no model of that name."""
        if name not in self.entries:
            raise BadInput("choose a model")
        return self.entries[name]

    def get(self, name: str) -> Loaded:
        """A model, loaded if need be. Users who ask for the same one at the same time wait for one loading."""
        entry = self.entry(name)
        with self.loading[name]:
            loaded = self.loaded.get(name) or replace(entry.load(), name=name)
            with self.lock:
                self.loaded.pop(name, None)
                self.loaded[name] = loaded  # the one used last stands last
                while len(self.loaded) > IN_MEMORY:
                    del self.loaded[next(iter(self.loaded))]
        return loaded
