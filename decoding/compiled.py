"""Fast decoding: weights with fewer bits in memory, and a step compiled into a few loops.

To write one token a model reads every weight once and does one multiplication and one addition with it. That is little
work for so much reading, so a step cannot be faster than the weights come from memory. Everything beyond that is
overhead. There are two ways to save time, and each works without the other:

1. Fewer bytes (`narrow`): the weights in 16 bits, or in INT8 with a scale for each row.
2. No overhead (`Compiled`): torch.compile makes one program of a token's step, from its id to the choice of the next
   one. In it the product of a weight matrix and a vector is written as what it is: sums over rows. The compiler makes
   its own loop of that. The loop is as fast as the memory, widens narrow weights on the way, and absorbs the operations
   before and after it. A library's matrix product is made for matrices and is slower here (BENCHMARKS.md).
"""

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

from backend import PRECISIONS
from cli import brief
from decoding.choice import GREEDY, Sampler, choose_of_few
from model import KVCache, Llama
from quant_t4 import quantize

DTYPES = PRECISIONS | {"int8": torch.int8}
FEW = 8  # with this many rows or fewer, a library's usual product is the wrong choice
COMPILE_FROM = 4000  # new tokens from which compiling pays off (more layers compile longer, and save more each time)
COMPILE_SEVERAL_FROM = 8000  # the same for several texts at once, for which the compiler writes longer loops


class NarrowLinear(nn.Module):
    """A Linear whose weight is not FP32 in memory.

    In 16 bits it computes what a Linear computes under autocast, and returns that type. With INT8 weights, inputs and
    results keep their type and the sums are FP32. (One exception: for a few rows, uncompiled, the CPU's kernel does
    everything in bfloat16.) With int8_activations inputs are rounded to INT8 too, row by row, and the sums are of
    integers, as in quantization-aware training (quant_t4.py).
    """

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype, int8_activations: bool = False):
        """weight (out, in) FP32. If dtype is FP32 too, it is used directly, not copied."""
        super().__init__()
        self.int8_activations, self.scale = int8_activations, None
        if dtype == torch.int8:
            weight, scale = quantize(weight)  # (out, in), (out, 1)
            self.scale = nn.Parameter(scale.flatten(), requires_grad=False)  # (out)
            self.register_buffer("ones", torch.ones(len(weight), dtype=torch.bfloat16), persistent=False)
        self.weight = nn.Parameter(weight.to(dtype), requires_grad=False)  # (out, in)

    def forward(self, x):
        rows = x.reshape(-1, x.size(-1))  # (..., in) -> (rows, in)
        if self.scale is None:
            y = self.product(rows.to(self.weight.dtype))
        elif self.int8_activations:
            rows, row_scale = quantize(rows)
            y = torch._int_mm(rows, self.weight.t()) * row_scale * self.scale  # (rows, in) @ (in, out)
        else:
            y = self.product(rows) * self.scale
        return y.reshape(*x.shape[:-1], -1)  # (rows, out) -> (..., out)

    def product(self, rows):
        """rows (rows, in) @ weight.T -> (rows, out), in the type of `rows`. A narrower weight is widened."""
        weight, count = self.weight, len(rows)
        if rows.device.type != "cpu" or count > FEW:
            return F.linear(rows, weight.to(rows.dtype))
        if torch.compiler.is_compiling():
            return self.sums(rows.float()).to(rows.dtype)
        if self.scale is not None and rows.size(1) % 16 == 0:  # the kernel reads 16 at a time
            return torch._weight_int8pack_mm(rows.bfloat16(), weight, self.ones).to(rows.dtype)  # `forward` scales it
        # MKL is faster with few columns than with few rows, and with two small products than with one.
        weight, columns = weight.to(rows.dtype), rows.t()  # (out, in), (in, rows)
        if count == 1 and rows.dtype == torch.float32 and len(weight) % 2 == 0:
            halves = weight.view(2, -1, weight.size(1))  # (out, in) -> (2, out / 2, in)
            return torch.bmm(halves, columns.expand(2, -1, -1)).view(1, -1)  # (2, out / 2, 1) -> (1, out)
        return (weight @ columns).t() if count > 1 else F.linear(rows, weight)  # (out, rows) -> (rows, out)

    def sums(self, rows):
        """As `product`, for FP32 rows. The compiler turns it into one loop over the weight, with a sum for each row."""
        if len(rows) > 1:
            # as_strided forces the rows into memory. Otherwise the loop would compute them for every row of the weight.
            rows = rows.as_strided(rows.shape, (rows.size(1), 1))  # (rows, in)
        return torch.stack([(self.weight.float() * row).sum(-1) for row in rows])  # (out, in) -> (rows, out)


