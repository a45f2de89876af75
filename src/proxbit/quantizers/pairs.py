"""Forward/backward quantizer pairs (F, B): what a pair is, and how one is made."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from proxbit.errors import ConfigError, MuRangeError
from proxbit.quantizers.functions import IDENTITY, Function, Mu, as_function
from proxbit.quantizers.levels import nearest_level
from proxbit.quantizers.row_units import RowUnits
from proxbit.quantizers.schedules import AGGREGATE, CONSTANT
from proxbit.sign import sign

__all__ = ["BINARY", "ROW_LEAST_SQUARES", "QuantizerPair", "Row", "compose", "heuristic"]

Plain = Callable[[Tensor, Mu], Tensor]
BINARY = (-1.0, 1.0)
ROW_LEAST_SQUARES = ("row", "ls", "none")


@dataclass(frozen=True)
class QuantizerPair:
    """A forward quantizer F and a backward quantizer B: the forward pass sees F_mu(w*), the gradient of the latent
    weight w* is B_mu(w*) times the gradient of F_mu(w*).

    Args:
        forward: `(w, mu) -> F_mu(w)`, elementwise; any shape, floating point.
        backward: `(w, mu) -> B_mu(w)`, elementwise; any shape, floating point.
        forward_formula: F in one line.
        backward_formula: B in one line.
        proximal: P, if F = T∘P and B = T'∘P; None for a heuristic pair.
        transform: T, likewise.
        mu_range: smallest (included) and largest sharpness (included, may be infinite).
        schedule: the default schedule of mu: kind, start, end, in row units (see `RowUnits`).
        scaling: the fields of the default row units: normalize, scale, center.
        levels: Q, increasing: what ships. {-1, +1} for binary pairs; empty if nothing is quantized.
        hard_from: at the end of the default schedule, F is within 1e-3 of the nearest level for every |w| <= 10 that is
            at least this far from a boundary between two levels; None if it is not.
        update_from: the map the step starts from, if it is not the latent weight itself: with it, a step is
            w* <- P(w*) - (step of the optimizer), as in ProxQuant and in reverse ProxConnect.
        source: paper, and equation or section.

    Raises:
        ConfigError: for levels that do not increase.
        MuRangeError: if the schedule starts or ends out of `mu_range`.

    Source:
        ProxConnect++: Lu, Yu, Li, Partovi Nia, Understanding Neural Network Binarization, NeurIPS 2023.
    """

    forward: Plain
    backward: Plain
    forward_formula: str
    backward_formula: str
    proximal: Function | None = None
    transform: Function | None = None
    mu_range: tuple[float, float] = (0.0, math.inf)
    schedule: tuple[str, float, float] = ("constant", 1.0, 1.0)
    scaling: tuple[str, str, str] = ROW_LEAST_SQUARES
    levels: tuple[float, ...] = BINARY
    hard_from: float | None = None
    update_from: Function | None = None
    source: str = ""

    def __post_init__(self) -> None:
        levels = tuple(map(float, self.levels))
        if any(low >= high for low, high in zip(levels[:-1], levels[1:], strict=True)):
            raise ConfigError(f"The levels of a quantizer pair must increase, as (-1, 1) do; not {self.levels}.")
        object.__setattr__(self, "levels", levels)
        try:
            for mu in self.schedule_ends:
                self.check_mu(mu)
        except MuRangeError as error:
            raise MuRangeError(f"The default schedule of a pair, now {self.schedule}, goes beyond: {error}") from error

    @property
    def schedule_ends(self) -> tuple[float, ...]:
        """The values of mu that the default schedule names."""
        kind, *ends = self.schedule
        return tuple(ends[:1] if kind in (CONSTANT, AGGREGATE) else ends)

    @property
    def units(self) -> RowUnits:
        """The default row units.

        Raises:
            ConfigError: if `scaling` does not name row units.
        """
        return RowUnits(*self.scaling)

    @property
    def sound(self) -> bool:
        """Whether the pair is built as F = T∘P, B = T'∘P, with P a proximal map."""
        return self.proximal is not None and self.transform is not None

    @property
    def binary(self) -> bool:
        """Whether its levels are {-1, +1}, which one bit a weight can store."""
        return self.levels == BINARY

    def __deepcopy__(self, memo: dict[int, object]) -> "QuantizerPair":
        """A pair is immutable data: copies of a model share it, and it keeps its name."""
        return self

    def __copy__(self) -> "QuantizerPair":
        """Likewise."""
        return self

    def hard(self, w: Tensor) -> Tensor:
        """The level nearest to w, the upper one half-way; same shape and dtype. w itself if there are no levels."""
        if self.binary:
            return sign(w)
        return nearest_level(w, self.levels) if self.levels else w

    def check_mu(self, mu: float) -> float:
        """Return `mu`, if it is in the range of this pair.

        Raises:
            MuRangeError: if it is not.
        """
        low, high = self.mu_range
        if not low <= mu <= high or math.isinf(mu):
            raise MuRangeError(f"mu = {mu} is out of range: this pair takes finite values from {low:g} to {high:g}.")
        return mu


