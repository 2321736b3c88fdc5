"""A checkpoint with INT8 weights, for sample.py: export.py --format int8"""

import copy
from pathlib import Path

import torch

import quant_t4
from formats.hf import weights, write_json, write_tensors, write_vocabulary
from model import Llama
from tokenizer import Tokenizer


def write_int8(folder: Path, model: Llama, state: dict, vocabulary: Tokenizer, dtype: torch.dtype) -> str:
    """Write a checkpoint with the INT8 weights and scales of the T4 recipe. Returns what it holds, in words.

    It rounds the linears that the model learnt to run in INT8, or all linears of the blocks if it learnt none. The rest
    (embedding, head, norms, FP32 blocks) is in `dtype`.
    """
    trained = tuple(state["config"].get("int8_linears", ()))
    linears = trained or ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    model = copy.deepcopy(model)
    quant_t4.apply_t4_recipe(model, linears)
    tensors = weights(model, dtype)
    for name, (integers, scale) in quant_t4.quantize_for_export(model).items():
        tensors |= {f"{name}.weight": integers.contiguous(), f"{name}.weight_scale": scale.contiguous()}
    write_tensors(folder, tensors)
    config = state["config"] | {"tokenizer": write_vocabulary(folder, vocabulary), "tokenizer_segmentation": "exact"}
    write_json(folder / "state.json", state | {"config": config, "rounded_to_int8": True})
    integers = [tensor for tensor in tensors.values() if tensor.dtype == torch.int8]
    return (f"{len(integers)} weights in INT8, {sum(t.numel() for t in integers) / model.num_parameters():.0%} of the "
            f"parameters" + ("" if trained else "; the model was not trained for it (--int8_linears)"))