def narrow(model: Llama, dtype: str, int8_activations: bool = False) -> Llama:
    """Turn all Linears of a model into NarrowLinears of a type in DTYPES, the head too. Returns the same model.

    Embedding and norms stay FP32. The model can no longer be trained. FP32 blocks are narrowed too: they keep training
    stable, and a trained model does not need them (BENCHMARKS.md).
    """
    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if isinstance(linear, nn.Linear):
                setattr(parent, name, NarrowLinear(linear.weight.detach(), DTYPES[dtype], int8_activations))
    return model.requires_grad_(False)


def summing(attention: Callable) -> Callable:
    """`attention` (q, k, v, mask), but for a single token written as sums, which the compiler turns into loops."""
    def attend(q, k, v, mask):
        B, H, T, D = q.shape
        if T > 1 or mask is not None:
            return attention(q, k, v, mask)
        q = q.view(B, k.size(1), -1, 1, D).float() * D ** -0.5  # (B, H, 1, D) -> (B, K, H / K, 1, D)
        k, v = k.unsqueeze(2).float(), v.unsqueeze(2).float()  # (B, K, 1, S, D)
        scores = (q * k).sum(-1)  # (B, K, H / K, S)
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        y = (weights.unsqueeze(-1) * v).sum(-2) / weights.sum(-1, keepdim=True)  # (B, K, H / K, D), divided last
        return y.view(B, H, T, D)  # (B, K, H / K, D) -> (B, H, 1, D)

    return attend


