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
    "PARQ",
    "PERIOD",
    "SIGN",
    "TANH",
    "LinearQuantizer",
    "Mu",
    "ProximalMap",
    "Pull",
    "as_proximal_map",
    "linear_quantizer",
    "name_of",
    "nearest_level",
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


def name_of(function: object) -> str:
    """How to call a function, or an object that is called like one."""
    return str(getattr(function, "__name__", type(function).__name__))


def as_proximal_map(function: "ProximalMap | Callable[[Tensor, Mu], Tensor]") -> ProximalMap:
    """A `ProximalMap` as it is; any other function `(w, mu) -> P_mu(w)` under its own name."""
    if isinstance(function, ProximalMap):
        return function
    return ProximalMap(name_of(function), function, f"P(w) = {name_of(function)}(w, mu)", "a map of the user")


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


def _identity(w: Tensor, mu: Mu) -> Tensor:
    return w


def _sign(w: Tensor, mu: Mu) -> Tensor:
    return sign(w)


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
class Pull:
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


def _binaryrelax(w: Tensor, mu: Mu) -> Tensor:
    return w / (1 + mu) + sign(w) * (mu / (1 + mu))


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
