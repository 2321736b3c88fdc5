"""How a token is made on a CPU: the whole of a model's step in plain loops.

model.py says what a Llama computes, in a few products of large matrices. When it writes there is only one token to
compute at a time, and each matrix meets a single vector. So a step is nothing but sums: one for each row of each
weight. Here they are, from the embedding's row to the logits (`step`). numba makes machine code of them. It is as fast
as the weights come from memory, which no library of matrix products is for one vector.

products.py has these sums for each type of weights: FP32, BF16, INT8 and INT4. This file has what is around them, and
then the whole step.

Shapes in the comments: R rows, which are new tokens, of one text or several; the others are model.py's.
"""

import math
from typing import NamedTuple

import numba
import numpy as np
import torch
from numba import prange

from decoding.loops import Threads, exp, loop
from decoding.products import Weight, dot, f32, linear, stacked, wide, widen
from model import KVCache, Llama, ModelConfig

FEW = 32  # tokens or fewer are read in loops; for more, matrix products are faster (NOTES.md)
NO_SCALE = np.ones(1, np.float32)


# ---------------------------------------------------------------------------------------------------------------
# A block


@loop
def embed(embedding, ids, C):
    """The rows (R, C) of the embedding's ids (R)."""
    x, room = np.empty((len(ids), C), f32), np.empty(C, f32)
    for r in range(len(ids)):
        weight = embedding.values[0, ids[r]]
        widen(weight, embedding.scales[0, ids[r]], room)
        row = wide(weight, room)
        for j in range(C):
            x[r, j] = row[j]
    return x


@loop
def rms_norm(x, weight, eps):
    """x (R, C) / sqrt(mean(x^2) + eps) * weight (C), as model.RMSNorm."""
    y = np.empty_like(x)
    for r in range(x.shape[0]):
        squares = f32(0)
        for j in range(x.shape[1]):
            squares += x[r, j] * x[r, j]
        scale = f32(1) / math.sqrt(squares / f32(x.shape[1]) + f32(eps))
        for j in range(x.shape[1]):
            y[r, j] = x[r, j] * scale * weight[j]
    return y


@loop
def add(x, y):
    """x (R, C) += y (R, C)"""
    for r in range(x.shape[0]):
        for j in range(x.shape[1]):
            x[r, j] += y[r, j]


@loop
def turn(heads, count, cos, sin, positions):
    """RoPE, as model.apply_rope: turn the first `count` of heads (R, N, D) by their positions (R). cos and sin are
    (context, D/2)."""
    half = cos.shape[1]
    for r in range(heads.shape[0]):
        p = positions[r]
        for n in range(count):
            for j in range(half):
                a, b = heads[r, n, j], heads[r, n, half + j]
                heads[r, n, j] = a * cos[p, j] - b * sin[p, j]
                heads[r, n, half + j] = b * cos[p, j] + a * sin[p, j]


@loop
def remember(heads, first, cache, texts, positions):
    """Write K of heads (R, N, D), from the `first` on, into a cache (B, K, S, D), at their texts and positions (R)."""
    for r in range(heads.shape[0]):
        for k in range(cache.shape[1]):
            for j in range(heads.shape[2]):
                cache[texts[r], k, positions[r], j] = heads[r, first + k, j]


