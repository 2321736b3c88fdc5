"""The model is transformers' Llama, and its cache, precision, initialisation and counts are as said."""
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from model import KVCache, Llama, ModelConfig, RMSNorm, causal_attention
from quant_t4 import apply_t4_recipe, use_integers


def shape(**changes):
    """A small shape, with a head_dim that is not hidden_size / heads."""
    small = dict(vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, head_dim=10, max_position_embeddings=16)
    return ModelConfig(**small | changes)


def random_shape(rng):
    kv_heads, group = rng.choice([(1, 1), (1, 3), (1, 4), (2, 1), (2, 2), (3, 2), (4, 1)])  # MQA, GQA and MHA
    heads, head_dim = kv_heads * group, rng.choice([None, 2, 6, 16])
    return shape(vocab_size=rng.randint(40, 200), intermediate_size=rng.randint(1, 100), head_dim=head_dim,
                 hidden_size=heads * rng.choice([8, 12, 32] if heads > 1 else [24, 64]),
                 num_hidden_layers=rng.randint(1, 4), num_attention_heads=heads, num_key_value_heads=kv_heads,
                 max_position_embeddings=rng.randint(1, 64), rms_norm_eps=10 ** rng.uniform(-8, -1),
                 rope_theta=10 ** rng.uniform(3, 6), tie_word_embeddings=rng.random() < 0.5,
                 fp32_blocks=rng.choice([(), (0,)]))


@pytest.mark.parametrize("case", range(8))
def test_shapes(rng, case):
    """They are those of the model's parameters, names and all."""
    config = random_shape(rng)
    parameters = dict(Llama(config).named_parameters())
    assert config.shapes() == {name: tuple(p.shape) for name, p in parameters.items()}


def llama(config):
    """A model whose weights are so large that its logits have a deviation of about 1, and no norm is 1.

    At initialisation the logits are so small that the wrong model could pass for the right one.
    """
    model = Llama(config)
    for p in model.parameters():
        p.data.uniform_(0.5, 1.5) if p.dim() == 1 else p.data.normal_(0, p.size(1) ** -0.5)
    return model


def transformers_llama(model):
    c = model.config
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps",
            "tie_word_embeddings")
    config = LlamaConfig(**{name: getattr(c, name) for name in same}, bos_token_id=None, eos_token_id=None,
                         rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta})
    theirs = LlamaForCausalLM(config).eval()
    theirs.load_state_dict(model.state_dict(), strict=True)
    return theirs


def random_ids(rng, config, batch=None, length=None):
    context = config.max_position_embeddings
    return torch.randint(config.vocab_size, (batch or rng.randint(1, 3), length or rng.randint(1, context)))


# -----------------------------------------------------------------------------
# the same function as transformers'

@pytest.mark.parametrize("length", [1, None, "context"] * 12)
def test_logits_are_those_of_transformers(rng, length):
    """The same weights give the same logits, to 2e-5, whatever the shape."""
    model = llama(random_shape(rng))
    context = model.config.max_position_embeddings
    ids = random_ids(rng, model.config, length=context if length == "context" else length)
    with torch.no_grad():
        ours, theirs = model(ids)[0], transformers_llama(model)(ids).logits
    assert ours.dtype == torch.float32 and 0.2 < ours.std() < 5
    assert (ours - theirs).abs().max() < 2e-5, model.config


@pytest.mark.parametrize("case", range(8))
def test_loss_and_gradients_are_those_of_transformers(rng, case):
    """The loss agrees to 1e-5 of itself, every gradient to 1e-4 of its norm (1e-6 of all, where it is 0)."""
    model = llama(random_shape(rng))
    theirs = transformers_llama(model)
    ids = random_ids(rng, model.config, length=model.config.max_position_embeddings + 1)
    _, loss = model(ids[:, :-1], ids[:, 1:])
    their_loss = theirs(ids, labels=ids).loss  # transformers shifts them itself
    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-5)
    loss.backward()
    their_loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    total = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    for name, p in model.named_parameters():
        tolerance = 1e-4 * p.grad.norm() + 1e-6 * total
        assert (p.grad - gradients.pop(name)).norm() < tolerance, (name, model.config)
    assert not gradients


