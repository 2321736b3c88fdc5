"""Decoding, made fast: weights that lie in memory in fewer bits, and a step compiled into a few loops.

To write one token a model reads every weight once and does a multiplication and an addition with each. That is little
work for so much reading, so a step can take no less time than the weights take to come from memory; what takes more
than that is overhead. Hence two things, and either works without the other:

1. Fewer bytes (`narrow`): the weights in 16 bits, or as INT8 with a scale for each row.
2. No overhead (`Compiled`): torch.compile makes one program of the step for one token, from its id to the choice of the
   next, in which a product of a weight matrix and a vector is written as what it is, the sums of its rows. For that the
   compiler writes its own loop, which keeps up with the memory, widens narrow weights on the way and takes in what
   stands before and after; a library's matrix product, made for matrices, is slower (BENCHMARKS.md).
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from choice import Sampler, choose_of_few
from config import brief
from model import KVCache, Llama
from quant_t4 import quantize

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
FEW = 8  # rows at most for which a library's usual product is the wrong one
COMPILE_FROM = 4000  # tokens from which compiling pays: more layers take longer to compile, and save more each time
COMPILE_SEVERAL_FROM = 8000  # the same of several texts at once, for which the compiler writes longer loops


class NarrowLinear(nn.Module):
    """A Linear whose weight lies in memory in another type than FP32.

    In 16 bits it gives what a Linear gives under autocast, in that type. With INT8 weights inputs and results are as
    they come, and the sums FP32 (but of a few rows that are not compiled a CPU's kernel has all in bfloat16); or
    (round_inputs) inputs are rounded to INT8 too, row by row, and the sums are those of integers, as in
    quantization-aware training (quant_t4.py).
    """

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype, round_inputs: bool = False):
        """weight (out, in) FP32; it is used itself, not copied, where that is its dtype."""
        super().__init__()
        self.round_inputs, self.scale = round_inputs, None
        if dtype == torch.int8:
            weight, scale = quantize(weight)  # (out, in), (out, 1)
            self.scale = nn.Parameter(scale.flatten(), requires_grad=False)  # (out)
            self.register_buffer("ones", torch.ones(len(weight), dtype=torch.bfloat16), persistent=False)
        self.weight = nn.Parameter(weight.to(dtype), requires_grad=False)  # (out, in)

    def forward(self, x):
        rows = x.reshape(-1, x.size(-1))  # (..., in) -> (rows, in)
        if self.scale is None:
            y = self.product(rows.to(self.weight.dtype))
        elif self.round_inputs:
            rows, row_scale = quantize(rows)
            y = torch._int_mm(rows, self.weight.t()) * row_scale * self.scale
        else:
            y = self.product(rows) * self.scale
        return y.reshape(*x.shape[:-1], -1)  # (rows, out) -> (..., out)

    def product(self, rows):
        """rows (rows, in) @ weight.T in the type of rows, widening the weight if need be: (rows, out)."""
        weight, count = self.weight, len(rows)
        if rows.device.type != "cpu" or count > FEW:
            return F.linear(rows, weight.to(rows.dtype))
        if torch.compiler.is_compiling():
            return self.sums(rows.float()).to(rows.dtype)
        if self.scale is not None and rows.size(1) % 16 == 0:  # it reads 16 at a time
            return torch._weight_int8pack_mm(rows.bfloat16(), weight, self.ones).to(rows.dtype)  # the scale comes later
        # MKL is quicker with few columns than with few rows, and with two small products than with a single one.
        weight, columns = weight.to(rows.dtype), rows.t()  # (out, in), (in, rows)
        if count == 1 and rows.dtype == torch.float32 and len(weight) % 2 == 0:
            halves = weight.view(2, -1, weight.size(1))  # (out, in) -> (2, out / 2, in)
            return torch.bmm(halves, columns.expand(2, -1, -1)).view(1, -1)  # (2, out / 2, 1) -> (1, out)
        return (weight @ columns).t() if count > 1 else F.linear(rows, weight)

    def sums(self, rows):
        """As `product`, of FP32 rows; of this the compiler makes one loop over the weight, with a sum for each row."""
        if len(rows) > 1:
            # as_strided wants them in memory. Else the loop would compute them anew for every row of the weight.
            rows = rows.as_strided(rows.shape, (rows.size(1), 1))
        return torch.stack([(self.weight.float() * row).sum(-1) for row in rows])  # (out, in) -> (rows, out)


def narrow(model: Llama, dtype: str, round_inputs: bool = False) -> Llama:
    """The model itself with all its Linears, the head too, as NarrowLinears of a type that DTYPES names.

    Embedding and norms stay FP32. Nothing can be trained any more. The FP32 blocks are not spared: what makes training
    stable is not missed when a trained model runs (BENCHMARKS.md).
    """
    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if isinstance(linear, nn.Linear):
                setattr(parent, name, NarrowLinear(linear.weight.detach(), DTYPES[dtype], round_inputs))
    return model.requires_grad_(False)


class SummingCache(KVCache):
    """A KVCache whose attention of a single token is written as sums, for the compiler to make loops of."""

    def attend(self, q, k, v):
        B, H, T, D = q.shape
        if T > 1:
            return super().attend(q, k, v)
        q = q.view(B, k.size(1), -1, 1, D).float() * D ** -0.5  # (B, H, 1, D) -> (B, K, H / K, 1, D)
        k, v = k.unsqueeze(2).float(), v.unsqueeze(2).float()  # (B, K, 1, S, D)
        scores = (q * k).sum(-1)  # (B, K, H / K, S)
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        y = (weights.unsqueeze(-1) * v).sum(-2) / weights.sum(-1, keepdim=True)  # softmax, divided at the end
        return y.view(B, H, T, D)  # (B, K, H / K, D) -> (B, H, 1, D)


class Step(nn.Module):
    """What is compiled: the logits of some tokens, and the choice of the next.

    A program is handed all parameters at every call. Two tensors instead of two hundred save it a tenth of a step:
    hence `pack` and `unpack`.
    """

    def __init__(self, model: Llama):
        super().__init__()
        self.model, self.lm_head = model.model, model.lm_head
        self.kinds = {}  # dtype -> {name of a parameter: its shape}
        for name, parameter in self.named_parameters():
            self.kinds.setdefault(parameter.dtype, {})[name] = parameter.shape

    def pack(self) -> dict[torch.dtype, torch.Tensor]:
        """Lay the parameters of a dtype side by side in one tensor (n,), of which they become views."""
        named = dict(self.named_parameters())
        packed = {dtype: torch.cat([named[name].detach().flatten() for name in kind])
                  for dtype, kind in self.kinds.items()}
        for name, view in self.unpack(packed).items():
            named[name].data = view
        return packed

    def unpack(self, packed: dict[torch.dtype, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The parameters by name, views of what `pack` has made."""
        views = {}
        for dtype, kind in self.kinds.items():
            pieces = packed[dtype].split([shape.numel() for shape in kind.values()])  # (n,) -> (out * in,) each
            views |= {name: piece.view(shape) for (name, shape), piece in zip(kind.items(), pieces)}
        return views

    def forward(self, input_ids, cache, seen, settings, chance):
        """As Llama.forward with a cache, and choice.choose_of_few: logits (B, T, V), tokens (B,)."""
        logits = self.lm_head(self.model(input_ids, cache))
        return logits, choose_of_few(logits[:, -1].float(), seen, settings, chance)


class Compiled:
    """A narrowed model that runs compiled where inputs have one of a few lengths, 1 above all; others run as before.

    It has what sample.generate asks of a model. On a GPU the step is a CUDA graph for each length of the cache that is
    read, which is rounded up to 256 so that they are few. (There was no GPU to try that on.)
    """

    def __init__(self, model: Llama, lengths: tuple[int, ...] = (1,)):
        self.model, self.config, self.lm_head, self.lengths = model, model.config, model.lm_head, lengths
        self.device = model.model.cos.device
        self.on_gpu = self.device.type == "cuda"
        self.module = Step(model)
        self.packed = self.module.pack()
        self.programs = {}  # (B, T, length of the cache) -> what Step is then

    def program(self):
        """A compiled function (packed, *inputs of Step.forward), for inputs of one shape but for the filled length."""
        module = self.module

        def step(packed, *inputs):
            return torch.func.functional_call(module, module.unpack(packed), inputs)

        step.__code__ = step.__code__.replace()  # a copy: programs are kept by code, and each step has one alone
        # To check before every call that nothing has changed would take a tenth of it: nothing has. On a CPU what calls
        # the loops one after the other is C++ too: as much quicker, and longer to compile.
        # Its loops may round once where they multiply and add, as the processor does.
        options = {"guard_filter_fn": lambda guards: [False] * len(guards),
                   **({"triton.cudagraphs": True} if self.on_gpu else
                      {"cpp_wrapper": True, "cpp.enable_floating_point_contract_flag": "fast"})}
        return torch.compile(step, dynamic=False, options=options)  # but for what is marked as dynamic

    def new_cache(self, length: int) -> KVCache:
        """An empty cache for texts of `length` tokens."""
        # With one position more than is ever read: all of a buffer would be contiguous, and want a program of its own.
        return KVCache(length + 1, self.device, grain=256) if self.on_gpu else SummingCache(length + 1, self.device)

    def has_program(self, input_ids, cache) -> bool:
        """Whether these are of a length that is compiled; a prompt is not, which may be as short."""
        return cache.length > 0 and input_ids.size(1) in self.lengths

    @torch.no_grad()
    def run(self, input_ids, cache, seen, settings, chance):
        """The compiled Step: logits (B, T, V), tokens (B,)."""
        shape = *input_ids.shape, cache.max_length
        cache.advance(input_ids.size(1))
        if shape not in self.programs:
            self.programs[shape] = self.program()
            torch._dynamo.mark_dynamic(cache.read, 0)  # a text grows: one program for all lengths
        if self.on_gpu:
            for tensor in (*self.packed.values(), *cache.keys.values(), *cache.values.values()):
                torch._dynamo.mark_static_address(tensor, guard=False)  # a CUDA graph takes these, not copies of them
        return self.programs[shape](self.packed, input_ids, cache, seen, settings.to(self.device), chance)

    def __call__(self, input_ids, cache, logits_to_keep=0):
        """As Llama.forward with a cache: (logits (B, T, vocab_size), None)."""
        if not self.has_program(input_ids, cache):
            return self.model(input_ids, cache=cache, logits_to_keep=logits_to_keep)
        B = len(input_ids)  # the choice is made too, and not looked at
        seen = torch.zeros(B, self.config.vocab_size, dtype=torch.bool, device=self.device)
        chance = torch.zeros(B, 1, dtype=torch.float64, device=self.device)
        logits, _ = self.run(input_ids, cache, seen, Sampler().settings, chance)
        return logits[:, -logits_to_keep:], None

    def choose(self, input_ids, cache, sampler: Sampler, seen, chance):
        """The tokens that follow input_ids (B, T) of a compiled length, as Sampler.choose has it: (B,) int64."""
        logits, tokens = self.run(input_ids, cache, seen, sampler.settings, chance)
        return sampler.choose(logits[:, -1].float(), seen, chance) if -1 in tokens.tolist() else tokens


@torch.no_grad()
def compile(model: Llama, batch_size: int = 1, lengths: tuple[int, ...] = (1,)) -> tuple[Compiled | Llama, str]:
    """The narrowed model compiled for batches of this size, or the model itself and a line that says why it cannot be.

    Compiling happens here: seconds for each layer, fewer where PyTorch has kept the program from an earlier run.
    """
    compiled = Compiled(model, lengths)
    try:
        for length in lengths:
            cache = compiled.new_cache(model.config.max_position_embeddings)
            ids = torch.zeros(batch_size, length, dtype=torch.int64, device=compiled.device)
            model(ids, cache=cache)
            for _ in range(3 if compiled.on_gpu else 1):  # a CUDA graph is recorded in the second, run in the third
                cache.length = model.config.max_position_embeddings // 2  # so that it looks worth two threads
                compiled(ids, cache)
    except Exception as error:  # whatever the compiler, the linker or the driver may raise
        return model, brief(error) or type(error).__name__
    return compiled, ""
