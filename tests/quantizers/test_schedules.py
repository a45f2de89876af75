"""Schedules of mu: end points, shape, purity, the hard part, and what cannot be scheduled."""

import math

import pytest

from proxbit.errors import MuRangeError, UnknownNameError
from proxbit.quantizers import AGGREGATE, SCHEDULES, MuSchedule

KINDS = ["linear", "log", "sigmoid"]
ENDS = [(0.3, 30.0), (1.0, 100.0), (0.01, 1.0), (5.0, 5.0), (30.0, 1.0), (7.0, 1e-3), (0.7, 2.9)]
RATES = [0.5, 0.25, 0.125, 0.0, 1.0, 2.0]


def curve(kind, start, end, p):
    """The schedules once more, each from another form of its formula."""
    if kind == "linear":
        return (1 - p) * start + p * end
    if kind == "log":
        return start ** (1 - p) * end**p
    remaining = (1 - math.tanh(5 * (p - 0.5)) / math.tanh(2.5)) / 2
    return 1 / ((1 - remaining) / end + remaining / start)


def test_the_kinds_are_all_tested_here():
    assert set(SCHEDULES) == {*KINDS, "constant", "aggregate"}


@pytest.mark.parametrize(("start", "end"), ENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_formula_and_direction(kind, start, end):
    """A schedule that ends at the limit of its pair must not leave it by a rounding error."""
    for steps in (2, 3, 57):
        schedule = MuSchedule(kind, start, end, steps)
        assert schedule.mu(0) == pytest.approx(start, rel=1e-12)
        assert schedule.mu(steps - 1) == pytest.approx(end, rel=1e-12)
        for step in range(steps):
            assert schedule.mu(step) == pytest.approx(curve(kind, start, end, step / (steps - 1)), rel=1e-12)
        values = [schedule.mu(step) for step in range(steps + 20)]
        assert all((later - earlier) * (end - start) >= 0 for earlier, later in zip(values[:-1], values[1:]))
        assert min(values) >= min(start, end) and max(values) <= max(start, end)


def test_shapes():
    """Half way: the arithmetic mean, the geometric mean, the harmonic mean."""
    assert MuSchedule("linear", 1.0, 9.0, 101).mu(50) == pytest.approx(5)
    assert MuSchedule("log", 1.0, 9.0, 101).mu(50) == pytest.approx(3)
    assert MuSchedule("sigmoid", 1.0, 9.0, 101).mu(50) == pytest.approx(1.8)


def test_constant_stays():
    schedule = MuSchedule("constant", 4.0, 99.0, 10, hard_fraction=0.5)
    assert [schedule.mu(step) for step in range(12)] == [4.0] * 12


@pytest.mark.parametrize("kind", ["constant", *KINDS, AGGREGATE])
def test_mu_is_a_function_of_the_step_alone(kind):
    """Asked in any order, any number of times, by any instance: resuming needs no state."""
    steps = len(RATES)
    schedule = MuSchedule(kind, 0.3, 30.0, steps, hard_fraction=0.2, learning_rates=RATES)
    forwards = [schedule.mu(step) for step in range(steps)]
    backwards = [schedule.mu(step) for step in reversed(range(steps))]
    fresh = [MuSchedule(kind, 0.3, 30.0, steps, 0.2, tuple(RATES)).mu(step) for step in range(steps)]
    assert forwards == backwards[::-1] == fresh


@pytest.mark.parametrize(("kind", "hard_fraction"), list(zip(KINDS, [0.1, 0.5, 1.0])))
def test_mu_is_at_its_end_during_the_hard_part(kind, hard_fraction):
    schedule = MuSchedule(kind, 0.5, 20.0, 40, hard_fraction=hard_fraction)
    hard = [step for step in range(45) if schedule.is_hard(step)]
    assert len(hard) == 5 + round(40 * hard_fraction)
    assert [schedule.mu(step) for step in hard] == pytest.approx([20.0] * len(hard))


@pytest.mark.parametrize(
    ("steps", "hard_fraction", "hard_steps"),
    [(10, 0.0, 0), (10, 0.1, 1), (10, 0.19, 1), (10, 1.0, 10), (7, 0.5, 3), (3, 0.1, 0), (1, 1.0, 1), (90, 0.7, 63)],
)
def test_the_last_fraction_of_the_steps_is_hard(steps, hard_fraction, hard_steps):
    schedule = MuSchedule("linear", 1.0, 2.0, steps, hard_fraction=hard_fraction)
    assert schedule.soft_steps == steps - hard_steps
    assert [schedule.is_hard(step) for step in range(steps)] == [False] * (steps - hard_steps) + [True] * hard_steps


def test_a_single_step_starts_at_the_start():
    schedule = MuSchedule("log", 0.3, 30.0, 1)
    assert schedule.mu(0) == 0.3
    assert schedule.mu(1) == pytest.approx(30)


def test_aggregate_is_one_plus_the_learning_rates_before():
    schedule = MuSchedule(AGGREGATE, math.nan, math.nan, len(RATES), learning_rates=RATES)
    expected = [1, 1.5, 1.75, 1.875, 1.875, 2.875]
    assert [schedule.mu(step) for step in range(6)] == expected
    assert schedule.mu(6) == schedule.mu(1000) == 4.875


def test_aggregate_stops_at_the_last_step():
    """More learning rates than steps are no error; those beyond are not used."""
    schedule = MuSchedule(AGGREGATE, 1.0, 1.0, 2, hard_fraction=0.5, learning_rates=RATES)
    assert [schedule.mu(step) for step in range(4)] == [1, 1.5, 1.75, 1.75]
    assert [schedule.is_hard(step) for step in range(3)] == [False, True, True]


def test_aggregate_needs_a_learning_rate_for_each_step():
    with pytest.raises(MuRangeError, match="a learning rate for each of the 7 steps, not 6"):
        MuSchedule(AGGREGATE, 1.0, 1.0, 7, learning_rates=RATES)


@pytest.mark.parametrize(("kind", "steps"), [("linear", 0), (AGGREGATE, -3)])
def test_no_steps(kind, steps):
    with pytest.raises(MuRangeError, match=f"at least 1 optimizer step, not {steps}"):
        MuSchedule(kind, 1.0, 2.0, steps)


@pytest.mark.parametrize("fraction", [-0.1, 1.01, math.nan, math.inf])
def test_hard_fraction_out_of_range(fraction):
    with pytest.raises(MuRangeError, match=rf"hard_fraction must be in \[0, 1\], not {fraction}"):
        MuSchedule("linear", 1.0, 2.0, 10, hard_fraction=fraction)


@pytest.mark.parametrize(("kind", "bad"), list(zip(["constant", *KINDS], [math.nan, math.inf, -math.inf, math.nan])))
def test_mu_must_be_finite(kind, bad):
    for start, end in ((bad, 1.0), (1.0, bad)):
        with pytest.raises(MuRangeError, match="mu must be finite"):
            MuSchedule(kind, start, end, 10)


@pytest.mark.parametrize(("kind", "bad"), [("log", 0.0), ("log", -1.0), ("sigmoid", 0.0)])
def test_logarithms_and_reciprocals_need_a_positive_mu(kind, bad):
    for start, end in ((bad, 1.0), (1.0, bad)):
        with pytest.raises(MuRangeError, match=f"'{kind}' needs mu > 0"):
            MuSchedule(kind, start, end, 10)


def test_linear_may_start_at_zero():
    assert MuSchedule("linear", 0.0, 1.0, 3).mu(1) == 0.5


def test_unknown_kind_names_the_nearest():
    with pytest.raises(UnknownNameError, match="Unknown mu schedule 'liner'. Did you mean 'linear'"):
        MuSchedule("liner", 1.0, 2.0, 10)
