"""What proxbit adds to a model and trains beside its weights."""

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

__all__ = ["SMALLEST", "Learned", "learned_modules", "lsq_scale"]

SMALLEST = 1e-8


class Learned(nn.Module):
    """A module with numbers that proxbit adds to a model: they do not decay, and a checkpoint holds all of them.

    No parameter is 0-dimensional: FSDP takes them apart by their first dimension.

    Attributes:
        calibrated: whether data has nothing to say any more about where its parameters start.
    """

    calibrated: bool

    def reset_parameters(self) -> None:
        """Set the parameters to where they start without data."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As `nn.Module`; what was loaded is not calibrated over."""
        super()._load_from_state_dict(state_dict, prefix, *args)
        if any(prefix + name in state_dict for name, _ in self.named_parameters()):
            self.calibrated = True


def learned_modules(model: nn.Module) -> Iterator[tuple[str, Learned]]:
    """What a model learns beside its weights, with the names of the modules that hold it."""
    for name, module in model.named_modules():
        if isinstance(module, Learned):
            yield name, module


def lsq_scale(parameter: Tensor, count: int) -> Tensor:
    r"""A learned scale or step: positive, with a gradient that is 1 / \sqrt{count} times that of what uses it.

    Source:
        Esser, McKinstry, Bablani, Appuswamy, Modha, Learned Step Size Quantization, ICLR 2020, section 2.2.
    """
    scale = parameter.abs() + SMALLEST
    return scale.detach() + (scale - scale.detach()) / math.sqrt(count)
