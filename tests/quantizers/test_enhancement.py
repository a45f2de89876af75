"""Sound partners of heuristic pairs."""

import pytest
import torch

from proxbit.quantizers import PAIRS, decompose, enhance, get_pair
from proxbit.quantizers.enhancement import Antiderivative

W = torch.linspace(-4, 4, 4001, dtype=torch.float64)


@pytest.mark.parametrize("mu", [0.3, 1.0, 5.0, 30.0])
@pytest.mark.parametrize(("heuristic", "partner"), [("bnn+", "bnn++"), ("ede", "ede++")])
def test_partner_is_the_known_one(heuristic, partner, mu):
    """The numerical integral of B against the closed form of F."""
    forward = enhance(heuristic).forward(W, mu)
    assert torch.allclose(forward, get_pair(partner).forward(W, mu), atol=1e-6, rtol=0)


def test_polynomial_partner():
    forward = enhance("bireal").forward(W, 2.0)
    assert torch.allclose(forward, get_pair("bireal++").forward(W, 2.0), atol=1e-6, rtol=0)


def test_box_becomes_the_hard_tanh():
    assert torch.allclose(enhance("bnn").forward(W, 1.0), W.clamp(-1, 1), atol=2e-4, rtol=0)


def test_no_weights_and_weights_that_are_not_finite():
    forward = enhance("bnn+").forward
    assert forward(torch.zeros(0, 5), 30.0).shape == (0, 5)
    result = forward(torch.tensor([1.0, torch.inf, -torch.inf, torch.nan]), 30.0)
    torch.testing.assert_close(result, torch.tensor([1.0, 1.0, -1.0, torch.nan]), equal_nan=True)


@pytest.mark.parametrize("name", [name for name in PAIRS if not PAIRS.get(name).sound])
def test_every_partner_is_sound(name):
    assert not decompose(name).sound
    assert decompose(enhance(name)).sound


@pytest.mark.parametrize("name", [name for name in PAIRS if PAIRS.get(name).sound])
def test_a_sound_pair_is_returned_as_it_is(name):
    assert enhance(name) is PAIRS.get(name)


def test_schedule_of_the_partner():
    assert enhance("bnn+").schedule == get_pair("bnn+").schedule
    assert enhance("bnn+", schedule=("log", 0.3, 30.0)).schedule == ("log", 0.3, 30.0)


def test_antiderivative_of_a_cosine():
    values = Antiderivative(lambda w, mu: mu * (mu * w).cos())(W, 3.0)
    assert torch.allclose(values, (3 * W).sin(), atol=1e-10)


def test_antiderivative_keeps_the_dtype_and_takes_zeros():
    values = Antiderivative(lambda w, mu: torch.ones_like(w))(torch.zeros(3, dtype=torch.float32), 1.0)
    assert values.dtype == torch.float32
    assert torch.equal(values, torch.zeros(3))


@pytest.mark.parametrize("name", ["bnn+", "xnor", "adabin"])
def test_the_partner_keeps_the_units_of_its_rows(name):
    """B is a function of the weight in those units."""
    partner, pair = enhance(name), get_pair(name)
    assert (partner.scaling, partner.levels, partner.mu_range) == (pair.scaling, pair.levels, pair.mu_range)
    assert torch.equal(partner.backward(W, 2.0), pair.backward(W, 2.0))
