"""Activations by the compiled kernels: as torch's operators have them, where those would be used."""

import pytest
import torch

from proxbit.nn import BinaryLinear
from proxbit.nn.levels import level_pass
from proxbit.quantizers import get_pair

ROWS, COLUMNS = (3, 50), 24
FORMATS = ["int8", "int4", "uint4", "sign", "elastic"]


def layer_of(activations, pair="bireal", **kind):
    layer = BinaryLinear(COLUMNS, 5, pair=get_pair("bnn++"), activations=activations, activation_pair=get_pair(pair))
    for name, parameter in layer.activation.named_parameters():
        with torch.no_grad():
            parameter.copy_(torch.linspace(0.2, 0.4, len(parameter)) if name == "threshold" else torch.tensor([0.6]))
    return layer.to(**kind)


def pass_of(layer, rows, hard=False):
    return level_pass(layer.activation.levels(hard), layer.activation.numbers(), rows)


def step(layer, x):
    """The output, and the gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    result = layer(x)
    result.backward(torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result).sin())
    return [result.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize("mu", [0.3, 4.0])
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("pair", ["bireal", "bnn", "bnn++", "bireal++", "tanh"])
@pytest.mark.parametrize("activations", FORMATS)
def test_the_same_as_by_operators(activations, pair, hard, mu, monkeypatch):
    layer = layer_of(activations, pair)
    layer.hardened = hard
    layer.activation.mu.fill_(mu)
    x = torch.randn(*ROWS, COLUMNS)
    x[0].relu_()  # zeros are on the lower bound of some grids
    assert pass_of(layer, x, hard) is not None
    found = step(layer, x)
    layer.zero_grad()
    monkeypatch.setattr("proxbit.nn.activation_quantizer.level_pass", lambda *_: None)
    for one, other in zip(found, step(layer, x), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("activations", FORMATS)
def test_under_autocast(activations, monkeypatch):
    """The product is one of fewer bits; the levels are made of the input as it is."""
    layer, x = layer_of(activations), torch.randn(*ROWS, COLUMNS)
    with torch.autocast("cpu", torch.bfloat16):
        assert pass_of(layer, x) is not None
        found = step(layer, x)
        layer.zero_grad()
        monkeypatch.setattr("proxbit.nn.activation_quantizer.level_pass", lambda *_: None)
        expected = step(layer, x)
    assert found[0].dtype == torch.bfloat16
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_where_the_operators_are_used():
    x = torch.randn(4, COLUMNS)
    sign = layer_of("sign")
    for rows in (x.double(), x.bfloat16(), x[:0], x.expand(2, 4, COLUMNS).transpose(0, 1), x.to("meta")):
        assert pass_of(sign, rows) is None
    assert pass_of(layer_of("sign", dtype=torch.bfloat16), x) is None
    assert pass_of(layer_of("float"), x) is None
    assert pass_of(layer_of("sign", "dsq"), x) is None


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


def test_a_backward_pass_sees_the_mu_of_its_forward_pass():
    layer, x = layer_of("sign", "bnn++"), torch.randn(4, COLUMNS, requires_grad=True)
    expected = step(layer, x.detach())[1]
    result = layer(x)
    layer.activation.mu.fill_(100.0)
    result.backward(torch.linspace(-1, 1, result.numel()).view_as(result).sin())
    assert torch.equal(x.grad, expected)
