"""Tiny models to show, what they say in float64, and what the page made of it."""
import json
from dataclasses import asdict
from functools import partial
from html.parser import HTMLParser

import torch

import checkpoint
import tokenizer
from config import Config
from model import Llama, ModelConfig
from web.shelf import Entry, Loaded, Shelf

VOCABULARY = tokenizer.load("quickstart-2048")
EOS = VOCABULARY.eos_id
CONTEXT = 64


def llama(**changes):
    """A tiny model with weights so large that it is sometimes sure and sometimes not."""
    model = Llama(ModelConfig(**dict(vocab_size=2050, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
                                     num_attention_heads=4, max_position_embeddings=CONTEXT) | changes))
    for p in model.parameters():
        p.data.uniform_(0.5, 1.5) if p.dim() == 1 else p.data.normal_(0, 1.5 * p.size(1) ** -0.5)
    return model


def shelf_of(*models, names="abcdefgh"):
    """A shelf of these models, each ready at once."""
    return Shelf([Entry(name, model.num_parameters(), 3, True, partial(Loaded, name, model, VOCABULARY))
                  for name, model in zip(names, models)])


def in_float64(model, ids):
    """Probabilities (T - 1, 2048) of what follows each of ids but the last, from a model of float64."""
    exact = Llama(ModelConfig(**asdict(model.config) | {"fp32_norms": False, "fp32_blocks": ()}))
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        return exact.double()(torch.tensor([ids[:-1]]))[0][0, :, :2048].softmax(-1)


def save_run(folder, rng):
    """The checkpoint of a tiny model, as train.py leaves it."""
    model = llama()
    config = Config(name=folder.name, model=model.config, block_size=32, tokens_per_step=32)
    state = {"step": rng.randrange(1, 999), "tokenizer_sha256": VOCABULARY.sha256,
             "config": json.loads(json.dumps(asdict(config), default=str))}
    checkpoint.save(folder, model, None, state, True, 1)
    return model


def last(steps):
    """What a tab shows in the end."""
    return list(steps)[-1]


def some_text(rng, count=30):
    """Random tokens as text."""
    return VOCABULARY.decode([rng.choice(range(200, 2048)) for _ in range(count)])


class Page(HTMLParser):
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
