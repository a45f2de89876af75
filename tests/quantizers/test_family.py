"""The family as a whole: what every row of data promises."""

import pytest
import torch

from pair_formulas import ROWS
from proxbit.quantizers import PAIRS, MuSchedule, get_pair

# How far from 0, in row means, F may still be more than 1e-3 from the sign at the end of the default schedule.
HARD_FROM = {
    "bc": 0.0,
    "dorefa": 0.0,
    "pc": 0.0,
    "parq": 0.011,
    "md-tanh": 0.05,
    "tanh": 0.15,
    "bnn": 0.0,
    "bnn+": 0.0,
    "bnn++": 0.45,
    "bireal": 0.0,
    "bireal++": 0.05,
    "ede": 0.0,
    "ede++": 0.15,
    "fda": 0.0,
    "reste": 0.0,
    "dsq": 0.0,
}


def test_the_family_is_the_one_of_the_formulas():
    assert set(PAIRS) == set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_complete(name):
    pair = get_pair(name)
    assert pair.source and pair.forward_formula and pair.backward_formula
    kind, start, end = pair.schedule
    schedule = MuSchedule(kind, start, end, steps=100)
    assert all(pair.check_mu(schedule.mu(step)) is not None for step in range(100))


@pytest.mark.parametrize("name", HARD_FROM)
def test_annealed_forwards_end_at_the_sign(name):
    pair = get_pair(name)
    w = torch.linspace(HARD_FROM[name], 3.1, 4001, dtype=torch.float64)
    assert float((pair.forward(w, pair.schedule[2]) - 1).abs().max()) <= 1e-3
    assert float((pair.forward(-w[1:], pair.schedule[2]) + 1).abs().max()) <= 1e-3


def test_binaryrelax_keeps_a_thousandth_of_the_weight():
    pair = get_pair("binaryrelax")
    w = torch.linspace(0, 2, 2001, dtype=torch.float64)
    assert float((pair.forward(w, pair.schedule[2]) - 1).abs().max()) <= 1e-3


@pytest.mark.parametrize("name", ROWS)
def test_odd_forward_even_backward_and_finite_far_out(name):
    pair, mu = get_pair(name), float(get_pair(name).schedule[1])
    w = torch.tensor([1e-3, 0.1, 0.9, 1.2, 3.0, 40.0, 1e4], dtype=torch.float64)
    assert torch.allclose(pair.forward(-w, mu), -pair.forward(w, mu))
    assert torch.allclose(pair.backward(-w, mu), pair.backward(w, mu))
    far = torch.tensor([1e30, -1e30], dtype=torch.float64)
    half = torch.tensor([6e4, -6e4, 1e-7, 0.0], dtype=torch.float16)
    for function in (pair.forward, pair.backward):
        assert bool(torch.isfinite(function(far, mu)).all())
        assert bool(torch.isfinite(function(half, mu)).all())
