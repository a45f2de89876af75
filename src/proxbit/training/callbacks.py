"""The callbacks of the ProxConnect step: one moves mu along its schedule, one keeps what layers are ordered by."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from proxbit.errors import MuRangeError
from proxbit.nn import ActivationQuantizer, LatentWeight, binary_activations, latent_layers, set_mu, start_update
from proxbit.quantizers import AGGREGATE, MuSchedule
from proxbit.training.monitor import hardening_gap
from proxbit.training.recipes import DEFAULT_RECIPE, get_recipe
from proxbit.training.stages import Stage

__all__ = ["LayerScores", "MuCallback", "learning_rates"]

# The hardening gap above which a user is told: a hundredth of the weights' size is below what a picture shows.
SOFT = 0.01


class MuCallback(TrainerCallback):
    """Sets mu, and whether F is hard, before every optimizer step, from the step's number alone.

    `ProxConnectTrainer` has one. Any other Trainer of transformers hardens a latent model with it:
    `Trainer(model, args, ..., callbacks=[MuCallback(model)])`. Each training begins at the first step of its schedule,
    whatever was done to the model before.

    Args:
        model: the latent model.
        begin: called when training begins or resumes, with the number of optimizer steps; returns the schedule. None:
            that of the pair, with the hard part of the default recipe.
        stages: called next, likewise; says when each layer begins. None: all at once.
    """

    def __init__(
        self,
        model: nn.Module,
        begin: Callable[[int], MuSchedule] | None = None,
        stages: Callable[[int], list[Stage]] | None = None,
    ) -> None:
        self.model = model
        self.begin = begin or self._default
        self.stages = stages
        self.late: list[tuple[Stage, MuSchedule]] = []
        self.schedule: MuSchedule | None = None
        self.best: int | None = None
        self.activations: list[tuple[ActivationQuantizer, int, MuSchedule]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the schedule and go to where training starts or resumes."""
        steps, self.best = state.max_steps, None
        self.schedule = schedule = self.begin(steps)
        stages = [] if self.stages is None else self.stages(steps)
        self.late = [(stage, _from(schedule, stage.weight)) for stage in stages if stage.weight or stage.activation]
        # Activations have units of their own: their pairs go their own default ways.
        begins = {id(stage.layer): stage.activation for stage in stages}
        self.activations = []
        for name, quantizer in binary_activations(self.model):
            own = MuSchedule(*quantizer.pair.schedule, steps=steps, hard_fraction=schedule.hard_fraction)
            begin = begins.get(id(self.model.get_submodule(name)), 0)
            self.activations.append((quantizer, begin, _from(own, begin)))
        for _, layer in latent_layers(self.model):  # A run that stopped early leaves layers that wait.
            layer.waits = frozenset()
        self._apply(state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set mu for the step that begins."""
        self._apply(state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put P(w*) in the place of w*, for pairs that update from there."""
        start_update(self.model)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn if training ended on weights that are far from those that ship."""
        gap = hardening_gap(self.model)
        if gap > SOFT and state.is_world_process_zero:
            layer = next(layer for _, layer in latent_layers(self.model))
            what = "Training ended soft" if self.best is None else f"The best model, of step {self.best}, is soft"
            warnings.warn(
                f"{what}, at mu = {float(layer.mu):.3g}: the hardening gap |soft - hard| / |hard| of the weights is "
                f"{gap:.3f}, so the packed model is not the one that was trained. {self._advice(state, layer)}",
                stacklevel=2,
            )

    def _advice(self, state: TrainerState, layer: LatentWeight) -> str:
        """What would have made the end of a run hard."""
        schedule = self.schedule
        assert schedule is not None
        if state.global_step <= schedule.soft_steps < schedule.steps:
            return (
                f"Its hard part begins at step {schedule.soft_steps} of {schedule.steps}, and training stopped at "
                f"{state.global_step}: let it get there, with more patience where it stops early, or with fewer steps "
                "(num_train_epochs, max_steps); or begin hard (hard_fraction=1)."
            )
        if self.best is not None and schedule.soft_steps < schedule.steps:
            return (
                "No step of the hard part had a better score, which is that of the packed model: give the hard part "
                f"more steps (hard_fraction, now {schedule.hard_fraction:g}), or a smaller learning rate."
            )
        # The steps must outweigh the pull of a pair that updates from P(w*): there a larger mu learns nothing.
        sharper = ", or a larger mu_end" if schedule.goes_to_end and layer.pair.update_from is None else ""
        short = f", which of {schedule.steps} steps is none" if schedule.hard_fraction > 0 else ""
        return f"Give the training a hard part (hard_fraction, now {schedule.hard_fraction:g}{short}){sharper}."

    def went_back(self, step: int) -> None:
        """Tell that the model is now the best one, saved after that many steps: mu is that of the last of them."""
        self.best = step
        self._apply(max(0, step - 1))

    def _default(self, steps: int) -> MuSchedule:
        layer = next(layer for _, layer in latent_layers(self.model))
        hard = get_recipe(DEFAULT_RECIPE).training["hard_fraction"]
        return MuSchedule(*layer.pair.schedule, steps=steps, hard_fraction=hard)

    def _apply(self, step: int) -> None:
        assert self.schedule is not None
        set_mu(self.model, self.schedule.mu(step), hard=self.schedule.is_hard(step))
        for stage, schedule in self.late:
            stage.layer.mu.fill_(schedule.mu(max(0, step - stage.weight)))
            begins = {"weight": stage.weight, "activation": stage.activation}
            stage.layer.waits = frozenset(what for what, begin in begins.items() if step < begin)
        for quantizer, begin, own in self.activations:
            quantizer.mu.fill_(own.mu(max(0, step - begin)))


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
        kept: Any = state.stateful_callbacks
        if state.global_step:
            own = kept.get(type(self).__name__)
            self.scores = own["args"]["scores"] if own else {}


def _from(schedule: MuSchedule, begin: int) -> MuSchedule:
    """The same schedule in the steps that are left from `begin` on, with as many hard ones at the end."""
    if begin == 0 or schedule.kind == AGGREGATE:
        return schedule
    left = schedule.steps - begin
    return replace(schedule, steps=left, hard_fraction=min(1.0, (schedule.steps - schedule.soft_steps) / left))


def learning_rates(scheduler: Any, steps: int) -> list[float]:
    """The learning rate of the latents, the last group, at every step, from the scheduler's own formula.

    Raises:
        MuRangeError: for a learning rate that is no function of the step.
    """
    inner = getattr(scheduler, "scheduler", scheduler)
    if not isinstance(inner, torch.optim.lr_scheduler.LambdaLR):
        raise MuRangeError(
            "The schedule 'aggregate' needs a learning rate that is a function of the step (a LambdaLR, such as "
            f"linear, cosine or constant), not {type(inner).__name__}."
        )
    return [float(inner.base_lrs[-1] * inner.lr_lambdas[-1](step)) for step in range(steps)]
