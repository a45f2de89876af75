"""Sign-Swish and its derivative, against another formula of the same function."""

import math

import numpy as np
import pytest
import torch

from proxbit.errors import ConfigError
from proxbit.quantizers import transforms
from proxbit.quantizers.transforms import (
    IDENTITY_TRANSFORM,
    SIGN_SWISH,
    Transform,
    as_transform,
    sign_swish,
    sign_swish_derivative,
)

MUS = pytest.mark.parametrize("mu", [0.01, 0.3, 1.0, 5.0, 30.0])
GRID = np.linspace(-20, 20, 2001)
PEAK = 2.39936


def swish(p, mu):
    """tanh(u) + u sech(u)^2 with u = mu p / 2: the half-angle form of 2 (x s(x))' - 1 at x = mu p."""
    u = mu * p / 2
    return np.tanh(u) + u / np.cosh(u) ** 2


def swish_slope(p, mu):
    """mu sech(u)^2 (1 - u tanh(u))."""
    u = mu * p / 2
    return mu / np.cosh(u) ** 2 * (1 - u * np.tanh(u))


def of(function, p, mu):
    return function(torch.as_tensor(p, dtype=torch.float64), mu).numpy()


@MUS
def test_value(mu):
    np.testing.assert_allclose(of(sign_swish, GRID / mu, mu), swish(GRID / mu, mu), rtol=0, atol=2e-14)


@MUS
def test_derivative(mu):
    np.testing.assert_allclose(
        of(sign_swish_derivative, GRID / mu, mu), swish_slope(GRID / mu, mu), rtol=1e-11, atol=1e-14 * mu
    )


@MUS
def test_derivative_is_the_slope_of_the_value(mu):
    step = 1e-5 / mu
    p = GRID / mu
    slope = (of(sign_swish, p + step, mu) - of(sign_swish, p - step, mu)) / (2 * step)
    np.testing.assert_allclose(of(sign_swish_derivative, p, mu), slope, rtol=1e-8, atol=1e-9 * mu)


@MUS
def test_autograd_of_the_value_is_the_derivative(mu):
    p = torch.from_numpy(GRID / mu).requires_grad_()
    sign_swish(p, mu).sum().backward()
    np.testing.assert_allclose(p.grad.numpy(), of(sign_swish_derivative, GRID / mu, mu), rtol=1e-9, atol=1e-13 * mu)


@MUS
def test_odd_value_even_derivative_and_the_origin(mu):
    p = GRID[GRID > 0] / mu
    np.testing.assert_allclose(of(sign_swish, -p, mu), -of(sign_swish, p, mu), rtol=0, atol=2e-14)
    np.testing.assert_allclose(of(sign_swish_derivative, -p, mu), of(sign_swish_derivative, p, mu), rtol=1e-13)
    assert of(sign_swish, [0.0, -0.0], mu).tolist() == [0.0, 0.0]
    np.testing.assert_allclose(of(sign_swish_derivative, [0.0, -0.0], mu), [mu, mu], rtol=1e-15)


@MUS
def test_peak_and_sign_change_of_the_derivative(mu):
    """The function rises up to |mu p| = 2.39936, where it is 1.19968, and falls to 1 from there."""
    before, after = (PEAK - 1e-4) / mu, (PEAK + 1e-4) / mu
    assert (of(sign_swish_derivative, [before, -before], mu) > 0).all()
    assert (of(sign_swish_derivative, [after, -after], mu) < 0).all()
    assert of(sign_swish, PEAK / mu, mu) == pytest.approx(1.19968, abs=5e-6)
    far = of(sign_swish, np.linspace(PEAK, 40, 500) / mu, mu)
    assert (np.diff(far) <= 2e-14).all() and (np.diff(far)[:250] < 0).all()
    assert far[-1] == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@MUS
def test_finite_and_hard_at_the_ends_of_the_number_line(mu, dtype):
    ends = [torch.finfo(dtype).max, -torch.finfo(dtype).max, math.inf, -math.inf]
    p = torch.tensor(ends, dtype=dtype)
    value, slope = sign_swish(p, mu), sign_swish_derivative(p, mu)
    assert value.dtype == slope.dtype == dtype
    assert value.tolist() == [1, -1, 1, -1]
    assert torch.isfinite(slope).all()
    assert slope.double().abs().max() < 1e-20


