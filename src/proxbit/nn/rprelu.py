"""RPReLU: a PReLU whose corner is learned too, behind layers whose inputs and weights are binary."""

from typing import Any

import torch
from torch import Tensor, nn

from proxbit.nn.learned import Learned

__all__ = ["RPReLU"]


class RPReLU(Learned):
    r"""y = PReLU(x - corner) + lift, with three learned numbers a channel.

    Args:
        channels: `O`.
        **kind: device and dtype of the parameters.

    Attributes:
        corner: `[O]`, 0 at first.
        slope: below the corner, `[O]`, 0.25 at first.
        lift: `[O]`, 0 at first.

    Source:
        Liu, Shen, Savvides, Cheng, ReActNet, ECCV 2020, section 4.2.
    """

    def __init__(self, channels: int, **kind: Any) -> None:
        super().__init__()
        self.calibrated = True
        self.corner = nn.Parameter(torch.empty(channels, **kind))
        self.slope = nn.Parameter(torch.empty(channels, **kind))
        self.lift = nn.Parameter(torch.empty(channels, **kind))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the parameters to their first values."""
        with torch.no_grad():
            self.corner.zero_()
            self.slope.fill_(0.25)
            self.lift.zero_()

    def forward(self, x: Tensor) -> Tensor:
        x = x - self.corner
        return torch.where(x >= 0, x, x * self.slope) + self.lift
