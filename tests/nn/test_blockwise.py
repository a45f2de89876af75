"""What is computed again in the backward pass, some rows at a time: the same gradients, and less memory."""

import pytest
import torch

from kept import kept_for_backward
from proxbit import blocks
from proxbit.errors import ModelStateError
from proxbit.nn import BinaryLinear
from proxbit.nn.attention import binary_attention, int8_attention
from proxbit.nn.blockwise import Blockwise, linear
from proxbit.quantizers import get_pair, quantize


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
    results = Blockwise(function, 4)([gain], [x, y])
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
    first, _ = Blockwise(lambda x, y, z: (x * z, y.exp()), 3)([], [x, y, z.detach()])
    first.sum().backward()
    assert torch.equal(x.grad, z) and torch.equal(y.grad, torch.zeros_like(y)) and z.grad is None


@pytest.mark.parametrize("rows", [2, 100], ids=["blocks", "one-block"])
@pytest.mark.parametrize("frozen", ["", "weight", "bias", "rows"])
def test_a_product(frozen, rows, monkeypatch):
    in_blocks_of(rows, 3, monkeypatch)
    tensors = dict(zip(("shift", "weight", "bias", "rows"), inputs((3,), (2, 3), (2,), (5, 3)), strict=True))
    if frozen:
        tensors[frozen].requires_grad_(False)
    asked = [each for each in tensors.values() if each.requires_grad]
    shift, weight, bias, x = tensors.values()
    grad = torch.randn(5, 2, dtype=torch.float64)
    plain = (x - shift).sin() @ weight.t() + bias
    made = Blockwise(lambda shift, x: ((x - shift).sin(),), 3).times(weight, bias, [shift], x)
    assert_equal([made], [plain])
    assert_equal(torch.autograd.grad(made, asked, grad), torch.autograd.grad(plain, asked, grad))


def test_a_product_under_autocast():
    """Gradients are those of a product of bfloat16, in the dtype of what they belong to."""
    weight, x = (torch.randn(shape, requires_grad=True) for shape in ((6, 4), (5, 4)))
    found = []
    for product in (
        lambda: torch.nn.functional.linear(x.sin(), weight),
        lambda: Blockwise(lambda x: (x.sin(),), 4).times(weight, None, [], x),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            made = product()
        found.append((made, *torch.autograd.grad(made, (weight, x), torch.ones_like(made))))
    assert found[0][0].dtype == torch.bfloat16 and found[1][1].dtype == torch.float32
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("center", ["none", "remove", "restore"])
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_a_weight_that_is_made_again(hard, center):
    """What a layer computes, and its first and second derivatives, do not depend on whether its weight was kept."""
    x, latent, bias, grad = inputs((2, 5, 3), (4, 3), (4,), (2, 5, 4))
    mu = torch.tensor(1.7, dtype=torch.float64)
    found = []
    for product in (torch.nn.functional.linear, linear):
        made = product(x, quantize(latent, mu, get_pair("bnn++"), hard=hard, center=center), bias)
        first = torch.autograd.grad(made, (x, latent, bias), grad, create_graph=True)
        second = torch.autograd.grad(sum(each.square().sum() for each in first), (x, latent, grad))
        found.append((made, *first, *second))
    assert_equal(*found)


@pytest.mark.parametrize("frozen", ["latent", "bias", "x"])
def test_a_weight_that_is_made_again_beside_what_is_frozen(frozen):
    tensors = dict(zip(("x", "latent", "bias"), inputs((5, 3), (4, 3), (4,)), strict=True))
    tensors[frozen].requires_grad_(False)
    x, latent, bias = tensors.values()
    asked = [each for each in tensors.values() if each.requires_grad]
    weight = quantize(latent, torch.tensor(1.7), get_pair("bnn++"))
    found = [product(x, weight, bias).sin().sum() for product in (torch.nn.functional.linear, linear)]
    assert_equal(*(torch.autograd.grad(each, asked, retain_graph=True) for each in found))


def test_a_weight_that_is_made_again_has_the_mu_of_its_forward():
    """mu moves in place between two forwards and their common backward."""
    x, latent = inputs((5, 3), (4, 3))
    found = []
    for product in (torch.nn.functional.linear, linear):
        mu = torch.tensor(1.0, dtype=torch.float64)
        first = product(x, quantize(latent, mu, get_pair("bnn++")), None)
        mu.fill_(5.0)
        second = product(x, quantize(latent, mu, get_pair("bnn++")), None)
        mu.fill_(20.0)
        found.append(torch.autograd.grad((first * second).sum(), (x, latent)))
    assert_equal(*found)


def test_no_second_derivative():
    (x,) = inputs((5, 3))
    (made,) = Blockwise(lambda x: (x.exp(),), 3)([], [x])
    with pytest.raises(ModelStateError, match="leave out create_graph"):
        torch.autograd.grad(made.sum(), x, create_graph=True)


@pytest.mark.parametrize("activations", ["float", "int8", "int4", "sign", "elastic"])
def test_a_linear_layer_keeps_its_input_and_its_latent_weight_only(activations):
    layer = BinaryLinear(64, 32, pair=get_pair("bnn++"), activations=activations).train()
    x = torch.randn(100, 64, requires_grad=True)
    elements, _ = kept(lambda: layer(x))
    assert 100 * 64 + 32 * 64 <= elements <= 100 * 64 + 32 * 64 + 300


@pytest.mark.parametrize("attention", [int8_attention, binary_attention], ids=["int8", "binary"])
def test_attention_keeps_no_probabilities(attention):
    module = torch.nn.Identity().train()
    q, k, v = (torch.randn(1, 2, 200, 4, requires_grad=True) for _ in range(3))
    elements, _ = kept(lambda: attention(module, q, k, v, None)[0])
    assert elements <= 4 * q.numel() < 2 * 200 * 200


def test_a_few_tokens_at_a_time_are_all_of_them(monkeypatch):
    """Of a layer with everything learned, and of an attention with a mask, a bias and dropout."""
    layer = BinaryLinear(64, 64, pair=get_pair("bnn++"), activations="sign", rprelu=True, residual=True).train()
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
