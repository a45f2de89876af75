"""Activations on levels, at every ISA that this machine runs, against numpy."""

import numpy as np
import pytest
import torch

import proxbit.kernels
from latent_rows import FORMULAS, number
from proxbit.analysis.timing import torch_threads
from proxbit.errors import PackedFormatError
from proxbit.kernels import INT8, Levels, quantize_activations
from proxbit.kernels.cpu import isas
from proxbit.kernels.interface import FUNCTIONS, KINDS, find_library

LIBRARY = find_library(proxbit.kernels.__path__)
ISAS = isas(LIBRARY) if LIBRARY else {}
SHAPES = [(1, 1), (3, 5), (70, 17), (32, 256), (5, 1001)]
TWO_LEVELS = KINDS[2:]
isa = pytest.mark.parametrize("isa", ISAS.values(), ids=list(ISAS))


def arguments(kind, shape, scale=0.7):
    """x, scale and threshold, as a kind has them; among them an input on every boundary."""
    x, threshold = torch.randn(shape) * 2, torch.randn(shape[1]) / 4
    if kind in TWO_LEVELS:
        x[0] = threshold if kind == "signs" else threshold + scale / 2
        return x, torch.tensor([scale]), threshold
    return x, torch.tensor([scale]), None


def made(isa, how, x, scale, threshold, grad):
    """All that a forward and a backward pass make: values, and the gradients of x, scale and threshold."""
    values, back = torch.full_like(x, torch.nan), grad.clone()
    learned = isa.level_gradient(how, x, scale, threshold, values, back)
    assert torch.equal(values, isa.level_values(how, x, scale, threshold))
    return values, back, *learned


def assert_close(found, expected, terms=None):
    """To the last digits; a sum, by the sizes of all that is added."""
    bound = 2e-6 * (np.abs(expected) + 1 if terms is None else np.abs(terms).sum(axis=0) + 1e-6)
    assert (np.abs(found.double().numpy() - expected) <= bound).all()


@isa
@pytest.mark.parametrize("shape", [*((rows, columns) for rows, columns in SHAPES), (2, 3, 64)], ids=str)
def test_int8(isa, shape):
    """Each row by its own largest value; NaN stays in its row, and the gradient is not touched."""
    x = torch.randn(shape) * 3
    x.view(-1, shape[-1])[-1, 0] = torch.nan if shape[-1] == 64 else 0.0
    q, step = quantize_activations(x)
    torch.testing.assert_close(isa.level_values(INT8, x, None, None), q * step, rtol=0, atol=0, equal_nan=True)
    values, grad = torch.empty_like(x), torch.ones_like(x)
    assert isa.level_gradient(INT8, x, None, None, values, grad) == (None, None) and bool((grad == 1).all())
    torch.testing.assert_close(values, q * step, rtol=0, atol=0, equal_nan=True)


@isa
@pytest.mark.parametrize(("shape", "codes"), list(zip(SHAPES, [(-8, 7), (0, 15)] * 3, strict=False)), ids=str)
def test_a_grid(isa, shape, codes):
    """LSQ: straight through inside, and to the step q - x / step inside, q outside."""
    x, step, _ = arguments("grid", shape, 0.25)
    if x.numel() > 4:
        x.view(-1)[:4] = torch.tensor([codes[0] * 0.25, codes[1] * 0.25, 0.125, 0.375])
    grad = torch.randn(shape)
    values, back, of_step, nothing = made(isa, Levels("grid", codes=codes), x, step, None, grad)
    units, g = x.double().numpy() / 0.25, grad.double().numpy()
    inside = (units >= codes[0]) & (units <= codes[1])
    q = np.rint(np.clip(units, *codes))
    assert (values.numpy() == q * 0.25).all() and (back.numpy() == np.where(inside, grad.numpy(), 0)).all()
    expected = (g * np.where(inside, q - units, q)).sum()
    assert_close(of_step, expected, (np.abs(g) * (np.abs(q) + np.abs(units))).flatten())
    assert nothing is None


