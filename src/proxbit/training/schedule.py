"""The schedule of a training: mu at each step, and from which step on each layer has binary activations and weights."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from proxbit.errors import ConfigError
from proxbit.nn import LatentWeight, latent_layers
from proxbit.quantizers import AGGREGATE, CONSTANT, MuSchedule, QuantizerPair
from proxbit.registry import Registry
from proxbit.training.sensitivity import taylor_sensitivity

__all__ = [
    "PROGRESSIONS",
    "TOGETHER",
    "LayerScores",
    "Progression",
    "Stage",
    "hardening_advice",
    "mu_schedule",
    "rest_of",
    "stages",
    "stored_scores",
]

TOGETHER = "together"
# Layers join in the first part of what is left, so that the last of them still have time to harden.
_JOINING = 0.5


@dataclass(frozen=True)
class Stage:
    """When a layer begins to be binary.

    Attributes:
        layer: a latent layer.
        weight: the step from which on training uses F of its weight; before, the latent weight itself.
        activation: likewise of its activations.
    """

    layer: LatentWeight
    weight: int
    activation: int


@dataclass(frozen=True)
class Progression:
    """An order in which layers become binary.

    Args:
        key: of a layer's name and its score: layers with smaller keys join earlier, equal ones from front to back.
            None: all join at once.
        score: what gives layers their scores before the first step: `(model, loss, batches) -> scores by name`, where
            `loss(batch)` is the loss of training. None: nothing does, they are 0.
    """

    key: Callable[[str, float], float] | None
    score: Callable[[nn.Module, Callable[[Any], Tensor], Iterable[Any]], dict[str, float]] | None = None


def _is_attention(name: str) -> bool:
    return any("att" in part for part in name.split("."))


PROGRESSIONS: Registry[Progression] = Registry("progression")
PROGRESSIONS.register(TOGETHER, Progression(None))
PROGRESSIONS.register("front-to-back", Progression(lambda name, score: 0))
PROGRESSIONS.register("mlp-first", Progression(lambda name, score: _is_attention(name)))
PROGRESSIONS.register("taylor", Progression(lambda name, score: score, taylor_sensitivity))


def stages(
    model: nn.Module,
    steps: int,
    *,
    activations_first: float = 0.0,
    progression: str = TOGETHER,
    scores: Mapping[str, float] | None = None,
) -> list[Stage]:
    """When each latent layer begins to be binary.

    Args:
        model: a latent model.
        steps: of the run.
        activations_first: the first fraction of the steps, in [0, 1), in which weights are not binary yet.
        progression: "together"; or the order in which layers join, evenly over half of the steps that are left:
            "front-to-back"; "mlp-first", feed-forward and other layers before those of attention; "taylor", the layers
            first whose hard weights change the loss least.
        scores: what `Progression.score` gave, of the progression that has one.

    Raises:
        ConfigError: if the progression goes by scores, and a layer has none.

    Source:
        activations first: Liu et al., ReActNet, ECCV 2020, section 5; feed-forward first: He et al., BiViT, 2022;
        "taylor": see `taylor_sensitivity`.
    """
    layers = list(latent_layers(model))
    first = int(steps * activations_first)
    order = PROGRESSIONS.get(progression)
    key = order.key
    if key is None:
        return [Stage(layer, first, 0) for _, layer in layers]
    known = dict.fromkeys((name for name, _ in layers), 0.0) if order.score is None else scores or {}
    missing = [name for name, _ in layers if name not in known]
    if missing:
        raise ConfigError(
            f"The progression {progression!r} goes by scores of layers, and {missing[0]} has none. They are taken when "
            "a run begins: it can be resumed from checkpoints of a run with this progression only."
        )
    layers.sort(key=lambda item: key(item[0], known[item[0]]))
    window = int((steps - first) * _JOINING)
    joined = [index * window // len(layers) for index in range(len(layers))]
    return [Stage(layer, first + join, join) for (_, layer), join in zip(layers, joined, strict=True)]


class LayerScores(TrainerCallback, ExportableState):
    """Keeps what layers are ordered by in the state of the Trainer, so that a resumed run has the order it began with.

    Attributes:
        scores: of the latent layers, by name.
    """

    def __init__(self, scores: dict[str, float] | None = None) -> None:
        self.scores = scores or {}

    def state(self) -> dict[str, Any]:
        """What checkpoints hold."""
        return {"args": {"scores": self.scores}, "attributes": {}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read the scores of a run that resumes: the Trainer restores callbacks only where it is asked to."""
        if state.global_step:
            self.scores = stored_scores(state)


def stored_scores(state: TrainerState) -> dict[str, float]:
    """What layers are ordered by, as the state of a Trainer keeps it."""
    stored: Any = (state.stateful_callbacks or {}).get(LayerScores.__name__)
    return stored["args"]["scores"] if stored else {}


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
