"""The model: Llama, written out by hand.

Read it from the bottom of the stack upwards: the norm, the rotary embedding, attention, the gated MLP,
a block, then the whole. Every name is the one Hugging Face's LlamaForCausalLM gives the same parameter, so a
checkpoint of ours is a checkpoint of theirs, and exporting is copying.

Shapes in the comments: B sequences, T tokens, C hidden_size, H query heads, K key/value heads, D head_dim.

Papers: Llama (Touvron et al. 2023), RMSNorm (Zhang & Sennrich 2019), RoPE (Su et al. 2021), SwiGLU (Shazeer
2020), grouped-query attention (Ainslie et al. 2023).
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class ModelConfig:
    """The shape of a model. Field names are LlamaConfig's, but for the last three, which are ours."""

    vocab_size: int = 2048
    """Rows of the embedding: at least the ids that the tokenizer can give."""
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
    """Added to the mean square in RMSNorm. The cards give none: this is LlamaConfig's default."""
    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths."""
    tie_word_embeddings: bool = False
    """Use the embedding as the output head too."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    scale_residual_init: bool = True
    """Divide that of o_proj and down_proj by sqrt(2 x layers), as Stentor3 does (Stentor2 does not)."""
    fp32_norms: bool = True
    """Compute every RMSNorm in FP32, whatever autocast says (Stentor3 card, Precision Stability Recipe)."""
    fp32_blocks: tuple[int, ...] = (0, -1)
    """Blocks that run in FP32 from end to end; negative numbers count from the last (same recipe)."""

    def __post_init__(self):
        """Fill in head_dim.

        Raises ValueError, in one line, for a shape that no Llama has.
        """
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                     "num_attention_heads", "num_key_value_heads", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(f"model.hidden_size {self.hidden_size} does not divide into "
                                 f"{self.num_attention_heads} heads; set model.head_dim")
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"model.num_attention_heads {self.num_attention_heads} is not a multiple of "
                             f"model.num_key_value_heads {self.num_key_value_heads}")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"model.head_dim is {self.head_dim}; RoPE rotates pairs, so it must be even")
        self.fp32_blocks = tuple(self.fp32_blocks)  # a list where the shape was read from JSON
        for block in self.fp32_blocks:
            if not -self.num_hidden_layers <= block < self.num_hidden_layers:
                raise ValueError(f"model.fp32_blocks names block {block}, and there are {self.num_hidden_layers}")


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float, fp32: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.fp32 = eps, fp32

    def forward(self, x):
        # A mean of squares in bf16 keeps eight bits of them; the card runs all norms in FP32.
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

    The two members of a pair stand half a head apart, as HF stores them, so that neither an export nor an import
    permutes anything. The products are FP32, as the tables are: bf16 has eight significant bits, too few to tell
    position 4,000 from its neighbours.
    """
    a, b = x.chunk(2, dim=-1)  # each (B, H, T, D/2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)  # (B, H, T, D)


def expand_heads(x, heads: int):
    """Repeat key or value heads for the query heads that share them: (B, K, S, D) -> (B, heads, S, D)."""
    return x.repeat_interleave(heads // x.size(1), dim=1)


def takes_grouped_heads(capability: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether a GPU of this compute capability has a fast attention kernel for fewer key and value heads than query
    heads: flash attention is one, from 8.0 on and in 16 bits. For what it cannot do (a T4, an FP32 block) there is
    the memory-efficient kernel, which wants equal heads; given others PyTorch writes out all scores."""
    return capability >= (8, 0) and dtype != torch.float32


def wants_equal_heads(q) -> bool:
    """Whether keys and values are to be repeated for these queries. Other devices than GPUs take them as they are."""
    return q.is_cuda and not takes_grouped_heads(torch.cuda.get_device_capability(q.device), q.dtype)


SHORT = 512  # positions up to which a CPU's backward pass takes longer in BF16 than in FP32: at 128, 2.5 times as long


def causal_attention(q, k, v, mask=None):
    """Softmax attention of the last T of S positions: q (B, H, T, D), k and v (B, K, S, D) -> (B, H, T, D).

    The one place that decides which of PyTorch's kernels it will be. Query head h reads key/value head h // (H / K).
    With a mask, (T, S) bool, it alone says who sees whom.
    """
    T, S = q.size(2), k.size(2)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and S <= SHORT and torch.is_grad_enabled():
        with torch.autocast("cpu", enabled=False):
            return causal_attention(q.float(), k.float(), v.float(), mask).to(q.dtype)
    if wants_equal_heads(q):
        k, v = expand_heads(k, q.size(1)), expand_heads(v, q.size(1))
    if mask is None and 1 < T < S:  # several queries after a prefix: query i sees keys up to S - T + i
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T == S,
                                          enable_gqa=q.size(1) != k.size(1))


