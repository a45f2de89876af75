"""The callback that moves mu along its schedule."""

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from proxbit.nn import set_mu
from proxbit.quantizers import MuSchedule

__all__ = ["MuCallback"]


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

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the schedule and go to where training starts or resumes."""
        self.schedule = self.begin(state.max_steps)
        self._apply(state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set mu for the step that begins."""
        self._apply(state.global_step)

    def _apply(self, step: int) -> None:
        assert self.schedule is not None
        set_mu(self.model, self.schedule.mu(step), hard=self.schedule.is_hard(step))
