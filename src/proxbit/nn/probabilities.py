"""Probabilities of an attention as zero or a learned scale."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from proxbit.nn.activation_quantizer import Total
from proxbit.nn.activations import fitted_upper_level, upper_level
from proxbit.nn.learned import SMALLEST, Learned, lsq_scale
from proxbit.nn.surrogate import clip, straight_through
from proxbit.sign import reaches

__all__ = ["BinaryProbabilities", "binarize_probabilities", "even_share"]


def even_share(probabilities: Tensor) -> Tensor:
    """1 / n of each row, `[..., 1]`: what each of the n keys that a query can see has if all have the same."""
    return probabilities.detach().clone().gt_(0).sum(dim=-1, keepdim=True).clamp(min=1).reciprocal()


def binarize_probabilities(probabilities: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`BinaryProbabilities` with this scale."""
    size = lsq_scale(scale, probabilities.shape[-1]).to(probabilities.dtype) * even_share(probabilities)
    units = clip(probabilities / size, 0, 1)
    return straight_through(reaches(probabilities, size.detach() / 2), units), size


class BinaryProbabilities(Learned):
    r"""Zero or a learned multiple of the even share 1 / n, where n is the number of keys that the query can see.

    Formula:
        p = 1[P \ge s_p / 2],   s_p = scale / n

    Backward, of p s_p: to P straight through where P \le s_p, else 0; to the scale (p - P / s_p) / n there, else 1 / n,
    times 1 / \sqrt{K}.

    Args:
        **kind: device and dtype of the parameter.

    Attributes:
        scale: `[1]`, 2 at first: keys with at least their even share.

    Source:
        Liu et al., BiT: Robustly Binarized Multi-distilled Transformer, NeurIPS 2022, section 2.2, equation of the
        elastic binarization of non-negative activations. Differs from it in: the scale is in units of the even share,
        so that it fits any number of keys, and nothing is taken off before.
    """

    def __init__(self, **kind: Any) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(1, **kind))
        self.calibrated = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.scale.fill_(2.0)

    def calibrate(self, rows: Sequence[Tensor]) -> None:
        """Set the scale to the least-squares one of some probabilities, each `[..., K]`."""
        units = torch.cat([(row / even_share(row)).flatten() for row in rows])
        with torch.no_grad():
            self.scale.fill_(max(upper_level(units, 2.0), SMALLEST))

    def fit(self, total: Total) -> None:
        """Likewise, of probabilities that come in parts, see `ActivationQuantizer.fit`."""
        units = fitted_upper_level(lambda function: total(lambda rows: function(rows / even_share(rows))))
        with torch.no_grad():
            self.scale.fill_(max(units, SMALLEST))

    def forward(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize.

        Args:
            probabilities: `[..., K]`, fp32 or fp64; of masked keys zero.

        Returns:
            p, `[..., K]`, and s_p, `[..., 1]`.
        """
        return binarize_probabilities(probabilities, self.scale)