def chunked_attention(q, k, v, length: int = 512):
    """causal_attention of whole sequences, `length` queries at a time, each over the keys up to its last.

    For devices whose only kernel writes out all scores: those above the diagonal are computed within a chunk alone, and
    where blocks are recomputed (`Llama.run_with`) no more than (length, T) of a head are there at once.
    """
    ends = [min(start + length, q.size(2)) for start in range(0, q.size(2), length)]
    return torch.cat([causal_attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end])
                      for start, end in zip([0, *ends], ends)], dim=2)  # (B, H, T, D)


class KVCache:
    """Keys and values of the tokens seen so far, in buffers of `max_length` positions, made at first use.

    Each layer's buffer takes the dtype of what is first put in, so FP32 blocks keep FP32 keys under autocast. What is
    read is the filled part alone, rounded up to a multiple of `grain`: with a coarse one a compiled model meets few
    different lengths, and what is not filled yet is masked.
    """

    def __init__(self, max_length: int, device=None, grain: int = 1):
        self.max_length, self.grain = max_length, grain
        self.length = 0  # positions filled in every layer; lower it to forget the newest tokens
        self.steps = torch.arange(math.ceil(max_length / grain) * grain, device=device)
        self.keys, self.values = {}, {}

    def advance(self, count: int):
        """Take in the next `count` tokens: `positions` (T,) are theirs, `read` (S,) those that will be read."""
        start, self.length = self.length, self.length + count
        self.positions = self.steps[start:self.length]
        self.read = self.steps[:math.ceil(self.length / self.grain) * self.grain]

    def extend(self, layer: int, k, v):
        """Store k and v (B, K, T, D) at `positions`; return what is read, (B, K, S, D) each."""
        if layer not in self.keys:
            B, K, _, D = k.shape
            self.keys[layer] = k.new_zeros(B, K, len(self.steps), D)
            self.values[layer] = v.new_zeros(B, K, len(self.steps), D)
        S = self.read.size(0)
        self.keys[layer].index_copy_(2, self.positions, k)
        self.values[layer].index_copy_(2, self.positions, v)
        return self.keys[layer][:, :, :S], self.values[layer][:, :, :S]

    def attend(self, q, k, v):
        """Attention of the new tokens over what extend has returned: q (B, H, T, D) -> (B, H, T, D)."""
        # (T, S); with a grain of 1 all that is read is filled, and T and S alone say who sees whom
        mask = self.read <= self.positions[:, None] if self.grain > 1 else None
        return causal_attention(q, k, v, mask)

    def repeat(self, count: int):
        """Go on as `count` sequences that begin alike: what was one is copied."""
        if count == 1:
            return
        self.keys = {layer: k.repeat(count, 1, 1, 1) for layer, k in self.keys.items()}  # (count * B, K, S, D)
        self.values = {layer: v.repeat(count, 1, 1, 1) for layer, v in self.values.items()}


class Attention(nn.Module):
    """Grouped-query attention: H query heads share K key/value heads, so the cache is K / H as large."""

    attend = staticmethod(causal_attention)  # of whole sequences

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        C, H, K, D = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(C, H * D, bias=False)
        self.k_proj = nn.Linear(C, K * D, bias=False)
        self.v_proj = nn.Linear(C, K * D, bias=False)
        self.o_proj = nn.Linear(H * D, C, bias=False)

    def forward(self, x, cos, sin, cache=None):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)  # (B, K, S, D) each, S = tokens so far
        y = (self.attend if cache is None else cache.attend)(q, k, v)  # (B, H, T, D)
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

    def forward(self, x, cos, sin, cache=None):
        # An island needs both: FP32 inputs, and autocast off, or the products would be cast down again.
        island = torch.autocast(x.device.type, enabled=False) if self.fp32 else nullcontext()
        with island:
            x = x.float() if self.fp32 else x
            x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
            x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class Decoder(nn.Module):
    """Embedding, blocks, final norm. A module of its own only so that names begin with `model.`, as HF's do."""

    recompute = None  # how to run a block, where it is to be run again in the backward pass (`Llama.run_with`)

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.fp32_norms)
        cos, sin = rope_table(config.max_position_embeddings, config.head_dim, config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)  # (max_position_embeddings, D/2)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, input_ids, cache=None):
        """Hidden states (B, T, C) of input_ids (B, T), which a cache has been told of (`KVCache.advance`)."""
        positions = slice(input_ids.size(1)) if cache is None else cache.positions
        cos, sin = self.cos[positions], self.sin[positions]  # (T, D/2) each
        x = self.embed_tokens(input_ids)  # (B, T, C)
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():
                x = self.recompute(layer, x, cos, sin)
            else:
                x = layer(x, cos, sin, cache)
        return self.norm(x)