def test_recomputed_blocks(rng):
    """The same loss and gradients to the bit, each block run twice in training and once without gradients."""
    model, runs = llama(shape()), []
    ids = random_ids(rng, model.config, 2, 16)
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda *_: runs.append(1))

    def gradients():
        loss = model(ids[:, :-1], ids[:, 1:])[1]
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    plain = gradients()
    model.run_with(causal_attention, partial(torch.utils.checkpoint.checkpoint, use_reentrant=False))
    runs.clear()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients(), plain))
    assert len(runs) == 2 * model.config.num_hidden_layers
    with torch.no_grad():
        runs.clear()
        model(ids)
    assert len(runs) == model.config.num_hidden_layers


def test_loss_by_hand(rng):
    """The loss is the mean of -log softmax, in float64, over the targets that are not -100."""
    model = llama(shape())
    ids, targets = random_ids(rng, model.config, 3, 16), random_ids(rng, model.config, 3, 16)
    targets[torch.rand(3, 16) < 0.4] = -100
    targets[0, 0], targets[1] = 7, -100
    logits, loss = model(ids, targets)
    z = logits.detach().double()
    surprises = [math.log(z[b, t].exp().sum()) - z[b, t, targets[b, t]].item()
                 for b in range(3) for t in range(16) if targets[b, t] != -100]
    assert loss.item() == pytest.approx(sum(surprises) / len(surprises), rel=1e-6)
    assert loss.dtype == torch.float32 and loss.dim() == 0 and model(ids)[1] is None


@torch.no_grad()
def test_loss_in_fp32(rng):
    """Of bf16 logits the loss is computed in FP32, also where autocast does not see to it."""
    model = llama(shape(fp32_blocks=())).bfloat16()
    ids, targets = random_ids(rng, model.config, 4, 16), random_ids(rng, model.config, 4, 16)
    logits, loss = model(ids, targets)
    assert (logits.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    exact = torch.nn.functional.cross_entropy(logits.double().view(-1, 61), targets.view(-1))
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)


@torch.no_grad()
def test_no_token_sees_a_later_one(rng):
    """A changed token changes no logits before it, and those from it on."""
    model = llama(shape())
    ids = random_ids(rng, model.config, 2, 16)
    place = rng.randrange(16)
    other = ids.clone()
    other[:, place] = (ids[:, place] + 1) % 61
    before, after = model(ids)[0], model(other)[0]
    assert torch.equal(before[:, :place], after[:, :place])
    assert (before[:, place:] != after[:, place:]).any(-1).all()


# -----------------------------------------------------------------------------
# the cache

IN_FLOAT64 = {"fp32_norms": False, "fp32_blocks": ()}  # where no two logits are equal but for rounding


def chunks(rng, length):
    """`length` as a random sum."""
    while length:
        yield (size := rng.randint(1, length) if rng.random() < 0.7 else 1)
        length -= size


@pytest.mark.parametrize("case", range(8))
@torch.no_grad()
def test_cache_in_chunks(rng, case):
    """Read in pieces of any size through a cache, a text gives the logits that it gives in one."""
    model = llama(replace(random_shape(rng), **IN_FLOAT64)).double()
    ids = random_ids(rng, model.config, length=model.config.max_position_embeddings)
    cache, sizes = KVCache(ids.size(1)), list(chunks(rng, ids.size(1)))
    pieces = [model(piece, cache=cache)[0] for piece in ids.split(sizes, dim=1)]
    assert (torch.cat(pieces, dim=1) - model(ids)[0]).abs().max() < 1e-10, sizes
    assert cache.length == ids.size(1)


