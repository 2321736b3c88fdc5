"""The model: Llama, written out by hand.

It goes from the smallest part to the largest: the norm, the rotary embedding, attention, the gated MLP, a block, then
the whole. Every parameter has the name that Hugging Face's LlamaForCausalLM gives it, so our checkpoints are theirs
too, and exporting is copying.

Shapes in the comments: B sequences, T tokens, C hidden_size, H query heads, K key/value heads, D head_dim.

Papers: Llama (Touvron et al. 2023), RMSNorm (Zhang & Sennrich 2019), RoPE (Su et al. 2021), SwiGLU (Shazeer
2020), grouped-query attention (Ainslie et al. 2023).
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class ModelConfig:
    """The shape of a model. The field names are LlamaConfig's; only the last three are ours."""

    vocab_size: int = 2048
    """Rows of the embedding: at least one for each id of the tokenizer."""
    hidden_size: int = 256
    """Width of the residual stream."""
    intermediate_size: int = 768
    """Width inside the MLP."""
    num_hidden_layers: int = 4
    """Number of blocks."""
    num_attention_heads: int = 8
    """Query heads."""
    num_key_value_heads: int = 2
    """Key and value heads; fewer than the query heads makes it grouped-query attention."""
    head_dim: int | None = None
    """Width of a head; hidden_size / num_attention_heads if None."""
    max_position_embeddings: int = 256
    """Context length in tokens."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square in RMSNorm. The cards do not give it: this is LlamaConfig's default."""
    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths."""
    tie_word_embeddings: bool = False
    """Use the embedding as the output head too."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    scale_residual_init: bool = True
    """Divide it by sqrt(2 x layers) for o_proj and down_proj, as Stentor3 does (Stentor2 does not)."""
    fp32_norms: bool = True
    """Compute every RMSNorm in FP32, whatever autocast says (Stentor3 card, Precision Stability Recipe)."""
    fp32_blocks: tuple[int, ...] = (0, -1)
    """Blocks that run in FP32 from end to end; negative numbers count from the last (same recipe)."""

    def __post_init__(self):
        """Fill in head_dim. Raises ValueError, in one line, for a shape that no Llama can have."""
        limits = {"vocab_size": 2**22, "hidden_size": 2**17, "intermediate_size": 2**20, "num_hidden_layers": 1000,
                  "num_attention_heads": 2**13, "num_key_value_heads": 2**13, "max_position_embeddings": 2**22}
        for name, most in limits.items():
            if type(getattr(self, name)) is not int or not 1 <= getattr(self, name) <= most:
                raise ValueError(f"model.{name} is {getattr(self, name)!r:.25}; it must be at least 1, at most {most}")
        for name, least in (("rms_norm_eps", 0), ("rope_theta", 1e-9), ("initializer_range", 0)):
            if not least <= getattr(self, name) <= 1e30:
                raise ValueError(f"model.{name} is {getattr(self, name)!r:.25}; it must be a number, at least {least}")
            setattr(self, name, float(getattr(self, name)))  # JSON may hold a whole number, too long for torch
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(f"model.hidden_size {self.hidden_size} does not divide into "
                                 f"{self.num_attention_heads} heads; set model.head_dim")
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"model.num_attention_heads {self.num_attention_heads} is not a multiple of "
                             f"model.num_key_value_heads {self.num_key_value_heads}")
        if type(self.head_dim) is not int or not 2 <= self.head_dim <= 2**12 or self.head_dim % 2:
            raise ValueError(f"model.head_dim is {self.head_dim!r:.25}; RoPE turns pairs: it is even, at most 4096")
        self.fp32_blocks = tuple(self.fp32_blocks)  # a list if the shape comes from JSON
        for block in self.fp32_blocks:
            if not -self.num_hidden_layers <= block < self.num_hidden_layers:
                raise ValueError(f"model.fp32_blocks names block {block}, and there are {self.num_hidden_layers}")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter, by name. No model is made for that: it might not fit."""
        V, C, inner = self.vocab_size, self.hidden_size, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        block = {"input_layernorm": (C,), "self_attn.q_proj": (q, C), "self_attn.k_proj": (kv, C),
                 "self_attn.v_proj": (kv, C), "self_attn.o_proj": (C, q), "post_attention_layernorm": (C,),
                 "mlp.gate_proj": (inner, C), "mlp.up_proj": (inner, C), "mlp.down_proj": (C, inner)}
        layers = {f"model.layers.{i}.{name}": block[name] for i in range(self.num_hidden_layers) for name in block}
        rest = {"model.embed_tokens": (V, C), "model.norm": (C,)} | ({} if self.tie_word_embeddings else
                                                                    {"lm_head": (V, C)})
        return {f"{name}.weight": shape for name, shape in (rest | layers).items()}


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float, fp32: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.fp32 = eps, fp32

    def forward(self, x):
        # In bf16 a mean of squares would keep only eight bits. The card runs all norms in FP32.
        h = x.float() if self.fp32 else x
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return (h * self.weight).to(x.dtype)


def rope_table(length: int, head_dim: int, theta: float):
    """Cosines and sines of the rotary embedding, two (length, head_dim / 2) FP32 tensors.

    Pair j of a head turns by position / theta^(2j / head_dim) radians (Su et al. 2021, eq. 15).
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)  # (D/2)
    angles = torch.outer(torch.arange(length).float(), frequencies)  # (length, D/2)
    return angles.cos(), angles.sin()


