"""Sound partners of heuristic pairs: keep the backward quantizer, and make the forward the one it is the slope of."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from proxbit.quantizers.catalog import get_pair
from proxbit.quantizers.functions import IDENTITY, Function, Mu
from proxbit.quantizers.pairs import QuantizerPair, compose

__all__ = ["Antiderivative", "enhance"]


@dataclass(frozen=True)
class Antiderivative:
    r"""The integral of a function from 0, by Simpson's rule on a grid and cubic Hermite interpolation.

    Formula:
        A(w) = \int_0^w B_mu(u) du

    Args:
        slope: `(w, mu) -> B_mu(w)`, elementwise.
        cells: of the grid, even. The grid spans the finite values asked for; the error is of order
            (mu span / cells)^4, so that a huge value beside them makes the others less exact.
    """

    slope: Callable[[Tensor, Mu], Tensor]
    cells: int = 32768

    def __call__(self, w: Tensor, mu: Mu) -> Tensor:
        if not w.numel():
            return torch.zeros_like(w)
        x = w.double()
        span = torch.where(x.isfinite(), x.abs(), 0).max().clamp(min=1e-6)
        x = x.clamp(-span, span)
        width = 2 * span / self.cells
        nodes = torch.linspace(-1, 1, self.cells + 1, dtype=x.dtype, device=x.device) * span
        at_nodes = self.slope(nodes, mu)
        at_middle = self.slope((nodes[:-1] + nodes[1:]) / 2, mu)
        areas = width / 6 * (at_nodes[:-1] + 4 * at_middle + at_nodes[1:])
        integral = torch.cat([areas.new_zeros(1), areas.cumsum(0)])
        integral = integral - integral[self.cells // 2]
        cell = ((x + span) / width).long().clamp(0, self.cells - 1)
        t = ((x - nodes[cell]) / width).clamp(0, 1)
        left, right = integral[cell], integral[cell + 1]
        slope_left, slope_right = width * at_nodes[cell], width * at_nodes[cell + 1]
        value = (
            left * (1 + 2 * t) * (1 - t) ** 2
            + slope_left * t * (1 - t) ** 2
            + right * t**2 * (3 - 2 * t)
            + slope_right * t**2 * (t - 1)
        )
        return value.to(w.dtype)


def enhance(pair: QuantizerPair | str, schedule: tuple[str, float, float] | None = None) -> QuantizerPair:
    r"""The sound partner of a heuristic pair.

    Formula:
        F+(w) = \int_0^w B(u) du,   B+ = B;   that is P = identity, T = F+.

    Args:
        pair: a pair, or the name of one. A pair that is sound already is returned as it is.
        schedule: of mu; None for that of the pair. F+ approaches the sign only if mu grows.

    Returns:
        A pair to register under a name of your own.

    Raises:
        UnknownNameError: for an unknown name.

    Source:
        ProxConnect++ (Lu et al., NeurIPS 2023), where BNN+ becomes BNN++ in this way.
    """
    pair = get_pair(pair)
    if pair.sound:
        return pair
    backward = pair.backward_formula.removeprefix("B(w) = ")
    transform = Function(
        name="antiderivative",
        function=Antiderivative(pair.backward),
        formula=f"integral of B from 0 to w, with B(w) = {backward}",
        source=pair.source,
        derivative=Function("backward quantizer", pair.backward, backward, pair.source),
    )
    return compose(
        IDENTITY,
        transform,
        mu_range=pair.mu_range,
        schedule=schedule or pair.schedule,
        scaling=pair.scaling,
        levels=pair.levels,
        source=f"the sound partner of: {pair.source}",
    )