@torch.no_grad()
@pytest.mark.parametrize("kept", [1, 3, 8])
def test_logits_to_keep(rng, kept):
    """The last so many logits are those of all, with a cache and without, and the head multiplies no other rows."""
    model, rows = llama(shape(**IN_FLOAT64)).double(), []
    ids = random_ids(rng, model.config, 2, 8)
    whole = model(ids)[0]
    model.lm_head.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].size(1)))
    for cache in (None, KVCache(8)):
        logits, loss = model(ids, cache=cache, logits_to_keep=kept)
        assert logits.shape == (2, kept, whole.size(-1)) and loss is None
        assert (logits - whole[:, -kept:]).abs().max() < 1e-10
    assert rows == [kept, kept]


@torch.no_grad()
def test_generation_with_a_cache(rng):
    """Greedy generation of a batch takes the same tokens, at the same logits, with the cache as without."""
    model = llama(shape(max_position_embeddings=40, **IN_FLOAT64)).double()
    ids, cache = random_ids(rng, model.config, 3, 8), KVCache(40)
    fresh = ids
    for _ in range(32):
        with_cache, without = model(fresh, cache=cache)[0][:, -1], model(ids)[0][:, -1]
        assert (with_cache - without).abs().max() < 1e-10
        assert torch.equal(with_cache.argmax(-1), without.argmax(-1))
        fresh = without.argmax(-1, keepdim=True)
        ids = torch.cat((ids, fresh), dim=1)


@torch.no_grad()
def test_another_attention_decodes_too(rng):
    """What `run_with` is handed computes every attention: that of whole texts, of a prompt and of each token after it.
    It gets the keys and values of all tokens so far."""
    model, calls = llama(shape(**IN_FLOAT64)).double(), []
    ids, K, D = random_ids(rng, model.config, 2, 9), model.config.num_key_value_heads, model.config.head_dim

    def recorder(q, k, v, mask=None):
        calls.append((q.size(2), k.size(2), mask))
        assert k.shape == v.shape == (2, K, k.size(2), D)
        return causal_attention(q, k, v, mask)

    plain = model(ids)[0]
    model.run_with(recorder)
    whole, cache = model(ids)[0], KVCache(16)
    pieces = [model(piece, cache=cache)[0] for piece in ids.split([6, 1, 1, 1], dim=1)]
    assert torch.equal(whole, plain) and (torch.cat(pieces, dim=1) - plain).abs().max() < 1e-10
    wanted = [(9, 9, None), (6, 6, None), (1, 7, None), (1, 8, None), (1, 9, None)]
    assert calls == [call for call in wanted for _ in range(model.config.num_hidden_layers)]


@torch.no_grad()
def test_cache_forgets_and_multiplies(rng):
    """With its length lowered a cache goes on as if the newest tokens had not been; repeated, for several texts."""
    model = llama(shape(max_position_embeddings=40, **IN_FLOAT64)).double()
    kept, wrong = rng.randint(1, 20), rng.randint(1, 20)
    ids, cache = random_ids(rng, model.config, 3, 40), KVCache(40)
    ids[:, :kept] = ids[0, :kept].clone()
    model(torch.cat((ids[:1, :kept], random_ids(rng, model.config, 1, wrong)), dim=1), cache=cache)
    cache.length = kept
    cache.repeat(3)
    assert cache.keys[1].size(0) == cache.values[1].size(0) == 3
    assert (model(ids[:, kept:], cache=cache)[0] - model(ids)[0][:, kept:]).abs().max() < 1e-10


# -----------------------------------------------------------------------------
# precision