class Row(TypedDict, total=False):
    """The fields of a `QuantizerPair` that `compose` and `heuristic` take as they are."""

    mu_range: tuple[float, float]
    schedule: tuple[str, float, float]
    scaling: tuple[str, str, str]
    levels: tuple[float, ...]
    hard_from: float | None
    update_from: Function | None
    source: str


def compose(
    proximal: Function | Plain,
    transform: Function | Plain = IDENTITY,
    **row: Unpack[Row],
) -> QuantizerPair:
    r"""The sound pair of a proximal map and a transform.

    Formula:
        F = T \circ P,   B = T' \circ P.

    Args:
        proximal: P, non-decreasing: a `Function`, or any other `(w, mu) -> P_mu(w)`.
        transform: T, smooth: a `Function`, or any other `(p, mu) -> T_mu(p)`; T' is then its `derivative`, if it has an
            attribute of that name, and otherwise computed by automatic differentiation.
        **row: further fields of `QuantizerPair`.

    Raises:
        ConfigError: if a P that does not promise otherwise decreases on [-3, 3], at the start or at the end of the
            schedule.

    Source:
        ProxConnect++ (Lu et al., NeurIPS 2023): with p = P(w*), the step on w* is exactly ProxConnect on l∘T.
    """
    proximal, transform = as_function(proximal), as_function(transform)
    row.setdefault("source", proximal.source)
    t, slope = transform.equation("T", "p"), transform.slope.equation("T'", "p")
    forward, backward = f"F = T(P(w)): {t}; {proximal.equation('P')}", f"B = T'(P(w)): {slope}"
    if transform is IDENTITY:
        forward, backward = proximal.equation("F"), transform.slope.equation("B")
    elif proximal is IDENTITY:
        forward, backward = f"F = T: {t}", f"B = T': {slope}"
    pair = QuantizerPair(
        forward=transform.after(proximal),
        backward=transform.slope.after(proximal),
        forward_formula=forward,
        backward_formula=backward,
        proximal=proximal,
        transform=transform,
        **row,
    )
    if not proximal.non_decreasing:
        _refuse_decreasing(proximal, pair.schedule_ends)
    return pair


def _refuse_decreasing(proximal: Function, sharpness: tuple[float, ...]) -> None:
    """Look at P on [-3, 3]."""
    w = torch.linspace(-3, 3, 6001, dtype=torch.float64, device="cpu")
    for mu in sharpness:
        p = proximal(w.clone(), mu)
        wrong = ~(p.diff() >= -1e-9 * p.abs().amax())
        if bool(wrong.any()):
            at = int(wrong.int().argmax())
            raise ConfigError(
                f"P must not decrease, or it is no proximal map: {proximal.name} goes from {p[at]:g} at w = {w[at]:g} "
                f"to {p[at + 1]:g} at {w[at + 1]:g}, with mu = {mu:g}. A pair without that promise is made by "
                "proxbit.heuristic."
            )


def heuristic(forward: Function | Plain, backward: Function | Plain, **row: Unpack[Row]) -> QuantizerPair:
    """A pair whose two sides are chosen freely, without the promise that `compose` gives.

    Args:
        forward: F: a `Function`, or any other `(w, mu) -> F_mu(w)`.
        backward: B: a `Function`, or any other `(w, mu) -> B_mu(w)`.
        **row: further fields of `QuantizerPair`.
    """
    f, b = as_function(forward), as_function(backward)
    return QuantizerPair(f, b, forward_formula=f.equation("F"), backward_formula=b.equation("B"), **row)
