"""The criterion: which pairs are sound, with P and T recovered."""

import math

import pytest
import torch
from torch import Tensor

from pair_formulas import ROWS
from proxbit.errors import ConfigError, MuRangeError
from proxbit.quantizers import PAIRS, compose, decompose, get_pair, heuristic, regularizer
from proxbit.quantizers.functions import BINARYRELAX, CLIP, IDENTITY, SIGN

LINEAR = get_pair("pc").proximal
W = torch.linspace(-2.9, 2.9, 1001, dtype=torch.float64)


def hard(w):
    return torch.where(w >= 0, 1.0, -1.0)


@pytest.mark.parametrize("name", ROWS)
def test_verdict_and_proximal_map(name):
    """The verdict comes from the numbers alone; it agrees with how the pair was made, and with the theory."""
    pair, proximal = PAIRS.get(name), ROWS[name][2]
    for mu in pair.schedule_ends:
        result = decompose(name, mu)
        assert result.sound == pair.sound == (result.interval is None) == (proximal is not None)
        if proximal is not None:
            # At a large mu, tanh is 1 to the last bit far out: P cannot be told from a constant there.
            slope = pair.backward(W, mu).abs()
            told = W[(W.abs() > 1e-3) & (slope > 1e-6 * slope.max())]
            theory, step = torch.from_numpy(proximal(told.numpy(), mu)), 6 / 20_000
            assert torch.allclose(result.proximal(told), theory, atol=1e-5 + (step * mu) ** 2)
            assert torch.allclose(result.transform(result.p), result.f, atol=1e-9)
            assert bool((torch.diff(result.p) >= -1e-12).all())


def pair_of(forward, backward):
    return heuristic(forward, backward)


def ones(w: Tensor, mu) -> Tensor:
    return torch.ones_like(w)


def test_a_decreasing_map_is_refused():
    result = decompose(pair_of(lambda w, mu: w.sin(), ones))
    assert not result.sound and "decreases" in result.reason
    assert result.interval == pytest.approx((-3.0, -math.pi / 2), abs=1e-3)


def test_a_forward_that_moves_where_the_gradient_is_zero_is_refused():
    result = decompose(pair_of(lambda w, mu: w, lambda w, mu: (w.abs() <= 1).to(w.dtype)))
    assert not result.sound and "F moves where B is zero" in result.reason
    assert result.interval == pytest.approx((-3.0, -1.0), abs=1e-3)


def test_a_backward_that_changes_where_the_map_stands_still_is_refused():
    """A staircase with a gradient that is not constant on the stairs; the interval is the first stair."""
    result = decompose(pair_of(lambda w, mu: torch.floor(w), lambda w, mu: 2 + w.cos()), window=2.5)
    assert not result.sound and "B changes while P stands still" in result.reason
    assert result.interval == pytest.approx((-2.5, -2.0), abs=1e-3)


def test_a_staircase_with_constant_gradient_is_sound():
    """Jumps are kept exactly: three levels, one apart."""
    result = decompose(pair_of(lambda w, mu: torch.floor(w + 0.5).clamp(-1, 1), ones))
    assert result.sound
    points = torch.tensor([-2.0, -0.2, 0.3, 1.7], dtype=torch.float64)
    assert torch.allclose(result.proximal(points), torch.tensor([-1.0, 0.0, 0.0, 1.0], dtype=torch.float64))


def test_negative_slopes_of_both_sides_agree():
    """sign-Swish falls beyond its peak, and so does its derivative: P is the identity all the same."""
    result = decompose("bnn++", mu=10.0)
    assert result.sound
    assert torch.allclose(result.p, result.w, atol=1e-6)
    assert float(torch.diff(result.f).min()) < 0


