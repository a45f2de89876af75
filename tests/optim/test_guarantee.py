"""The guarantee of ProxConnect, on a strongly convex problem with a convex regularizer."""

import math

import pytest
import torch
from torch import nn

from proxbit.optim import ProxConnect
from proxbit.quantizers import MuSchedule, compose

STEPS = 600
LAMBDA = 0.3


def soft_threshold(w, mu):
    """The proximal map of mu times lambda |w|."""
    return torch.where(w >= 0, 1.0, -1.0) * (w.abs() - mu * LAMBDA).clamp(min=0)


def ridge():
    """A strongly convex least-squares loss, and its gradient."""
    a, y = torch.randn(40, 12, dtype=torch.float64), torch.randn(40, dtype=torch.float64)

    def loss(w):
        return (a @ w - y).square().sum() / 80 + 0.05 * w.square().sum()

    def gradient(w):
        return a.T @ (a @ w - y) / 40 + 0.1 * w

    return loss, gradient


def optimum(gradient):
    """By proximal gradient, until it stands still."""
    w = torch.zeros(12, dtype=torch.float64)
    for _ in range(4000):
        w = soft_threshold(w - 0.2 * gradient(w), 0.2)
    return w


def gap_of_average(loss, gradient, best, schedule=None):
    """Objective of the average of the iterates, weighted by the learning rates, less the optimum; and the bound G R."""
    start = torch.randn(12, dtype=torch.float64)
    radius = float((best - start).norm())
    lipschitz = 2 * max(float(gradient(start).norm()), float(gradient(best).norm()))
    weight = nn.Parameter(start[None].clone())
    base = torch.optim.SGD([weight], lr=radius / lipschitz)
    scheduler_of = torch.optim.lr_scheduler.LambdaLR
    optimizer = ProxConnect(base, compose(soft_threshold), [weight], schedule=schedule, normalize="none", scale="fixed")
    scheduler = scheduler_of(optimizer, lambda step: 1 / math.sqrt(step + 1))
    total, rates = torch.zeros(12, dtype=torch.float64), 0.0
    for _ in range(STEPS):
        rate = scheduler.get_last_lr()[0]
        total, rates = total + rate * weight.detach()[0], rates + rate
        weight.grad = gradient(weight.detach()[0])[None]
        assert weight.grad.norm() <= lipschitz
        optimizer.step()
        scheduler.step()
    average = total / rates

    def objective(w):
        return float(loss(w) + LAMBDA * w.abs().sum())

    return objective(average) - objective(best), lipschitz * radius


@pytest.mark.parametrize("seed", range(3))
def test_the_average_comes_as_near_as_the_theorem_says(seed):
    """Corollary 5.2 of Dockhorn et al. (2021), as PARQ quotes it: within G R (2 + 1.5 ln t) / sqrt(t)."""
    torch.manual_seed(seed)
    loss, gradient = ridge()
    gap, scale = gap_of_average(loss, gradient, optimum(gradient))
    assert -1e-9 <= gap <= scale * (2 + 1.5 * math.log(STEPS)) / math.sqrt(STEPS)


def test_it_is_the_aggregate_mu_that_does_it():
    """With mu held at 1 the regularizer is lost in the sum of the gradients: the gap stays where it was."""
    loss, gradient = ridge()
    best = optimum(gradient)
    aggregate, _ = gap_of_average(loss, gradient, best)
    torch.manual_seed(1)
    held, _ = gap_of_average(loss, gradient, best, MuSchedule("constant", 1, 1, STEPS))
    assert aggregate < 0.2 * held
