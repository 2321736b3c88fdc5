"""Checkpoints with INT8 or INT4 weights, for sample.py: export.py --format int8 | int4 | bundle

A bundle is a single file, a whole deployment: the weights, what state.json says, and the vocabulary.
"""

import copy
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save as to_bytes

import quant_t4
from checkpoint import VOCABULARY
from decoding.narrow import narrow
from formats.hf import vocabulary_file, weights, write_json, write_tensors, write_vocabulary
from model import Llama
from tokenizer import Tokenizer

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def int8_tensors(model: Llama, linears: tuple[str, ...], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of a model with the named linears in INT8, as the T4 recipe rounds them, and the rest (embedding,
    head, norms, FP32 blocks) in `dtype`. A weight's scale is NAME.weight_scale."""
    model = copy.deepcopy(model)
    quant_t4.apply_t4_recipe(model, linears)
    tensors = weights(model, dtype)
    for name, (integers, scale) in quant_t4.quantize_for_export(model).items():
        tensors |= {f"{name}.weight": integers, f"{name}.weight_scale": scale}
    return tensors


def narrow_tensors(model: Llama, kind: str) -> dict[str, torch.Tensor]:
    """The tensors of a model as decoding/narrow.py has them in memory; only INT4's scales are FP16, which they fit."""
    tensors = {}
    for name, p in narrow(copy.deepcopy(model), kind).named_parameters():  # a tied head has no name of its own
        grouped = name.endswith(".scale") and p.size(1) > 1
        tensors[name.replace(".scale", ".weight_scale")] = p.detach().half() if grouped else p.detach()
    return tensors


def write_packed(folder: Path, model: Llama, state: dict, vocabulary: Tokenizer, kind: str, dtype: torch.dtype) -> str:
    """Write a checkpoint in INT8 or INT4. Returns what it holds, in words.

    INT8 rounds the linears that the model learnt to run in INT8, or all linears of the blocks if it learnt none; the
    rest has `dtype`. INT4 rounds all, embedding and head to INT8.
    """
    trained = tuple(state["config"].get("int8_linears", ()))
    tensors = int8_tensors(model, trained or LINEARS, dtype) if kind == "int8" else narrow_tensors(model, kind)
    write_tensors(folder, tensors)
    write_json(folder / "state.json", rounded(state, write_vocabulary(folder, vocabulary), kind))
    remark = "" if kind == "int4" or trained else "; the model was not trained for it (--int8_linears)"
    integers = [tensor for tensor in tensors.values() if tensor.dtype in (torch.int8, torch.uint8)]
    return f"{len(integers)} weights in {kind.upper()}, {bits(tensors, model):.2f} bits a parameter in all{remark}"


def write_bundle(folder: Path, model: Llama, state: dict, vocabulary: Tokenizer, kind: str) -> str:
    """Write NAME.safetensors, with everything that sample.py needs, its weights in INT8 or INT4. Returns the result in
    words."""
    tensors = narrow_tensors(model, kind)
    whole = tensors | {VOCABULARY: torch.from_numpy(np.frombuffer(vocabulary.data, np.uint8).copy())}
    notes = {"format": "pt", "state": json.dumps(rounded(state, vocabulary_file(vocabulary), kind))}
    name = f"{state['config'].get('name', 'model')}.safetensors"
    (folder / name).write_bytes(to_bytes({name: tensor.contiguous() for name, tensor in whole.items()}, notes))
    return f"{name}, weights in {kind.upper()}, {bits(tensors, model):.2f} bits a parameter"


def rounded(state: dict, vocabulary: str, kind: str) -> dict:
    """What was saved beside the weights, for rounded ones and the vocabulary's file beside them."""
    config = state["config"] | {"tokenizer": vocabulary, "tokenizer_segmentation": "exact"}
    return state | {"config": config, "rounded_to": kind}


def bits(tensors: dict[str, torch.Tensor], model: Llama) -> float:
    """Bits that the tensors take for each parameter of the model."""
    return 8 * sum(tensor.nbytes for tensor in tensors.values()) / model.num_parameters()
