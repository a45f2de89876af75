"""Proximal maps P_mu: the non-decreasing maps that take a latent weight towards the levels {-1, +1}.

Each map is one row of data: a function `(w, mu) -> P_mu(w)` with its formula and source.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from proxbit.sign import sign

__all__ = [
    "BINARYRELAX",
    "BOX",
    "IDENTITY",
    "LINEAR",
    "PARQ",
    "PERIOD",
    "SIGN",
    "TANH",
    "Mu",
    "ProximalMap",
    "linear_quantizer",
]

Mu = Tensor | float


@dataclass(frozen=True)
class ProximalMap:
    """A proximal map: non-decreasing in `w`, for every `mu` of its range.

    Args:
        name: the literature's name.
        function: `(w, mu) -> P_mu(w)`, elementwise; any shape, floating point, same shape and dtype out.
        formula: the map in one line, for tables and pictures.
        source: paper and equation or section.
    """

    name: str
    function: Callable[[Tensor, Mu], Tensor]
    formula: str
    source: str

    def __call__(self, w: Tensor, mu: Mu) -> Tensor:
        return self.function(w, mu)


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


def _identity(w: Tensor, mu: Mu) -> Tensor:
    return w


def _sign(w: Tensor, mu: Mu) -> Tensor:
    return sign(w)


def _linear(w: Tensor, mu: Mu) -> Tensor:
    return linear_quantizer(w, rho=mu, varrho=mu)


def _binaryrelax(w: Tensor, mu: Mu) -> Tensor:
    return (w + mu * sign(w)) / (1 + mu)


def _parq(w: Tensor, mu: Mu) -> Tensor:
    return (w * mu).clamp(-1, 1)


def _tanh(w: Tensor, mu: Mu) -> Tensor:
    return (mu * w).tanh()


def _box(w: Tensor, mu: Mu) -> Tensor:
    return (mu * w).clamp(-1, 1) / mu


def _period(w: Tensor, mu: Mu) -> Tensor:
    return w.clamp(-torch.pi, torch.pi)


IDENTITY = ProximalMap("identity", _identity, "P(w) = w", "the proximal map of a constant")
SIGN = ProximalMap("sign", _sign, "P(w) = sign(w)", "BinaryConnect: Courbariaux, Bengio, David, NeurIPS 2015")
LINEAR = ProximalMap(
    "linear",
    _linear,
    "P(w) = L_mu^mu(w): 1 - |1 - |w|| shrunk by mu towards the levels, hard for mu >= 1",
    "ProxConnect: Dockhorn et al., NeurIPS 2021; with rho = varrho it is ProxQuant's W-shaped map",
)
BINARYRELAX = ProximalMap(
    "binaryrelax",
    _binaryrelax,
    "P(w) = (w + mu sign(w)) / (1 + mu)",
    "BinaryRelax: Yin, Zhang, Lyu, Osher, Qi, Xin, SIAM J. Imaging Sciences 2018",
)
PARQ = ProximalMap(
    "parq",
    _parq,
    "P(w) = clip(mu w, -1, 1)",
    "PARQ: Jin, Ma, Liu, Gromov, Defazio, Xiao, 2025, https://huggingface.co/papers/2503.15748",
)
TANH = ProximalMap(
    "tanh",
    _tanh,
    "P(w) = tanh(mu w)",
    "Mirror descent: Ajanthan, Gupta, Torr, Hartley, Dokania, AISTATS 2021",
)
BOX = ProximalMap("box", _box, "P(w) = clip(w, -1/mu, 1/mu)", "the projection onto a box")
PERIOD = ProximalMap("period", _period, "P(w) = clip(w, -pi, pi)", "the projection onto half a period of `FOURIER`")
