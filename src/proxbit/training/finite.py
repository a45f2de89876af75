"""Losses and weights that are not numbers: found before they are saved, without waiting for the device at each step."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from proxbit.errors import LossError

__all__ = ["FiniteWatch"]

NEVER = torch.iinfo(torch.int64).max


class FiniteWatch:
    """Remembers the first optimizer step whose loss was NaN or infinite, on the device; `check` looks at it.

    Args:
        accelerator: of the Trainer. In fp16 losses are not looked at: steps that overflow are skipped there.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.first = torch.full((1,), NEVER, device=accelerator.device)

    def see(self, loss: Tensor, step: int) -> None:
        """Look at a loss of one process, of the optimizer step with this number, from 1 on."""
        if self.accelerator.mixed_precision != "fp16":
            self.first = torch.where(loss.detach().isfinite(), self.first, self.first.clamp(max=step))

    def check(self, step: int, model: nn.Module | None = None) -> None:
        """Raise, in every process, if any of them has met what is no number. All processes must call it.

        Args:
            step: optimizer steps that are done.
            model: to look at its parameters as well.

        Raises:
            LossError: naming rank and step, or the parameter.
        """
        first = self._gather(self.first)
        if min(first) < NEVER:
            rank = first.index(min(first))
            raise LossError(
                f"The loss of rank {rank} was NaN or infinite at step {first[rank]}; nothing was saved after that. "
                "Lower learning_rate, or look at the pictures of that step; detect_anomalies=True names the layer."
            )
        if model is None:
            return
        parameters = dict(model.named_parameters())
        finite = torch.stack([_local(parameter).isfinite().all() for parameter in parameters.values()])
        # The number of the first that is not, or how many there are.
        bad = self._gather(torch.where(finite.all(), len(parameters), (~finite).int().argmax()).reshape(1))
        if min(bad) < len(parameters):
            rank = bad.index(min(bad))
            raise LossError(
                f"{list(parameters)[bad[rank]]} holds NaN or infinite values after step {step} (rank {rank}); it was "
                "not saved. Lower learning_rate, or set max_grad_norm."
            )

    def _gather(self, value: Tensor) -> list[int]:
        """One number of each process, by rank."""
        return [int(each) for each in self.accelerator.gather(value).tolist()]


def _local(parameter: nn.Parameter) -> Tensor:
    """What this process holds of a parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()
