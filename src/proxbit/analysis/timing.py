"""The one place that times things: interleaved rounds, medians, ratios within a round, shares of operators."""

import math
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from proxbit.errors import ConfigError

__all__ = ["Timings", "in_turn", "operator_shares", "time_rounds", "torch_threads"]

Call = Callable[[], object]

# The outermost operator of a chain decides. In vision transformers nn.Linear comes as aten::linear, so that a bare
# product of matrices belongs to attention.
OPERATORS = {
    "linear": ("aten::linear", "quantized::linear", "proxbit::linear"),
    "attention": ("aten::scaled_dot_product", "aten::_scaled_dot", "aten::matmul", "aten::bmm", "aten::softmax"),
    "GELU": ("aten::gelu",),
    "LayerNorm": ("aten::layer_norm",),
    "convolution": ("aten::conv", "aten::_conv"),
}
REST = "rest"


@dataclass(frozen=True)
class Timings:
    """What candidates took, timed once each in every round.

    Attributes:
        seconds: of one call, round by round, for each candidate. One that ran out of patience has fewer rounds.
    """

    seconds: dict[str, tuple[float, ...]]

    def median(self, name: str) -> float:
        """Seconds of one call."""
        return statistics.median(self.seconds[name])

    def spread(self, name: str) -> float:
        """The distance of the quartiles, as a fraction of the median; 0 for a single round."""
        values = self.seconds[name]
        if len(values) < 2:
            return 0.0
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return (high - low) / self.median(name)

    def ratio(self, name: str, base: str) -> float:
        """How many times faster than `base`: the median of the ratios within a round, where both met the same load."""
        rounds = zip(self.seconds[base], self.seconds[name], strict=False)
        return statistics.median(theirs / own for theirs, own in rounds)


def in_turn(calls: Sequence[Call]) -> Call:
    """One call that makes several, one after the other.

    With the layers of a whole model, or with copies of one layer, that together exceed the caches, each finds its
    weights in memory.
    """

    def call() -> None:
        for one in calls:
            one()

    return call


def time_rounds(
    calls: Mapping[str, Call],
    rounds: int,
    *,
    warmup: int = 2,
    sample_seconds: float = 0.0,
    cold: bool = False,
    patience: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
) -> Timings:
    """Time candidates against each other.

    Every round takes one sample of every candidate in turn, so that a disturbance of the machine meets all of them.

    Args:
        calls: the candidates, by name.
        rounds: how many.
        warmup: calls of each candidate before the first round.
        sample_seconds: how long a sample lasts at least; it makes as many calls as that takes, and counts their mean.
        cold: a sample is one call right after the other candidates. Otherwise a call that is not timed comes first, and
            what fits into the caches is there.
        patience: seconds; a candidate that took longer than this in all sits out the rounds that remain.
        clock: in seconds.

    Returns:
        The times of one call.

    Raises:
        ConfigError: for counts below one.
    """
    if rounds < 1 or warmup < 1:
        raise ConfigError(f"Timing needs one round and one call to warm up at least, not {rounds} and {warmup}.")
    numbers, seconds, spent = {}, {name: list[float]() for name in calls}, dict.fromkeys(calls, 0.0)
    for name, call in calls.items():
        once = math.inf
        for _ in range(warmup):
            once = _mean_seconds(call, 1, clock)
        numbers[name] = 1 if cold else max(1, math.ceil(sample_seconds / max(once, 1e-9)))
    for _ in range(rounds):
        for name, call in calls.items():
            if spent[name] > patience:
                continue
            begin = clock()
            if not cold:
                call()
            seconds[name].append(_mean_seconds(call, numbers[name], clock))
            spent[name] += clock() - begin
    return Timings({name: tuple(values) for name, values in seconds.items()})


def _mean_seconds(call: Call, number: int, clock: Callable[[], float]) -> float:
    begin = clock()
    for _ in range(number):
        call()
    return (clock() - begin) / number


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Let torch use this many threads for a while; None leaves them as they are.

    Raises:
        ConfigError: for fewer than one.
    """
    before = torch.get_num_threads()
    if count is not None and count < 1:
        raise ConfigError(f"torch needs one thread at least, not {count}.")
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def operator_shares(call: Call, repeats: int = 3) -> dict[str, float]:
    """Which fraction of its time in operators a call spends in linear layers, in attention, and in the rest.

    Args:
        call: for example a forward pass.
        repeats: calls that are profiled; one before them is up to the caller.

    Returns:
        Fractions that sum to one, largest groups of vision transformers first.
    """
    # The profiler writes two lines to standard error for each run unless it is told not to.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU]) as run:
        for _ in range(repeats):
            call()
    microseconds: Counter[str] = Counter()
    for event in run.events() or ():
        names, node = [event.name], event
        while (node := node.cpu_parent) is not None:
            names.append(node.name)
        microseconds[_group(reversed(names))] += event.self_cpu_time_total
    total = microseconds.total() or 1.0
    return {group: microseconds[group] / total for group in (*OPERATORS, REST)}


def _group(names: Iterator[str]) -> str:
    """The group of the outermost operator that has one."""
    return next(
        (group for name in names for group, starts in OPERATORS.items() if name.startswith(starts)),
        REST,
    )
