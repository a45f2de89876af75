"""Forward/backward quantizer pairs (F, B): what a pair is, how one is made, and the registry of names."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from proxbit.errors import MuRangeError, UnknownNameError
from proxbit.quantizers.proximal import Mu, ProximalMap
from proxbit.quantizers.transforms import IDENTITY_TRANSFORM, Transform
from proxbit.registry import Registry

__all__ = ["PAIRS", "QuantizerPair", "Surrogate", "compose", "get_pair", "heuristic", "pair_name", "register_pair"]


@dataclass(frozen=True)
class Surrogate:
    """One side of a pair that is not built from a proximal map and a transform.

    Args:
        function: `(w, mu) -> value`, elementwise; any shape, floating point.
        formula: the function in one line.
    """

    function: Callable[[Tensor, Mu], Tensor]
    formula: str

    def __call__(self, w: Tensor, mu: Mu) -> Tensor:
        return self.function(w, mu)


@dataclass(frozen=True)
class _Composed:
    """T∘P, or T'∘P."""

    proximal: ProximalMap
    outer: Callable[[Tensor, Mu], Tensor]

    def __call__(self, w: Tensor, mu: Mu) -> Tensor:
        return self.outer(self.proximal(w, mu), mu)


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
        schedule: the default schedule of mu: kind, start, end, in row-normalised units (see `quantizers.scaling`).
        source: paper, and equation or section.

    Source:
        ProxConnect++: Lu, Yu, Li, Partovi Nia, Understanding Neural Network Binarization, NeurIPS 2023.
    """

    forward: Callable[[Tensor, Mu], Tensor]
    backward: Callable[[Tensor, Mu], Tensor]
    forward_formula: str
    backward_formula: str
    proximal: ProximalMap | None = None
    transform: Transform | None = None
    mu_range: tuple[float, float] = (0.0, math.inf)
    schedule: tuple[str, float, float] = ("constant", 1.0, 1.0)
    source: str = ""

    @property
    def sound(self) -> bool:
        """Whether the pair is built as F = T∘P, B = T'∘P, with P a proximal map."""
        return self.proximal is not None and self.transform is not None

    def __deepcopy__(self, memo: dict[int, object]) -> "QuantizerPair":
        """A pair is immutable data: copies of a model share it, and it keeps its name."""
        return self

    def check_mu(self, mu: float) -> float:
        """Return `mu`, if it is in the range of this pair.

        Raises:
            MuRangeError: if it is not.
        """
        low, high = self.mu_range
        if not low <= mu <= high or math.isinf(mu):
            raise MuRangeError(f"mu = {mu} is out of range: this pair takes finite values from {low:g} to {high:g}.")
        return mu


def compose(
    proximal: ProximalMap,
    transform: Transform = IDENTITY_TRANSFORM,
    *,
    mu_range: tuple[float, float] = (0.0, math.inf),
    schedule: tuple[str, float, float] = ("constant", 1.0, 1.0),
    source: str = "",
) -> QuantizerPair:
    r"""The sound pair of a proximal map and a transform.

    Formula:
        F = T \circ P,   B = T' \circ P.

    Args:
        proximal: P, non-decreasing.
        transform: T, smooth, with its derivative.
        mu_range: see `QuantizerPair`.
        schedule: see `QuantizerPair`.
        source: see `QuantizerPair`.

    Source:
        ProxConnect++ (Lu et al., NeurIPS 2023): with p = P(w*), the step on w* is exactly ProxConnect on l∘T.
    """
    return QuantizerPair(
        forward=_Composed(proximal, transform.function),
        backward=_Composed(proximal, transform.derivative),
        forward_formula=f"T(P(w)): {transform.formula}; {proximal.formula}",
        backward_formula=f"T'(P(w)): {transform.derivative_formula}",
        proximal=proximal,
        transform=transform,
        mu_range=mu_range,
        schedule=schedule,
        source=source or proximal.source,
    )


def heuristic(
    forward: Surrogate,
    backward: Surrogate,
    *,
    mu_range: tuple[float, float] = (0.0, math.inf),
    schedule: tuple[str, float, float] = ("constant", 1.0, 1.0),
    source: str = "",
) -> QuantizerPair:
    """A pair whose two sides are chosen freely, without the promise that `compose` gives.

    Args:
        forward: F with its formula.
        backward: B with its formula.
        mu_range: see `QuantizerPair`.
        schedule: see `QuantizerPair`.
        source: see `QuantizerPair`.
    """
    return QuantizerPair(
        forward=forward,
        backward=backward,
        forward_formula=forward.formula,
        backward_formula=backward.formula,
        mu_range=mu_range,
        schedule=schedule,
        source=source,
    )


PAIRS: Registry[QuantizerPair] = Registry("quantizer pair")


def register_pair(name: str, pair: QuantizerPair) -> QuantizerPair:
    """Make a pair available by name wherever a pair is accepted.

    Args:
        name: a new name.
        pair: from `compose`, `heuristic`, or a `QuantizerPair` of your own.

    Raises:
        UnknownNameError: if the name is taken.
    """
    return PAIRS.register(name, pair)


def get_pair(pair: "str | QuantizerPair") -> QuantizerPair:
    """The pair of that name; a pair is returned as it is.

    Raises:
        UnknownNameError: if no pair has that name; the message lists the valid ones.
    """
    return pair if isinstance(pair, QuantizerPair) else PAIRS.get(pair)


def pair_name(pair: "str | QuantizerPair") -> str:
    """The registered name of a pair, which is what a configuration file stores.

    Raises:
        UnknownNameError: if the name, or the object, is not registered.
    """
    if not isinstance(pair, QuantizerPair):
        PAIRS.get(pair)
        return pair
    for name in PAIRS:
        if PAIRS.get(name) is pair:
            return name
    raise UnknownNameError(
        "This QuantizerPair has no name, so no checkpoint could say which pair it was trained with. "
        "Call proxbit.register_pair('a-name', pair) first."
    )
