"""What goes wrong in a training: losses and weights that are NaN or infinite, inputs that hold nothing to quantize."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import gather
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from proxbit.errors import ActivationError, LossError
from proxbit.nn import latent_layers

__all__ = ["FiniteWatch", "watch_activations"]

NEVER = torch.iinfo(torch.int64).max


class FiniteWatch:
    """Remembers the first optimizer step whose loss was NaN or infinite, on the device; `check` looks at it.

    In fp16 losses are not looked at: steps that overflow are skipped there. It is made once Accelerate has been set up.
    """

    def __init__(self) -> None:
        self.state = AcceleratorState()
        self.reset()

    def reset(self) -> None:
        """Begin anew, with a training."""
        self.first = torch.full((1,), NEVER, device=self.state.device)
        self.checked: int | None = None

    def see(self, loss: Tensor, step: int) -> None:
        """Look at a loss of one process, of the optimizer step with this number, from 1 on."""
        if self.state.mixed_precision != "fp16":
            self.first = torch.where(loss.detach().isfinite(), self.first, self.first.clamp(max=step))

    def check(self, step: int, model: nn.Module | None = None) -> None:
        """Raise, in every process, if any of them has met what is no number. All processes must call it.

        Args:
            step: optimizer steps that are done.
            model: to look at its parameters as well, once a step.

        Raises:
            LossError: naming rank and step, or the parameter.
        """
        first = _by_rank(self.first)
        if min(first) < NEVER:
            rank = first.index(min(first))
            raise LossError(
                f"The loss of rank {rank} was NaN or infinite at step {first[rank]}; nothing was saved after that. "
                "Lower learning_rate, or look at the images of that step; detect_anomalies=True names the layer."
            )
        if model is None or step == self.checked:
            return
        parameters = dict(model.named_parameters())
        finite = torch.stack([_local(parameter).isfinite().all() for parameter in parameters.values()])
        # The number of the first that is not, or how many there are.
        bad = _by_rank(torch.where(finite.all(), len(parameters), (~finite).int().argmax()).reshape(1))
        if min(bad) < len(parameters):
            rank = bad.index(min(bad))
            raise LossError(
                f"{list(parameters)[bad[rank]]} holds NaN or infinite values after step {step} (rank {rank}); it was "
                "not saved. Lower learning_rate, or set max_grad_norm."
            )
        self.checked = step


def _by_rank(value: Tensor) -> list[int]:
    """One number of each process."""
    return [int(each) for each in gather(value).tolist()]


def _local(parameter: nn.Parameter) -> Tensor:
    """What this process holds of a parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()


def watch_activations(model: nn.Module) -> Callable[[], None]:
    """Check the input of every latent layer before each forward; this reads it once more, and waits for the device.

    Args:
        model: a latent model.

    Returns:
        A function that ends the watch.

    Raises:
        ActivationError: by the forward, naming the layer, for an input that holds NaN or infinity, or that is one
            constant (such as all zeros), of which no sign or step says anything.
    """
    handles = [layer.register_forward_pre_hook(partial(_check, name)) for name, layer in latent_layers(model)]

    def end() -> None:
        for handle in handles:
            handle.remove()

    return end


def _check(name: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
    input = arguments[0]
    assert isinstance(input, Tensor)
    if not input.numel():
        return
    low, high = (float(bound) for bound in input.detach().aminmax())
    if not -float("inf") < low <= high < float("inf"):
        raise ActivationError(f"{name}: its input holds NaN or infinite values (smallest {low}, largest {high}).")
    if low == high:
        raise ActivationError(f"{name}: its input is {low} everywhere: there is nothing to quantize.")
