"""The quantizer pairs: F and B of each one written once more, soundness, ranges of mu, and what a pair is made of."""

import copy
import math

import numpy as np
import pytest
import torch

import proxbit
from pair_formulas import ROWS, clip, nearest, swish, swish_slope
from proxbit.errors import ConfigError, MuRangeError
from proxbit.quantizers import BINARY, PAIRS, Function, QuantizerPair, compose, get_pair, heuristic
from proxbit.quantizers.functions import CLIP, SIGN, SIGN_SWISH

FORWARD = {name: row[0] for name, row in ROWS.items()}
BACKWARD = {name: row[1] for name, row in ROWS.items()}
PROXIMAL = {name: row[2] for name, row in ROWS.items() if row[2] is not None}
LOWEST_MU = {name: row[3] for name, row in ROWS.items()}
MUS = {name: row[4] for name, row in ROWS.items()}
every_pair = pytest.mark.parametrize("name", sorted(PAIRS))
# With zeros, the levels, the edges of the box, and large values.
GRID = np.concatenate([np.linspace(-3, 3, 481), [-20.0, 20.0, -0.0, 0.0, -1e-300, 1e-300]])


def on_grid(function, mu, grid=GRID):
    return function(torch.from_numpy(grid), mu).numpy()


@every_pair
def test_forward_and_backward(name):
    pair = get_pair(name)
    for mu in MUS[name]:
        for value in (mu, torch.tensor(mu, dtype=torch.float64)):
            np.testing.assert_allclose(on_grid(pair.forward, value), FORWARD[name](GRID, mu), rtol=1e-11, atol=1e-13)
            np.testing.assert_allclose(on_grid(pair.backward, value), BACKWARD[name](GRID, mu), rtol=1e-9, atol=1e-13)


def test_soundness_flags():
    assert {name for name in PAIRS if get_pair(name).sound} == set(PROXIMAL)
    for name in sorted(PAIRS):
        pair = get_pair(name)
        assert (pair.proximal is not None) == (pair.transform is not None) == pair.sound


@pytest.mark.parametrize("name", PROXIMAL)
def test_sound_pairs_keep_the_condition_of_proxconnect(name):
    """dF = B dP, by central differences of F and of P (written here), wherever both are smooth; P never decreases."""
    pair, step = get_pair(name), 1e-6
    middle = np.linspace(-2.7, 2.7, 301) + 0.001234
    low, high = middle - step, middle + step
    for mu in MUS[name]:
        change_f = on_grid(pair.forward, mu, high) - on_grid(pair.forward, mu, low)
        change_p = PROXIMAL[name](high, mu) - PROXIMAL[name](low, mu)
        multiplier = on_grid(pair.backward, mu, middle)
        np.testing.assert_allclose(change_f, multiplier * change_p, rtol=1e-6, atol=1e-14 * max(1, mu))
        assert (np.diff(on_grid(pair.proximal, mu, np.sort(GRID))) >= -1e-14).all()
        np.testing.assert_allclose(on_grid(pair.proximal, mu), PROXIMAL[name](GRID, mu), rtol=1e-12, atol=1e-14)


def test_the_exact_gradient_pair():
    """For bnn++, P is the identity, so B is the derivative of F itself."""
    step = 1e-6
    points = np.linspace(-4, 4, 161)
    for mu in (0.3, 1.0, 5.0):
        difference = on_grid(get_pair("bnn++").forward, mu, points + step) - on_grid(
            get_pair("bnn++").forward, mu, points - step
        )
        np.testing.assert_allclose(
            on_grid(get_pair("bnn++").backward, mu, points), difference / (2 * step), rtol=0, atol=1e-8
        )


@pytest.mark.parametrize("name", ["bnn", "bnn+"])
def test_heuristic_pairs_break_the_condition(name):
    """F is flat where B is not 0: no proximal map explains the pair."""
    inside = np.array([-0.4, 0.3])
    assert (on_grid(get_pair(name).backward, 5.0, inside) != 0).all()
    assert np.array_equal(
        on_grid(get_pair(name).forward, 5.0, inside + 0.01), on_grid(get_pair(name).forward, 5.0, inside)
    )


