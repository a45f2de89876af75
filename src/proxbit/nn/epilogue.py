"""What follows the product of a 1-bit layer: sums in few bits, RPReLU, a residual."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from proxbit.errors import ConfigError
from proxbit.nn.learned import Learned
from proxbit.nn.surrogate import clip
from proxbit.registry import Registry

__all__ = ["ACCUMULATORS", "Accumulator", "Epilogue", "Overflow", "RPReLU"]


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


class Overflow(NamedTuple):
    """How badly the sums of a forward pass fit into an accumulator.

    Attributes:
        share: of the sums that did not fit, 0-dimensional.
        penalty: by how much sums overflowed on average, 0-dimensional, with a gradient; None in a pass without one.
    """

    share: Tensor
    penalty: Tensor | None


@dataclass(frozen=True)
class Accumulator:
    r"""A register of few bits that sums of whole numbers end in, simulated exactly.

    Sums are taken wide and narrowed once, at their end, so that the result does not depend on the order of the
    additions. For wrapping accumulators this holds in any order; for saturating ones it is an assumption.

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

    def overflow(self, sums: Tensor) -> Overflow:
        r"""The share of sums that do not fit, and by how much sums overflow on average: mean(max(|z| - h, 0))."""
        wide = sums.detach()
        share = ((wide < -self.half) | (wide > self.half - 1)).float().mean()
        return Overflow(share, (sums.abs() - self.half).relu().mean() if torch.is_grad_enabled() else None)


@dataclass(frozen=True)
class Epilogue:
    """What follows the product of a 1-bit layer.

    The RPReLU itself is a child of the layer, as its parameters are: `<layer>.rprelu.corner`.

    Args:
        rprelu: whether there is an `RPReLU`.
        residual: whether the input is added at the end.
        accumulator: what the sums end in; None for registers that are wide enough. Offsets of rows go without.
    """

    rprelu: bool = False
    residual: bool = False
    accumulator: Accumulator | None = None

    def check(self, columns: int, rows: int, activations: str) -> None:
        """Raise ConfigError if a layer of this shape, with activations of this format, cannot have it."""
        if self.accumulator is not None and activations == "float":
            raise ConfigError("An accumulator of few bits sums whole numbers: choose other activations than 'float'.")
        if self.residual and columns != rows:
            raise ConfigError(f"A residual needs as many outputs as inputs; this layer has {columns} and {rows}.")

    def accumulate(self, sums: Tensor, unit: Tensor, scale: Tensor, bias: Tensor | None) -> tuple[Tensor, Overflow]:
        """The product, from sums of whole numbers that the accumulator may not hold.

        Args:
            sums: of codes and signs, `[..., O]`.
            unit: of the codes, one number or `[..., 1]`.
            scale: of the weights, `[O]`.
            bias: `[O]` or None.
        """
        assert self.accumulator is not None
        overflow = self.accumulator.overflow(sums)
        result = self.accumulator(sums) * (unit * scale.to(sums.dtype))
        return result if bias is None else result + bias.to(sums.dtype), overflow

    def __call__(self, result: Tensor, input: Tensor, rprelu: RPReLU | None) -> Tensor:
        """The output of the layer.

        Args:
            result: the product, `[..., O]`.
            input: `[..., I]`, whose dtype the output gets.
            rprelu: of the layer.
        """
        if rprelu is not None:
            result = rprelu(result)
        result = result + input if self.residual else result
        # Learned numbers are in single precision, also in a model of half; autocast sees to dtypes itself.
        kind = input.device.type
        cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        return result if cast else result.to(input.dtype)