class Llama(nn.Module):
    """The language model: decoder and output head, FP32 parameters, initialised as the Stentor cards say.

    Weights are drawn from torch's global generator; seed it first to get the same model twice.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        self.init_weights()

    def tie_weights(self):
        """Make a tied head's weight the embedding's: one parameter under two names. (decode.py's head has its own.)"""
        if self.config.tie_word_embeddings and isinstance(self.lm_head, nn.Linear):
            self.lm_head.weight = self.model.embed_tokens.weight

    def _apply(self, function, recurse=True):
        """What `.to` and its like do. Where it cannot change a parameter in place (XLA) it makes new ones, and has to
        be told that two of them are one."""
        super()._apply(function, recurse)
        self.tie_weights()
        return self

    @torch.no_grad()
    def init_weights(self):
        """Linear and embedding weights normal(0, initializer_range), norms 1.

        With scale_residual_init the two projections that write into the residual stream, o_proj and down_proj,
        get initializer_range / sqrt(2 x layers), so that the sum of all blocks starts no larger than one (GPT-2;
        Stentor3 card, Weight Initialization). The Stentor2 card calls its draw a "truncated" normal, but the code
        it prints is a plain one: the code is followed.
        """
        std = self.config.initializer_range
        residual_std = std / math.sqrt(2 * self.config.num_hidden_layers)
        for name, module in self.named_modules():
            if isinstance(module, RMSNorm):
                module.weight.fill_(1.0)
            elif isinstance(module, (nn.Linear, nn.Embedding)):
                residual = self.config.scale_residual_init and name.endswith(("o_proj", "down_proj"))
                module.weight.normal_(0.0, residual_std if residual else std)

    def forward(self, input_ids, targets=None, cache=None, logits_to_keep=0):
        """Next-token logits, and the loss where targets are given.

        input_ids (B, T) int64; targets (B, T) int64, target -100 meaning "do not count". With a KVCache the tokens
        are taken to follow those already in it. Returns (logits (B, T, vocab_size), loss): the loss is the mean
        cross-entropy in nats per counted token, a 0-D FP32 tensor, or None. logits_to_keep leaves out all logits but
        those of so many last positions; 0 keeps all, as in transformers. Of a prompt nobody wants the others, and the
        head is a tenth of a tiny model's work.
        """
        if cache is not None:
            cache.advance(input_ids.size(1))
        x = self.model(input_ids, cache)  # (B, T, C)
        logits = self.lm_head(x[:, -logits_to_keep:])  # (B, T, V); -0 is 0, the first
        if targets is None:
            return logits, None
        # log-softmax over thousands of entries wants FP32, whatever precision made the logits
        loss = F.cross_entropy(logits.float().view(-1, logits.size(-1)), targets.reshape(-1))  # (B*T, V), (B*T)
        return logits, loss

    def new_cache(self, length: int) -> KVCache:
        """An empty KVCache for texts of `length` tokens, on the model's device."""
        return KVCache(length, self.model.cos.device)

    def run_with(self, attention, recompute=None):
        """Train with another attention than causal_attention, (q, k, v) -> y of the same shapes; and with
        `recompute(block, x, cos, sin)`, which runs a block and forgets all but its input until the backward pass runs
        it again (Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost)."""
        self.model.recompute = recompute
        for block in self.model.layers:
            block.self_attn.attend = attention

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """AdamW's two groups: Linear weights decay; embeddings, norms and biases do not (Stentor3 card, AdamW).

        A tied head is the embedding, and does not decay. Raises AssertionError unless every parameter is in
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
        """Parameters, a tied head counted once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, length: int) -> int:
        """FLOPs to train on one token (forward and backward) in sequences of `length` tokens.

        6 for every parameter that is in a matrix product, and 12 x layers x H x D x length for attention's own
        two products (PaLM, Chowdhery et al. 2022, appendix B, which does not discount the causal half).
        """
        c = self.config
        products = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 6 * products + 12 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * length


# ---------------------------------------------------------------------------------------------------------------
# python model.py [config/NAME.py] [--field=value ...]: the arithmetic of the model cards, for any config

BYTES = {"FP32": 4, "FP16 / BF16": 2, "INT8": 1, "INT4": 0.5}  # of one weight


def count_parameters(model: Llama) -> dict[str, int]:
    """Parameters by component, in the rows of the Stentor3 card's table. A tied head counts as none."""
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

    The card's own table has half of what this formula, also the card's, gives.
    """
    elements = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers * length
    return elements * bytes_per_element


def memory_table(config: ModelConfig, parameters: int) -> dict[str, tuple[float, float]]:
    """Bytes of (weights, KV cache of a full context) at each precision, for one sequence.

    The scales of INT8 and INT4 weights are left out. Such weights are multiplied in 16 bits, and so the cache is kept
    in 16 (Stentor3 card, Memory Requirements, where both have FP16's cache).
    """
    return {name: (parameters * size, kv_cache_bytes(config, config.max_position_embeddings, max(size, 2)))
            for name, size in BYTES.items()}


def main(argv: list[str]):
    """Print the parameters, memory and arithmetic of a config's model."""
    from config import load

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
    from config import script
    from model import main  # that of the module which the config's classes come from, not of this second copy of it
    script(main)