class Step(nn.Module):
    """The part that is compiled: the logits of some tokens, and the choice of the next one.

    Each call hands all parameters to the program. Handing over two tensors instead of two hundred saves a tenth of a
    step. That is why there are `pack` and `unpack`.
    """

    def __init__(self, model: Llama):
        super().__init__()
        self.model, self.lm_head = model.model, model.lm_head
        self.kinds = {}  # dtype -> {name of a parameter: its shape}
        for name, parameter in self.named_parameters():
            self.kinds.setdefault(parameter.dtype, {})[name] = parameter.shape

    def pack(self) -> dict[torch.dtype, torch.Tensor]:
        """Put all parameters of a dtype into one tensor (n,). They become views of it."""
        named = dict(self.named_parameters())
        packed = {dtype: torch.cat([named[name].detach().flatten() for name in kind])  # (out, in) each -> (n,)
                  for dtype, kind in self.kinds.items()}
        for name, view in self.unpack(packed).items():
            named[name].data = view
        return packed

    def unpack(self, packed: dict[torch.dtype, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The parameters by name, as views of what `pack` returned."""
        views = {}
        for dtype, kind in self.kinds.items():
            pieces = packed[dtype].split([shape.numel() for shape in kind.values()])  # (n,) -> (out * in,) each
            views |= {name: piece.view(shape) for (name, shape), piece in zip(kind.items(), pieces)}  # (out, in) each
        return views

    def forward(self, input_ids, cache: KVCache, seen, settings, chance):
        """Llama.forward with a cache, then choose_of_few: logits (B, T, V), tokens (B,)."""
        logits = self.lm_head(self.model(input_ids, cache))
        return logits, choose_of_few(logits[:, -1].float(), seen, settings, chance)


class Compiled:
    """A narrowed model that runs compiled for a few input lengths, above all 1. Other inputs run as before.

    It has everything that generate.py needs of a model. On a GPU each length of the cache has its own CUDA graph. The
    length is rounded up to a multiple of 256, so there are few. (There was no GPU to try this on.)
    """

    def __init__(self, model: Llama, lengths: tuple[int, ...] = (1,)):
        self.model, self.config, self.lm_head, self.lengths = model, model.config, model.lm_head, lengths
        self.device = model.model.cos.device
        self.on_gpu = self.device.type == "cuda"
        if not self.on_gpu:
            model.run_with(summing(model.model.layers[0].self_attn.attend))
        self.module = Step(model)
        self.packed = self.module.pack()
        self.programs = {}  # (B, T, length of the cache) -> the compiled Step for that

    def program(self) -> Callable:
        """A compiled function (packed, *inputs of Step.forward) for inputs of one shape, whatever part of the cache is
        filled."""
        module = self.module

        def step(packed, *inputs):
            return torch.func.functional_call(module, module.unpack(packed), inputs)

        step.__code__ = step.__code__.replace()  # a copy: PyTorch files programs by code, and this gets one of its own
        # PyTorch would check before every call that nothing has changed, which takes a tenth of the step. Nothing has.
        # On a CPU the calls of the loops are C++ too: that saves as much again, and takes longer to compile. The loops
        # may round a multiplication and an addition once, as the processor does.
        options = {"guard_filter_fn": lambda guards: [False] * len(guards),
                   **({"triton.cudagraphs": True} if self.on_gpu else
                      {"cpp_wrapper": True, "cpp.enable_floating_point_contract_flag": "fast"})}
        return torch.compile(step, dynamic=False, options=options)  # except what is marked as dynamic

    def new_cache(self, length: int) -> KVCache:
        """An empty cache for texts of `length` tokens."""
        # One position more than is ever read: the whole buffer would be contiguous, and would need its own program.
        return KVCache(length + 1, self.device, grain=256 if self.on_gpu else 1)

    def has_program(self, input_ids, cache: KVCache) -> bool:
        """Whether these inputs have a compiled length. A prompt never counts, however short."""
        return cache.length > 0 and input_ids.size(1) in self.lengths

    @torch.no_grad()
    def run(self, input_ids, cache: KVCache, seen, settings, chance):
        """Run the compiled Step: logits (B, T, V), tokens (B,)."""
        shape = *input_ids.shape, cache.max_length
        cache.advance(input_ids.size(1))
        if shape not in self.programs:
            self.programs[shape] = self.program()
            torch._dynamo.mark_dynamic(cache.read, 0)  # a text grows, and one program serves all lengths
        if self.on_gpu:
            for tensor in (*self.packed.values(), *cache.keys.values(), *cache.values.values()):
                torch._dynamo.mark_static_address(tensor, guard=False)  # the CUDA graph uses these, not copies
        return self.programs[shape](self.packed, input_ids, cache, seen, settings.to(self.device), chance)

    def __call__(self, input_ids, cache: KVCache, logits_to_keep: int = 0):
        """As Llama.forward with a cache: (logits (B, T, vocab_size), None)."""
        if not self.has_program(input_ids, cache):
            return self.model(input_ids, cache=cache, logits_to_keep=logits_to_keep)
        B = len(input_ids)  # the step also chooses a token; we ignore it
        seen = torch.zeros(B, self.config.vocab_size, dtype=torch.bool, device=self.device)
        chance = torch.zeros(B, 1, dtype=torch.float64, device=self.device)
        logits, _ = self.run(input_ids, cache, seen, GREEDY.settings, chance)
        return logits[:, -logits_to_keep:], None

    def choose(self, input_ids, cache: KVCache, sampler: Sampler, seen, chance):
        """Choose the tokens (B,) int64 after input_ids (B, T) of a compiled length, as Sampler.choose would."""
        logits, tokens = self.run(input_ids, cache, seen, sampler.settings, chance)
        return sampler.choose(logits[:, -1].float(), seen, chance) if -1 in tokens.tolist() else tokens


@torch.no_grad()
def compile(model: Llama, batch_size: int = 1, lengths: tuple[int, ...] = (1,)) -> tuple[Compiled | Llama, str]:
    """The narrowed model, compiled for batches of this size. If that fails, the model itself and a line that says why.

    Compiling happens here. It takes seconds for each layer, fewer if PyTorch has kept the program of an earlier run.
    """
    attention = model.model.layers[0].self_attn.attend
    compiled = Compiled(model, lengths)
    try:
        for length in lengths:
            cache = compiled.new_cache(model.config.max_position_embeddings)
            ids = torch.zeros(batch_size, length, dtype=torch.int64, device=compiled.device)
            model(ids, cache=cache)
            for _ in range(3 if compiled.on_gpu else 1):  # the second pass records the CUDA graph, the third runs it
                cache.length = model.config.max_position_embeddings // 2  # so that the loops look worth two threads
                compiled(ids, cache)
    except Exception as error:  # whatever the compiler, the linker or the driver may raise
        model.run_with(attention)
        return model, brief(error)
    return compiled, ""
