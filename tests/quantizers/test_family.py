"""The family as a whole: what every row of data promises."""

import numpy as np
import pytest
import torch

from pair_formulas import ROWS, SCALING, nearest, pull
from proxbit.errors import ConfigError
from proxbit.quantizers import PAIRS, MuSchedule, decompose, get_pair, update_start

TERNARY, TWO_BITS, UNEVEN = [-1, 0, 1], [-1.5, -0.5, 0.5, 1.5], [-2, -0.5, 0.25, 1]
LEVELS = {"ternary": TERNARY, "two-bit": TWO_BITS, "uneven": UNEVEN}
VARIANTS = {name: (name, None) for name in ROWS} | {
    f"{name}-{kind}": (name, {"levels": levels}) for name in ("pc", "proxquant") for kind, levels in LEVELS.items()
}
VARIANTS |= {
    "pc-rho": ("pc", {"rho": 0.5, "varrho": 0}),
    "pc-varrho": ("pc", {"levels": TERNARY, "rho": 0, "varrho": 2.0}),
    "rpc-ternary": ("rpc", {"levels": TERNARY}),
}


def variant(name):
    return get_pair(*VARIANTS[name])


def furthest(pair, distance):
    """How far F is from the nearest level, for all |w| <= 10 at least `distance` from a boundary, at the end of mu."""
    boundaries = [(low + high) / 2 for low, high in zip(pair.levels[:-1], pair.levels[1:], strict=True)]
    edges = [boundary + side * distance for boundary in boundaries for side in (-1, 1)]
    w = np.concatenate([np.linspace(-10, 10, 20001), edges, np.linspace(-1, 1, 20001)])
    away = np.abs(w[:, None] - np.array(boundaries)).min(axis=1)
    w = np.unique(w[away >= distance - 1e-15])
    return float(np.abs(pair.forward(torch.from_numpy(w), pair.schedule[2]).numpy() - nearest(w, pair.levels)).max())


def test_the_family_is_the_one_of_the_formulas():
    assert set(PAIRS) == set(ROWS)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_row_is_complete(name):
    pair = variant(name)
    assert pair.source and pair.forward_formula and pair.backward_formula
    assert pair.scaling == SCALING.get(name, ("row", "ls", "none"))
    assert list(pair.levels) == sorted(set(pair.levels))
    kind, start, end = pair.schedule
    schedule = MuSchedule(kind, start, end, steps=100)
    assert all(pair.check_mu(schedule.mu(step)) is not None for step in range(100))


@pytest.mark.parametrize("name", [name for name in VARIANTS if variant(name).hard_from is not None])
def test_annealed_forwards_end_at_the_levels_from_where_their_row_says(name):
    pair = variant(name)
    assert furthest(pair, pair.hard_from) <= 1e-3
    if pair.hard_from > 0:
        assert furthest(pair, 0.8 * pair.hard_from) > 1e-3


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "fp" and variant(name).hard_from is None])
def test_rows_that_promise_no_hard_end_have_none(name):
    """Not even half-way from a boundary to a level, and those that are no clip at the levels not beyond either."""
    pair = variant(name)
    gap = min(high - low for low, high in zip(pair.levels[:-1], pair.levels[1:], strict=True))
    assert pair.levels and pair.hard_from is None
    assert furthest(pair, 0.25 * gap if name.startswith("proxquant") else 1.0) > 1e-3


def test_full_precision_has_no_levels():
    pair = get_pair("fp")
    assert (pair.levels, pair.hard_from, pair.binary) == ((), None, False)


@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize("name", ["pc", "proxquant"])
def test_any_levels(name, kind):
    """Sound and non-decreasing while soft; the nearest level, the upper one half-way, from half of a gap on.

    Of ProxQuant that holds between the levels: what is beyond them is not projected.
    """
    pair, levels = get_pair(name, {"levels": LEVELS[kind]}), LEVELS[kind]
    assert pair.levels == tuple(map(float, levels))
    w = np.arange(-192, 193) / 64
    if name == "proxquant":
        w = w[(w >= levels[0]) & (w <= levels[-1])]
    tensor = torch.from_numpy(w)
    hard = max(high - low for low, high in zip(levels[:-1], levels[1:], strict=True)) / 2
    for mu in (0.01 * hard, 0.5 * hard, hard):
        result = decompose(pair, mu)
        assert pair.sound and result.sound, result.reason
        assert (np.diff(pair.forward(tensor, mu).numpy()) >= -1e-14).all()
        assert (pair.backward(tensor, mu) == 1).all()
        assert np.ptp(pair.forward(tensor, mu).numpy()) == pytest.approx(levels[-1] - levels[0], abs=1e-14)
        assert (len(np.unique(pair.forward(tensor, mu).numpy())) > len(levels)) == (mu < hard)
    np.testing.assert_array_equal(pair.forward(tensor, hard).numpy(), nearest(w, levels))
    np.testing.assert_array_equal(pair.hard(tensor).numpy(), nearest(w, levels))


