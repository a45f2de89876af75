"""Proximal maps: the linear quantizer and what it reduces to, and the maps of one row each."""

import math

import numpy as np
import pytest
import torch

from pair_formulas import nearest
from proxbit.quantizers import get_pair
from proxbit.quantizers.proximal import (
    BINARYRELAX,
    BOX,
    IDENTITY,
    PARQ,
    PERIOD,
    SIGN,
    TANH,
    LinearQuantizer,
    as_proximal_map,
    linear_quantizer,
    nearest_level,
)

# Steps of 1/64 from -3 to 3: 0, the levels and their midpoints are among them, and all are exact in binary.
GRID = np.arange(-192, 193) / 64
TERNARY = (-1.0, 0.0, 1.0)
UNEVEN = (-2.0, -0.5, 0.25, 1.0)
LEVELS = pytest.mark.parametrize(
    "levels", [(-1.0, 1.0), TERNARY, UNEVEN], ids=["binary", "ternary", "four-uneven-levels"]
)
SHRINKS = [(0.0, 0.0), (0.25, 0.0), (0.0, 0.25), (0.125, 0.5), (0.5, 0.125), (0.375, 0.375), (1.0, 0.0), (7.0, 7.0)]
MAPS = {
    "identity": (IDENTITY, [1.0]),
    "sign": (SIGN, [0.0, 1.0, 1000.0]),
    "linear": (get_pair("pc").proximal, [0.0, 0.01, 0.4, 1.0, 10.0]),
    "binaryrelax": (BINARYRELAX, [0.0, 0.1, 1.0, 100.0]),
    "parq": (PARQ, [1.0, 2.5, 100.0]),
    "tanh": (TANH, [0.3, 5.0]),
    "box": (BOX, [0.2, 1.0, 30.0]),
    "period": (PERIOD, [1.0]),
}


def plus_minus(w):
    return np.where(w >= 0, 1.0, -1.0)


def quantized(w, rho, varrho, levels=(-1.0, 1.0)):
    return linear_quantizer(torch.as_tensor(w, dtype=torch.float64), rho, varrho, levels).numpy()


def pieces(value, rho, varrho, levels):
    """L_rho^varrho of one number, by interpolating between the corners of its graph."""
    if value <= levels[0]:
        return levels[0]
    if value >= levels[-1]:
        return levels[-1]
    index = max(i for i, level in enumerate(levels) if level <= value)
    low, high = levels[index], levels[index + 1]
    middle = 0.5 * (low + high)
    if value < middle:
        flat_until, reaches = min(middle, low + rho), max(low, middle - varrho)
        return low if value <= flat_until else np.interp(value, [flat_until, middle], [low, reaches])
    flat_from, starts = max(middle, high - rho), min(high, middle + varrho)
    return high if value >= flat_from else np.interp(value, [middle, flat_from], [starts, high])


@LEVELS
@pytest.mark.parametrize(("rho", "varrho"), SHRINKS)
def test_linear_quantizer_is_the_graph_through_its_corners(rho, varrho, levels):
    expected = [pieces(value, rho, varrho, levels) for value in GRID]
    np.testing.assert_allclose(quantized(GRID, rho, varrho, levels), expected, rtol=0, atol=1e-14)


@LEVELS
def test_without_shrink_it_clips(levels):
    np.testing.assert_allclose(quantized(GRID, 0.0, 0.0, levels), np.clip(GRID, levels[0], levels[-1]), atol=1e-14)


@LEVELS
@pytest.mark.parametrize(("rho", "varrho"), [(2.0, 0.0), (0.0, 2.0), (2.0, 2.0)], ids=["rho", "varrho", "both"])
def test_half_the_gap_or_more_gives_the_nearest_level(rho, varrho, levels):
    """Midpoints go to the upper level, as 0 goes to +1; the result is a level to the last bit."""
    np.testing.assert_array_equal(quantized(GRID, rho, varrho, levels), nearest(GRID, levels))


@pytest.mark.parametrize("lam", [0.0, 0.1, 0.5, 0.75, 1.0, 2.0])
def test_equal_shrinks_are_the_map_of_proxquant(lam):
    w = GRID[np.abs(GRID) <= 1]
    distance = np.abs(w) - 1
    expected = plus_minus(w) * (1 + np.sign(distance) * np.maximum(np.abs(distance) - lam, 0))
    np.testing.assert_allclose(quantized(w, lam, lam), expected, atol=1e-14)
    np.testing.assert_allclose(LinearQuantizer()(torch.from_numpy(w), lam).numpy(), expected, atol=1e-14)


@pytest.mark.parametrize("lam", [0.0, 0.1, 1.0, 30.0])
def test_vertical_shrink_alone_is_binaryrelax(lam):
    w = GRID[np.abs(GRID) <= 1]
    expected = (w + lam * plus_minus(w)) / (1 + lam)
    np.testing.assert_allclose(quantized(w, 0.0, lam / (1 + lam)), expected, atol=1e-14)
    np.testing.assert_allclose(BINARYRELAX(torch.from_numpy(w), lam).numpy(), expected, atol=1e-14)


@pytest.mark.parametrize("slope", [1.0, 1.25, 4.0, 50.0])
def test_horizontal_shrink_alone_is_parq(slope):
    expected = np.clip(slope * GRID, -1, 1)
    np.testing.assert_allclose(quantized(GRID, 1 - 1 / slope, 0.0), expected, atol=1e-12)
    np.testing.assert_allclose(PARQ(torch.from_numpy(GRID), slope).numpy(), expected, atol=1e-14)


