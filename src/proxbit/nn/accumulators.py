"""Sums in few bits: what an accumulator that is too narrow makes of the sum of a row, simulated exactly.

Sums are taken wide, and made narrow once, at their end: in that way the result does not depend on the order of the
additions. Wrapping accumulators give that whatever the order; of saturating ones it is an assumption.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from proxbit.errors import ConfigError
from proxbit.nn.surrogate import clip
from proxbit.registry import Registry

__all__ = ["ACCUMULATORS", "Accumulator"]


def _saturate(sums: Tensor, half: int) -> Tensor:
    return clip(sums, -half, half - 1)


def _wrap(sums: Tensor, half: int) -> Tensor:
    # In fp64, where the sum of two numbers of 24 bits is exact; the gradient passes straight.
    inside = torch.remainder(sums.detach().double().round() + half, 2 * half) - half
    wrapped = inside.to(sums.dtype) + (sums - sums.detach())
    # As near to the end of the range as to the middle: from there back to zero, so that what wraps is continuous.
    turn = half / 2
    return torch.where(wrapped > turn, half - wrapped, torch.where(wrapped < -turn, -half - wrapped, wrapped))


ACCUMULATORS: Registry[Callable[[Tensor, int], Tensor]] = Registry("accumulator")
ACCUMULATORS.register("saturate", _saturate)
ACCUMULATORS.register("wrap", _wrap)


@dataclass(frozen=True)
class Accumulator:
    r"""A register of few bits that sums of whole numbers end in.

    Formula (h = 2^{bits - 1}):
        saturate   min(max(z, -h), h - 1);                        backward: 1 where it is not clipped, else 0
        wrap       m = ((z + h) mod 2 h) - h, then m where |m| \le h / 2, h - m above, -h - m below: a triangle wave;
                   backward: through the wrapping straight, 1 or -1

    Args:
        bits: 2 to 24.
        mode: a key of `ACCUMULATORS`.

    Raises:
        ConfigError: for a number of bits out of this range.
        UnknownNameError: for a mode that does not exist.

    Source:
        wrap, and the penalty: Ni, Chu, Castaneda, Chiang, Studer, Goldstein, WrapNet, ICLR 2021; the slope of the
        cyclic activation is 1.
    """

    bits: int
    mode: str = "saturate"

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or isinstance(self.bits, bool) or not 2 <= self.bits <= 24:
            raise ConfigError(f"accumulator_bits must be a whole number from 2 to 24, or None; not {self.bits!r}.")
        ACCUMULATORS.get(self.mode)

    @property
    def half(self) -> int:
        """2^{bits - 1}."""
        return int(2 ** (self.bits - 1))

    def __call__(self, sums: Tensor) -> Tensor:
        """What is left of sums: any shape, same dtype."""
        return ACCUMULATORS.get(self.mode)(sums, self.half)

    def overflows(self, sums: Tensor) -> Tensor:
        """The share of sums that do not fit, 0-dimensional."""
        return ((sums < -self.half) | (sums > self.half - 1)).float().mean()

    def penalty(self, sums: Tensor) -> Tensor:
        r"""By how much sums overflow on average: mean(max(|z| - h, 0)), 0-dimensional."""
        return (sums.abs() - self.half).relu().mean()
