"""Tiny models as runs of ours, what an export of one holds, and texts to try its tokenizer on."""
import json
from dataclasses import asdict

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import checkpoint
import export
import tokenizer
from config import Config
from decoding.choice import Sampler
from decoding.generate import generate
from model import Llama, ModelConfig
from tokenizer import portable

QUICK = tokenizer.load("quickstart-2048")
EOS = "<|endoftext|>"
REMOTE = {"trust_remote_code": True}
EXACT_FILES = ["README.md", "config.json", "generation_config.json", "model.safetensors",
               "tokenization_tokenmonster.py", "tokenizer_config.json", "tokenmonster.vocab"]
PORTABLE_FILES = ["README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                  "tokenizer_config.json"]
FRAGMENTS = ["the", " of a", "return self", "don't", "l\u2019eau", "(x, y)", "://", "?", "??", "111", "99999",
             " 1 + 1 = 2.", "def f(self):\n    return [x for x in self]\n", "import numpy as np\n", "0000 ", "-" * 40,
             " ", "  ", " " * 30, "\t", "\n", "\n\n", " \n", "\r\n", "\r", "\x7f", "\x7f a", "\x00\x01", "\x14", "\x85",
             "\xa0", "\u2028", "\ufeff", "\ufffd", "\u00e9", "e\u0301", "\u0301", "\u1e69", "\u212b", "\uac00",
             "\u4e00\u4e8c", "\u0414\u0430", "\U0001f600", "\U0001f468\u200d\U0001f469", "\U0010ffff", "</s>",
             "<|endoftext", "[PAD]"]


def llama(**changes):
    """A tiny model with weights so large that its likeliest tokens change from place to place, but never end a text."""
    model = Llama(ModelConfig(**dict(vocab_size=2048, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                     num_attention_heads=4, num_key_value_heads=2,
                                     max_position_embeddings=256) | changes))
    for p in model.parameters():
        p.data.uniform_(0.5, 1.5) if p.dim() == 1 else p.data.normal_(0, 1.5 * p.size(1) ** -0.5)
    if not model.config.tie_word_embeddings:
        model.lm_head.weight.data[QUICK.eos_id] = 0
    return model


def save(run, model, vocabulary=QUICK, step=1200, **config):
    """A run of this model as train.py leaves it."""
    settings = Config(name="tiny", model=model.config, block_size=32, tokens_per_step=32, **config)
    state = {"step": step, "seconds": 65.0, "best_loss": 1.5, "int8_product": None, "val_loss": 1.5,
             "bits_per_byte": 1.2345, "tokenizer_sha256": vocabulary.sha256, "scaler": {}, "train_tokens": {},
             "config": json.loads(json.dumps(asdict(settings), default=str))}
    checkpoint.save(run, model, torch.optim.AdamW(model.parameters()), state, True, 1)
    return run


def export_both(root):
    """A run and its exports, in a folder: out/tiny, hf (exact) and plain/hf (portable)."""
    run = save(root / "out" / "tiny", llama())
    export.main(["--checkpoint", str(run), "--out", str(root / "hf")])
    export.main(["--checkpoint", str(run), "--out", str(root / "plain" / "hf"), "--tokenizer", "portable"])
    return root


def names(folder):
    """The files of a folder, as paths relative to it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def contents(folder):
    """Everything in a folder: empty directories and the bytes of files too."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def load_hf(folder):
    """A folder's model, in FP32."""
    return AutoModelForCausalLM.from_pretrained(folder).float().eval()


@torch.no_grad()
def difference(ours, theirs, rows=None):
    """The largest difference between the logits of two models on random ids."""
    ids = torch.randint(rows or ours.config.vocab_size, (3, ours.config.max_position_embeddings // 2))
    return float((ours(ids)[0] - theirs(ids).logits).abs().max())


def greedy(model, prompt, count, eos_id=None):
    """Our greedy continuation."""
    return list(generate(model, prompt, count, Sampler(vocab_size=2048), eos_id))


def any_text(rng):
    """Some fragments and some characters of any kind, lone surrogates too."""
    def character():  # one of one byte, of two, of three, of four
        return chr(rng.randrange(rng.choice([0x80, 0x800, 0x10000, 0x110000])))

    parts = [rng.choice(FRAGMENTS) if rng.random() < 0.7 else character() for _ in range(rng.randint(1, 14))]
    return "".join(parts).replace(EOS, "")  # that, transformers takes for the token


def texts(rng, count=300):
    return ["", " ", "\n", *(any_text(rng) for _ in range(count))]


def well_formed(text):
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def their_model(rng, **changes):
    """Somebody's Llama, made by transformers, that ends its texts with our token."""
    logging.disable_progress_bar()  # when it is saved
    theta = rng.choice([500.0, 20_000.0])
    config = LlamaConfig(**dict(
        vocab_size=2048, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=2, eos_token_id=2, rope_theta=theta,
        rope_parameters={"rope_type": "default", "rope_theta": theta}, rms_norm_eps=1e-5) | changes)
    model = LlamaForCausalLM(config).eval()
    for p in model.parameters():
        p.data.uniform_(0.5, 1.5) if p.dim() == 1 else p.data.normal_(0, 1.5 * p.size(1) ** -0.5)
    return model


def with_tokenizer(folder):
    (folder / "tokenizer.json").write_bytes(portable.tokenizer_json(QUICK, lossless=True))
    return folder