def apply_rope(x, cos, sin):
    """Rotate x (B, H, T, D) by its positions; cos and sin are (T, D/2).

    The two members of a pair stand half a head apart, as in HF's weights, so exports and imports permute nothing. The
    products are FP32, like the tables: bf16's eight bits do not tell position 4,000 from its neighbours.
    """
    a, b = x.chunk(2, dim=-1)  # each (B, H, T, D/2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)  # (B, H, T, D)


def causal_attention(q, k, v, mask=None):
    """Softmax attention of the last T of S positions: q (B, H, T, D), k and v (B, K, S, D) -> (B, H, T, D).

    Query head h reads key/value head h // (H / K). If there is a mask (T, S) bool, it alone says who sees whom. PyTorch
    picks the kernel; if a device needs another, `Llama.run_with` sets it (backend.py).
    """
    T, S = q.size(2), k.size(2)
    if mask is None and 1 < T < S:  # several queries after a prefix: query i sees keys up to S - T + i
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T == S,
                                          enable_gqa=q.size(1) != k.size(1))


class KVCache:
    """Keys and values of the tokens seen so far, in buffers of `max_length` positions, made at first use.

    Each layer's buffer takes the dtype of its first keys, so FP32 blocks keep FP32 keys under autocast.
    """

    def __init__(self, max_length: int):
        self.max_length, self.length = max_length, 0  # positions filled in every layer; lower it to forget the newest
        self.keys, self.values = {}, {}  # layer -> (B, K, max_length, D)

    def advance(self, count: int):
        """Prepare for the next `count` tokens: they go to `positions`, a slice."""
        start, self.length = self.length, self.length + count
        self.positions = slice(start, self.length)

    def extend(self, layer: int, k, v):
        """Store k and v (B, K, T, D). Returns all keys and values so far, (B, K, S, D) each, and no mask."""
        if layer not in self.keys:
            B, K, _, D = k.shape
            self.keys[layer] = k.new_zeros(B, K, self.max_length, D)
            self.values[layer] = v.new_zeros(B, K, self.max_length, D)
        self.keys[layer][:, :, self.positions] = k
        self.values[layer][:, :, self.positions] = v
        return self.keys[layer][:, :, :self.length], self.values[layer][:, :, :self.length], None

    def repeat(self, count: int):
        """Copy what is kept `count` times, for sequences that begin alike and go on differently."""
        if count == 1:
            return
        self.keys = {layer: k.repeat(count, 1, 1, 1) for layer, k in self.keys.items()}  # (count * B, K, S, D)
        self.values = {layer: v.repeat(count, 1, 1, 1) for layer, v in self.values.items()}


class Attention(nn.Module):
    """Grouped-query attention: H query heads share K key/value heads, so the cache is only K / H as large."""

    attend = staticmethod(causal_attention)  # unless `Llama.run_with` sets another

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        C, H, K, D = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(C, H * D, bias=False)
        self.k_proj = nn.Linear(C, K * D, bias=False)
        self.v_proj = nn.Linear(C, K * D, bias=False)
        self.o_proj = nn.Linear(H * D, C, bias=False)

    def forward(self, x, cos, sin, cache: KVCache | None = None):
        # Three projections of every token: what it looks for, what it can be found by, and what it passes on.
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        # Turn queries and keys by their positions, so that their products depend on how far apart they are.
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        mask = None
        if cache is not None:  # when generating, the keys and values of earlier tokens are still there
            k, v, mask = cache.extend(self.layer, k, v)  # (B, K, S, D) each, S = tokens so far
        # Each token takes a weighted mean of the values before it; then the heads, side by side, are mixed.
        y = self.attend(q, k, v, mask)  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, H * D) -> (B, T, C)


class MLP(nn.Module):
    """SwiGLU: one projection, gated by the SiLU of another (Shazeer 2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Norm, attention, add; norm, MLP, add."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.fp32 = layer in (block % config.num_hidden_layers for block in config.fp32_blocks)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.fp32_norms)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.fp32_norms)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, cache: KVCache | None = None):
        # An FP32 block needs FP32 inputs and autocast off. Otherwise autocast would cast the products down again.
        island = torch.autocast(x.device.type, enabled=False) if self.fp32 else nullcontext()
        with island:
            x = x.float() if self.fp32 else x
            x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)  # tokens talk to each other
            x = x + self.mlp(self.post_attention_layernorm(x))  # each token thinks for itself
        return x


class Decoder(nn.Module):
    """Embedding, blocks, final norm. It is a module only so that names begin with `model.`, as HF's do."""

    recompute = None  # if set (`Llama.run_with`), it runs a block now and again in the backward pass

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.fp32_norms)
        cos, sin = rope_table(config.max_position_embeddings, config.head_dim, config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)  # (max_position_embeddings, D/2)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, input_ids, cache: KVCache | None = None):
        """Hidden states (B, T, C) of input_ids (B, T). If there is a cache, call its `advance` first."""
        positions = slice(input_ids.size(1)) if cache is None else cache.positions
        cos, sin = self.cos[positions], self.sin[positions]  # (T, D/2) each
        x = self.embed_tokens(input_ids)  # (B, T, C), the residual stream, to which every block adds
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():
                x = self.recompute(layer, x, cos, sin)
            else:
                x = layer(x, cos, sin, cache)
        return self.norm(x)


