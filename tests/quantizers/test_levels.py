"""Maps towards any levels: the linear quantizer and what it reduces to, and the nearest level."""

import math

import numpy as np
import pytest
import torch

from pair_formulas import nearest
from proxbit.quantizers import get_pair
from proxbit.quantizers.functions import BINARYRELAX, CLIP
from proxbit.quantizers.levels import LinearQuantizer, linear_quantizer, nearest_level

# Steps of 1/64 from -3 to 3: 0, the levels and their midpoints are among them, and all are exact in binary.
GRID = np.arange(-192, 193) / 64
TERNARY = (-1.0, 0.0, 1.0)
UNEVEN = (-2.0, -0.5, 0.25, 1.0)
LEVELS = pytest.mark.parametrize(
    "levels", [(-1.0, 1.0), TERNARY, UNEVEN], ids=["binary", "ternary", "four-uneven-levels"]
)
SHRINKS = [(0.0, 0.0), (0.25, 0.0), (0.0, 0.25), (0.125, 0.5), (0.5, 0.125), (0.375, 0.375), (1.0, 0.0), (7.0, 7.0)]


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
def test_linear_quantizer_is_the_graph_through_its_corners(levels):
    """It never decreases, and its levels stay."""
    for rho, varrho in SHRINKS:
        result, expected = quantized(GRID, rho, varrho, levels), [pieces(value, rho, varrho, levels) for value in GRID]
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-14)
        assert (np.diff(result) >= -1e-14).all()
        np.testing.assert_array_equal(quantized(np.array(levels), rho, varrho, levels), levels)
        assert quantized([-math.inf, math.inf], rho, varrho, levels).tolist() == [levels[0], levels[-1]]


@LEVELS
def test_without_shrink_it_clips_and_with_half_the_gap_it_gives_the_nearest_level(levels):
    """Midpoints go to the upper level, as 0 goes to +1; the result is a level to the last bit."""
    np.testing.assert_allclose(quantized(GRID, 0.0, 0.0, levels), np.clip(GRID, levels[0], levels[-1]), atol=1e-14)
    for rho, varrho in ((2.0, 0.0), (0.0, 2.0), (2.0, 2.0)):
        np.testing.assert_array_equal(quantized(GRID, rho, varrho, levels), nearest(GRID, levels))


@pytest.mark.parametrize("lam", [0.0, 0.5, 2.0])
def test_equal_shrinks_are_the_map_of_proxquant(lam):
    w = GRID[np.abs(GRID) <= 1]
    distance = np.abs(w) - 1
    expected = plus_minus(w) * (1 + np.sign(distance) * np.maximum(np.abs(distance) - lam, 0))
    np.testing.assert_allclose(quantized(w, lam, lam), expected, atol=1e-14)
    np.testing.assert_allclose(LinearQuantizer()(torch.from_numpy(w), lam).numpy(), expected, atol=1e-14)


@pytest.mark.parametrize("lam", [0.0, 0.1, 30.0])
def test_vertical_shrink_alone_is_binaryrelax(lam):
    w = GRID[np.abs(GRID) <= 1]
    expected = (w + lam * plus_minus(w)) / (1 + lam)
    np.testing.assert_allclose(quantized(w, 0.0, lam / (1 + lam)), expected, atol=1e-14)
    np.testing.assert_allclose(BINARYRELAX(torch.from_numpy(w), lam).numpy(), expected, atol=1e-14)


@pytest.mark.parametrize("slope", [1.0, 1.25, 50.0])
def test_horizontal_shrink_alone_is_parq(slope):
    expected = np.clip(slope * GRID, -1, 1)
    np.testing.assert_allclose(quantized(GRID, 1 - 1 / slope, 0.0), expected, atol=1e-12)
    np.testing.assert_allclose(CLIP(torch.from_numpy(GRID), slope).numpy(), expected, atol=1e-14)


def test_ternary_by_hand():
    """Flat for 0.2 around each level, then straight to the midpoint, which is reached from both sides."""
    w = [-1.5, -1.0, -0.8, -0.65, -0.5, -0.35, -0.1, 0.0, 0.1, 0.35, 0.5, 0.65, 0.8, 2.0]
    expected = [-1, -1, -1, -0.75, -0.5, -0.25, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1]
    np.testing.assert_allclose(quantized(w, 0.2, 0.0, TERNARY), expected, rtol=0, atol=1e-14)


def test_a_hard_map_gives_the_levels_only():
    w = torch.tensor([-math.inf, -2.0, -0.5, -1e-300, -0.0, 0.0, 1e-300, 0.5, 2.0, math.inf], dtype=torch.float64)
    for mu in (1.0, 50.0):
        assert get_pair("pc").proximal(w, mu).tolist() == [-1, -1, -1, -1, 1, 1, 1, 1, 1, 1]


def test_half_precision_linear_quantizer_matches_double():
    w = torch.from_numpy(GRID)
    for dtype in (torch.float16, torch.bfloat16):
        exact = linear_quantizer(w, 0.25, 0.125, TERNARY)
        result = linear_quantizer(w.to(dtype), 0.25, 0.125, TERNARY)
        torch.testing.assert_close(result.double(), exact, rtol=0, atol=4 * torch.finfo(dtype).eps)


@LEVELS
def test_nearest_level(levels):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        w = torch.from_numpy(GRID).to(dtype)
        result = nearest_level(w.view(5, 77), levels)
        assert result.dtype == dtype
        np.testing.assert_array_equal(result.flatten().double().numpy(), nearest(w.double().numpy(), levels))
        ends = torch.tensor([-math.inf, math.inf], dtype=dtype)
        assert nearest_level(ends, levels).tolist() == [levels[0], levels[-1]]


@pytest.mark.parametrize(
    ("rho", "varrho", "levels"), [(1.0, 1.0, (-1.0, 1.0)), (0.5, 2.0, TERNARY), (0.0, 1.0, UNEVEN), (3.0, 0.0, TERNARY)]
)
def test_shrinks_are_in_proportion_to_mu(rho, varrho, levels):
    for mu in (0.0, 0.125, 0.25):
        result = LinearQuantizer(levels, rho, varrho)(torch.from_numpy(GRID), mu).numpy()
        expected = [pieces(value, mu * rho, mu * varrho, levels) for value in GRID]
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-14)