def test_ternary_by_hand():
    """Flat for 0.2 around each level, then straight to the midpoint, which is reached from both sides."""
    w = [-1.5, -1.0, -0.8, -0.65, -0.5, -0.35, -0.1, 0.0, 0.1, 0.35, 0.5, 0.65, 0.8, 2.0]
    expected = [-1, -1, -1, -0.75, -0.5, -0.25, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1]
    np.testing.assert_allclose(quantized(w, 0.2, 0.0, TERNARY), expected, rtol=0, atol=1e-14)


@LEVELS
@pytest.mark.parametrize(("rho", "varrho"), SHRINKS)
def test_linear_quantizer_never_decreases_and_fixes_its_levels(rho, varrho, levels):
    result = quantized(GRID, rho, varrho, levels)
    assert (np.diff(result) >= -1e-14).all()
    np.testing.assert_array_equal(quantized(np.array(levels), rho, varrho, levels), levels)
    assert quantized([-math.inf, math.inf], rho, varrho, levels).tolist() == [levels[0], levels[-1]]


@pytest.mark.parametrize(("name", "mu"), [(name, mu) for name in MAPS for mu in MAPS[name][1]])
def test_every_map_never_decreases_and_is_odd(name, mu):
    proximal = MAPS[name][0]
    w = torch.from_numpy(GRID)
    result = proximal(w, mu)
    assert proximal.name == name
    assert result.shape == w.shape
    assert (result.diff() >= -1e-14).all()
    nonzero = w != 0
    torch.testing.assert_close(proximal(-w, mu)[nonzero], -result[nonzero], rtol=0, atol=1e-14)


@pytest.mark.parametrize(("name", "mu"), [("sign", 1.0), ("linear", 1.0), ("linear", 50.0)])
def test_a_hard_map_gives_the_levels_only(name, mu):
    w = torch.tensor([-math.inf, -2.0, -0.5, -1e-300, -0.0, 0.0, 1e-300, 0.5, 2.0, math.inf], dtype=torch.float64)
    assert MAPS[name][0](w, mu).tolist() == [-1, -1, -1, -1, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("proximal", [BINARYRELAX, PARQ], ids=["binaryrelax", "parq"])
def test_soft_maps_approach_the_sign(proximal):
    """Away from 0 the distance to the sign falls as mu grows."""
    w = torch.tensor([-1.5, -0.2, 0.2, 1.5], dtype=torch.float64)
    gaps = [float((proximal(w, mu) - w.sgn()).abs().max()) for mu in (1.0, 2.0, 4.0, 1e6)]
    assert all(later < earlier for earlier, later in zip(gaps[:-1], gaps[1:]))
    assert gaps[-1] < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_dtype_is_kept_whatever_mu_is(name, dtype):
    """mu is a float64 tensor without dimensions in the layers; it must not raise the precision of a weight."""
    proximal, values = MAPS[name]
    w = torch.tensor([-1.25, -0.5, 0.0, 0.75], dtype=dtype)
    for mu in (values[-1], torch.tensor(values[-1], dtype=torch.float64)):
        result = proximal(w, mu)
        assert result.dtype == dtype
        exact = proximal(w.double(), values[-1])
        torch.testing.assert_close(result.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_half_precision_linear_quantizer_matches_double():
    w = torch.from_numpy(GRID)
    for dtype in (torch.float16, torch.bfloat16):
        exact = linear_quantizer(w, 0.25, 0.125, TERNARY)
        result = linear_quantizer(w.to(dtype), 0.25, 0.125, TERNARY)
        torch.testing.assert_close(result.double(), exact, rtol=0, atol=4 * torch.finfo(dtype).eps)


@LEVELS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_nearest_level(levels, dtype):
    w = torch.from_numpy(GRID).to(dtype)
    result = nearest_level(w.view(5, 77), levels)
    assert result.dtype == dtype
    np.testing.assert_array_equal(result.flatten().double().numpy(), nearest(w.double().numpy(), levels))
    ends = torch.tensor([-math.inf, math.inf], dtype=dtype)
    assert nearest_level(ends, levels).tolist() == [levels[0], levels[-1]]


@LEVELS
@pytest.mark.parametrize(("rho", "varrho"), [(1.0, 1.0), (0.5, 2.0), (0.0, 1.0), (3.0, 0.0)])
def test_shrinks_are_in_proportion_to_mu(rho, varrho, levels):
    for mu in (0.0, 0.125, 0.25):
        result = LinearQuantizer(levels, rho, varrho)(torch.from_numpy(GRID), mu).numpy()
        expected = [pieces(value, mu * rho, mu * varrho, levels) for value in GRID]
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-14)


def test_a_plain_function_is_a_proximal_map():
    def halved(w, mu):
        return w / 2

    proximal = as_proximal_map(halved)
    assert (proximal.name, proximal.formula) == ("halved", "P(w) = halved(w, mu)")
    assert proximal(torch.tensor([3.0]), 1.0).tolist() == [1.5]
    assert as_proximal_map(proximal) is proximal
    assert as_proximal_map(LinearQuantizer()).name == "LinearQuantizer"