@loop(parallel=True)
def attend(heads, H, keys, values, texts, positions):
    """Causal attention of the queries, the first H of heads (R, N, D), to keys and values (B, K, S, D) of their texts
    (R), up to their positions (R).

    Returns (R, H * D). Query head h reads key/value head h // (H / K).
    """
    R, _, D = heads.shape
    y, scale = np.empty((R, H * D), f32), f32(1 / math.sqrt(D))
    for job in prange(R * H):
        r, h = job // H, job % H
        k, v = keys[texts[r], h // (H // keys.shape[1])], values[texts[r], h // (H // keys.shape[1])]  # (S, D) each
        scores, largest, total = np.empty(positions[r] + 1, f32), f32(-np.inf), f32(0)
        for s in range(len(scores)):
            scores[s] = dot(k[s], NO_SCALE, heads[r, h]) * scale
            largest = max(largest, scores[s])
        for s in range(len(scores)):
            scores[s] = exp(scores[s] - largest)
            total += scores[s]
        mean = np.zeros(D, f32)
        for s in range(len(scores)):
            for j in range(D):
                mean[j] += scores[s] * v[s, j]
        for j in range(D):
            y[r, h * D + j] = mean[j] / total
    return y


@loop
def swiglu(gate_up):
    """silu(gate) * up (R, F) of gate and up, side by side (R, 2 F)."""
    R, F = len(gate_up), gate_up.shape[1] // 2
    y = np.empty((R, F), f32)
    for r in range(R):
        for i in range(F):
            y[r, i] = gate_up[r, i] / (f32(1) + exp(-gate_up[r, i])) * gate_up[r, F + i]
    return y


class Weights(NamedTuple):
    """All weights of a model. Norms are (layers, C) FP32, the tables of RoPE (context, D/2)."""

    embedding: Weight
    attention_norm: np.ndarray
    qkv: Weight
    o: Weight
    mlp_norm: np.ndarray
    gate_up: Weight
    down: Weight
    norm: np.ndarray
    head: Weight
    cos: np.ndarray
    sin: np.ndarray
    eps: float


@loop
def step(weights, ids, texts, positions, wanted, keys, values):
    """The logits (wanted, V) FP32 that follow the last `wanted` of R new tokens.

    ids, texts and positions (R) int64: which token, of which text, at which place. keys and values (layers, B, K, S, D)
    FP32 hold what is known of the tokens before them, and get what is learnt of these.
    """
    R, K, D = len(ids), keys.shape[2], keys.shape[4]
    x = embed(weights.embedding, ids, weights.norm.shape[1])  # (R, C), the residual stream, to which every block adds
    for layer in range(len(keys)):
        h = rms_norm(x, weights.attention_norm[layer], weights.eps)
        heads = linear(weights.qkv, layer, h).reshape(R, -1, D)  # (R, (H + 2K) * D) -> (R, H + 2K, D)
        H = heads.shape[1] - 2 * K
        turn(heads, H + K, weights.cos, weights.sin, positions)  # queries and keys
        remember(heads, H, keys[layer], texts, positions)
        remember(heads, H + K, values[layer], texts, positions)
        y = attend(heads, H, keys[layer], values[layer], texts, positions)
        add(x, linear(weights.o, layer, y))  # tokens talk to each other
        h = rms_norm(x, weights.mlp_norm[layer], weights.eps)
        add(x, linear(weights.down, layer, swiglu(linear(weights.gate_up, layer, h))))  # each thinks for itself
    return linear(weights.head, np.int64(0), rms_norm(x[R - wanted:], weights.norm[0], weights.eps))


# ---------------------------------------------------------------------------------------------------------------
# From torch, and beside it


def norms(modules: list[torch.nn.Module]) -> np.ndarray:
    """Their weights, (len(modules), C) FP32."""
    return torch.stack([module.weight.detach() for module in modules]).numpy()


def weights_of(model: Llama) -> Weights:
    """The weights of a narrow model as the loops want them."""
    blocks, embedding, head = model.model.layers, model.model.embed_tokens, model.lm_head
    tied = embedding.weight is head.weight
    packed_head = stacked([[head]])
    return Weights(
        embedding=packed_head if tied else stacked([[embedding]]),
        attention_norm=norms([block.input_layernorm for block in blocks]),
        qkv=stacked([[block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj] for block in blocks]),
        o=stacked([[block.self_attn.o_proj] for block in blocks]),
        mlp_norm=norms([block.post_attention_layernorm for block in blocks]),
        gate_up=stacked([[block.mlp.gate_proj, block.mlp.up_proj] for block in blocks]),
        down=stacked([[block.mlp.down_proj] for block in blocks]),
        norm=norms([model.model.norm]), head=packed_head,
        cos=model.model.cos.numpy(), sin=model.model.sin.numpy(), eps=model.config.rms_norm_eps)


class StackedCache(KVCache):
    """A KVCache whose layers lie in two arrays, as the loops want them."""

    def __init__(self, config: ModelConfig, max_length: int):
        super().__init__(max_length)
        self.config = config

    def begin(self, texts: int):
        """Make the arrays for so many texts. Their layers are the buffers of KVCache."""
        c = self.config
        shape = c.num_hidden_layers, texts, c.num_key_value_heads, self.max_length, c.head_dim  # (layers, B, K, S, D)
        self.all_keys, self.all_values = np.zeros(shape, f32), np.zeros(shape, f32)
        self.keys = dict(enumerate(torch.from_numpy(self.all_keys)))
        self.values = dict(enumerate(torch.from_numpy(self.all_values)))

    def repeat(self, count: int):
        """As KVCache.repeat, but of the filled part alone."""
        if count > 1:
            keys, values = (whole[:, :, :, :self.length] for whole in (self.all_keys, self.all_values))
            self.begin(count * keys.shape[1])
            self.all_keys[:, :, :, :self.length] = np.tile(keys, (1, count, 1, 1, 1))
            self.all_values[:, :, :, :self.length] = np.tile(values, (1, count, 1, 1, 1))


class Engine:
    """A narrow model on a CPU, with the face of Llama for decoding: it reads a few tokens in loops, more with torch."""

    def __init__(self, model: Llama, threads: int | None = None):
        """`threads`: at most so many; None: as many as there are cores."""
        self.model, self.config, self.lm_head = model, model.config, model.lm_head
        cores = numba.config.NUMBA_NUM_THREADS  # those that this process may use
        self.weights, self.threads = weights_of(model), Threads(min(threads or cores, cores))

    def new_cache(self, length: int) -> StackedCache:
        """An empty cache for texts of `length` tokens."""
        return StackedCache(self.config, length)

    def __call__(self, input_ids, cache: StackedCache, logits_to_keep: int = 0):
        """As Llama.forward with a cache: input_ids (B, T) -> (logits (B, T or logits_to_keep, V), None)."""
        B, T = input_ids.shape
        if not cache.keys:
            cache.begin(B)
        if B * T > FEW:
            return self.read(input_ids, cache, logits_to_keep)
        start, ids = cache.length, input_ids.t().reshape(-1).numpy()  # (B, T) -> (T * B): all texts at one place first
        if start + T > cache.max_length or not 0 <= ids.min() <= ids.max() < self.config.vocab_size:
            raise IndexError(f"an id beyond {self.config.vocab_size:,} or a place beyond {cache.max_length:,}, where "
                             f"loops would read what is not theirs")
        cache.advance(T)
        texts, positions = np.tile(np.arange(B), T), np.repeat(np.arange(start, start + T), B)  # (T * B) each
        wanted = logits_to_keep or T
        logits = self.threads.run(step, self.weights, ids, texts, positions, wanted * B, cache.all_keys,
                                  cache.all_values)
        return torch.from_numpy(logits).view(wanted, B, -1).transpose(0, 1), None  # (wanted * B, V) -> (B, wanted, V)

    def read(self, input_ids, cache: StackedCache, logits_to_keep: int):
        """As __call__, for many tokens: with torch, on no more threads than a step has."""
        usual = torch.get_num_threads()
        torch.set_num_threads(min(usual, self.threads.count))
        try:
            return self.model(input_ids, cache=cache, logits_to_keep=logits_to_keep)
        finally:
            torch.set_num_threads(usual)