@isa
@pytest.mark.parametrize("kind", TWO_LEVELS)
@pytest.mark.parametrize(
    ("backward", "forward", "shape"),
    [
        (backward, (None, "polynomial", "sign-swish")[i % 3], SHAPES[i % len(SHAPES)])
        for i, backward in enumerate(FUNCTIONS)
    ],
)
def test_two_levels(isa, kind, backward, forward, shape):
    x, scale, threshold = arguments(kind, shape)
    grad, mu, s = torch.randn(shape), 1.3, float(torch.tensor(0.7))
    values, back, of_scale, of_threshold = made(
        isa, Levels(kind, forward, backward, number(mu)), x, scale, threshold, grad
    )
    over, g = x.double().numpy() - threshold.double().numpy(), grad.double().numpy()
    u = over / s if kind == "signs" else 2 * over / s - 1
    upper = (x >= (threshold if kind == "signs" else threshold + scale / 2)).numpy()
    assert upper[0].all()
    f = np.where(upper, 1.0, -1.0) if forward is None else FORMULAS[forward](u, mu)
    b = FORMULAS[backward](u, mu)
    code = f if kind == "signs" else (f + 1) / 2
    if forward is None:
        assert (values.numpy() == (code.astype(np.float32) * np.float32(s))).all()
    assert_close(values, s * code)
    # The box and the sign jump where rounding decides on which side an input lies.
    steady = ~np.isclose(np.abs(u), 1, atol=1e-5) & ~np.isclose(u, 0, atol=1e-5)
    b = np.where(steady, b, np.where(g == 0, 0, back.double().numpy() / g))
    assert_close(back, g * b)
    moved = 0 if kind == "signs" else b * over / s
    assert_close(of_scale, (g * (code - moved)).sum(), (np.abs(g) * (np.abs(code) + np.abs(moved))).flatten())
    assert_close(of_threshold, -(g * b).sum(axis=0), g * b)


@isa
def test_every_forward_quantizer(isa):
    x, scale, threshold = arguments("signs", (4, 300))
    u = (x.double() - threshold.double()).numpy() / float(scale)
    steady = ~np.isclose(np.abs(u), 1, atol=1e-5) & ~np.isclose(u, 0, atol=1e-5)
    for forward in FUNCTIONS:
        values = isa.level_values(Levels("signs", forward, "one", number(2.0)), x, scale, threshold)
        expected = np.where(steady, float(scale) * FORMULAS[forward](u, 2.0), values)
        np.testing.assert_allclose(values.double().numpy(), expected, rtol=0, atol=1e-5, err_msg=forward)


@isa
@pytest.mark.parametrize("kind", KINDS[1:])
def test_whatever_the_threads_the_same_bits(isa, kind):
    x, scale, threshold = arguments(kind, (101, 1033))
    how, grad = Levels(kind, None, "polynomial slope", number(1.0), (-8, 7)), torch.randn(101, 1033)
    found = []
    for count in (1, 3):
        with torch_threads(count):
            found.append(made(isa, how, x, scale, threshold, grad))
    assert all(one is other or torch.equal(one, other) for one, other in zip(*found, strict=True))


@isa
def test_nan_stays(isa):
    """On a grid, and in F; the levels themselves say that it is below every boundary, as `sign` does."""
    x, scale, threshold = torch.tensor([[torch.nan, 1.0]]), torch.ones(1), torch.zeros(2)
    assert isa.level_values(Levels("grid", codes=(-8, 7)), x, scale, None)[0].tolist()[1] == 1.0
    for kind, how in {"grid": {"codes": (-8, 7)}, "signs": {"forward": "tanh"}}.items():
        bound = None if kind == "grid" else threshold
        values = isa.level_values(Levels(kind, mu=number(1.0), **how), x, scale, bound)
        assert values.isnan().tolist() == [[True, False]]
    assert isa.level_values(Levels("signs", mu=number(1.0)), x, scale, threshold).tolist() == [[-1.0, 1.0]]


@isa
def test_tensors_that_are_not_what_they_should_be(isa):
    """An error, before the library sees an address."""
    x, scale, threshold = arguments("signs", (4, 6))
    how, grad, values = Levels("signs", mu=number(1.0)), torch.randn(4, 6), torch.empty(4, 6)
    freed, shrunk = values.clone(), values.clone()
    freed.untyped_storage().resize_(0)
    shrunk.untyped_storage().resize_(40)
    for bad, message in (
        (freed, "beyond its storage"),
        (shrunk, "beyond its storage"),
        (values[:3], r"must be \[4, 6\] in fp32, contiguous; not \[3, 6\]"),
        (values.double(), r"in fp32, contiguous; not \[4, 6\] in torch.float64"),
        (torch.empty(6, 4).t(), "in fp32, contiguous"),
        (values.to("meta"), "on the device meta"),
    ):
        with pytest.raises(PackedFormatError, match=message):
            isa.level_gradient(how, x, scale, threshold, bad, grad)
        with pytest.raises(PackedFormatError, match=message):
            isa.level_gradient(how, x, scale, threshold, values, bad)
    for numbers, message in (
        ((torch.ones(2), threshold), r"The scale .* must be \[1\]"),
        ((scale, threshold[:5]), r"The threshold .* must be \[6\]"),
        ((scale, None), "only two levels have a threshold: not so for 'signs'"),
    ):
        with pytest.raises(PackedFormatError, match=message):
            isa.level_values(how, x, *numbers)
    with pytest.raises(PackedFormatError, match="not so for 'int8'"):
        isa.level_values(INT8, x, scale, None)
    with pytest.raises(PackedFormatError, match="not so for 'grid'"):
        isa.level_values(Levels("grid"), x, scale, threshold)
