"""Timing, with a clock that the candidates themselves move: no test depends on how fast a machine is."""

import pytest
import torch
from torch import nn

from proxbit.analysis.timing import OPERATORS, Timings, in_turn, operator_shares, time_rounds, torch_threads
from proxbit.errors import ConfigError


class FakeTime:
    """A clock, and candidates that take as long as they say."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def __call__(self):
        return self.now

    def candidate(self, name, *seconds):
        """Takes the given seconds one call after the other, then the last of them for ever."""
        queue = list(seconds)

        def call():
            self.log.append(name)
            self.now += queue.pop(0) if len(queue) > 1 else queue[0]

        return call


@pytest.fixture
def clock():
    return FakeTime()


def test_every_candidate_is_called_once_in_every_round(clock):
    calls = {name: clock.candidate(name, 1.0) for name in "ab"}
    timings = time_rounds(calls, 3, warmup=1, cold=True, clock=clock)
    assert "".join(clock.log) == "ab" + "ab" * 3
    assert timings.seconds == {"a": (1.0,) * 3, "b": (1.0,) * 3}


def test_hot_samples_follow_a_call_that_is_not_timed(clock):
    """The second call of a round is the faster one: what fits is in the caches."""
    calls = {"a": clock.candidate("a", 9.0, 5.0, 2.0, 5.0, 2.0)}
    assert time_rounds(calls, 2, warmup=1, clock=clock).seconds["a"] == (2.0, 2.0)


def test_short_calls_are_repeated_for_as_long_as_a_sample_lasts(clock):
    calls = {"short": clock.candidate("s", 0.25), "long": clock.candidate("l", 3.0)}
    timings = time_rounds(calls, 1, warmup=1, sample_seconds=1.0, clock=clock)
    assert "".join(clock.log) == "sl" + "s" + "ssss" + "l" + "l"
    assert (timings.median("short"), timings.median("long")) == (0.25, 3.0)


def test_a_candidate_out_of_patience_sits_out_the_rest(clock):
    calls = {"slow": clock.candidate("s", 10.0), "fast": clock.candidate("f", 1.0)}
    timings = time_rounds(calls, 4, warmup=1, cold=True, patience=15.0, clock=clock)
    assert [len(timings.seconds[name]) for name in ("slow", "fast")] == [2, 4]
    assert timings.ratio("fast", "slow") == 10.0


def test_ratios_are_taken_within_a_round():
    """The machine was slower and slower: the ratio of the medians would be the same, that of mixed rounds not."""
    timings = Timings({"base": (2.0, 40.0, 600.0), "fast": (1.0, 10.0, 200.0)})
    assert timings.ratio("fast", "base") == 3.0
    assert timings.ratio("base", "fast") == pytest.approx(1 / 3)
    assert timings.median("base") / timings.median("fast") == 4.0


def test_the_spread_is_the_distance_of_the_quartiles():
    assert Timings({"a": (1.0, 2.0, 3.0, 4.0, 5.0)}).spread("a") == pytest.approx(2 / 3)
    assert Timings({"a": (1.0,)}).spread("a") == 0


@pytest.mark.parametrize(("rounds", "warmup"), [(0, 1), (1, 0), (-1, 1)])
def test_counts_below_one_are_refused(rounds, warmup):
    with pytest.raises(ConfigError, match="one round and one call"):
        time_rounds({}, rounds, warmup=warmup)


def test_in_turn_makes_every_call(clock):
    in_turn([clock.candidate(name, 1.0) for name in "abc"])()
    assert clock.log == ["a", "b", "c"]


def test_threads_are_set_for_a_while():
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        with torch_threads(None):
            assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with pytest.raises(ConfigError, match="one thread"), torch_threads(0):
        pass


def test_shares_sum_to_one_and_name_what_ran():
    x, layer = torch.randn(4, 8), nn.Linear(8, 8)
    shares = operator_shares(lambda: layer(x))
    assert set(shares) == {*OPERATORS, "rest"}
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["linear"] == 1
    q = torch.randn(1, 2, 4, 8)
    attention = operator_shares(lambda: nn.functional.scaled_dot_product_attention(q, q, q))
    assert attention["attention"] == 1


def test_packed_layers_count_as_linear():
    weight, scale = torch.zeros(8, 1, dtype=torch.uint8), torch.ones(8)
    x = torch.randn(2, 8)
    for name in ("linear_w1", "linear_w1a8"):
        op = getattr(torch.ops.proxbit, name)
        assert operator_shares(lambda op=op: op(x, weight, scale, None))["linear"] == 1
