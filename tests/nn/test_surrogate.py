"""Two levels: those given or by F of a pair, with B of the pair as the gradient."""

import pytest
import torch

from proxbit.nn.surrogate import binarize_units, clip, straight_through
from proxbit.quantizers import get_pair


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("name", ["bireal", "bnn++", "ede"])
def test_values_and_gradients(name, hard):
    pair, mu = get_pair(name), torch.tensor(2.0, dtype=torch.float64)
    units = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    levels = torch.where(torch.rand(5, 7) > 0.5, 1.0, -1.0)
    result = binarize_units(units, levels, mu, pair, hard)
    expected = levels.double() if hard else pair.forward(units.detach(), mu)
    assert torch.equal(result.detach(), expected)
    grad = torch.randn(5, 7, dtype=torch.float64)
    mu_before = mu.clone()
    mu.fill_(99.0)  # A schedule moves on between forward and backward.
    result.backward(grad)
    torch.testing.assert_close(units.grad, pair.backward(units.detach(), mu_before) * grad)


def test_values_of_one_and_the_gradient_of_the_other():
    x, grad = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    units = 3 * x
    made = straight_through(units.detach().round(), units)
    assert torch.equal(made, (3 * x.detach()).round())
    made.backward(grad)
    assert torch.equal(x.grad, 3 * grad)


def test_what_is_clipped_has_no_gradient_and_the_bounds_have_one():
    """Whatever `Tensor.clamp` of this torch does there."""
    x = torch.tensor([-3.0, -2.0, -1.0, 4.0, 5.0, 6.0, torch.inf, torch.nan], requires_grad=True)
    made = clip(x, -2, 5)
    made.backward(torch.full_like(x, 3.0))
    assert made[:-1].tolist() == [-2, -2, -1, 4, 5, 5, 5] and bool(made[-1].isnan())
    assert x.grad.tolist() == [0, 3, 3, 3, 3, 0, 0, 0]
