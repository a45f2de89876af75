"""The algebra: a least-squares optimum, rounding that is never worse than plain signs, rows of every kind."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proxbit.posttraining.closed_form import DAMPING, Rounding, align, compensate, quadratic

ROUNDINGS = [Rounding(scale, offset) for scale in ("row", "tensor", "fixed") for offset in (False, True)]


def problem(seed, rows=5, columns=12, tokens=60):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, dtype=torch.float64, generator=generator)
    x = torch.randn(tokens, columns, dtype=torch.float64, generator=generator) @ mix
    weight = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    x = x - x.mean(0)
    return weight, x, x.T @ x / tokens


def test_without_a_ridge_it_is_the_least_squares_optimum():
    """The float model reads other inputs than there are: what predicts its outputs best is what lstsq finds."""
    weight, x, covariance = problem(0)
    f = x + torch.randn_like(x)
    y = (f - f.mean(0)) @ weight.T
    expected = torch.linalg.lstsq(x, y).solution.T
    found = align(y.T @ x / len(x), weight, covariance, 0.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_the_ridge_goes_to_the_prior_where_data_say_nothing():
    weight, x, _ = problem(1)
    x[:, 3] = 0
    found = align(torch.zeros(5, 12, dtype=torch.float64), weight, x.T @ x / len(x), 0.1)
    torch.testing.assert_close(found[:, 3], weight[:, 3])
    ridge, target = 0.3, torch.randn(5, 12, dtype=torch.float64)
    found = align(target, weight, x.T @ x / len(x), ridge)
    gradient = found @ (x.T @ x / len(x)) - target + ridge * (found - weight)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(ROUNDINGS), st.integers(2, 150))
def test_compensation_is_never_worse_than_plain_signs(seed, rounding, columns):
    weight, _, covariance = problem(seed, columns=columns, tokens=columns + 20)
    damped = covariance + DAMPING * covariance.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    start = weight.abs().mean(1)
    found = compensate(weight, covariance, rounding, start)
    assert bool((found.signs.abs() == 1).all()) and bool((found.scale > 0).all())
    offset = weight.mean(1, keepdim=True) if rounding.offset else torch.zeros(len(weight), 1, dtype=torch.float64)
    signs = torch.where(weight - offset >= 0, 1.0, -1.0).double()
    scale = start[:, None]
    if rounding.scale == "row":
        scale = ((signs @ damped) * (weight - offset)).sum(1, keepdim=True) / quadratic(signs, damped)[:, None]
    if rounding.scale == "tensor":
        scale = ((signs @ damped) * (weight - offset)).sum() / quadratic(signs, damped).sum()
    plain = quadratic(weight - offset - scale * signs, damped)
    errors = quadratic(weight - found.weight, damped)
    if rounding.scale == "tensor":
        errors, plain = errors.sum(), plain.sum()
    assert bool((errors <= plain * (1 + 1e-9) + 1e-12).all())


def test_it_is_much_better_where_inputs_are_alike():
    weight, x, _ = problem(2, rows=64, columns=64, tokens=400)
    x = x @ torch.diag(torch.logspace(0, -2, 64, dtype=torch.float64)) @ torch.randn(64, 64, dtype=torch.float64)
    covariance = x.T @ x / len(x)
    found = compensate(weight, covariance, Rounding(), weight.abs().mean(1))
    plain = weight.abs().mean(1, keepdim=True) * torch.where(weight >= 0, 1.0, -1.0).double()
    share = quadratic(weight - found.weight, covariance).sum() / quadratic(weight - plain, covariance).sum()
    assert share < 0.3


def test_of_few_columns_it_finds_nearly_the_best_signs():
    """All 2^10 rows tried: no greedy walk finds each best one, and none is far from it."""
    weight, _, covariance = problem(3, rows=20, columns=10)
    damped = covariance + DAMPING * covariance.diagonal().mean() * torch.eye(10, dtype=torch.float64)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 10)
    product, square = weight @ damped @ signs.T, quadratic(signs, damped)
    best = (quadratic(weight, damped)[:, None] - product.clamp(min=0) ** 2 / square).amin(1)
    found = compensate(weight, covariance, Rounding(), weight.abs().mean(1))
    errors = quadratic(weight - found.weight, damped)
    plain = torch.where(weight >= 0, 1.0, -1.0).double()
    plain = quadratic(weight, damped) - ((plain @ damped) * weight).sum(1) ** 2 / quadratic(plain, damped)
    assert bool((errors >= best - 1e-9).all())
    assert float((plain - errors).sum()) > 0.75 * float((plain - best).sum())


@pytest.mark.parametrize("rounding", ROUNDINGS, ids=lambda each: f"{each.scale}-{each.offset}")
def test_scales_are_of_the_kind_that_the_layer_has(rounding):
    weight, _, covariance = problem(4)
    start = torch.full((5,), 0.7, dtype=torch.float64)
    found = compensate(weight, covariance, rounding, start)
    if rounding.scale == "fixed":
        assert torch.equal(found.scale, start)
    assert (len(set(found.scale.tolist())) == 1) == (rounding.scale != "row")
    assert bool((found.offset == 0).all()) != rounding.offset