@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("product", [None, "fake", "integers"])
@pytest.mark.parametrize("blocks", [(0, -1), (), (1,), (-2, 0), (0, 1, 2, 3)])
def test_fp32_islands(rng, blocks, product, dtype):
    """Under autocast every product in the chosen blocks is FP32, in and out, and no other product is: with the INT8
    recipe too, whose linears take the others' place."""
    model = llama(shape(num_hidden_layers=4, fp32_blocks=blocks))
    if product:
        names = {name.split(".")[-1] for name, _ in model.named_modules() if name.endswith("_proj")}
        assert apply_t4_recipe(model, tuple(names))["INT8 linears"] == 7 * (4 - len(blocks))
        use_integers(model, product == "integers")
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda _, x, y, name=name: seen.update({name: (x[0].dtype, y.dtype)}))
    cache = KVCache(16)
    with torch.autocast("cpu", dtype):
        model(random_ids(rng, model.config), cache=cache)
    islands = {block % 4 for block in blocks}
    for layer in range(4):
        here = {name: dtypes for name, dtypes in seen.items() if name.startswith(f"model.layers.{layer}.")}
        assert len(here) == 7 and cache.keys[layer].dtype == cache.values[layer].dtype
        if layer in islands:
            assert set(here.values()) == {(torch.float32, torch.float32)}, here
            assert cache.keys[layer].dtype == torch.float32
        else:
            assert {out for _, out in here.values()} == {dtype}, here
            assert cache.keys[layer].dtype == dtype
    assert seen["lm_head"][1] == dtype


@torch.no_grad()
def test_fp32_island_is_exact(rng):
    """An island gives under autocast, of bf16 too, bit for bit what it gives without; others do not."""
    model = llama(shape(fp32_blocks=(0,)))
    x = torch.randn(2, 16, 24).bfloat16()
    tables = model.model.cos, model.model.sin
    for layer, exact in ((0, True), (1, False)):
        plain = model.model.layers[layer](x.float(), *tables)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model.model.layers[layer](x, *tables), plain) == exact


def exact_norm(x, weight, eps):
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@torch.no_grad()
def test_norm_in_fp32(rng):
    """Of large bf16 numbers, the FP32 norm is the float64 one rounded once; the bf16 norm often is not."""
    rounded_once = {}
    for fp32 in (True, False):
        norm = RMSNorm(512, 1e-6, fp32)
        norm.weight.uniform_(0.5, 1.5)
        x = (torch.randn(64, 512) * 10 ** rng.uniform(1, 4)).bfloat16()
        assert norm(x).dtype == torch.bfloat16
        exact = exact_norm(x, norm.weight, 1e-6).bfloat16()
        rounded_once[fp32] = (norm(x) == exact).double().mean()
    assert rounded_once[True] > 0.999 and rounded_once[False] < 0.9, rounded_once


@torch.no_grad()
@pytest.mark.parametrize("fp32", [True, False])
def test_every_norm_of_a_bf16_model(rng, fp32):
    """fp32_norms reaches every norm: in a model cast to bf16, all of them are exact or none is."""
    model = llama(shape(hidden_size=256, fp32_blocks=(), fp32_norms=fp32)).bfloat16()
    exact = []
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.register_forward_hook(lambda m, x, y: exact.append(
                bool((y == exact_norm(x[0], m.weight, 1e-6).bfloat16()).double().mean() > 0.995)))
    model(random_ids(rng, model.config, 4, 16))
    assert exact == [fp32] * 5


# -----------------------------------------------------------------------------
# initialisation and counts

def test_a_tied_head_stays_tied():
    """Moved to a device whose tensors are of another kind (meta, as XLA), where .to() makes new parameters."""
    model = llama(shape(tie_word_embeddings=True))
    count = model.num_parameters()
    assert model.to("meta").lm_head.weight is model.model.embed_tokens.weight
    assert model.to_empty(device="cpu").lm_head.weight is model.model.embed_tokens.weight
    assert model.num_parameters() == count == sum(p.numel() for p in llama(model.config).parameters())


