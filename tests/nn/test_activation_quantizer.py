"""What activation quantizers have in common: floats as they are, and a product that keeps its input alone."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kept import kept_for_backward
from proxbit.errors import ConfigError
from proxbit.nn import ACTIVATIONS, ActivationQuantizer
from proxbit.nn.activations import make_activation
from proxbit.quantizers import get_pair


def test_floats_are_what_they_are():
    made, x = ActivationQuantizer(4), torch.randn(3, 4)
    assert made(x) is x and made.shift is None and not made.learns and made.numbers() == ()
    assert made.levels(hard=True) is None and made.levels(hard=False) is None
    with pytest.raises(ConfigError, match="they have no codes"):
        made.parts(x)


def test_a_pair_of_its_own():
    assert ActivationQuantizer(4).pair is get_pair("bireal")
    assert ActivationQuantizer(4, get_pair("bnn++")).mu == get_pair("bnn++").schedule[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["kernels", "operators"])
@pytest.mark.parametrize("activations", list(ACTIVATIONS))
def test_the_product_keeps_its_input_alone(activations, dtype):
    """The same as what `forward` makes times the weight, and of that nothing stays for the backward pass."""
    made = make_activation(activations, 64, dtype=dtype)
    weight, bias = torch.randn(5, 64, dtype=dtype, requires_grad=True), torch.randn(5, dtype=dtype, requires_grad=True)
    x = torch.randn(2, 40, 64, dtype=dtype, requires_grad=True)
    asked = [x, weight, bias, *made.parameters()]
    with kept_for_backward() as found:
        result = made.linear(x, weight, bias)
    held = found.total() // dtype.itemsize
    assert held <= x.numel() + weight.numel() + 2 * 64
    expected = torch.nn.functional.linear(made(x), weight, bias)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(result)
    ours, plain = (torch.autograd.grad(each, asked, grad, retain_graph=True) for each in (result, expected))
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.fixture
def hasty_threads():
    """Threads that take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("activations", ["sign", "elastic", "int4"])
def test_backward_passes_of_several_threads(activations, hasty_threads):
    """What is learned is replaced nowhere: each thread gets the gradients that it gets alone."""
    made = make_activation(activations, 64, dtype=torch.float64)
    weight, before = torch.randn(5, 64, dtype=torch.float64), dict(made.named_parameters())
    inputs = [torch.randn(7, 64, dtype=torch.float64) for _ in range(4)]

    def gradients(x):
        return torch.autograd.grad(made.linear(x, weight, None).square().sum(), list(before.values()))

    alone = [gradients(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for index, found in enumerate(pool.map(gradients, inputs * 25)):
            assert all(torch.equal(a, b) for a, b in zip(found, alone[index % 4], strict=True))
    assert all(made._parameters[name] is parameter for name, parameter in before.items())
