"""Transforms T_mu: smooth maps applied after a proximal map, each with its exact derivative T'_mu."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from proxbit.errors import ConfigError
from proxbit.quantizers.proximal import Mu, name_of

__all__ = [
    "EDE",
    "FOURIER",
    "IDENTITY_TRANSFORM",
    "POLYNOMIAL",
    "SIGN_SWISH",
    "SINE",
    "TANH",
    "Transform",
    "as_tensor_like",
    "as_transform",
    "sign_swish",
    "sign_swish_derivative",
]


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


@dataclass(frozen=True)
class _Slope:
    """The derivative of an elementwise function, by automatic differentiation."""

    function: Callable[[Tensor, Mu], Tensor]

    def __call__(self, p: Tensor, mu: Mu) -> Tensor:
        again = torch.is_grad_enabled() and p.requires_grad
        with torch.enable_grad():
            at = p if again else p.detach().requires_grad_()
            value = self.function(at, mu)
            if not value.requires_grad:
                raise ConfigError(
                    f"{name_of(self.function)} has no derivative that automatic differentiation can see; give it one "
                    "as its attribute `derivative`, or pass a Transform."
                )
            slope: Tensor = torch.autograd.grad(value, at, torch.ones_like(value), create_graph=again)[0]
        return slope


def as_transform(function: Transform | Callable[[Tensor, Mu], Tensor]) -> Transform:
    """A `Transform` as it is; any other function `(p, mu) -> T_mu(p)` under its own name.

    Its derivative is its attribute `derivative`, if there is one, and otherwise found by automatic differentiation.
    """
    if isinstance(function, Transform):
        return function
    name = name_of(function)
    derivative = getattr(function, "derivative", _Slope(function))
    return Transform(name, function, derivative, f"T(p) = {name}(p, mu)", f"T'(p), T = {name}", "a map of the user")


def sign_swish(p: Tensor, mu: Mu) -> Tensor:
    r"""The sign-Swish function, a smooth sign that overshoots to 1.19968 at |mu p| = 2.39936.

    Formula:
        SS_mu(p) = 2 s(x) (1 + x (1 - s(x))) - 1 = t + h (1 - t^2),   x = mu p,  s the logistic function,  h = x/2,
        t = tanh(h).

    Args:
        p: any shape, floating point.
        mu: sharpness, > 0.

    Returns:
        Same shape and dtype as `p`.

    Source:
        Darabi, Belbahri, Courbariaux, Partovi Nia, Regularized Binary Network Training, 2018,
        https://huggingface.co/papers/1812.11800
    """
    # Beyond |x| = 60 the function is 1 to the last bit of float64; without the bound, inf * 0 would be NaN.
    h = (mu / 2 * p).clamp_(-30, 30)
    t = torch.tanh(h)
    # tanh_backward(h, t) is h (1 - t^2), in one kernel.
    result: Tensor = torch.ops.aten.tanh_backward(h, t).add_(t)
    return result


def sign_swish_derivative(p: Tensor, mu: Mu) -> Tensor:
    r"""The derivative of sign-Swish.

    Formula:
        SS'_mu(p) = mu (2 - x tanh(x/2)) / (1 + cosh x) = 2 mu s(y) (1 - s(y)) (2 + y - 2 y s(y)),   x = mu p, y = -|x|.
        The second form cannot overflow, and is exact far out. SS'_mu(0) = mu; it is negative for |x| > 2.39936.

    Args:
        p: any shape, floating point.
        mu: sharpness, > 0.

    Returns:
        Same shape and dtype as `p`.

    Source:
        As `sign_swish`.
    """
    y = p.abs().mul_(-mu).clamp_(min=-60)
    s = torch.sigmoid(y)
    result: Tensor = torch.ops.aten.sigmoid_backward((2 + y).addcmul_(y, s, value=-2), s).mul_(2 * mu)
    return result


def _identity(p: Tensor, mu: Mu) -> Tensor:
    return p


def _ones(p: Tensor, mu: Mu) -> Tensor:
    return torch.ones((), dtype=p.dtype, device=p.device).expand_as(p)


def as_tensor_like(mu: Mu, like: Tensor) -> Tensor:
    """`mu` as a 0-dimensional tensor, for functions that take no numbers."""
    return torch.as_tensor(mu, dtype=like.dtype, device=like.device)


def _tanh(p: Tensor, mu: Mu) -> Tensor:
    return (mu * p).tanh()


def _tanh_slope(p: Tensor, mu: Mu) -> Tensor:
    return mu * (1 - (mu * p).tanh() ** 2)


def _ede_gain(p: Tensor, mu: Mu) -> Tensor:
    return (1 / as_tensor_like(mu, p)).clamp(min=1)


def _ede(p: Tensor, mu: Mu) -> Tensor:
    return _ede_gain(p, mu) * _tanh(p, mu)


def _ede_slope(p: Tensor, mu: Mu) -> Tensor:
    return _ede_gain(p, mu) * _tanh_slope(p, mu)


def _polynomial(p: Tensor, mu: Mu) -> Tensor:
    x = (mu * p).clamp(-1, 1)
    return x * (2 - x.abs())


def _polynomial_slope(p: Tensor, mu: Mu) -> Tensor:
    return (mu * p).abs().mul_(-2).add_(2).clamp_(min=0).mul_(mu)


# The half period of the Fourier series is 2 pi, so that weights of a few row means lie on its flat top.
FOURIER_TERMS = 32
FOURIER_FREQUENCY = 0.5


def _fourier(p: Tensor, mu: Mu) -> Tensor:
    odd = range(1, 2 * FOURIER_TERMS, 2)
    share = (as_tensor_like(mu, p) + 1 - torch.arange(FOURIER_TERMS, dtype=p.dtype, device=p.device)).clamp(0, 1)
    return 4 / torch.pi * sum((share[i] * (k * FOURIER_FREQUENCY * p).sin() / k for i, k in enumerate(odd)), p * 0)


def _fourier_slope(p: Tensor, mu: Mu) -> Tensor:
    odd = range(1, 2 * FOURIER_TERMS, 2)
    share = (as_tensor_like(mu, p) + 1 - torch.arange(FOURIER_TERMS, dtype=p.dtype, device=p.device)).clamp(0, 1)
    gain = 4 * FOURIER_FREQUENCY / torch.pi
    return gain * sum((share[i] * (k * FOURIER_FREQUENCY * p).cos() for i, k in enumerate(odd)), p * 0)


def _sine(p: Tensor, mu: Mu) -> Tensor:
    return (mu * p).sin()


def _cosine(p: Tensor, mu: Mu) -> Tensor:
    return mu * (mu * p).cos()


IDENTITY_TRANSFORM = Transform("identity", _identity, _ones, "T(p) = p", "T'(p) = 1", "")
SIGN_SWISH = Transform(
    "sign-swish",
    sign_swish,
    sign_swish_derivative,
    "T(p) = SS_mu(p) = 2 s(x) (1 + x (1 - s(x))) - 1, x = mu p",
    "T'(p) = mu (2 - x tanh(x/2)) / (1 + cosh x), x = mu p",
    "Regularized Binary Network Training: Darabi et al., 2018, https://huggingface.co/papers/1812.11800",
)
TANH = Transform("tanh", _tanh, _tanh_slope, "T(p) = tanh(mu p)", "T'(p) = mu (1 - tanh(mu p)^2)", "")
EDE = Transform(
    "ede",
    _ede,
    _ede_slope,
    "T(p) = k tanh(mu p), k = max(1/mu, 1)",
    "T'(p) = k mu (1 - tanh(mu p)^2)",
    "IR-Net: Qin et al., CVPR 2020, error decay estimator",
)
POLYNOMIAL = Transform(
    "polynomial",
    _polynomial,
    _polynomial_slope,
    "T(p) = x (2 - |x|), x = clip(mu p, -1, 1)",
    "T'(p) = mu (2 - 2 |mu p|)+",
    "Bi-Real Net: Liu et al., ECCV 2018, approximation of the sign",
)
FOURIER = Transform(
    "fourier",
    _fourier,
    _fourier_slope,
    "T(p) = s_mu(p) = (4/pi) sum_{i=0..mu} sin((2i+1) p/2) / (2i+1)",
    "T'(p) = (2/pi) sum_{i=0..mu} cos((2i+1) p/2)",
    "FDA-BNN: Xu et al., NeurIPS 2021, decomposition of the sign in sines",
)
SINE = Transform("sine", _sine, _cosine, "T(p) = sin(mu p)", "T'(p) = mu cos(mu p)", "BiPer: Vargas et al., CVPR 2024")