@pytest.mark.parametrize(
    ("forward", "backward"),
    [
        (lambda w, mu: torch.where(w > 2.999, torch.nan, -w), lambda w, mu: torch.ones_like(w)),
        (lambda w, mu: w.sqrt(), lambda w, mu: 0.5 / w.sqrt()),
        (lambda w, mu: w, lambda w, mu: torch.where(w.abs() < 1e-3, torch.inf, 1.0)),
    ],
    ids=["NaN at the end", "NaN below zero", "infinite B"],
)
def test_what_is_not_finite_is_not_sound(forward, backward):
    result = decompose(heuristic(forward, backward), 1.0)
    assert not result.sound and result.reason == "F or B is not finite."
    low, high = result.interval
    assert -3 <= low < high <= 3


@pytest.mark.parametrize("window", [0.0, -3.0, math.nan, math.inf])
def test_the_window_is_a_positive_number(window):
    with pytest.raises(ConfigError, match=f"window must be a positive number, not {window}"):
        decompose("bnn", window=window)


def test_a_function_may_change_what_it_is_given_or_return_a_number():
    kept = decompose(compose(lambda w, mu: (w * mu).clamp(-1, 1)), 2.0)
    changed = decompose(heuristic(lambda w, mu: w.mul_(mu).clamp_(-1, 1), lambda w, mu: 1.0), 2.0)
    assert kept.sound and changed.sound and torch.equal(kept.w, changed.w)
    torch.testing.assert_close(kept.p, changed.p)


def test_mu_out_of_range():
    with pytest.raises(MuRangeError, match="out of range"):
        decompose("parq", mu=0.5)


@pytest.mark.parametrize(
    ("proximal", "mu", "expected"),
    [
        (SIGN, 1.0, lambda p: (1 - p**2) / 2),
        (IDENTITY, 1.0, lambda p: 0 * p),
        (CLIP, 4.0, lambda p: (1 - p**2) / 2 * (1 - 1 / 4)),
        (BINARYRELAX, 1.5, lambda p: 1.5 * (p.abs() - 1) ** 2 / 2),
    ],
    ids=["sign", "identity", "parq", "binaryrelax"],
)
def test_regularizer(proximal, mu, expected):
    """Closed forms. BinaryRelax: mu/2 times the squared distance to the levels, where P takes its values."""
    p, r = regularizer(proximal, mu)
    if proximal is BINARYRELAX:
        reached = p.abs() >= mu / (1 + mu)
        p, r = p[reached], r[reached]
    assert torch.allclose(r, expected(p), atol=2e-3)


@pytest.mark.parametrize("proximal", [SIGN, LINEAR, BINARYRELAX, CLIP], ids=lambda p: p.name)
def test_the_proximal_map_minimises_its_regularizer(proximal):
    """argmin_p r(p) + (p - w)^2 / 2, found by trying every p of the grid."""
    mu = 0.4 if proximal is LINEAR else 2.0
    p, r = regularizer(proximal, mu)
    for w in (-1.7, -0.6, -0.05, 0.2, 0.9, 2.2):
        best = p[torch.argmin(r + (p - w) ** 2 / 2)]
        assert float(best) == pytest.approx(float(proximal(torch.tensor([w]).double(), mu)), abs=5e-3)


@pytest.mark.parametrize(
    ("forward", "backward", "sound"),
    [
        (lambda w, mu: hard(w.clamp(-0.8, 0.8)), lambda w, mu: (w.abs() <= 0.8).to(w.dtype), False),
        (lambda w, mu: 0.37 * hard(w), ones, True),
        (lambda w, mu: 2.5 * (mu * w).tanh(), lambda w, mu: 2.5 * mu / (mu * w).cosh() ** 2, True),
        (lambda w, mu: (mu * w).tanh(), lambda w, mu: 0.1 + 0 * w, True),
        (lambda w, mu: (mu * w).tanh(), lambda w, mu: 1 / (1 + w**2), True),
        (lambda w, mu: (mu * w).tanh(), lambda w, mu: 0.2 - w, False),
    ],
    ids=["ReCU", "row-scaled sign", "scaled tanh", "constant", "any positive slope", "a slope that changes sign"],
)
def test_pairs_outside_of_the_family(forward, backward, sound):
    """ReCU clips before the sign. A strictly increasing F is sound with every positive B: P is an integral."""
    assert decompose(pair_of(forward, backward), window=2.0).sound == sound
