"""Laws that hold for every pair, every mu of its default schedule and every weight, on inputs chosen by hypothesis."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pair_formulas import ROWS, plus_minus, square_wave
from proxbit.quantizers import decompose, get_pair, quantize

LEVELS = {"ternary": [-1, 0, 1], "two-bit": [-1.5, -0.5, 0.5, 1.5]}
VARIANTS = {name: (name, None) for name in ROWS} | {f"pc-{kind}": ("pc", {"levels": q}) for kind, q in LEVELS.items()}
SOUND = [name for name, variant in VARIANTS.items() if ROWS[variant[0]][2] is not None]
# Pairs whose F has no value but the levels, whatever mu.
SIGNS = [name for name in ROWS if ROWS[name][0] in (plus_minus, square_wave)]
LARGEST = float(np.float32(1e30))

law = settings(deadline=None, max_examples=25, derandomize=True, database=None)
every_pair = pytest.mark.parametrize("name", VARIANTS)
every_sound_pair = pytest.mark.parametrize("name", SOUND)
progress = st.floats(0, 1)
# Zero, and sizes whose products with mu are neither zero nor infinite.
sizes = st.one_of(st.just(0.0), st.floats(1e-100, 4), st.floats(1e-3, 1e3))
weights = st.lists(
    st.builds(lambda size, minus: -size if minus else size, sizes, st.booleans()), min_size=1, max_size=30
)


def variant(name):
    return get_pair(*VARIANTS[name])


def mu_of(pair, share):
    """A value between the ends of the default schedule, evenly on a scale of logarithms."""
    low, high = sorted(pair.schedule[1:])
    return low + (high - low) * share if low == 0 else min(high, max(low, low * (high / low) ** share))


def double(values):
    return torch.tensor(values, dtype=torch.float64)


@every_pair
@law
@given(values=weights, share=progress)
def test_forward_is_odd_and_backward_even(name, values, share):
    """But for F at its ties: 0, and the boundaries between two levels."""
    pair = variant(name)
    mu, w = mu_of(pair, share), double(values)
    middles = double([(low + high) / 2 for low, high in zip(pair.levels[:-1], pair.levels[1:], strict=True)])
    off = w[(w[:, None] != middles).all(dim=1) & (w != 0)]
    torch.testing.assert_close(pair.forward(-off, mu), -pair.forward(off, mu), rtol=1e-12, atol=2e-14)
    torch.testing.assert_close(pair.backward(-w, mu), pair.backward(w, mu), rtol=1e-12, atol=1e-14 * max(1, mu))


@every_sound_pair
@law
@given(values=weights, share=progress)
def test_proximal_maps_never_decrease(name, values, share):
    pair = variant(name)
    w = double(values + [-value for value in values]).sort().values
    p = pair.proximal(w, mu_of(pair, share))
    assert bool((p.diff() >= -1e-14 * (1 + p.abs().max())).all())


@every_sound_pair
@law
@given(values=weights, share=progress)
def test_both_sides_are_of_the_proximal_map(name, values, share):
    """F = T(P(w)), with F and P as numpy has them; B = T'(P(w)), with T' by central differences of T."""
    pair, w = variant(name), double(values)
    mu = mu_of(pair, share)
    if name == "fda++":
        mu = float(round(mu))  # The series of the paper has whole terms.
    p = pair.proximal(w, mu)
    if name in ROWS:
        forward, _, proximal, *_ = ROWS[name]
        with np.errstate(over="ignore"):
            np.testing.assert_allclose(p.numpy(), proximal(w.numpy(), mu), rtol=1e-12, atol=1e-13)
            np.testing.assert_allclose(pair.transform(p, mu).numpy(), forward(w.numpy(), mu), rtol=0, atol=1e-11)
    assert torch.equal(pair.forward(w, mu), pair.transform(p, mu))
    near, step = p.abs() < 10, 1e-6
    slope = (pair.transform(p[near] + step, mu) - pair.transform(p[near] - step, mu)) / (2 * step)
    torch.testing.assert_close(pair.backward(w, mu)[near], slope, rtol=1e-5, atol=2e-6 * max(1, mu) ** 2)


@cache
def examined(name, end):
    pair = variant(name)
    return decompose(pair, pair.schedule[end])


@pytest.mark.parametrize("end", [1, 2], ids=["start", "end"])
@every_sound_pair
@law
@given(shares=st.lists(progress, min_size=1, max_size=20))
def test_transform_at_the_inverse_of_the_recovered_map(name, end, shares):
    """F(P^-1(p)) = T(p) and B(P^-1(p)) = T'(p): P is found from F and B alone, T is the one of the row."""
    pair, found = variant(name), examined(name, end)
    mu = pair.schedule[end]
    index = (double(shares) * (len(found.w) - 1)).long()
    index = torch.searchsorted(found.p, found.p[index])
    # In a jump P^-1 is one w for many p: leave out its two points and their neighbours.
    jumps = (found.w.diff() < 1e-5).nonzero().flatten()
    index = index[((index[:, None] - jumps).abs() > 3).all(dim=1)]
    w, p = found.w[index], found.p[index]
    torch.testing.assert_close(pair.forward(w, mu), pair.transform(p, mu), rtol=0, atol=1e-3)
    torch.testing.assert_close(pair.forward(w, mu), found.transform(p), rtol=0, atol=1e-3)


