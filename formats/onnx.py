"""The model as an ONNX graph, for ONNX Runtime and transformers.js: export.py --format onnx

A graph has no memory, so the cache goes in and comes out. Its inputs are the keys and values of every layer's past; its
outputs are past and new ones together. A mask says which tokens of a batch are padding; positions count from the first
token that is not. Inputs, outputs and axes have the names that optimum gave them, which transformers.js looks for.
"""

import logging
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn as nn

from cli import BadInput
from model import Llama

TOLERANCE = 1e-5  # of a logit, relative to the largest


class Past:
    """The cache of one forward pass, as model.Attention uses one. It holds what came in and what goes out."""

    def __init__(self, past: list[torch.Tensor], allowed: torch.Tensor):
        """past: the keys and values of each layer in turn, (B, K, P, D). allowed (B, 1, T, P + T): who sees whom."""
        self.past, self.allowed, self.present = past, allowed, []

    def extend(self, layer: int, k, v):
        """The keys and values of past and new tokens, (B, K, P + T, D) each, and the mask, which knows the padding."""
        k, v = torch.cat((self.past[2 * layer], k), dim=2), torch.cat((self.past[2 * layer + 1], v), dim=2)
        self.present += [k, v]
        return k, v, self.allowed


class WithPast(nn.Module):
    """A Llama as a function of the new tokens and the past of the earlier ones."""

    def __init__(self, model: Llama):
        super().__init__()
        self.llama = model

    def forward(self, input_ids, attention_mask, past: list[torch.Tensor]):
        """input_ids (B, T) int64; attention_mask (B, P + T) int64, 0 for padding; past as in Past.

        -> logits (B, T, V) and the new past.
        """
        decoder, (T, S) = self.llama.model, (input_ids.size(1), attention_mask.size(1))
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, S - T:]  # (B, T)
        cos, sin = decoder.cos[positions].unsqueeze(1), decoder.sin[positions].unsqueeze(1)  # (B, 1, T, D/2)
        query = torch.arange(T, device=input_ids.device).unsqueeze(1) + (S - T)  # (T, 1), places among all S
        key = torch.arange(S, device=input_ids.device).unsqueeze(0)  # (1, S)
        # Every token sees itself, even padding. A softmax over nothing would be NaN, and NaN spreads.
        real = attention_mask.bool()[:, None, None, :]  # (B, 1, 1, S)
        allowed = (key <= query) & real | (key == query)  # (B, 1, T, S)
        cache = Past(past, allowed)
        x = decoder.embed_tokens(input_ids)  # (B, T, C)
        for layer in decoder.layers:
            x = layer(x, cos, sin, cache)
        return self.llama.lm_head(decoder.norm(x)), cache.present


def names(model: Llama, kind: str) -> list[str]:
    """The names of the past's tensors, in order: kind is "past_key_values" or "present"."""
    return [f"{kind}.{layer}.{part}" for layer in range(model.config.num_hidden_layers) for part in ("key", "value")]


def write_onnx(folder: Path, model: Llama) -> str:
    """Write model.onnx. If ONNX Runtime is installed, run the file and compare. Returns the result in words.

    Raises BadInput if a package is missing or the graph's logits differ.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401 (torch.onnx.export needs it; this says so in one line if it is missing)
        from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    except ImportError as error:
        raise BadInput(f"ONNX needs {error.name}: pip install {error.name}") from error
    folder.mkdir()
    c, path = model.config, folder / "model.onnx"
    past = [torch.randn(2, c.num_key_value_heads, 3, c.head_dim) for _ in names(model, "past_key_values")]
    batch, length = torch.export.Dim("batch_size"), torch.export.Dim("sequence_length")
    behind = torch.export.Dim("past_sequence_length", min=0)
    arguments = (torch.randint(c.vocab_size, (2, 4)), torch.ones(2, 7, dtype=torch.int64), past)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns about torchvision
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own parts warn about each other
        program = torch.onnx.export(
            WithPast(model).eval(), arguments, dynamo=True, verbose=False,
            input_names=["input_ids", "attention_mask", *names(model, "past_key_values")],
            output_names=["logits", *names(model, "present")],
            dynamic_shapes=({0: batch, 1: length}, {0: batch, 1: torch.export.Dim.AUTO},
                            [{0: batch, 2: behind}] * len(past)))
    # This axis is the sum of two others. torch finds that out by itself, but does not let us name it.
    program.model.graph.inputs[1].shape[1] = "past_sequence_length + sequence_length"
    ClearMetadataAndDocStringPass()(program.model)  # stack traces, with the paths of this machine's files
    program.save(path, external_data=False)
    onnx.checker.check_model(path)
    try:
        import onnxruntime
    except ImportError:
        return "ONNX checks it; pip install onnxruntime, and its logits are compared too"
    return check(onnxruntime, path, model)


@torch.no_grad()
def check(onnxruntime: ModuleType, path: Path, model: Llama) -> str:
    """Compare the graph's logits with the model's, in one pass and token by token. Returns the result in words.

    Raises BadInput if they differ.
    """
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    c, length = model.config, min(24, model.config.max_position_embeddings)
    input_ids = torch.randint(c.vocab_size, (3, length), generator=torch.Generator().manual_seed(0))
    wanted = model(input_ids)[0]
    whole, _ = run(session, model, input_ids, None)
    logits, past = run(session, model, input_ids[:, :length // 2], None)
    steps = [logits]
    for position in range(length // 2, length):
        logits, past = run(session, model, input_ids[:, position:position + 1], past)
        steps.append(logits)
    difference = max(float((logits - wanted).abs().max()) for logits in (whole, torch.cat(steps, dim=1)))
    if not difference <= TOLERANCE * max(1.0, float(wanted.abs().max())):
        raise BadInput(f"ONNX Runtime {onnxruntime.__version__} makes other logits: they differ by {difference:.2g}")
    return f"run with ONNX Runtime {onnxruntime.__version__}: logits differ by {difference:.1g} at most"


def run(session: Any, model: Llama, input_ids, past: list[torch.Tensor] | None, attention_mask=None):
    """One pass of the graph over input_ids (B, T) after a past, if any. Returns (logits, present)."""
    c = model.config
    if past is None:
        past = [torch.zeros(len(input_ids), c.num_key_value_heads, 0, c.head_dim)] * (2 * c.num_hidden_layers)
    if attention_mask is None:
        attention_mask = torch.ones(len(input_ids), past[0].size(2) + input_ids.size(1), dtype=torch.int64)
    feed = {"input_ids": input_ids, "attention_mask": attention_mask}
    feed |= dict(zip(names(model, "past_key_values"), past))
    logits, *present = map(torch.from_numpy, session.run(None, {name: t.numpy() for name, t in feed.items()}))
    return logits, present
