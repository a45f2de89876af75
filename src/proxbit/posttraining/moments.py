"""What the closed form needs of all tokens of a layer, summed over forward passes and over processes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from proxbit.posttraining.lockstep import summed

__all__ = ["Gathered", "Moments", "Pair", "moments"]


class Pair(NamedTuple):
    """What two forward passes of the same images bring to one module.

    Attributes:
        binarized: in the model that is binarized up to there.
        floating: in the float model.
    """

    binarized: Tensor
    floating: Tensor


@dataclass(frozen=True)
class Gathered:
    """All pairs of this process.

    Attributes:
        pairs: one for each chunk of images.
        workers: how many are looked at at a time.
        reduce: sums tensors over processes.
    """

    pairs: Sequence[Pair]
    workers: int
    reduce: Callable[[list[Tensor]], list[Tensor]]

    def total(self, function: Callable[[Any], Sequence[Tensor]], parts: Sequence[Any] | None = None) -> list[Tensor]:
        """Sums, in fp64, of what a function gives for each pair, or for each of other parts, one a pair."""
        return self.reduce(summed(function, self.pairs if parts is None else parts, self.workers))


@dataclass(frozen=True)
class Moments:
    """Second moments of the inputs x and the wanted outputs y of a layer, in each of its G groups, float64.

    Attributes:
        tokens: how many were summed.
        input_mean: m_x, `[G, I]`; 0 where nothing can take a mean up.
        output_mean: m_y, `[G, O]`; likewise.
        covariance: H = E[(x - m_x)(x - m_x)^T], `[G, I, I]`.
        cross: T = E[(y - m_y)(x - m_x)^T], `[G, O, I]`.
        power: E|y - m_y|^2, `[G]`.
    """

    tokens: int
    input_mean: Tensor
    output_mean: Tensor
    covariance: Tensor
    cross: Tensor
    power: Tensor

    def joined(self, other: "Moments | None") -> "Moments":
        """Those of both: of a layer that is called again. Means that differ from call to call count as variance."""
        if other is None:
            return self
        total = self.tokens + other.tokens
        a, b = self.tokens / total, other.tokens / total
        dx, dy = self.input_mean - other.input_mean, self.output_mean - other.output_mean
        return Moments(
            total,
            a * self.input_mean + b * other.input_mean,
            a * self.output_mean + b * other.output_mean,
            a * self.covariance + b * other.covariance + a * b * dx[:, :, None] * dx[:, None, :],
            a * self.cross + b * other.cross + a * b * dy[:, :, None] * dx[:, None, :],
            a * self.power + b * other.power + a * b * dy.square().sum(dim=1),
        )

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """E|y - Q x - b|^2 / E|y - m_y|^2.

        Args:
            weight: Q, `[G, O, I]`.
            bias: b, `[G, O]`; None for the best one.
        """
        error = self.power - 2 * (weight * self.cross).sum((1, 2)) + ((weight @ self.covariance) * weight).sum((1, 2))
        if bias is not None:
            error += (self.output_mean - (weight @ self.input_mean[:, :, None])[:, :, 0] - bias).square().sum(dim=1)
        return float(error.sum() / self.power.sum().clamp(min=torch.finfo(torch.float64).tiny))


def moments(
    gathered: Gathered, inputs: Callable[[int], Tensor], outputs: Callable[[int], Tensor], centred: bool
) -> Moments:
    """Sum them over all tokens: first the means, then what is around them.

    Args:
        gathered: the pairs, which are counted.
        inputs: of the layer in the pair of that number, as it multiplies them, `[n, G, I]`.
        outputs: what it is to give there, `[n, G, O]`.
        centred: whether means are taken off.
    """
    numbers = range(len(gathered.pairs))

    def first(k: int) -> list[Tensor]:
        x, y = inputs(k), outputs(k)
        return [torch.tensor(float(len(x))), x.sum(dim=0, dtype=torch.float64), y.sum(dim=0, dtype=torch.float64)]

    count, sum_x, sum_y = gathered.total(first, numbers)
    mean_x, mean_y = (each / count if centred else torch.zeros_like(each) for each in (sum_x, sum_y))

    def second(k: int) -> list[Tensor]:
        x, y = inputs(k).float() - mean_x.float(), outputs(k).float() - mean_y.float()
        x, y = x.transpose(0, 1), y.transpose(0, 1)
        return [x.mT @ x, y.mT @ x, y.double().square().sum((1, 2))]

    covariance, cross, power = (each / count for each in gathered.total(second, numbers))
    return Moments(int(count), mean_x, mean_y, covariance, cross, power)