@law
@given(share=progress)
@pytest.mark.parametrize("name", SIGNS)
def test_zero_is_positive(name, share):
    pair, zeros = variant(name), double([0.0, -0.0])
    assert pair.forward(zeros, mu_of(pair, share)).tolist() == [1.0, 1.0]


def test_the_hard_level_of_zero_is_plus_one():
    for name in set(ROWS) - {"fp"}:
        assert variant(name).hard(double([0.0, -0.0])).tolist() == [1.0, 1.0]


@every_pair
@law
@given(
    values=st.lists(st.floats(-LARGEST, LARGEST, width=32), min_size=1, max_size=20),
    halves=st.lists(st.floats(-6e4, 6e4, width=16), min_size=1, max_size=20),
    share=progress,
)
def test_both_sides_are_finite_however_large_the_weight(name, values, halves, share):
    pair = variant(name)
    mu = mu_of(pair, share)
    for w in (
        torch.tensor([*values, LARGEST, -LARGEST], dtype=torch.float32),
        torch.tensor([*halves, 6e4, -6e4], dtype=torch.float16),
    ):
        for sharpness in (mu, torch.tensor(mu, dtype=torch.float64)):
            assert bool(torch.isfinite(pair.forward(w, sharpness)).all())
            assert bool(torch.isfinite(pair.backward(w, sharpness)).all())


@every_pair
@settings(deadline=None, max_examples=15, derandomize=True, database=None)
@given(
    exponents=st.lists(st.integers(-60, 60), min_size=4, max_size=4),
    share=progress,
    center=st.sampled_from(["none", "remove", "restore"]),
    normalize=st.sampled_from(["row", "std"]),
    scale=st.sampled_from(["ls", "fixed"]),
    hard=st.booleans(),
    seed=st.integers(0, 99),
)
def test_row_scaling(name, center, exponents, share, normalize, scale, hard, seed):
    """By powers of two, so to the last bit: the weight scales with its row, the multiplier of the gradient stays."""
    pair, generator = variant(name), torch.Generator().manual_seed(seed)
    latent, grad = torch.randn(2, 4, 7, dtype=torch.float64, generator=generator)
    factors = 2.0 ** double(exponents).unsqueeze(1)
    results = []
    for start in (latent, latent * factors):
        start = start.clone().requires_grad_()
        modes = {"normalize": normalize, "scale": scale, "center": center, "hard": hard}
        weight = quantize(start, double(mu_of(pair, share)), pair, **modes)
        weight.backward(grad)
        results.append((weight.detach(), start.grad))
    (weight, gradient), (scaled, scaled_gradient) = results
    assert torch.equal(scaled, weight * factors)
    assert torch.equal(scaled_gradient, gradient)
