"""The criterion of ProxConnect++ as code: which pairs (F, B) are sound, and what their proximal map penalises.

A pair is sound when F = T∘P and B = T'∘P for a proximal map P and a smooth T. Then dF = T'(P) dP = B dP, so

    P(w) = integral of dF(u) / B(u) up to w,

and the pair is sound exactly when this P is non-decreasing, and F and B are functions of P(w) alone.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from proxbit.errors import ConfigError
from proxbit.quantizers.catalog import get_pair
from proxbit.quantizers.functions import Function, Mu
from proxbit.quantizers.pairs import QuantizerPair

__all__ = ["Decomposition", "decompose", "regularizer"]

CELLS = 20_000
BISECTIONS = 44
# Of the largest slope of F, or the largest B: below it, a number on the grid counts as zero.
NEGLIGIBLE = 1e-6
# Of the whole movement of F: what a numerical antiderivative may do at a kink.
VISIBLE = 1e-4


@dataclass(frozen=True)
class Decomposition:
    """P and T of a pair at one mu, on a grid, and whether the pair is sound.

    Attributes:
        sound: whether P is a proximal map, and F and B are functions of it.
        reason: why, in one sentence.
        interval: where the criterion fails first, in units of w; None for a sound pair.
        w: grid, `[n]`, increasing; a jump of F is two points with (nearly) the same w.
        p: P(w), `[n]`, centred so that its ends are opposite.
        f: F(w), `[n]`.
        b: B(w), `[n]`.
    """

    sound: bool
    reason: str
    interval: tuple[float, float] | None
    w: Tensor
    p: Tensor
    f: Tensor
    b: Tensor

    def proximal(self, w: Tensor) -> Tensor:
        """P at any w inside the grid, linear between its points."""
        return _interpolate(w, self.w, self.p)

    def transform(self, p: Tensor) -> Tensor:
        """T at any p in the range of P, linear between the points of the grid: F = T(P(w))."""
        return _interpolate(p, self.p, self.f)


@dataclass(frozen=True)
class _Cells:
    """F and B on the cells of a grid: what changes smoothly in each, and what jumps."""

    nodes: Tensor
    smooth: Tensor
    jump: Tensor
    place: Tensor
    b_mean: Tensor
    b_middle: Tensor
    b_jump: Tensor


def _interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    right = torch.searchsorted(xs, x.contiguous(), right=True).clamp(1, len(xs) - 1)
    left = right - 1
    width = (xs[right] - xs[left]).clamp(min=torch.finfo(xs.dtype).tiny)
    return ys[left] + (ys[right] - ys[left]) * ((x - xs[left]) / width).clamp(0, 1)


def _at(function: Callable[[Tensor, Mu], Tensor], w: Tensor, mu: Mu) -> Tensor:
    """F or B of `w`, which it may change in place, or be a number of."""
    return torch.as_tensor(function(w.clone(), mu), dtype=w.dtype).expand_as(w)


def _cells(pair: QuantizerPair, mu: Mu, window: float) -> _Cells:
    """Sample the pair; bisect every cell towards its steepest point, so that jumps are found and not smeared."""
    nodes = torch.linspace(-window, window, CELLS + 1, dtype=torch.float64)
    low, high = nodes[:-1].clone(), nodes[1:].clone()
    f_low, f_high = _at(pair.forward, low, mu), _at(pair.forward, high, mu)
    total = f_high - f_low
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        f_middle = _at(pair.forward, middle, mu)
        left = (f_middle - f_low).abs() > (f_high - f_middle).abs()
        low, f_low = torch.where(left, low, middle), torch.where(left, f_low, f_middle)
        high, f_high = torch.where(left, middle, high), torch.where(left, f_middle, f_high)
    jump = f_high - f_low
    jump = torch.where(jump.abs() > 1e-9 * (1 + f_high.abs()), jump, torch.zeros_like(jump))
    middle = (nodes[:-1] + nodes[1:]) / 2
    b_left, b_middle, b_right = (_at(pair.backward, x, mu) for x in (nodes[:-1], middle, nodes[1:]))
    b_jump = (_at(pair.backward, low, mu) + _at(pair.backward, high, mu)) / 2
    return _Cells(nodes, total - jump, jump, high, (b_left + 4 * b_middle + b_right) / 6, b_middle, b_jump)


def _growth(cells: _Cells) -> tuple[Tensor, Tensor]:
    """dF / B on each cell, smooth part; and where F moves although B is zero.

    Where both vanish together the ratio has a limit: that of the nearest cell where it can be computed, or zero where B
    is exactly zero, since then nothing is seen of w at all.
    """
    width = cells.nodes[1] - cells.nodes[0]
    slope, b = cells.smooth / width, cells.b_mean
    b_small = b.abs() <= NEGLIGIBLE * b.abs().max()
    still = slope.abs() <= NEGLIGIBLE * slope.abs().max().clamp(min=1e-12)
    near_zero = torch.nn.functional.max_pool1d(b_small[None].double(), 5, 1, 2)[0].bool()
    known = ~(near_zero | (still & b_small))
    ratio = torch.where(b_small, torch.zeros_like(b), slope / torch.where(b_small, torch.ones_like(b), b))
    stuck = b_small & ~still & ~_between_signs(b)
    if bool(known.any()):
        places = known.nonzero().flatten()
        after = torch.searchsorted(places, torch.arange(len(b))).clamp(0, len(places) - 1)
        before = (after - 1).clamp(0)
        index = torch.arange(len(b))
        nearer = (places[after] - index).abs() < (index - places[before]).abs()
        nearest = torch.where(nearer, places[after], places[before])
        ratio = torch.where(known | (cells.b_middle == 0), ratio, ratio[nearest])
    return ratio * width, stuck


def _between_signs(b: Tensor) -> Tensor:
    """Cells next to a change of sign of B."""
    flips = torch.zeros_like(b)
    flips[1:] = (b[1:] * b[:-1] < 0).double()
    return torch.nn.functional.max_pool1d(flips[None], 5, 1, 2)[0].bool()


def _runs(mask: Tensor) -> list[tuple[int, int]]:
    """Maximal runs of True, as half-open ranges."""
    edges = torch.diff(torch.nn.functional.pad(mask.int(), (1, 1)))
    starts, ends = (edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist()
    return list(zip(starts, ends, strict=True))


def _verdict(cells: _Cells, growth: Tensor, jumps: Tensor, stuck: Tensor) -> tuple[str, tuple[float, float] | None]:
    """The first reason against soundness, with its interval; or an empty reason."""

    def span(start: int, end: int) -> tuple[float, float]:
        return float(cells.nodes[start]), float(cells.nodes[end])

    known = torch.isfinite(cells.smooth + cells.jump + cells.b_mean + cells.b_jump)
    for start, end in _runs(~known):
        return "F or B is not finite.", span(start, end)
    moves = (cells.smooth + cells.jump).abs()
    for start, end in _runs(stuck):
        if float(moves[start:end].sum()) > VISIBLE * float(moves.sum()):
            return "F moves where B is zero: the gradient cannot follow.", span(start, end)
    step = growth + jumps
    scale = step.abs().sum().clamp(min=1e-12)
    for start, end in _runs(step < -1e-9 * scale):
        if float(-step[start:end].sum()) > VISIBLE * float(scale):
            return "P decreases, so it is no proximal map.", span(start, end)
    flat = (growth.abs() <= 1e-12 * scale) & (jumps == 0)
    for start, end in _runs(flat):
        inside = cells.b_middle[start:end]
        if float(inside.max() - inside.min()) > 1e-6 * float(cells.b_middle.abs().max()):
            return "B changes while P stands still: B is no function of P.", span(start, end)
    return "", None


def decompose(pair: QuantizerPair | str, mu: float | None = None, window: float = 3.0) -> Decomposition:
    r"""Decide whether a pair is sound, and recover its P and T.

    Formula:
        P(w) = \int_{-window}^{w} dF(u) / B(u), jumps of F included as \Delta F / B

    Args:
        pair: a pair, or the name of one.
        mu: sharpness; None for the start of the pair's default schedule.
        window: the pair is examined on [-window, window].

    Returns:
        P and T on a grid, and the verdict with its reason.

    Raises:
        ConfigError: if the window is not a positive number.
        MuRangeError: if mu is out of the range of the pair.
        UnknownNameError: for an unknown name.

    Source:
        ProxConnect++ (Lu et al., NeurIPS 2023), which pairs are admissible. Decided on a grid of window / 10,000: what
        B does within less of a jump of F is not seen, as of `bireal` from mu = 10,000 on.
    """
    pair = get_pair(pair)
    mu = pair.check_mu(pair.schedule[1] if mu is None else mu)
    if not 0 < window < math.inf:
        raise ConfigError(f"window must be a positive number, not {window}.")
    cells = _cells(pair, mu, window)
    growth, stuck = _growth(cells)
    usable = cells.b_jump.abs() > NEGLIGIBLE * cells.b_middle.abs().max()
    jumped = cells.jump != 0
    stuck = stuck | (jumped & ~usable)
    jumps = torch.where(jumped & usable, cells.jump / torch.where(usable, cells.b_jump, torch.ones_like(growth)), 0.0)
    reason, interval = _verdict(cells, growth, jumps, stuck)
    w, p = _cumulate(cells, growth, jumps)
    return Decomposition(
        sound=not reason,
        reason=reason or "P is non-decreasing, and F and B are functions of P.",
        interval=interval,
        w=w,
        p=p - (p[0] + p[-1]) / 2,
        f=_at(pair.forward, w, mu),
        b=_at(pair.backward, w, mu),
    )


def _cumulate(cells: _Cells, growth: Tensor, jumps: Tensor) -> tuple[Tensor, Tensor]:
    """The points of P: one a node, and two more a jump, just before it and at it."""
    ends = torch.cumsum(growth + jumps, 0)
    w = [cells.nodes]
    p = [torch.cat([torch.zeros(1, dtype=torch.float64), ends])]
    at = jumps.nonzero().flatten()
    width = cells.nodes[1] - cells.nodes[0]
    before = ends[at] - jumps[at] - growth[at] * (cells.nodes[at + 1] - cells.place[at]) / width
    w += [cells.place[at] - 1e-6 * width, cells.place[at]]
    p += [before, before + jumps[at]]
    order = torch.argsort(torch.cat(w), stable=True)
    return torch.cat(w)[order], torch.cat(p)[order]


def regularizer(proximal: Function, mu: float, window: float = 3.0) -> tuple[Tensor, Tensor]:
    r"""The regularizer whose proximal map P is, up to a constant: what a method penalises.

    Formula:
        P(w) = argmin_p r(p) + (p - w)^2 / 2, so r'(p) = P^{-1}(p) - p; r is infinite outside of the range of P.

    Args:
        proximal: P, non-decreasing.
        mu: sharpness.
        window: P is examined on [-window, window].

    Returns:
        p and r(p), `[n]` each, p evenly spaced over the range of P, the smallest r is 0.

    Source:
        The definition of the proximal map; for sign it gives r(p) = (1 - p^2) / 2 on [-1, 1].
    """
    w = torch.linspace(-window, window, 2 * CELLS, dtype=torch.float64)
    values = proximal(w, mu)
    p = torch.linspace(float(values[0]), float(values[-1]), 2001, dtype=torch.float64)
    slope = _interpolate(p, values, w) - p
    r = torch.cat([p.new_zeros(1), torch.cumulative_trapezoid(slope, p)])
    return p, r - r.min()