class Llama(nn.Module):
    """The language model: decoder and output head, with FP32 parameters, initialised as the Stentor cards say.

    The weights come from torch's global generator; seed it first to get the same model twice.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        self.init_weights()

    def tie_weights(self):
        """Give a tied head the embedding's weight: one parameter, two names. (A narrowed head has its own.)"""
        if self.config.tie_word_embeddings and isinstance(self.lm_head, nn.Linear):
            self.lm_head.weight = self.model.embed_tokens.weight

    def _apply(self, function: Callable, recurse: bool = True) -> "Llama":
        """What `.to()` and the like call. On XLA it makes new parameters, so the head must be tied again."""
        super()._apply(function, recurse)
        self.tie_weights()
        return self

    @torch.no_grad()
    def init_weights(self):
        """Linear and embedding weights normal(0, initializer_range), norms 1.

        With scale_residual_init the two projections that write into the residual stream, o_proj and down_proj,
        get initializer_range / sqrt(2 x layers), so that the sum of all blocks starts no larger than one (GPT-2;
        Stentor3 card, Weight Initialization). The Stentor2 card speaks of a "truncated" normal, but the code on it
        draws from a plain one. I follow the code.
        """
        std = self.config.initializer_range
        residual_std = std / math.sqrt(2 * self.config.num_hidden_layers)
        for name, module in self.named_modules():
            if isinstance(module, RMSNorm):
                module.weight.fill_(1.0)
            elif isinstance(module, (nn.Linear, nn.Embedding)):
                residual = self.config.scale_residual_init and name.endswith(("o_proj", "down_proj"))
                module.weight.normal_(0.0, residual_std if residual else std)

    def forward(self, input_ids, targets=None, cache: KVCache | None = None, logits_to_keep: int = 0):
        """Next-token logits, and the loss if there are targets.

        input_ids (B, T) int64; targets (B, T) int64, where -100 means "do not count". With a KVCache the tokens
        follow those already in it. Returns (logits (B, T, vocab_size), loss): the loss is the mean cross-entropy in
        nats per counted token, a 0-D FP32 tensor, or None. logits_to_keep is how many logits to compute, counted from
        the last; 0 means all, as in transformers. A prompt needs only its last logits, and the head is a tenth of a
        tiny model's work.
        """
        if cache is not None:
            cache.advance(input_ids.size(1))
        x = self.model(input_ids, cache)  # (B, T, C)
        logits = self.lm_head(x[:, -logits_to_keep:])  # (B, T, V); -0 is 0, the first
        if targets is None:
            return logits, None
        # A log-softmax over thousands of entries needs FP32, whatever precision the logits come in.
        loss = F.cross_entropy(logits.float().view(-1, logits.size(-1)), targets.reshape(-1))  # (B*T, V), (B*T)
        return logits, loss

    def new_cache(self, length: int) -> KVCache:
        """An empty KVCache for texts of `length` tokens."""
        return KVCache(length)

    def run_with(self, attention: Callable, recompute: Callable | None = None):
        """Use `attention` in place of causal_attention: (q, k, v, mask) -> y, same shapes. And train with
        `recompute(block, x, cos, sin)`, if given: it runs a block, keeps only its input, and runs it again in the
        backward pass (Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost)."""
        self.model.recompute = recompute
        for block in self.model.layers:
            block.self_attn.attend = attention

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """AdamW's two groups: Linear weights decay; embeddings, norms and biases do not (Stentor3 card, AdamW).

        A tied head is the embedding, so it does not decay. Raises AssertionError unless every parameter is in
        exactly one group.
        """
        embedding = self.model.embed_tokens.weight
        decay = {name: module.weight for name, module in self.named_modules()
                 if isinstance(module, nn.Linear) and module.weight is not embedding}
        decaying = {id(p) for p in decay.values()}
        rest = [p for p in self.parameters() if id(p) not in decaying]
        assert len(decay) + len(rest) == len(list(self.parameters())), "a parameter is in no group, or in two"
        return [{"params": list(decay.values()), "weight_decay": weight_decay},
                {"params": rest, "weight_decay": 0.0}]

    def num_parameters(self) -> int:
        """The number of parameters. A tied head counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, length: int) -> int:
        """FLOPs to train on one token (forward and backward) in sequences of `length` tokens.

        6 for every parameter in a matrix product, and 12 x layers x H x D x length for the two products in attention
        (PaLM, Chowdhery et al. 2022, appendix B, which counts the masked half too).
        """
        c = self.config
        products = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 6 * products + 12 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * length
