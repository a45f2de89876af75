"""What is computed again in the backward pass, some rows at a time: the same gradients, and less memory."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kept import kept_for_backward
from proxbit import blocks
from proxbit.errors import ModelStateError
from proxbit.nn import BinaryLinear, Epilogue
from proxbit.nn.attention import binary_attention, int8_attention
from proxbit.nn.recompute import RowRecipe, kernel_recipe, linear, product, recompute
from proxbit.quantizers import RowUnits, get_pair, quantize, recomputed_weight


def kept(call):
    """Elements that are kept for the backward pass of a call, and its result."""
    with kept_for_backward() as found:
        result = call()
    return found.total() // 4, result


def in_blocks_of(rows, width, monkeypatch):
    """Blocks of so many rows."""
    monkeypatch.setattr(blocks, "BLOCK", rows * width // torch.get_num_threads())


def inputs(*shapes):
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def assert_equal(found, expected):
    """Up to the order of the sums over rows."""
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 3, 100], ids=["row-by-row", "a-rest", "one-block"])
def test_the_same_values_and_gradients(rows, monkeypatch):
    in_blocks_of(rows, 4, monkeypatch)
    gain, x, y = inputs((4,), (7, 4), (7, 2, 4))
    calls = []

    def function(gain, x, y):
        calls.append((len(x), torch.is_grad_enabled()))
        return (x * gain).exp(), y.sin() * x[:, None]

    wide, deep = function(gain, x, y)
    weights = torch.randn_like(wide), torch.randn_like(deep)
    expected = torch.autograd.grad((wide * weights[0]).sum() + (deep * weights[1]).sum(), (gain, x, y))
    calls.clear()
    results = recompute(function, 4, [gain], [x, y])
    assert_equal(results, (wide, deep))
    assert sum(count for count, _ in calls) == 7 and not any(grad for _, grad in calls)
    calls.clear()
    found = torch.autograd.grad((results[0] * weights[0]).sum() + (results[1] * weights[1]).sum(), (gain, x, y))
    assert_equal(found, expected)
    assert max(count for count, _ in calls) == min(rows, 7) and all(grad for _, grad in calls)


def test_a_result_that_nothing_came_of(monkeypatch):
    """And an input without a gradient, and one that the other result does not depend on."""
    in_blocks_of(2, 3, monkeypatch)
    x, y, z = inputs((5, 3), (5, 3), (5, 3))
    first, _ = recompute(lambda x, y, z: (x * z, y.exp()), 3, [], [x, y, z.detach()])
    first.sum().backward()
    assert torch.equal(x.grad, z) and torch.equal(y.grad, torch.zeros_like(y)) and z.grad is None


@pytest.mark.parametrize(
    ("frozen", "rows"), [("", 2), ("", 100), ("weight", 2), ("bias", 100), ("rows", 2), ("rows", 100)]
)
def test_a_product(frozen, rows, monkeypatch):
    in_blocks_of(rows, 3, monkeypatch)
    tensors = dict(zip(("shift", "weight", "bias", "rows"), inputs((3,), (2, 3), (2,), (5, 3)), strict=True))
    if frozen:
        tensors[frozen].requires_grad_(False)
    asked = [each for each in tensors.values() if each.requires_grad]
    shift, weight, bias, x = tensors.values()
    grad = torch.randn(5, 2, dtype=torch.float64)
    plain = (x - shift).sin() @ weight.t() + bias
    recipe = RowRecipe(lambda shift, x: ((x - shift).sin(),), 3, 1, "cpu")
    made = product(recipe, (shift, x), weight, bias)
    assert_equal([made], [plain])
    assert_equal(torch.autograd.grad(made, asked, grad), torch.autograd.grad(plain, asked, grad))


def test_a_product_under_autocast():
    """Gradients are those of a product of bfloat16, in the dtype of what they belong to."""
    weight, x = (torch.randn(shape, requires_grad=True) for shape in ((6, 4), (5, 4)))
    found = []
    for call in (
        lambda: torch.nn.functional.linear(x.sin(), weight),
        lambda: product(RowRecipe(lambda x: (x.sin(),), 4, 0, "cpu"), (x,), weight, None),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            made = call()
        found.append((made, *torch.autograd.grad(made, (weight, x), torch.ones_like(made))))
    assert found[0][0].dtype == torch.bfloat16 and found[1][1].dtype == torch.float32
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_a_function_is_computed_again_under_the_autocast_of_its_forward():
    weight, x = (torch.randn(shape, requires_grad=True) for shape in ((4, 6), (5, 4)))
    found, dtypes = [], []

    def function(weight, x):
        dtypes.append((x @ weight).dtype)
        return ((x @ weight).float().exp(),)

    for call in (function, lambda weight, x: recompute(function, 6, [weight], [x])):
        with torch.autocast("cpu", torch.bfloat16):
            (made,) = call(weight, x)
        found.append((made, *torch.autograd.grad(made, (weight, x), torch.ones_like(made))))
    assert dtypes == [torch.bfloat16] * 3
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def kept_and_not(latent, mu, center="none", hard=False):
    """A product with a weight that is kept, and one with the same weight that is computed again."""
    pair, units = get_pair("bnn++"), RowUnits(center=center)
    yield lambda x, bias: torch.nn.functional.linear(x, quantize(latent, mu, pair, units, hard=hard), bias)
    yield lambda x, bias: linear(x, recomputed_weight(latent, mu, pair, units, hard=hard), bias)


@pytest.mark.parametrize(
    ("hard", "center"), [(False, "none"), (True, "none"), (False, "remove"), (True, "restore"), (False, "restore")]
)
def test_a_weight_that_is_computed_again(hard, center):
    """What a layer computes, and its first and second derivatives, do not depend on whether its weight was kept."""
    x, latent, bias, grad = inputs((2, 5, 3), (4, 3), (4,), (2, 5, 4))
    mu, found = torch.tensor(1.7, dtype=torch.float64), []
    for call in kept_and_not(latent, mu, center, hard):
        made = call(x, bias)
        first = torch.autograd.grad(made, (x, latent, bias), grad, create_graph=True)
        second = torch.autograd.grad(sum(each.square().sum() for each in first), (x, latent, grad))
        found.append((made, *first, *second))
    assert_equal(*found)


@pytest.mark.parametrize("frozen", ["bias", "x"])
def test_a_weight_that_is_computed_again_beside_what_is_frozen(frozen):
    tensors = dict(zip(("x", "latent", "bias"), inputs((5, 3), (4, 3), (4,)), strict=True))
    tensors[frozen].requires_grad_(False)
    x, latent, bias = tensors.values()
    asked = [each for each in tensors.values() if each.requires_grad]
    calls = kept_and_not(latent, torch.tensor(1.7))
    assert_equal(*(torch.autograd.grad(call(x, bias).sin().sum(), asked) for call in calls))


def test_where_a_weight_is_kept():
    """Without a gradient there is nothing to save, and on the meta device, as on accelerators, memory is not short."""
    latent, mu, pair = torch.randn(4, 3), torch.tensor(1.7), get_pair("bnn++")
    assert recomputed_weight(latent, mu, pair, RowUnits()) is None
    assert recomputed_weight(latent.to("meta").requires_grad_(), mu, pair, RowUnits()) is None
    layer = BinaryLinear(6, 4, pair=pair)
    layer.weight.requires_grad_(False)
    assert layer(torch.randn(2, 6)).grad_fn is not None and torch.equal(
        layer.forward_weight(), layer.effective_weight()
    )
    layer.requires_grad_(True).waits = frozenset({"weight"})
    assert layer.forward_weight() is layer.weight


def test_a_weight_that_is_computed_again_has_the_mu_of_its_forward():
    """mu moves in place between two forwards and their common backward."""
    x, latent = inputs((5, 3), (4, 3))
    found = []
    for which in range(2):
        mu = torch.tensor(1.0, dtype=torch.float64)
        first = list(kept_and_not(latent, mu))[which](x, None)
        mu.fill_(5.0)
        second = list(kept_and_not(latent, mu))[which](x, None)
        mu.fill_(20.0)
        found.append(torch.autograd.grad((first * second).sum(), (x, latent)))
    assert_equal(*found)


def test_no_second_derivative():
    (x,) = inputs((5, 3))
    (made,) = recompute(lambda x: (x.exp(),), 3, [], [x])
    with pytest.raises(ModelStateError, match="leave out create_graph"):
        torch.autograd.grad(made.sum(), x, create_graph=True)


@pytest.mark.parametrize("activations", ["float", "int8", "int4", "sign", "elastic"])
def test_a_linear_layer_keeps_its_input_and_its_latent_weight_only(activations):
    layer = BinaryLinear(64, 32, pair=get_pair("bnn++"), activations=activations).train()
    x = torch.randn(100, 64, requires_grad=True)
    elements, _ = kept(lambda: layer(x))
    assert 100 * 64 + 32 * 64 <= elements <= 100 * 64 + 32 * 64 + 300


def test_gradient_checkpointing_saves_on_top():
    """Its hooks see what a layer saves: of two layers nothing is kept but the input of the first."""
    layers = [BinaryLinear(64, 64, pair=get_pair("bnn++"), activations=name).train() for name in ("sign", "float")]
    x = torch.randn(100, 64, requires_grad=True)

    def both(x):
        return layers[1](layers[0](x))

    elements, result = kept(lambda: checkpoint(both, x, use_reentrant=False))
    assert elements <= 100 * 64 + 100
    asked = (x, *layers[0].parameters(), *layers[1].parameters())
    for one, other in zip(*(torch.autograd.grad(each.sin().sum(), asked) for each in (result, both(x))), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("attention", [int8_attention, binary_attention], ids=["int8", "binary"])
def test_attention_keeps_no_probabilities(attention):
    module = torch.nn.Identity().train()
    q, k, v = (torch.randn(1, 2, 200, 4, requires_grad=True) for _ in range(3))
    elements, _ = kept(lambda: attention(module, q, k, v, None)[0])
    assert elements <= 4 * q.numel() < 2 * 200 * 200


def test_a_few_tokens_at_a_time_are_all_of_them(monkeypatch):
    """Of a layer with everything learned, and of an attention with a mask, a bias and dropout."""
    layer = BinaryLinear(64, 64, pair=get_pair("bnn++"), activations="sign", epilogue=Epilogue(True, True)).train()
    layer.activation.calibrated = True
    x, bias = torch.randn(3, 5, 64, requires_grad=True), torch.randn(1, 2, 5, 5, requires_grad=True)
    mask = torch.rand(3, 1, 5, 5) > 0.2
    module = torch.nn.Identity().train()
    found = []
    for rows in (1, 100):
        in_blocks_of(rows, 64, monkeypatch)
        torch.manual_seed(0)
        q = layer(x).view(3, 5, 2, 32).transpose(1, 2)
        made, _ = binary_attention(module, q, q * 2, q + 1, mask, dropout=0.3, position_bias=bias)
        asked = (x, bias, *layer.parameters())
        found.append((made, *torch.autograd.grad(made.square().sum(), asked)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


ROWS, COLUMNS = (3, 50), 24
FORMATS = ["int8", "int4", "uint4", "sign", "elastic"]


def layer_of(activations, pair="bireal", **kind):
    layer = BinaryLinear(COLUMNS, 5, pair=get_pair("bnn++"), activations=activations, activation_pair=get_pair(pair))
    for name, parameter in layer.activation.named_parameters():
        with torch.no_grad():
            parameter.copy_(torch.linspace(0.2, 0.4, len(parameter)) if name == "threshold" else torch.tensor([0.6]))
    return layer.to(**kind)


def recipe_of(layer, rows, hard=False):
    return kernel_recipe(layer.activation.levels(hard), layer.activation.numbers(), rows)


def step(layer, x):
    """The output, and the gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    result = layer(x)
    result.backward(torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result).sin())
    return [result.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]