@pytest.mark.parametrize("name", ["bc", "bnn", "bnn+", "bnn++", "parq", "pc"])
def test_infinite_values_give_a_level(name):
    pair = get_pair(name)
    w = torch.tensor([-math.inf, math.inf], dtype=torch.float64)
    assert pair.forward(w, 2.0).tolist() == [-1, 1]
    assert torch.isfinite(pair.backward(w, 2.0)).all()


@every_pair
def test_dtype_and_shape_are_kept(name):
    pair = get_pair(name)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        w = torch.randn(2, 3, 4).to(dtype)
        for side in (pair.forward, pair.backward):
            result = side(w, torch.tensor(1.5, dtype=torch.float64))
            assert (result.dtype, result.shape) == (dtype, w.shape)


@every_pair
def test_range_of_mu(name):
    pair, lowest = get_pair(name), LOWEST_MU[name]
    highest = 31 if name.startswith("fda") else math.inf
    for mu in (lowest, lowest + 1, min(highest, 1e6)):
        assert pair.check_mu(mu) == mu
    for mu in (lowest - 1e-6, -1.0, math.nan, math.inf, -math.inf):
        with pytest.raises(MuRangeError, match=f"takes finite values from {lowest:g} to {highest:g}") as caught:
            pair.check_mu(mu)
        assert f"mu = {mu} is out of range" in str(caught.value)


def test_upper_end_of_the_range_of_mu():
    pair = compose(SIGN, mu_range=(2.0, 8.0), schedule=("linear", 2.0, 8.0))
    assert pair.check_mu(8.0) == 8.0
    with pytest.raises(MuRangeError, match="mu = 8.5 .* from 2 to 8"):
        pair.check_mu(8.5)


@pytest.mark.parametrize("schedule", [None, ("linear", 2.0, 9.0), ("log", 1.0, 8.0), ("constant", 1.0, 4.0)])
def test_a_schedule_beyond_the_range_of_mu(schedule):
    """As that of pairs that are given none is, at mu = 1."""
    more = {} if schedule is None else {"schedule": schedule}
    with pytest.raises(MuRangeError, match=r"default schedule of a pair, now \(.*goes beyond: mu = [19].0 .* 2 to 8"):
        compose(SIGN, mu_range=(2.0, 8.0), **more)
    assert compose(SIGN, mu_range=(2.0, 8.0), schedule=("constant", 2.0, 1.0)).mu_range == (2.0, 8.0)


def test_levels_are_increasing_numbers():
    """In a list too, as they come out of a configuration file."""
    pair = compose(SIGN, levels=[-1, 1])
    assert pair.levels == (-1.0, 1.0) and pair.binary
    with pytest.raises(ConfigError, match=r"must increase, as \(-1, 1\) do; not \(1, 0, -1\)"):
        compose(SIGN, levels=(1, 0, -1))


def test_copies_are_the_pair_itself():
    pair = get_pair("bnn++")
    assert copy.copy(pair) is copy.deepcopy(pair) is pair


@pytest.mark.parametrize(
    ("levels", "dtype"),
    [
        ((-1.0, 1.0), torch.float16),
        ((-1.0, 0.0, 1.0), torch.float32),
        ((-2.0, -0.5, 0.25, 1.0), torch.float64),
        ((-2.0, -0.5, 0.25, 1.0), torch.float16),
    ],
)
def test_hard_is_the_nearest_level_and_the_upper_one_half_way(levels, dtype):
    pair = compose(SIGN, levels=levels)
    w = torch.linspace(-3, 3, 193).to(dtype).view(193, 1)
    middles = [(low + high) / 2 for low, high in zip(levels[:-1], levels[1:], strict=True)]
    assert pair.hard(w).dtype == dtype and pair.hard(w).shape == w.shape
    np.testing.assert_array_equal(pair.hard(w).double().numpy(), nearest(w.double().numpy(), levels))
    assert pair.hard(torch.tensor(middles, dtype=dtype)).tolist() == list(levels[1:])
    assert pair.binary == (len(levels) == 2)


def test_hard_without_levels_is_the_weight_itself():
    w = torch.randn(3, 4)
    assert compose(SIGN, levels=()).hard(w) is w
    assert not compose(SIGN, levels=()).binary
    assert get_pair("fp").levels == () and get_pair("fp").hard(w) is w


