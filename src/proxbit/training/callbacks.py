"""The callback of the ProxConnect step: it moves mu along its schedule, and starts the update where the pair says."""

import warnings
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from proxbit.nn import ActivationQuantizer, binary_activations, latent_layers, set_mu, start_update
from proxbit.quantizers import MuSchedule
from proxbit.training.monitor import hardening_gap

__all__ = ["MuCallback"]

# The hardening gap above which a user is told: a hundredth of the weights' size is below what a picture shows.
SOFT = 0.01


class MuCallback(TrainerCallback):
    """Sets mu, and whether F is hard, before every optimizer step, from the step's number alone.

    Args:
        model: the latent model.
        begin: called when training begins or resumes, with the number of optimizer steps; returns the schedule.
    """

    def __init__(self, model: nn.Module, begin: Callable[[int], MuSchedule]) -> None:
        self.model = model
        self.begin = begin
        self.schedule: MuSchedule | None = None
        self.activations: list[tuple[ActivationQuantizer, MuSchedule]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the schedule and go to where training starts or resumes."""
        self.schedule = self.begin(state.max_steps)
        # Activations have units of their own: their pairs go their own default ways.
        rest = {"steps": state.max_steps, "hard_fraction": self.schedule.hard_fraction}
        self.activations = [
            (quantizer, MuSchedule(*quantizer.pair.schedule, **rest)) for _, quantizer in binary_activations(self.model)
        ]
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
        if gap > SOFT:
            layer = next(layer for _, layer in latent_layers(self.model))
            warnings.warn(
                f"Training ended soft, at mu = {float(layer.mu):.3g}: the hardening gap |soft - hard| / |hard| of the "
                f"weights is {gap:.3f}, so the packed model is not the one that was trained. Give the training a hard "
                f"part (hard_fraction, now {args.hard_fraction:g}), or a larger mu_end.",
                stacklevel=2,
            )

    def _apply(self, step: int) -> None:
        assert self.schedule is not None
        set_mu(self.model, self.schedule.mu(step), hard=self.schedule.is_hard(step))
        for quantizer, schedule in self.activations:
            quantizer.mu.fill_(schedule.mu(step))