CASES = [
    *((activations, "bireal", hard, 0.3) for activations in FORMATS for hard in (False, True)),
    *(("sign", pair, False, 4.0) for pair in ("bnn", "bnn++", "bireal++", "tanh")),
    *(("elastic", pair, True, 4.0) for pair in ("bnn", "bnn++", "bireal++", "tanh")),
    ("elastic", "bnn++", False, 0.3),
]


@pytest.mark.parametrize(("activations", "pair", "hard", "mu"), CASES)
def test_kernels_compute_what_operators_do(activations, pair, hard, mu, monkeypatch):
    layer = layer_of(activations, pair)
    layer.hardened = hard
    layer.activation.mu.fill_(mu)
    x = torch.randn(*ROWS, COLUMNS)
    x[0].relu_()  # zeros are on the lower bound of some grids
    assert recipe_of(layer, x, hard) is not None
    found = step(layer, x)
    layer.zero_grad()
    monkeypatch.setattr("proxbit.nn.activation_quantizer.kernel_recipe", lambda *_: None)
    for one, other in zip(found, step(layer, x), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("activations", ["int8", "uint4", "sign"])
def test_kernels_under_autocast(activations, monkeypatch):
    """The product is one of fewer bits; the levels are made of the input as it is."""
    layer, x = layer_of(activations), torch.randn(*ROWS, COLUMNS)
    with torch.autocast("cpu", torch.bfloat16):
        assert recipe_of(layer, x) is not None
        found = step(layer, x)
        layer.zero_grad()
        monkeypatch.setattr("proxbit.nn.activation_quantizer.kernel_recipe", lambda *_: None)
        expected = step(layer, x)
    assert found[0].dtype == torch.bfloat16
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_where_operators_are_used_instead_of_kernels():
    x = torch.randn(4, COLUMNS)
    sign = layer_of("sign")
    for rows in (x.double(), x.bfloat16(), x[:0], x.expand(2, 4, COLUMNS).transpose(0, 1), x.to("meta")):
        assert recipe_of(sign, rows) is None
    assert recipe_of(layer_of("sign", dtype=torch.bfloat16), x) is None
    assert recipe_of(layer_of("float"), x) is None
    assert recipe_of(layer_of("sign", "dsq"), x) is None


@pytest.mark.parametrize("frozen", ["threshold", "scale", "input"])
def test_what_needs_no_gradient_has_none(frozen):
    layer, x = layer_of("sign"), torch.randn(4, COLUMNS)
    expected = step(layer, x)[1]
    layer.zero_grad()
    if frozen == "input":
        layer(x).sum().backward()
        assert layer.activation.threshold.grad is not None
        return
    getattr(layer.activation, frozen).requires_grad_(False)
    assert torch.equal(step(layer, x)[1], expected)
    assert [name for name, each in layer.named_parameters() if each.grad is None] == [f"activation.{frozen}"]
    assert all(each.grad is not None for name, each in layer.named_parameters() if not name.endswith(frozen))


def test_a_kernel_has_the_mu_of_its_forward_pass():
    layer, x = layer_of("sign", "bnn++"), torch.randn(4, COLUMNS, requires_grad=True)
    expected = step(layer, x.detach())[1]
    result = layer(x)
    layer.activation.mu.fill_(100.0)
    result.backward(torch.linspace(-1, 1, result.numel()).view_as(result).sin())
    assert torch.equal(x.grad, expected)
