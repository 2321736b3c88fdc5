"""What a model says of a text, and what goes on inside: expectations, attention patterns and the logit lens."""

import math

import torch

from backend import expand_heads
from decoding.choice import filter_logits
from model import Llama, apply_rope
from web.shelf import Loaded


@torch.no_grad()
def expectations(loaded: Loaded, ids: list[int]) -> torch.Tensor:
    """Logits (T - 1, V) in FP32, over the ids that the vocabulary has: row i is what the model expected as ids[i + 1].

    One pass over the finished text gives what the model saw while it wrote the text, one token at a time.
    """
    logits, _ = loaded.model(torch.tensor([ids[:-1]], device=loaded.model.lm_head.weight.device))
    return logits[0, :, :loaded.vocabulary.vocab_size].float().cpu()


def entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """Bits of each distribution, (..., V) -> (...): how many yes-or-no questions it takes to learn the next token."""
    return -torch.special.xlogy(probabilities, probabilities).sum(-1) / math.log(2)


def kept(logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """Which tokens of logits (V,) sampling could have chosen: (V,) bool."""
    return filter_logits(logits, temperature, top_k, top_p).isfinite()


@torch.no_grad()
def look_inside(model: Llama, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention patterns (layers, H, T, T), and the logit lens (layers + 1, T, V).

    Row t of a pattern says how much token t takes from each token. The logit lens (nostalgebraist 2020) is what the
    head makes of the residual stream before the first block and after each. Attention kernels keep no pattern, so
    queries and keys are computed a second time here, beside the blocks' own.
    """
    decoder, T = model.model, len(ids)
    cos, sin = decoder.cos[:T], decoder.sin[:T]
    x = decoder.embed_tokens(torch.tensor([ids], device=model.lm_head.weight.device))  # (1, T, C)
    future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
    patterns, streams = [], [x]
    for block in decoder.layers:
        attention, h = block.self_attn, block.input_layernorm(x)
        q = apply_rope(attention.q_proj(h).view(1, T, -1, attention.head_dim).transpose(1, 2), cos, sin)  # (1, H, T, D)
        k = apply_rope(attention.k_proj(h).view(1, T, -1, attention.head_dim).transpose(1, 2), cos, sin)  # (1, K, T, D)
        scores = q @ expand_heads(k, q.size(1)).mT / math.sqrt(attention.head_dim)  # (1, H, T, T)
        patterns.append(scores.masked_fill(future, -torch.inf).softmax(-1)[0])
        x = block(x, cos, sin)
        streams.append(x)
    lens = model.lm_head(decoder.norm(torch.cat(streams)))  # (layers + 1, T, V)
    return torch.stack(patterns).float().cpu(), lens.float().cpu()
