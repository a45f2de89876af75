"""The table of functions: values, derivatives, what is promised of them, and the kernels that go by their names."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import proxbit.kernels
from pair_formulas import swish, swish_slope
from proxbit.errors import ConfigError
from proxbit.kernels.interface import FUNCTIONS as COMPILED
from proxbit.quantizers import FUNCTIONS, Function
from proxbit.quantizers.functions import (
    BINARYRELAX,
    BOX,
    CLIP,
    FOURIER,
    IDENTITY,
    ONE,
    PERIOD,
    POLYNOMIAL,
    SIGN,
    SIGN_SWISH,
    TANH,
    as_function,
)

KERNELS = Path(proxbit.kernels.__file__).parent
MUS = (0.01, 1.0, 30.0)
GRID = np.linspace(-20, 20, 2001)
PEAK = 2.39936


def of(function, w, mu):
    return function(torch.as_tensor(w, dtype=torch.float64), mu).numpy()


def test_the_kernels_know_the_functions_of_the_table_by_name():
    """One list in the table, in Python, in C and in Triton; the order is that of the enum."""
    rows = [FUNCTIONS.get(name) for name in FUNCTIONS]
    assert {row.compiled for row in rows if row.compiled is not None} == set(COMPILED)
    (enum,) = {
        found[1]
        for file in KERNELS.rglob("*.h")
        if (found := re.search(r"enum proxbit_function \{(.*?)\}", file.read_text(), re.DOTALL))
    }
    names = re.findall(r"PROXBIT_(\w+) = (\d+)", enum)
    expected = [*(re.sub("[- ]", "_", name).upper() for name in COMPILED), "FUNCTIONS"]
    assert names == [(name, str(index)) for index, name in enumerate(expected)]
    triton = "".join(file.read_text() for file in KERNELS.glob("triton/*.py"))
    assert set(re.findall(r'FUNCTION == "([^"]+)"', triton)) == set(COMPILED)


def test_a_row_is_its_function_and_says_what_it_is():
    for name in FUNCTIONS:
        row, w = FUNCTIONS.get(name), torch.linspace(-2, 2, 9, dtype=torch.float64)
        assert row.name == name and row.formula
        assert torch.equal(row(w, 1.5), row.function(w, 1.5))
    assert TANH.equation("T", "p") == "T(p) = tanh(mu p)"
    assert FOURIER.slope.equation("B") == "B(w) = (2/pi) sum_{i=0..mu} cos((2i+1) w/2)"


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if FUNCTIONS.get(name).derivative is not None])
def test_each_derivative_is_the_slope_and_the_gradient_of_its_function(name):
    """By central differences, and by autograd. No point is at a kink."""
    row, step, w = FUNCTIONS.get(name), 1e-6, np.linspace(-3, 3, 200)
    for mu in (0.7, 5.0):
        slope = (of(row, w + step, mu) - of(row, w - step, mu)) / (2 * step)
        np.testing.assert_allclose(of(row.derivative, w, mu), slope, rtol=1e-6, atol=1e-8)
        at = torch.from_numpy(w).requires_grad_()
        row(at, mu).sum().backward()
        np.testing.assert_allclose(at.grad.numpy(), slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if FUNCTIONS.get(name).non_decreasing])
def test_what_promises_it_never_decreases_and_is_odd(name):
    row, w = FUNCTIONS.get(name), torch.arange(-192, 193, dtype=torch.float64) / 64
    for mu in (0.3, 1.0, 40.0):
        p, nonzero = row(w, mu), w != 0
        assert p.shape == w.shape and (p.diff() >= -1e-14).all()
        torch.testing.assert_close(row(-w, mu)[nonzero], -p[nonzero], rtol=0, atol=1e-14)


def test_promises():
    assert {FUNCTIONS.get(name) for name in FUNCTIONS if FUNCTIONS.get(name).non_decreasing} == {
        BINARYRELAX,
        BOX,
        CLIP,
        IDENTITY,
        PERIOD,
        SIGN,
        TANH,
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_dtype_is_kept_whatever_mu_is(name, dtype):
    """mu is a float64 tensor without dimensions in the layers; it must not raise the precision of a weight."""
    row, w = FUNCTIONS.get(name), torch.tensor([[-1.25, -0.5], [0.0, 0.75]], dtype=dtype)
    for mu in (1.5, torch.tensor(1.5, dtype=torch.float64)):
        value = row(w, mu)
        assert value.dtype == dtype and value.shape == w.shape
        exact = row(w.double(), 1.5)
        torch.testing.assert_close(value.double(), exact, rtol=0, atol=64 * torch.finfo(dtype).eps)


def test_soft_maps_approach_the_sign():
    """Away from 0 the distance to the sign falls as mu grows."""
    w = torch.tensor([-1.5, -0.2, 0.2, 1.5], dtype=torch.float64)
    for row in (BINARYRELAX, CLIP, TANH):
        gaps = [float((row(w, mu) - w.sgn()).abs().max()) for mu in (1.0, 2.0, 4.0, 1e6)]
        assert all(later < earlier for earlier, later in zip(gaps[:-1], gaps[1:])) and gaps[-1] < 1e-5


def test_function_of_a_function():
    """The identity and the constant need none; compositions of the table are found again."""
    assert TANH.after(IDENTITY) is TANH and IDENTITY.after(TANH) is TANH and ONE.after(TANH) is ONE
    assert FOURIER.after(PERIOD) is FUNCTIONS.get("series")
    assert FOURIER.after(BOX).compiled is None and POLYNOMIAL.after(PERIOD).compiled is None
    w = torch.linspace(-2, 2, 9, dtype=torch.float64)
    made = TANH.after(BOX)
    assert made.compiled is None and "tanh(mu p), p(w) = clip(w, -1/mu, 1/mu)" in made.formula
    assert torch.equal(made(w, 2.0), (2.0 * w.clamp(-0.5, 0.5)).tanh())


@pytest.mark.parametrize("mu", MUS)
def test_sign_swish(mu):
    """Against the half-angle form: odd, exact at 0; up to 1.19968 at |mu w| = 2.39936, and falling to 1 from there."""
    w = GRID / mu
    np.testing.assert_allclose(of(SIGN_SWISH, w, mu), swish(w, mu), rtol=0, atol=2e-14)
    np.testing.assert_allclose(of(SIGN_SWISH.slope, w, mu), swish_slope(w, mu), rtol=1e-11, atol=1e-14 * mu)
    assert of(SIGN_SWISH, [0.0, -0.0], mu).tolist() == [0.0, 0.0]
    np.testing.assert_allclose(of(SIGN_SWISH.slope, [0.0, -0.0], mu), [mu, mu], rtol=1e-15)
    before, after = (PEAK - 1e-4) / mu, (PEAK + 1e-4) / mu
    assert (of(SIGN_SWISH.slope, [before, -before], mu) > 0).all()
    assert (of(SIGN_SWISH.slope, [after, -after], mu) < 0).all()
    assert of(SIGN_SWISH, PEAK / mu, mu) == pytest.approx(1.19968, abs=5e-6)
    far = of(SIGN_SWISH, np.linspace(PEAK, 40, 500) / mu, mu)
    assert (np.diff(far) <= 2e-14).all() and (np.diff(far)[:250] < 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_sign_swish_is_finite_and_hard_at_the_ends_of_the_number_line(dtype):
    largest = torch.finfo(dtype).max
    for mu in MUS:
        w = torch.tensor([largest, -largest, math.inf, -math.inf], dtype=dtype)
        assert SIGN_SWISH(w, mu).tolist() == [1, -1, 1, -1]
        assert SIGN_SWISH.slope(w, mu).double().abs().max() < 1e-20


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_sign_swish_in_lower_precision_is_near_the_exact_value(dtype):
    w, mu, error = (
        torch.linspace(-6, 6, 201, dtype=dtype),
        torch.tensor(1.5, dtype=torch.float64),
        torch.finfo(dtype).eps,
    )
    exact = w.double().numpy()
    for row, expected in ((SIGN_SWISH, swish(exact, 1.5)), (SIGN_SWISH.slope, swish_slope(exact, 1.5))):
        np.testing.assert_allclose(row(w, mu).double().numpy(), expected, rtol=0, atol=32 * error)


def test_sharper_is_nearer_to_the_sign():
    """The distance to the sign, averaged over [-1, 1], falls as 1 / mu."""
    w = np.linspace(-1, 1, 20001)
    gaps = [np.abs(of(SIGN_SWISH, w, mu) - np.where(w >= 0, 1, -1)).mean() for mu in (20.0, 40.0, 80.0)]
    np.testing.assert_allclose([gaps[0] / gaps[1], gaps[1] / gaps[2]], 2, rtol=0.01)


def cubic(w, mu):
    return mu * w**3


def test_a_plain_function_is_differentiated():
    """Also where gradients are off, and without a trace in what it was given; the derivative has one itself."""
    row, w = as_function(cubic), torch.linspace(-2, 2, 9, dtype=torch.float64)
    for given in (w, w.clone().requires_grad_()):
        with torch.no_grad():
            slope = row.slope(given, 2.0)
        np.testing.assert_allclose(slope.numpy(), 6 * w.numpy() ** 2, rtol=1e-14)
        assert not slope.requires_grad and given.grad is None
    assert not row.slope(w, 2.0).requires_grad and not w.requires_grad
    assert (row.name, row.equation("T", "p")) == ("cubic", "T(p) = cubic(p, mu)") and "cubic" in row.slope.formula
    assert not row.non_decreasing and row.compiled is None
    at = w.clone().requires_grad_()
    (second,) = torch.autograd.grad(row.slope(at, 2.0).sum(), at)
    np.testing.assert_allclose(second.numpy(), 12 * w.numpy(), rtol=1e-14)


def test_a_function_and_its_own_derivative_are_kept():
    class Doubled:
        def __call__(self, w, mu):
            return 2 * w

        def derivative(self, w, mu):
            return 0 * w + 7

    assert as_function(SIGN_SWISH) is SIGN_SWISH and SIGN_SWISH.slope is SIGN_SWISH.derivative
    assert as_function(Doubled()).name == "Doubled"
    assert as_function(Doubled()).slope(torch.tensor([1.5]), 1.0).item() == 7
    cubic.derivative = POLYNOMIAL
    try:
        assert as_function(cubic).slope is POLYNOMIAL
    finally:
        del cubic.derivative


def test_a_function_without_a_derivative_says_what_to_do():
    stairs = as_function(lambda w, mu: torch.where(w.detach() >= 0, 1.0, -1.0))
    with pytest.raises(ConfigError, match="give it one as its attribute `derivative`"):
        stairs.slope(torch.ones(3), 1.0)


def test_the_names_that_were_renamed_make_functions():
    with pytest.warns(DeprecationWarning, match="is now proxbit.quantizers.Function"):
        old = [getattr(proxbit.quantizers, name) for name in ("ProximalMap", "Transform", "Surrogate")]
    half = old[0]("half", lambda w, mu: w / 2, "P(w) = w / 2", "here")
    double = old[1]("double", lambda p, mu: 2 * p, lambda p, mu: p * 0 + 2, "T(p) = 2 p", "T'(p) = 2", "there")
    mine = old[2](cubic, "F(w) = mu w^3")
    assert half.non_decreasing and (half.formula, half.source) == ("w / 2", "here")
    assert (double.equation("T", "p"), double.slope.equation("T'", "p")) == ("T(p) = 2 p", "T'(p) = 2")
    assert double.slope(torch.tensor([1.5]), 1.0).item() == 2
    assert isinstance(mine, Function) and (mine.name, mine.formula) == ("cubic", "mu w^3")
