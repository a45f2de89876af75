"""Proximal maps for any levels: the linear quantizer of ProxConnect, and the soft threshold of ProxQuant."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from proxbit.quantizers.functions import Mu

__all__ = ["LinearQuantizer", "SoftThreshold", "linear_quantizer", "nearest_level"]


def nearest_level(w: Tensor, levels: Sequence[float]) -> Tensor:
    """The nearest of some increasing levels, the upper one half-way between two; same shape and dtype as `w`."""
    values = torch.tensor(levels, dtype=w.dtype, device=w.device)
    return values[torch.bucketize(w, (values[1:] + values[:-1]) / 2, right=True)]


def linear_quantizer(w: Tensor, rho: Mu, varrho: Mu, levels: Sequence[float] = (-1.0, 1.0)) -> Tensor:
    r"""The piecewise linear quantizer L_rho^varrho of ProxConnect.

    Formula:
        Between neighbouring levels q < q' with midpoint p, and with
        q+ = min(p, q + rho), q'- = max(p, q' - rho), p- = max(q, p - varrho), p+ = min(q', p + varrho):
            L(w) = q + (p- - q) clip((w - q+) / (p - q+), 0, 1)             for w <  p
            L(w) = q' - (q' - p+) clip((q'- - w) / (q'- - p), 0, 1)         for w >= p
        and L is constant outside [min levels, max levels].

    Args:
        w: any shape, floating point.
        rho: horizontal shrink, >= 0. Half the gap or more gives the nearest level.
        varrho: vertical shrink, >= 0. Half the gap or more gives the nearest level.
        levels: increasing, at least two.

    Returns:
        Same shape and dtype as `w`.

    Source:
        Dockhorn, Yu, Sari, Zolnouri, Partovi Nia, Demystifying and Generalizing BinaryConnect, NeurIPS 2021.
    """
    tiny = torch.finfo(w.dtype).tiny
    rho, varrho = (torch.as_tensor(value, dtype=w.dtype, device=w.device) for value in (rho, varrho))
    result = torch.full_like(w, levels[0])
    for low, high in zip(levels[:-1], levels[1:], strict=True):
        middle = (low + high) / 2
        left_edge = (low + rho).clamp(max=middle)
        right_edge = (high - rho).clamp(min=middle)
        below = (middle - varrho).clamp(min=low)
        above = (middle + varrho).clamp(max=high)
        left = low + (below - low) * ((w - left_edge) / (middle - left_edge).clamp(min=tiny)).clamp(0, 1)
        right = high - (high - above) * ((right_edge - w) / (right_edge - middle).clamp(min=tiny)).clamp(0, 1)
        result = result + torch.where(w < middle, left, right) - low
    return result


@dataclass(frozen=True)
class LinearQuantizer:
    """`linear_quantizer` with shrinks in proportion to mu: `(w, mu) -> L_rho^varrho(w)`.

    Args:
        levels: increasing, at least two.
        rho: horizontal shrink for mu = 1.
        varrho: vertical shrink for mu = 1.
    """

    levels: tuple[float, ...] = (-1.0, 1.0)
    rho: float = 1.0
    varrho: float = 1.0

    def __call__(self, w: Tensor, mu: Mu) -> Tensor:
        return linear_quantizer(w, mu * self.rho, mu * self.varrho, self.levels)


@dataclass(frozen=True)
class SoftThreshold:
    """Every weight goes towards its nearest level, by mu at most: the proximal map of mu times the distance to it.

    Formula:
        P(w) = w - clip(w - q, -mu, mu), q the level nearest to w

    Args:
        levels: increasing, at least two.

    Source:
        ProxQuant: Bai, Wang, Liberty, ICLR 2019. Between the levels it is `linear_quantizer` with both shrinks mu. That
        projects what is beyond them: repeated at every step in row units, whose mean |w| is 1, it would make rows
        binary in a few steps, whatever mu.
    """

    levels: tuple[float, ...] = (-1.0, 1.0)

    def __call__(self, w: Tensor, mu: Mu) -> Tensor:
        most = torch.as_tensor(mu, dtype=w.dtype, device=w.device)
        return w - (w - nearest_level(w, self.levels)).clamp(-most, most)