def test_hard_of_a_binary_pair_at_zero_and_below_the_smallest_number():
    w = torch.tensor([0.0, -0.0, 1e-45, -1e-45])
    assert get_pair("bc").hard(w).tolist() == [1, 1, 1, -1]


def test_copies_of_a_model_share_its_pairs():
    pair = get_pair("bnn++")
    assert copy.deepcopy({"pair": pair})["pair"] is pair
    assert copy.deepcopy(compose(SIGN)) is not get_pair("bc")


def test_compose_chains_map_and_transform():
    pair = proxbit.compose(CLIP, SIGN_SWISH, mu_range=(1, 9), schedule=("log", 2.0, 8.0), source="here")
    assert pair.sound
    assert (pair.mu_range, pair.schedule, pair.source) == ((1, 9), ("log", 2.0, 8.0), "here")
    np.testing.assert_allclose(on_grid(pair.forward, 3.0), swish(clip(GRID, 3.0), 3.0), rtol=0, atol=1e-14)
    np.testing.assert_allclose(on_grid(pair.backward, 3.0), swish_slope(clip(GRID, 3.0), 3.0), rtol=1e-11)
    assert compose(CLIP).source == CLIP.source
    np.testing.assert_allclose(on_grid(compose(CLIP).backward, 3.0), 1)


def test_compose_of_plain_functions():
    """The derivative of T is found, or taken where the function brings it."""

    def halved(w, mu):
        return w / 2

    def squared(p, mu):
        return mu * p * p.abs()

    pair = compose(halved, squared)
    assert pair.sound and (pair.proximal.name, pair.transform.name) == ("halved", "squared")
    np.testing.assert_allclose(on_grid(pair.forward, 3.0), 3 * GRID / 2 * np.abs(GRID / 2), rtol=1e-14)
    np.testing.assert_allclose(on_grid(pair.backward, 3.0), 6 * np.abs(GRID / 2), rtol=1e-14)
    assert "halved" in pair.forward_formula and "squared" in pair.forward_formula
    squared.derivative = lambda p, mu: p * 0 + 7
    assert on_grid(compose(halved, squared).backward, 3.0).tolist() == [7.0] * len(GRID)


@pytest.mark.parametrize(
    ("proximal", "words"),
    [
        (lambda w, mu: -w, "from 3 at w = -3 to 2.999 at -2.999, with mu = 1"),
        (lambda w, mu: torch.where(w * mu <= 3, w, 0), "to 0 at .*, with mu = 4"),
        (lambda w, mu: w.log(), "nan"),
    ],
    ids=["falls", "falls at the end", "no number"],
)
def test_compose_refuses_what_is_no_proximal_map(proximal, words):
    with pytest.raises(ConfigError, match=rf"must not decrease.*{words}.*heuristic"):
        compose(proximal, schedule=("log", 1.0, 4.0))


def test_heuristic_of_plain_functions():
    def stairs(w, mu):
        return w.floor()

    pair = heuristic(stairs, Function("mu", lambda w, mu: w * 0 + mu, "mu"))
    assert not pair.sound
    assert (pair.forward_formula, pair.backward_formula) == ("F(w) = stairs(w, mu)", "B(w) = mu")
    assert pair.forward(torch.tensor(2.5), 1.0).item() == 2
    assert pair.backward(torch.tensor(2.5), 3.0).item() == 3


def test_fields_of_a_row():
    defaults, row = compose(SIGN), {"levels": (-1.0, 0.0, 1.0), "scaling": ("std", "fixed", "remove")}
    row |= {"hard_from": 0.5, "update_from": CLIP, "schedule": ("log", 1.0, 2.0), "mu_range": (0.5, 9.0), "source": "s"}
    for pair in (compose(SIGN, **row), heuristic(SIGN, CLIP, **row)):
        assert {field: getattr(pair, field) for field in row} == row
    assert (
        (defaults.levels, defaults.scaling) == (BINARY, ("row", "ls", "none")) == ((-1.0, 1.0), ("row", "ls", "none"))
    )
    assert defaults.hard_from is None and defaults.update_from is None


def test_a_pair_cannot_be_changed():
    """Layers share it."""
    with pytest.raises(AttributeError, match="cannot assign"):
        get_pair("bc").mu_range = (0, 1)
    assert isinstance(get_pair("bc"), QuantizerPair)
