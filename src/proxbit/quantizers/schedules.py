"""Schedules of the sharpness mu: pure functions of the optimizer step, so that resuming needs no state."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from proxbit.errors import MuRangeError
from proxbit.registry import Registry

__all__ = ["AGGREGATE", "CONSTANT", "SCHEDULES", "MuSchedule"]

AGGREGATE = "aggregate"
CONSTANT = "constant"
STEEPNESS = 10.0


def _constant(progress: float, start: float, end: float) -> float:
    return start


def _linear(progress: float, start: float, end: float) -> float:
    return start + (end - start) * progress


def _log(progress: float, start: float, end: float) -> float:
    return start * math.exp(math.log(end / start) * progress)


def _sigmoid(progress: float, start: float, end: float) -> float:
    def logistic(fraction: float) -> float:
        return 1 / (1 + math.exp(STEEPNESS * (fraction - 0.5)))

    remaining = (logistic(progress) - logistic(1)) / (logistic(0) - logistic(1))
    return 1 / (1 / end + (1 / start - 1 / end) * remaining)


Curve = Callable[[float, float, float], float]
# `aggregate` is no curve of the progress: it sums what the optimizer does.
SCHEDULES: Registry[Curve | None] = Registry("mu schedule")
SCHEDULES.register(CONSTANT, _constant)
SCHEDULES.register("linear", _linear)
SCHEDULES.register("log", _log)
SCHEDULES.register("sigmoid", _sigmoid)
SCHEDULES.register(AGGREGATE, None)


@dataclass(frozen=True)
class MuSchedule:
    r"""The sharpness mu at each optimizer step, and from which step on the forward is hard.

    Formula (p = step / (soft steps - 1), at most 1):
        constant   mu = start
        linear     mu = start + (end - start) p
        log        mu = start (end / start)^p
        sigmoid    1/mu = 1/end + (1/start - 1/end) r(p), r a logistic curve of steepness 10 scaled to r(0)=1, r(1)=0
        aggregate  mu = 1 + sum of the learning rates of the steps before

    Args:
        kind: one of the names above.
        start: mu at step 0.
        end: mu at the end of the soft part, kept during the hard part.
        steps: optimizer steps of the whole training, >= 1.
        hard_fraction: the last fraction of the steps, in [0, 1], in which F is the sign.
        learning_rates: for `aggregate`, the learning rate of every step (at least `steps` of them).

    Raises:
        MuRangeError: for values that no schedule can follow.
        UnknownNameError: for an unknown kind.

    Source:
        sigmoid: PARQ, https://huggingface.co/papers/2503.15748, section 4; aggregate: Dockhorn et al., NeurIPS 2021.
    """

    kind: str
    start: float
    end: float
    steps: int
    hard_fraction: float = 0.0
    learning_rates: Sequence[float] = field(default=(), repr=False)
    _aggregate: tuple[float, ...] = field(default=(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise MuRangeError(f"A mu schedule needs at least 1 optimizer step, not {self.steps}.")
        if not 0 <= self.hard_fraction <= 1:
            raise MuRangeError(f"hard_fraction must be in [0, 1], not {self.hard_fraction}.")
        if self.kind == AGGREGATE:
            if len(self.learning_rates) < self.steps:
                raise MuRangeError(
                    f"The schedule 'aggregate' needs a learning rate for each of the {self.steps} steps, "
                    f"not {len(self.learning_rates)}."
                )
            sums = accumulate(self.learning_rates, initial=1.0)
            object.__setattr__(self, "_aggregate", tuple(sums)[: self.steps + 1])
            return
        SCHEDULES.get(self.kind)
        if not (math.isfinite(self.start) and math.isfinite(self.end)):
            raise MuRangeError(f"mu must be finite, not {self.start} to {self.end}; the hard part stands for infinity.")
        if self.kind in ("log", "sigmoid") and min(self.start, self.end) <= 0:
            raise MuRangeError(f"The schedule {self.kind!r} needs mu > 0, not {self.start} to {self.end}.")

    @property
    def goes_to_end(self) -> bool:
        """Whether `end` has a say in mu."""
        return self.kind not in (CONSTANT, AGGREGATE)

    @property
    def soft_steps(self) -> int:
        """The first step at which F is hard; `steps` if no step is."""
        return self.steps - math.floor(self.steps * self.hard_fraction + 1e-9)

    def is_hard(self, step: int) -> bool:
        """Whether F is the sign at optimizer step `step` (counted from 0)."""
        return step >= self.soft_steps

    def mu(self, step: int) -> float:
        """The sharpness at optimizer step `step` (counted from 0)."""
        curve = SCHEDULES.get(self.kind)
        if curve is None:
            return self._aggregate[min(step, self.steps)]
        progress = 1.0 if self.is_hard(step) else min(1.0, step / max(1, self.soft_steps - 1))
        value = curve(progress, self.start, self.end)
        # Rounding must not carry mu out of the range that was checked at both ends.
        return min(max(value, min(self.start, self.end)), max(self.start, self.end))
