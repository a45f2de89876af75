"""Modules with learned numbers that proxbit adds to a model, beside its weights."""

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

__all__ = ["SMALLEST", "Learned", "learned_modules", "lsq_scale"]

SMALLEST = 1e-8


class Learned(nn.Module):
    """A module with learned numbers that proxbit adds to a model. They have no weight decay; checkpoints hold them.

    No parameter is 0-dimensional: FSDP shards parameters by their first dimension.

    Attributes:
        calibrated: whether the parameters were set from data or loaded; calibration then leaves them alone.
    """

    calibrated: bool

    def reset_parameters(self) -> None:
        """Set the parameters to their values before calibration."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As `nn.Module`; loaded parameters count as calibrated."""
        super()._load_from_state_dict(state_dict, prefix, *args)
        if any(prefix + name in state_dict for name, _ in self.named_parameters()):
            self.calibrated = True


def learned_modules(model: nn.Module) -> Iterator[tuple[str, Learned]]:
    """The learned modules of a model, with their names."""
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