@pytest.mark.parametrize("tied, scaled", [(False, True), (True, False)])
def test_init(rng, tied, scaled):
    """init_weights draws every parameter, each kind at its own deviation, and sets the norms to 1."""
    std = rng.uniform(0.01, 0.1)
    model = Llama(shape(vocab_size=300, hidden_size=128, intermediate_size=200, num_hidden_layers=3,
                        head_dim=None, num_key_value_heads=4, tie_word_embeddings=tied,
                        initializer_range=std, scale_residual_init=scaled))
    for p in model.parameters():
        p.data.fill_(math.nan)
    model.init_weights()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    for name, p in model.named_parameters():
        if "norm" in name:
            assert (p == 1).all(), name
            continue
        expected = std / math.sqrt(6) if scaled and ("o_proj" in name or "down_proj" in name) else std
        assert p.std().item() == pytest.approx(expected, rel=0.05), name
        assert abs(p.mean()) < 6 * expected / math.sqrt(p.numel()), name
    torch.manual_seed(1)
    first = Llama(shape()).lm_head.weight
    torch.manual_seed(1)
    assert torch.equal(first, Llama(shape()).lm_head.weight)


@pytest.mark.parametrize("tied", [True, False])
def test_parameter_groups(tied):
    """Every parameter is in one group: the Linear weights decay, and a tied head is none of them."""
    model = Llama(shape(tie_word_embeddings=tied))
    names = {id(p): name for name, p in model.named_parameters()}
    decay, rest = model.parameter_groups(0.3)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    decaying, others = ([names[id(p)] for p in group["params"]] for group in (decay, rest))
    assert sorted(decaying + others) == sorted(names.values())
    assert set(decaying) == {name for name in names.values() if "_proj" in name or name == "lm_head.weight"}
    assert ("lm_head.weight" in decaying) == (not tied)


@pytest.mark.parametrize("tied", [True, False])
def test_flops_per_token(rng, tied):
    """The formula is the count of the products that torch really makes, forward and backward."""
    model = Llama(shape(tie_word_embeddings=tied))
    C, M, V, L, H, K, D, T = 24, 40, 61, 2, 4, 2, 10, rng.randint(2, 16)
    by_hand = 6 * (L * (2 * C * H * D + 2 * C * K * D + 3 * C * M) + V * C) + 12 * L * H * D * T
    assert model.flops_per_token(T) == by_hand
    ids = random_ids(rng, model.config, 2, T)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # plain products
        model(ids, ids)[1].backward()
    assert counter.get_total_flops() == 2 * T * by_hand


def test_num_parameters():
    """Stentor3-20M has the 20,324,160 parameters of its card; a tied head is counted once."""
    stentor = dict(vocab_size=4096, hidden_size=320, intermediate_size=1280, num_hidden_layers=12,
                   num_attention_heads=10, num_key_value_heads=2, head_dim=None)
    with torch.device("meta"):
        assert Llama(shape(**stentor)).num_parameters() == 20_324_160
        assert Llama(shape(**stentor, tie_word_embeddings=True)).num_parameters() == 20_324_160 - 4096 * 320


@pytest.mark.parametrize("changes, named", [
    *(({name: value}, name) for value in (0, -1) for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "head_dim")),
    ({"head_dim": 5}, "head_dim"), ({"hidden_size": 26, "head_dim": None}, "hidden_size"),
    ({"hidden_size": 12, "head_dim": None}, "head_dim"), ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ({"num_key_value_heads": 8}, "num_key_value_heads"), ({"fp32_blocks": (2,)}, "fp32_blocks"),
    ({"fp32_blocks": (0, -3)}, "fp32_blocks"),
])
def test_shapes_that_no_llama_has(changes, named):
    """ModelConfig refuses them in one line that names the field."""
    with pytest.raises(ValueError, match=named) as refusal:
        shape(**changes)
    assert "\n" not in str(refusal.value)


def test_overfits_one_batch(rng):
    """The whole learns: some hundred steps on one batch bring its loss below 0.05."""
    model = Llama(shape(hidden_size=64, intermediate_size=128, max_position_embeddings=32))
    optimizer = torch.optim.AdamW(model.parameter_groups(0.0), lr=1e-2)
    ids = random_ids(rng, model.config, 4, 32)
    ids[:, 0] = torch.arange(4)  # told apart from the first token on
    for _ in range(300):
        _, loss = model(ids[:, :-1], ids[:, 1:])
        if loss < 0.05:
            return
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    raise AssertionError(f"the loss is still {loss.item():.3f}")