@pytest.mark.parametrize("huge", [1e30, math.inf])
def test_huge_values_in_single_precision(huge):
    p = torch.tensor([huge, -huge])
    assert sign_swish(p, 5.0).tolist() == [1, -1]
    assert sign_swish_derivative(p, 5.0).abs().max() < 1e-20


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_lower_precision_is_near_the_exact_value(dtype):
    p = torch.linspace(-6, 6, 201, dtype=dtype)
    error = 16 * torch.finfo(dtype).eps
    mu = torch.tensor(1.5, dtype=torch.float64)
    exact = p.double().numpy()
    np.testing.assert_allclose(sign_swish(p, mu).double().numpy(), swish(exact, 1.5), rtol=0, atol=error)
    np.testing.assert_allclose(
        sign_swish_derivative(p, mu).double().numpy(), swish_slope(exact, 1.5), rtol=0, atol=2 * error
    )


def test_sharper_is_nearer_to_the_sign():
    """The distance to the sign, averaged over [-1, 1], falls as 1 / mu."""
    p = np.linspace(-1, 1, 20001)
    gaps = [np.abs(of(sign_swish, p, mu) - np.where(p >= 0, 1, -1)).mean() for mu in (20.0, 40.0, 80.0)]
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.01)
    assert gaps[1] / gaps[2] == pytest.approx(2, rel=0.01)


def test_identity_transform():
    p = torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(IDENTITY_TRANSFORM(p, 3.0), p)
    slope = IDENTITY_TRANSFORM.derivative(p, 3.0)
    assert slope.dtype == p.dtype
    assert slope.tolist() == [[1.0] * 4] * 3


def test_a_transform_is_its_function():
    assert SIGN_SWISH.derivative is sign_swish_derivative
    double = Transform("double", lambda p, mu: 2 * p, lambda p, mu: p * 0 + 2, "2p", "2", "none")
    assert double(torch.tensor([1.5]), 1.0).item() == 3.0


SMOOTH = ["EDE", "FOURIER", "IDENTITY_TRANSFORM", "POLYNOMIAL", "SIGN_SWISH", "SINE", "TANH"]


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("mu", [0.7, 5.0])
def test_each_derivative_is_the_slope_and_the_gradient_of_its_function(name, mu):
    """By central differences, and by autograd, which users of a transform take. No point is at a kink."""
    transform, step = getattr(transforms, name), 1e-6
    p = np.linspace(-3, 3, 200)
    slope = (of(transform, p + step, mu) - of(transform, p - step, mu)) / (2 * step)
    np.testing.assert_allclose(of(transform.derivative, p, mu), slope, rtol=1e-6, atol=1e-8)
    at = torch.from_numpy(p).requires_grad_()
    transform(at, mu).sum().backward()
    np.testing.assert_allclose(at.grad.numpy(), slope, rtol=1e-6, atol=1e-8)


def cubic(p, mu):
    return mu * p**3


def test_a_plain_function_is_differentiated():
    """Also where gradients are off, and without a trace in what it was given."""
    transform, p = as_transform(cubic), torch.linspace(-2, 2, 9, dtype=torch.float64)
    for given in (p, p.clone().requires_grad_()):
        with torch.no_grad():
            slope = transform.derivative(given, 2.0)
        np.testing.assert_allclose(slope.numpy(), 6 * p.numpy() ** 2, rtol=1e-14)
        assert not slope.requires_grad and given.grad is None
    assert not transform.derivative(p, 2.0).requires_grad and not p.requires_grad
    assert transform.name == "cubic"
    assert transform.formula == "T(p) = cubic(p, mu)" and "cubic" in transform.derivative_formula
    assert torch.equal(transform(p, 2.0), 2 * p**3)


def test_the_derivative_of_a_plain_function_has_derivatives():
    p = torch.linspace(-2, 2, 9, dtype=torch.float64, requires_grad=True)
    slope = as_transform(cubic).derivative(p, 2.0)
    (second,) = torch.autograd.grad(slope.sum(), p)
    np.testing.assert_allclose(second.numpy(), 12 * p.detach().numpy(), rtol=1e-14)


def test_a_transform_and_its_own_derivative_are_kept():
    assert as_transform(SIGN_SWISH) is SIGN_SWISH

    class Doubled:
        def __call__(self, p, mu):
            return 2 * p

        def derivative(self, p, mu):
            return 0 * p + 7

    transform = as_transform(Doubled())
    assert transform.name == "Doubled"
    assert transform.derivative(torch.tensor([1.5]), 1.0).item() == 7


def test_a_function_without_a_derivative_says_what_to_do():
    stairs = as_transform(lambda p, mu: torch.where(p.detach() >= 0, 1.0, -1.0))
    with pytest.raises(ConfigError, match="give it one as its attribute `derivative`"):
        stairs.derivative(torch.ones(3), 1.0)
