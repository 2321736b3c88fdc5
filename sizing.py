"""The arithmetic of the model cards, for any config: python sizing.py [config/NAME.py] [--field=value ...]

It prints the parameters of each component, the memory at each precision, and the FLOPs of a training run.
"""

import torch

from cli import script
from config import load
from model import Llama, ModelConfig

BYTES = {"FP32": 4, "FP16 / BF16": 2, "INT8": 1, "INT4": 0.5}  # of one weight


def count_parameters(model: Llama) -> dict[str, int]:
    """Parameters of each component, as in the Stentor3 card's table. A tied head counts as 0."""
    count = dict.fromkeys(("embedding", "head", "attention", "mlp", "layer norms", "final norm"), 0)
    components = {"embed_tokens": "embedding", "lm_head": "head", "self_attn": "attention", "mlp": "mlp",
                  "input_layernorm": "layer norms", "post_attention_layernorm": "layer norms", "norm": "final norm"}
    for name, parameter in model.named_parameters():
        part = next(part for part in name.split(".") if part in components)
        count[components[part]] += parameter.numel()
    return count


def kv_cache_bytes(config: ModelConfig, length: int, bytes_per_element: float) -> float:
    """Bytes of the keys and values of one sequence: 2 x K x D x layers x length elements (Stentor3 card, "KV cache
    note").

    The table on the same card has half of what its formula gives.
    """
    elements = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers * length
    return elements * bytes_per_element


def memory_table(config: ModelConfig, parameters: int) -> dict[str, tuple[float, float]]:
    """Bytes of (weights, KV cache of a full context) at each precision, for one sequence.

    The scales of INT8 and INT4 weights are left out. Such weights are multiplied in 16 bits, so their cache has 16 bits
    too (Stentor3 card, Memory Requirements, where both have FP16's cache).
    """
    return {name: (parameters * size, kv_cache_bytes(config, config.max_position_embeddings, max(size, 2)))
            for name, size in BYTES.items()}


def main(argv: list[str]):
    """Print the parameters, memory and FLOPs of a config's model."""
    run = load(argv)
    config = run.model
    with torch.device("meta"):  # shapes without numbers
        model = Llama(config)
    count, total = count_parameters(model), model.num_parameters()
    tied, layers = config.tie_word_embeddings, config.num_hidden_layers
    embeddings = count["embedding"] + count["head"]
    rows = [("Embedding table" + (" (and head, tied)" if tied else ""), count["embedding"]),
            *([] if tied else [("LM head (untied)", count["head"])]),
            (f"Transformer layers x {layers}", count["attention"] + count["mlp"] + count["layer norms"]),
            ("  attention", count["attention"]), ("  MLP", count["mlp"]), ("  layer norms", count["layer norms"]),
            ("Final norm", count["final norm"]), ("Total", total)]
    print(f"{run.name}: {layers} layers of {config.hidden_size}, MLP of {config.intermediate_size}, "
          f"{config.num_attention_heads} heads and {config.num_key_value_heads} key/value heads of {config.head_dim}\n")
    print(f"{'Component':33} {'Parameters':>13} {'Share':>8}")
    for name, parameters in rows:
        print(f"{name:33} {parameters:13,} {parameters / total:8.{1 if parameters > total / 1000 else 3}%}")
    print(f"\nEmbedding and head are {embeddings / total:.1%} of the parameters.\n")
    print(f"{'Precision':13} {'Weights':>10} {'KV cache':>10} {'Both':>10}   "
          f"one sequence of {config.max_position_embeddings:,}")
    for name, (weights, cache) in memory_table(config, total).items():
        print(f"{name:13} {weights / 1e6:7.1f} MB {cache / 1e6:7.1f} MB {(weights + cache) / 1e6:7.1f} MB")
    per_token, length = model.flops_per_token(run.block_size), run.block_size
    tokens = run.max_steps * run.tokens_per_step
    print(f"\nTraining takes {per_token / 1e6:.1f} MFLOPs a token in sequences of {length:,}, "
          f"{per_token / 3e6:.1f} of them forward;")
    print(f"{run.max_steps:,} steps of {run.tokens_per_step:,} tokens are {tokens:,} tokens and "
          f"{tokens * per_token:.3g} FLOPs.")


if __name__ == "__main__":
    script(main)