def test_schedule_of_any_levels():
    """It ends where the shrinks reach half of the largest gap."""
    for parameters, end in (
        ({}, 1.0),
        ({"levels": TERNARY}, 0.5),
        ({"levels": UNEVEN}, 0.75),
        ({"levels": TERNARY, "rho": 0, "varrho": 2.0}, 0.25),
        ({"rho": 0.5, "varrho": 0.25}, 2.0),
    ):
        assert get_pair("pc", parameters).schedule == pytest.approx(("linear", 0.01 * end, end))


@pytest.mark.parametrize(
    "parameters",
    [
        {"levels": []},
        {"levels": [1]},
        {"levels": [1, -1]},
        {"levels": [-1, -1, 1]},
        {"levels": ["a", "b"]},
        {"levels": "ab"},
        {"levels": [-1, None, 1]},
        {"levels": [False, True]},
        {"rho": True},
        {"levels": 3},
        {"levels": None},
        {"rho": -0.1},
        {"varrho": -1.0},
        {"rho": 0, "varrho": 0},
        {"rho": "1"},
        {"rho": None},
    ],
    ids=str,
)
def test_levels_and_shrinks_that_cannot_work(parameters):
    with pytest.raises(ConfigError, match=r"increasing numbers, such as \[-1, 0, 1\], and rho and varrho") as caught:
        get_pair("pc", parameters)
    assert all(f"{name}=" in str(caught.value) for name in ("levels", "rho", "varrho"))


@pytest.mark.parametrize("name", ["proxquant", "rpc"])
def test_where_the_step_starts_from(name):
    """ProxQuant and reverse ProxConnect step from P(w); ProxQuant shows the network P(w), reverse ProxConnect w."""
    pair, w = get_pair(name), np.linspace(-2, 2, 401)
    for mu in (0.01, 0.4, 1.0):
        at = torch.from_numpy(w)
        np.testing.assert_allclose(pair.update_from(at, mu).numpy(), pull(w, mu), rtol=0, atol=1e-14)
        seen = w if name == "rpc" else pull(w, mu)
        np.testing.assert_allclose(pair.forward(at, mu).numpy(), seen, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ["proxquant", "rpc"])
def test_the_pull_of_a_step_is_mu(name):
    """In row units, short of a level and beyond: what the steps of the optimizer have to outweigh."""
    pair = get_pair(name)
    kind, start, end = pair.schedule
    assert (kind, start, end) == ("linear", 0.0, 0.02)
    w = torch.linspace(0, 1 - end, 99, dtype=torch.float64)
    torch.testing.assert_close(pair.update_from(w, end), w + end, rtol=0, atol=1e-12)
    torch.testing.assert_close(pair.update_from(4 - w, end), 4 - w - end, rtol=0, atol=1e-12)
    assert torch.equal(pair.update_from(4 * w - 2, start), 4 * w - 2)


def test_pulls_do_not_add_up_to_a_projection():
    """In row units |w| is 1 in the mean: two of five Gaussian weights are beyond a level, and not to be cut off."""
    latent = torch.randn(4, 3072, generator=torch.Generator().manual_seed(0)) * 0.03
    moved = latent
    for _ in range(30):
        moved = update_start(moved, torch.tensor(1e-4), get_pair("rpc"))
    assert 0 < (moved - latent).abs().max() / latent.abs().mean() < 2 * 30 * 1e-4


def test_only_two_methods_step_from_elsewhere():
    assert {name for name in PAIRS if get_pair(name).update_from is not None} == {"proxquant", "rpc"}
