"""quant_t4.py: rounding within its bounds, gradients by the stated rule, and integers that give what floats give."""
import pytest
import torch

from cli import BadInput
from model import Llama, ModelConfig
from quant_t4 import Int8LinearT4, Int8Product, apply_t4_recipe, quantize, quantize_for_export, use_integers

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def rows(rng, count=20, width=64):
    """Rows of very different sizes, among them zeros, one number only, denormals, huge numbers."""
    x = torch.randn(count, width) * 10.0 ** torch.randint(-20, 20, (count, 1))
    x[0], x[1], x[2] = 0, rng.uniform(-5, 5), 1e-42
    x[3, 1:] = 0
    return x


def test_rounding(rng):
    """In float64: off by half a scale at most, integers within +-127, the largest of a row kept."""
    x = rows(rng)
    integers, scale = quantize(x)
    assert integers.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == (20, 1)
    assert integers.abs().max() == 127
    back, exact = integers.double() * scale.double(), x.double()
    assert ((back - exact).abs() <= scale.double() * (0.5 + 1e-5)).all()
    normal = exact.abs().amax(1) > 1e-30
    assert torch.allclose(back.abs().amax(1)[normal], exact.abs().amax(1)[normal], rtol=1e-6)
    assert (integers[0] == 0).all() and torch.isfinite(scale).all()


def test_half_a_step_goes_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5]])
    integers, scale = quantize(x)
    assert scale.item() == 1.0 and integers.tolist() == [[127, 0, 2, 2, 0, -2, 126]]


def test_a_channel_of_its_own(rng):
    """With one scale for all, rows of small weights are zeros; with one for each row they are not."""
    weight = torch.randn(8, 32) * torch.tensor([1e-4, 1.0] * 4)[:, None]
    integers, scale = quantize(weight)
    assert ((integers * scale - weight).norm(dim=1) < 0.02 * weight.norm(dim=1)).all()
    whole, whole_scale = quantize(weight.view(1, -1))
    assert (whole.view(8, 32)[0::2] == 0).all()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("integers", [False, True])
def test_an_overflow_is_not_hidden(value, integers):
    """A GradScaler must see it."""
    linear = Int8LinearT4(32, 24, bias=False)
    linear.integers = integers
    x = torch.randn(5, 32)
    x[2, 7] = value
    y = linear(x)
    assert not torch.isfinite(y[2]).any() and torch.isfinite(y[[0, 1, 3, 4]]).all()


@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("shape", [(3,), (2, 7), (2, 3, 5)])
def test_gradients(rng, integers, shape):
    """The straight-through rule by hand in float64: dx = dy W^, dW = dy^T x^, where ^ is rounded to INT8 and back."""
    width, out = 8 * rng.randint(1, 6), 8 * rng.randint(1, 6)
    x, linear = torch.randn(*shape, width, requires_grad=True), Int8LinearT4(width, out, bias=False)
    linear.integers = integers
    grad = torch.randn(*shape, out)
    y = linear(x)
    y.backward(grad)

    def rounded(tensor):
        scale = tensor.detach().abs().amax(-1, keepdim=True) / 127
        return (tensor.detach() / scale).round().double() * scale.double()

    x_hat, weight_hat, flat = rounded(x), rounded(linear.weight), grad.double().reshape(-1, out)
    assert torch.allclose(y.double(), x_hat @ weight_hat.T, rtol=1e-5, atol=1e-5)
    assert torch.allclose(x.grad.double(), grad.double() @ weight_hat, rtol=1e-5, atol=1e-5)
    assert torch.allclose(linear.weight.grad.double(), flat.T @ x_hat.reshape(-1, width), rtol=1e-5, atol=1e-5)
    assert linear.weight.dtype == linear.weight.grad.dtype == torch.float32


def test_integers_and_floats_agree(rng):
    """The exact integer product against float64 of the same integers: to a rounding of FP32."""
    x, weight = rows(rng, 33, 48).clamp(-1e12, 1e12), torch.randn(40, 48)
    (x8, x_scale), (weight8, weight_scale) = quantize(x), quantize(weight)
    exact = (x8.double() @ weight8.double().T) * x_scale.double() * weight_scale.double().T
    y = Int8Product.apply(x, weight, torch.float32).double()
    assert torch.allclose(y, exact, rtol=3e-7, atol=0) or ((y - exact).abs() <= 3e-7 * exact.abs() + 1e-37).all()


def test_each_can_be_switched_off():
    """Weight and input, alone and together; with neither it is a plain Linear."""
    linear, x = Int8LinearT4(32, 24, bias=False), torch.randn(6, 32)
    outputs = []
    for linear.quantize_weight in (False, True):
        for linear.quantize_input in (False, True):
            outputs.append(linear(x))
    assert torch.equal(outputs[0], torch.nn.functional.linear(x, linear.weight))
    assert len({tuple(y.flatten().tolist()) for y in outputs}) == 4
    assert all(torch.allclose(y, outputs[0], atol=0.1) for y in outputs)


def tiny(**changes):
    return Llama(ModelConfig(**dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
                                    num_attention_heads=4, num_key_value_heads=2) | changes))


