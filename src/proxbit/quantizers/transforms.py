"""Transforms T_mu: smooth maps applied after a proximal map, each with its exact derivative T'_mu."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from proxbit.quantizers.proximal import Mu

__all__ = ["IDENTITY_TRANSFORM", "SIGN_SWISH", "Transform", "sign_swish", "sign_swish_derivative"]


@dataclass(frozen=True)
class Transform:
    """A smooth transform and its derivative.

    Args:
        name: the literature's name.
        function: `(p, mu) -> T_mu(p)`, elementwise; any shape, floating point.
        derivative: `(p, mu) -> T'_mu(p)`, elementwise; any shape, floating point.
        formula: T in one line.
        derivative_formula: T' in one line.
        source: paper and equation or section.
    """

    name: str
    function: Callable[[Tensor, Mu], Tensor]
    derivative: Callable[[Tensor, Mu], Tensor]
    formula: str
    derivative_formula: str
    source: str

    def __call__(self, p: Tensor, mu: Mu) -> Tensor:
        return self.function(p, mu)


def sign_swish(p: Tensor, mu: Mu) -> Tensor:
    r"""The sign-Swish function, a smooth sign that overshoots to 1.19968 at |mu p| = 2.39936.

    Formula:
        SS_mu(p) = 2 s(x) (1 + x (1 - s(x))) - 1,   x = mu p,  s the logistic function.

    Args:
        p: any shape, floating point.
        mu: sharpness, > 0.

    Returns:
        Same shape and dtype as `p`.

    Source:
        Darabi, Belbahri, Courbariaux, Partovi Nia, Regularized Binary Network Training, 2018,
        https://huggingface.co/papers/1812.11800
    """
    x = mu * p
    # Beyond |x| = 60 the function is 1 to the last bit of float64; without the bound, inf * 0 would be NaN.
    x = x.clamp(-60, 60)
    s = torch.sigmoid(x)
    return 2 * s * (1 + x * torch.sigmoid(-x)) - 1


def sign_swish_derivative(p: Tensor, mu: Mu) -> Tensor:
    r"""The derivative of sign-Swish.

    Formula:
        SS'_mu(p) = mu (2 - x tanh(x/2)) / (1 + cosh x) = 2 mu s(x) s(-x) (2 - x tanh(x/2)),   x = mu p.
        The second form cannot overflow. SS'_mu(0) = mu; it is negative for |x| > 2.39936.

    Args:
        p: any shape, floating point.
        mu: sharpness, > 0.

    Returns:
        Same shape and dtype as `p`.

    Source:
        As `sign_swish`.
    """
    x = (mu * p).clamp(-60, 60)
    return 2 * mu * torch.sigmoid(x) * torch.sigmoid(-x) * (2 - x * torch.tanh(x / 2))


def _identity(p: Tensor, mu: Mu) -> Tensor:
    return p


def _ones(p: Tensor, mu: Mu) -> Tensor:
    return torch.ones((), dtype=p.dtype, device=p.device).expand_as(p)


IDENTITY_TRANSFORM = Transform("identity", _identity, _ones, "T(p) = p", "T'(p) = 1", "")
SIGN_SWISH = Transform(
    "sign-swish",
    sign_swish,
    sign_swish_derivative,
    "T(p) = SS_mu(p) = 2 s(x) (1 + x (1 - s(x))) - 1, x = mu p",
    "T'(p) = mu (2 - x tanh(x/2)) / (1 + cosh x), x = mu p",
    "Regularized Binary Network Training: Darabi et al., 2018, https://huggingface.co/papers/1812.11800",
)
