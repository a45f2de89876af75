"""The schedule of mu of a training: the pair's own, or what the settings of the step say instead."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from accelerate.state import AcceleratorState

from proxbit.errors import ConfigError
from proxbit.nn import LatentWeight
from proxbit.quantizers import AGGREGATE, CONSTANT, MuSchedule, QuantizerPair

__all__ = ["hardening_advice", "mu_schedule", "rest_of"]


def mu_schedule(
    layers: Sequence[LatentWeight],
    steps: int,
    *,
    kind: str | None,
    start: float | None,
    end: float | None,
    hard_fraction: float,
    learning_rates: Callable[[], Sequence[float]],
) -> MuSchedule:
    """The schedule of a training, checked against the range of every pair in use.

    Args:
        layers: of the latent model; the pair of the first one has the defaults.
        steps: optimizer steps of the training.
        kind, start, end: of mu; None for those of the pair.
        hard_fraction: the last fraction of the steps, in which F is the sign.
        learning_rates: returns that of the latents at every step; asked for the schedule "aggregate" only.

    Raises:
        ConfigError: for a `start` or `end` that the schedule ignores, and for a pair with `update_from` that cannot
            learn with the schedule, or under DeepSpeed.
        MuRangeError: for a mu that a pair does not take.
    """
    own_kind, *own_ends = layers[0].pair.schedule
    kind = kind or own_kind
    if any(layer.pair.update_from is not None for layer in layers):
        _check_updates(kind)
    start, end = _checked_ends(kind, (start, end), own_ends)
    rates = learning_rates() if kind == AGGREGATE else ()
    schedule = MuSchedule(kind, start, end, steps, hard_fraction, rates)
    for layer in layers:
        for step in (0, steps):
            layer.pair.check_mu(schedule.mu(step))
    return schedule


def rest_of(schedule: MuSchedule, begin: int) -> MuSchedule:
    """The same schedule in the steps that are left from `begin` on, with as many hard ones at the end."""
    if begin == 0 or schedule.kind == AGGREGATE:
        return schedule
    left = schedule.steps - begin
    return replace(schedule, steps=left, hard_fraction=min(1.0, (schedule.steps - schedule.soft_steps) / left))


def hardening_advice(schedule: MuSchedule, pair: QuantizerPair, step: int, *, best: bool) -> str:
    """What would have made the end of a training hard.

    Args:
    schedule: of the training.
    pair: of its layers.
    step: at which it ended.
    best: whether the model is not the last one but the best one.
    """
    if step <= schedule.soft_steps < schedule.steps:
        return (
            f"Its hard part begins at step {schedule.soft_steps} of {schedule.steps}, and training stopped at "
            f"{step}: let it get there, with more patience where it stops early, or with fewer steps "
            "(num_train_epochs, max_steps); or begin hard (hard_fraction=1)."
        )
    if best and schedule.soft_steps < schedule.steps:
        return (
            "No step of the hard part had a better score, which is that of the packed model: give the hard part "
            f"more steps (hard_fraction, now {schedule.hard_fraction:g}), or a smaller learning rate."
        )
    # The steps must outweigh the pull of a pair that updates from P(w*): there a larger mu learns nothing.
    sharper = ", or a larger mu_end" if schedule.goes_to_end and pair.update_from is None else ""
    short = f", which of {schedule.steps} steps is none" if schedule.hard_fraction > 0 else ""
    return f"Give the training a hard part (hard_fraction, now {schedule.hard_fraction:g}{short}){sharper}."


def _checked_ends(kind: str, given: tuple[float | None, float | None], own: Iterable[float]) -> tuple[float, float]:
    """Where mu starts and ends: what is given, or else what the pair has."""
    start, end = (default if value is None else value for default, value in zip(own, given, strict=True))
    if kind == AGGREGATE and given != (None, None):
        raise ConfigError(
            "mu_schedule 'aggregate' starts at 1 and adds the learning rates up: mu_start and mu_end would do "
            "nothing. Leave them at None, or set mu_schedule to linear, log or sigmoid."
        )
    if kind == CONSTANT and given[1] not in (None, start):
        raise ConfigError(
            f"mu_schedule 'constant' (None stands for that of the pair) stays at {start:g}: mu_end={given[1]:g} would "
            "do nothing. Leave it at None, or set mu_schedule to linear, log or sigmoid."
        )
    return start, start if kind == CONSTANT else end


def _check_updates(kind: str) -> None:
    """Check what a pair with `update_from` asks of a training."""
    if kind == AGGREGATE:
        raise ConfigError(
            "A pair with `update_from` applies P at every step anew: with the mu of the schedule 'aggregate' it "
            "never learns. Leave mu_schedule, mu_start and mu_end at None for the default schedule of the pair."
        )
    if getattr(AcceleratorState(), "deepspeed_plugin", None) is not None:
        raise ConfigError(
            "A pair with `update_from` changes weights before each step, and DeepSpeed takes steps on a copy of "
            "its own: it would do nothing. Take another pair, or FSDP2."
        )