def test_recipe(rng):
    """It takes the inner blocks' linears and no others, keeps names and parameters, and may be applied twice."""
    model, input_ids = tiny(), torch.randint(0, 64, (2, 9))
    before, parameters = model(input_ids)[0], dict(model.named_parameters())
    linears = tuple(rng.sample(LINEARS, rng.randint(1, 7)))
    for _ in range(2):
        assert apply_t4_recipe(model, linears) == {"INT8 linears": 2 * len(linears), "FP32 norms": 9, "FP32 blocks": 2}
        assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
        assert list(model.state_dict()) == list(parameters)
    int8 = {name for name, module in model.named_modules() if isinstance(module, Int8LinearT4)}
    assert {name.split(".")[2] for name in int8} == {"1", "2"}
    assert {name.split(".")[-1] for name in int8} == set(linears)
    after = model(input_ids)[0]
    assert not torch.equal(after, before) and torch.allclose(after, before, atol=0.05)
    groups = model.parameter_groups(0.1)
    assert sum(len(group["params"]) for group in groups) == len(parameters)
    with pytest.raises(BadInput, match="^int8_linears: .*lm_head.*q_proj"):
        apply_t4_recipe(model, ("lm_head",))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_how_closely_the_two_products_agree(rng, device, dtype, tolerance):
    """Fake and integers against float64 of the same integers, relative to the largest output: FP32's rounding, or that
    of the 16-bit type that autocast rounds the fake values and both results to."""
    linear = Int8LinearT4(256, 64, bias=False).to(device)
    x = (torch.randn(48, 256) * torch.logspace(-2, 2, 48)[:, None]).to(device)
    (x8, x_scale), (weight8, weight_scale) = quantize(x), quantize(linear.weight.detach())
    exact = (x8.double() * x_scale) @ (weight8.double() * weight_scale).T
    for integers in (False, True):
        linear.integers = integers
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            y = linear(x)
        assert y.dtype == dtype
        error = (y.double() - exact).abs().amax(1) / exact.abs().amax(1)  # of each token, on its own scale
        assert error.max() < tolerance, integers
    plain = torch.nn.functional.linear(x, linear.weight).double()
    assert ((plain - exact).abs().amax(1) / exact.abs().amax(1)).min() > 1e-3  # INT8 itself is further off than FP32's


@pytest.mark.parametrize("integers", [False, True])
def test_recipe_is_live_when_traced(integers):
    """What torch.compile's front end makes of it, whole and with its gradients, is what eager computes; and when it is
    switched off, the plain model is."""
    model, input_ids = tiny(num_hidden_layers=2, fp32_blocks=(0,)), torch.randint(0, 64, (2, 9))

    def run(model):
        logits, loss = model(input_ids, input_ids)
        return [logits, *torch.autograd.grad(loss, weights)]

    weights = list(model.parameters())
    plain = run(model)
    apply_t4_recipe(model, LINEARS)
    use_integers(model, integers)
    eager = run(model)
    traced = run(torch.compile(model, backend="aot_eager", fullgraph=True))
    assert all(torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in zip(traced, eager))
    assert (traced[0] - plain[0]).abs().max() > 10 * (traced[0] - eager[0]).abs().max()
    for module in model.modules():
        if isinstance(module, Int8LinearT4):
            module.quantize_weight = module.quantize_input = False
    switched_off = run(torch.compile(model, backend="aot_eager", fullgraph=True))
    assert all(torch.allclose(ours, theirs, atol=1e-6) for ours, theirs in zip(switched_off, plain))


def test_recipe_is_live_when_compiled():
    """torch.compile does not fold it away: compiled outputs are the eager ones, and not the plain model's."""
    model = tiny(num_hidden_layers=2, fp32_blocks=(0,))  # a block of each kind
    input_ids = torch.randint(0, 64, (2, 9))
    plain = model(input_ids)[0]
    apply_t4_recipe(model, LINEARS)
    eager = model(input_ids)[0]
    try:
        compiled = torch.compile(model)(input_ids)[0]
    except torch._inductor.exc.InvalidCxxCompiler:
        pytest.skip("there is no C++ compiler here")
    assert torch.allclose(compiled, eager, atol=2e-3)
    assert (compiled - plain).abs().max() > 3 * (compiled - eager).abs().max()


def test_export_is_what_was_trained(rng):
    """A plain model with the exported integers times scales computes what the trained one did, bit for bit in FP32."""
    model, input_ids = tiny(), torch.randint(0, 64, (2, 9))
    apply_t4_recipe(model, LINEARS)
    for module in model.modules():
        if isinstance(module, Int8LinearT4):
            module.quantize_input = False
    trained = model(input_ids)[0]
    exported = quantize_for_export(model)
    assert len(exported) == 14 and all(integers.dtype == torch.int8 for integers, _ in exported.values())
    plain = tiny()
    plain.load_state_dict({**model.state_dict(), **{f"{name}.weight": integers * scale
                                                    for name, (integers, scale) in exported.items()}})
    assert torch.equal(plain(input_ids)[0], trained)


def test_dtypes_under_autocast():
    """In and out as a plain Linear's; the master and its gradient stay FP32."""
    for integers in (False, True):
        linear = Int8LinearT4(32, 24, bias=False)
        linear.integers = integers
        with torch.autocast("cpu", torch.bfloat16):
            y = linear(torch.randn(5, 32))
        y.float().sum().backward()
        assert y.dtype == torch.bfloat16 and linear.weight.dtype == linear.weight.grad.dtype == torch.float32


def test_it_learns(rng):
    """Updates too small to change a rounded weight add up underneath: a tiny model learns a text by heart."""
    model = tiny(fp32_blocks=())
    assert apply_t4_recipe(model, LINEARS)["INT8 linears"] == 28
    text = torch.randint(0, 64, (4, 17))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(150):
        _, loss = model(text[:, :-1], text[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
