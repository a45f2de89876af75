"""`DistillationTrainer`: a Trainer whose model also learns from a teacher."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_pt_utils import find_batch_size

from proxbit.checkpoint.files import is_model_folder
from proxbit.errors import ConfigError
from proxbit.foreign import printable
from proxbit.plugin.loading import load_weights
from proxbit.training.arguments import DISTILLATION, DistillationArguments
from proxbit.training.losses import asked, check_teacher, mixed_loss

__all__ = ["DistillationTrainer", "check_arguments"]


class DistillationTrainer(Trainer):
    """A `Trainer` whose loss is that of `DistillationLoss`, with whatever loss the model computes itself as the task's.

    Models may be of any state.

    Args:
        model: a model whose outputs have what is compared: `logits`, or `hidden_states`.
        args: with weight and temperature of the distillation.
        teacher: any model with the same labels; it is put in evaluation mode. None: the task's loss alone.
        *others, **kwargs: as in `transformers.Trainer`.

    Raises:
        ConfigError: if `args` are those of transformers; if the teacher shares parameters with the model, or has
            another number of labels; if `distillation_weight` is not 0, and one of the models gives numbers, or labels
            that do not exclude each other: distillation is of one class among several;
            in the first step, if one of the models does not give what is compared.
    """

    args: DistillationArguments

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: DistillationArguments | None = None,
        *others: Any,
        teacher: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        args = args or DistillationArguments()
        check_arguments(args, DistillationArguments)
        check_teacher(model, teacher, args.distillation_weight)
        self.teacher = teacher
        super().__init__(model, args, *others, **kwargs)
        self.teacher = None if teacher is None else teacher.to(self.args.device).eval()
        self._step_samples = 0
        self._share = 1.0

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As the Trainer, but with the names that `save_pretrained` gave to the weights."""
        target = self.model if model is None else model
        if self._is_plain(target, resume_from_checkpoint):
            load_weights(target, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """Likewise."""
        if self._is_plain(self.model, self.state.best_model_checkpoint):
            load_weights(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _is_plain(self, model: nn.Module, folder: str) -> bool:
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return isinstance(model, PreTrainedModel) and not sharded and is_model_folder(folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As the Trainer, without tokens."""
        with self._without_tokens():
            super()._save(output_dir, state_dict)

    @contextmanager
    def _without_tokens(self) -> Iterator[None]:
        """Within the context, the arguments hold no token: the Trainer pickles them beside every model."""
        whole, self.args = self.args, copy.copy(self.args)
        for each in fields(whole):
            if each.name.endswith("_token"):
                setattr(self.args, each.name, None)
        try:
            yield
        finally:
            self.args = whole

    def penalty(self) -> Tensor | None:
        """What the last forward pass adds to the loss beside task and teacher, as a mean over its batch."""
        return None

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Tensor | int | None]:
        """As the Trainer; counts the samples of the step."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        self._step_samples = sum(find_batch_size(batch) for batch in batches)
        return batches, num_items

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As the Trainer; where it does not divide the loss itself, what is added to it counts by its samples."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)  # transformers 5.15 does not have it
        if scaled is None:
            counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = counted or self.compute_loss_func is not None
        self._share = find_batch_size(inputs) / self._step_samples if scaled and self._step_samples else 1.0
        try:
            return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[no-any-return]
        finally:
            self._share = 1.0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The task's loss, mixed with distillation from the teacher while training.

        The task's loss is a mean over this batch, or its part of the mean over all batches of the step: what is added
        is a mean over this batch, times the share of the batch in the step.
        """
        teacher = self.teacher if model.training else None
        settings = {name: getattr(self.args, name) for name in DISTILLATION}
        if teacher is not None:
            inputs = asked(inputs, settings)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if teacher is not None:
            loss = mixed_loss(loss, outputs, inputs, teacher, settings, self._share)
        penalty = self.penalty() if model.training else None
        if penalty is not None:
            loss = loss + self._share * penalty
        return (loss, outputs) if return_outputs else loss


def check_arguments(args: TrainingArguments, kind: type[DistillationArguments]) -> None:
    """Raise ConfigError for arguments that lack the fields of a Trainer."""
    if not isinstance(args, kind):
        raise ConfigError(
            f"args are {type(args).__name__}: this Trainer takes {kind.__name__} of proxbit.training, which have the "
            f"same fields and its own: {kind.__name__}({printable(args.output_dir)!r}, ...)."
        )
