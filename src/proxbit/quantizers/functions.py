"""The table of functions: every elementwise function `(w, mu) -> f_mu(w)` that pairs are made of, one row each.

A row serves in any role: as F, as B, as a proximal map P or as a transform T. Rows that one method alone needs stand
beside that method, in `family`; `FUNCTIONS` has them all.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from proxbit.errors import ConfigError
from proxbit.registry import Registry
from proxbit.sign import reaches, sign

__all__ = [
    "BINARYRELAX",
    "BOX",
    "CLIP",
    "EDE",
    "FOURIER",
    "FUNCTIONS",
    "IDENTITY",
    "INDICATOR",
    "ONE",
    "PERIOD",
    "POLYNOMIAL",
    "SERIES_SLOPE",
    "SIGN",
    "SIGN_SWISH",
    "SINE",
    "TANH",
    "Function",
    "Mu",
    "as_function",
    "as_tensor_like",
    "define",
    "name_of",
]

Mu = Tensor | float


@dataclass(frozen=True)
class Function:
    """An elementwise function `(w, mu) -> f_mu(w)` of a pair: F, B, P or T.

    Args:
        name: the literature's name.
        function: any shape, floating point; same shape and dtype out.
        formula: f_mu(w) in one line.
        source: paper, and equation or section.
        derivative: its derivative; None to have it computed, see `slope`.
        non_decreasing: whether it never decreases, for every mu of its range, as a proximal map must not. `compose`
            examines a function that does not promise it.
        compiled: the name that the kernels have for it, one of `kernels.interface.FUNCTIONS`; None where torch's
            operators compute it.
    """

    name: str
    function: Callable[[Tensor, Mu], Tensor]
    formula: str
    source: str = ""
    derivative: "Function | None" = None
    non_decreasing: bool = False
    compiled: str | None = None

    def __call__(self, w: Tensor, mu: Mu) -> Tensor:
        return self.function(w, mu)

    @property
    def slope(self) -> "Function":
        """The derivative, by automatic differentiation where there is none of its own."""
        return self.derivative or Function(f"{self.name} slope", _Slope(self), f"d/dw {self.formula}", self.source)

    def equation(self, left: str, variable: str = "w") -> str:
        """The formula as an equation: `T(p) = tanh(mu p)` for "T" and "p"."""
        return f"{left}({variable}) = " + re.sub(r"\bw\b", variable, self.formula)

    def after(self, inner: "Function") -> "Function":
        """This function of another one; the row of the table for the two, if there is one."""
        if inner is IDENTITY or self is ONE:
            return self
        if self is IDENTITY:
            return inner
        for row in map(FUNCTIONS.get, FUNCTIONS):
            made = row.function
            if isinstance(made, Composed) and made.outer is self and made.inner is inner:
                return row
        formula = f"{self.equation('f', 'p')}, {inner.equation('p')}"
        return Function(f"{self.name} of {inner.name}", Composed(self, inner), formula)


@dataclass(frozen=True)
class Composed:
    """One function of another."""

    outer: Function
    inner: Function

    def __call__(self, w: Tensor, mu: Mu) -> Tensor:
        return self.outer(self.inner(w, mu), mu)


@dataclass(frozen=True)
class _Slope:
    """The derivative of an elementwise function, by automatic differentiation."""

    of: Function

    def __call__(self, w: Tensor, mu: Mu) -> Tensor:
        differentiable = torch.is_grad_enabled() and w.requires_grad
        with torch.enable_grad():
            at = w if differentiable else w.detach().requires_grad_()
            value = self.of(at, mu)
            if not value.requires_grad:
                raise ConfigError(
                    f"{self.of.name} has no derivative that automatic differentiation can see; give it one as its "
                    "attribute `derivative`, or pass a Function."
                )
            slope: Tensor = torch.autograd.grad(value, at, torch.ones_like(value), create_graph=differentiable)[0]
        return slope


def name_of(function: object) -> str:
    """How to call a function, or an object that is called like one."""
    return str(getattr(function, "__name__", type(function).__name__))


def as_function(function: Function | Callable[[Tensor, Mu], Tensor]) -> Function:
    """A `Function` as it is; any other function `(w, mu) -> f_mu(w)` under its own name.

    Its derivative is its attribute `derivative`, if there is one.
    """
    if isinstance(function, Function):
        return function
    name, own = name_of(function), getattr(function, "derivative", None)
    derivative = own if own is None or isinstance(own, Function) else Function(f"{name} slope", own, f"{name}'(w, mu)")
    return Function(name, function, f"{name}(w, mu)", "a map of the user", derivative)


FUNCTIONS: Registry[Function] = Registry("function")


def define(name: str, function: Callable[[Tensor, Mu], Tensor], formula: str, **fields: Any) -> Function:
    """A row of the table; the arguments are the fields of `Function`."""
    return FUNCTIONS.register(name, Function(name, function, formula, **fields))


def as_tensor_like(mu: Mu, like: Tensor) -> Tensor:
    """`mu` as a 0-dimensional tensor, for functions that take no numbers."""
    return torch.as_tensor(mu, dtype=like.dtype, device=like.device)


def _one(w: Tensor, mu: Mu) -> Tensor:
    return torch.ones((), dtype=w.dtype, device=w.device).expand_as(w)


def _identity(w: Tensor, mu: Mu) -> Tensor:
    return w


def _sign(w: Tensor, mu: Mu) -> Tensor:
    return sign(w)


def _indicator(w: Tensor, mu: Mu) -> Tensor:
    return reaches(-w.abs(), -1)


def _binaryrelax(w: Tensor, mu: Mu) -> Tensor:
    return w / (1 + mu) + sign(w) * (mu / (1 + mu))


def _clip(w: Tensor, mu: Mu) -> Tensor:
    return (w * mu).clamp(-1, 1)


def _box(w: Tensor, mu: Mu) -> Tensor:
    return (mu * w).clamp(-1, 1) / mu


def _period(w: Tensor, mu: Mu) -> Tensor:
    return w.clamp(-torch.pi, torch.pi)


def _tanh(w: Tensor, mu: Mu) -> Tensor:
    return (mu * w).tanh()


def _tanh_slope(w: Tensor, mu: Mu) -> Tensor:
    return mu * (1 - (mu * w).tanh() ** 2)


def _ede_gain(w: Tensor, mu: Mu) -> Tensor:
    return (1 / as_tensor_like(mu, w)).clamp(min=1)


def _ede(w: Tensor, mu: Mu) -> Tensor:
    return _ede_gain(w, mu) * _tanh(w, mu)


def _ede_slope(w: Tensor, mu: Mu) -> Tensor:
    return _ede_gain(w, mu) * _tanh_slope(w, mu)


def _polynomial(w: Tensor, mu: Mu) -> Tensor:
    x = (mu * w).clamp(-1, 1)
    return x * (2 - x.abs())


def _polynomial_slope(w: Tensor, mu: Mu) -> Tensor:
    return (mu * w).abs().mul_(-2).add_(2).clamp_(min=0).mul_(mu)


def _sign_swish(w: Tensor, mu: Mu) -> Tensor:
    """t + h (1 - t^2), t = tanh(h), h = mu w / 2: a smooth sign that overshoots to 1.19968 at |mu w| = 2.39936."""
    # Beyond |mu w| = 60 the function is 1 to the last bit of float64; without the bound, inf * 0 would be NaN.
    h = (mu / 2 * w).clamp_(-30, 30)
    t = torch.tanh(h)
    # tanh_backward(h, t) is h (1 - t^2), in one kernel.
    result: Tensor = torch.ops.aten.tanh_backward(h, t).add_(t)
    return result


def _sign_swish_slope(w: Tensor, mu: Mu) -> Tensor:
    """2 mu s(y) (1 - s(y)) (2 + y - 2 y s(y)), y = -|mu w|: this form cannot overflow, and is exact far out."""
    y = w.abs().mul_(-mu).clamp_(min=-60)
    s = torch.sigmoid(y)
    result: Tensor = torch.ops.aten.sigmoid_backward((2 + y).addcmul_(y, s, value=-2), s).mul_(2 * mu)
    return result


# The half period of the Fourier series is 2 pi, so that weights of a few row means lie on its flat top.
FOURIER_TERMS = 32
FOURIER_FREQUENCY = 0.5


def _fourier(w: Tensor, mu: Mu) -> Tensor:
    odd = range(1, 2 * FOURIER_TERMS, 2)
    share = (as_tensor_like(mu, w) + 1 - torch.arange(FOURIER_TERMS, dtype=w.dtype, device=w.device)).clamp(0, 1)
    return 4 / torch.pi * sum((share[i] * (k * FOURIER_FREQUENCY * w).sin() / k for i, k in enumerate(odd)), w * 0)


def _fourier_slope(w: Tensor, mu: Mu) -> Tensor:
    odd = range(1, 2 * FOURIER_TERMS, 2)
    share = (as_tensor_like(mu, w) + 1 - torch.arange(FOURIER_TERMS, dtype=w.dtype, device=w.device)).clamp(0, 1)
    gain = 4 * FOURIER_FREQUENCY / torch.pi
    return gain * sum((share[i] * (k * FOURIER_FREQUENCY * w).cos() for i, k in enumerate(odd)), w * 0)


def _sine(w: Tensor, mu: Mu) -> Tensor:
    return (mu * w).sin()


def _cosine(w: Tensor, mu: Mu) -> Tensor:
    return mu * (mu * w).cos()


ONE = define("one", _one, "1", compiled="one")
IDENTITY = define(
    "identity", _identity, "w", source="the proximal map of a constant", derivative=ONE, non_decreasing=True
)
SIGN = define(
    "sign",
    _sign,
    "sign(w)",
    source="BinaryConnect: Courbariaux, Bengio, David, NeurIPS 2015",
    non_decreasing=True,
    compiled="sign",
)
INDICATOR = define(
    "indicator",
    _indicator,
    "1[|w| <= 1]",
    source="Binarized Neural Networks: Hubara, Courbariaux, Soudry, El-Yaniv, Bengio, NeurIPS 2016",
    compiled="box",
)
BINARYRELAX = define(
    "binaryrelax",
    _binaryrelax,
    "(w + mu sign(w)) / (1 + mu)",
    source="BinaryRelax: Yin, Zhang, Lyu, Osher, Qi, Xin, SIAM J. Imaging Sciences 2018",
    non_decreasing=True,
)
CLIP = define(
    "clip",
    _clip,
    "clip(mu w, -1, 1)",
    source="PARQ: Jin, Ma, Liu, Gromov, Defazio, Xiao, 2025, https://huggingface.co/papers/2503.15748",
    non_decreasing=True,
    compiled="clip",
)
BOX = define("box", _box, "clip(w, -1/mu, 1/mu)", source="the projection onto a box", non_decreasing=True)
PERIOD = define(
    "period", _period, "clip(w, -pi, pi)", source="the projection onto half a period of `fourier`", non_decreasing=True
)
TANH = define(
    "tanh",
    _tanh,
    "tanh(mu w)",
    source="Mirror descent: Ajanthan, Gupta, Torr, Hartley, Dokania, AISTATS 2021",
    derivative=define("tanh slope", _tanh_slope, "mu (1 - tanh(mu w)^2)", compiled="tanh slope"),
    non_decreasing=True,
    compiled="tanh",
)
EDE = define(
    "ede",
    _ede,
    "k tanh(mu w), k = max(1/mu, 1)",
    source="IR-Net: Qin et al., CVPR 2020, error decay estimator",
    derivative=define("ede slope", _ede_slope, "k mu (1 - tanh(mu w)^2), k = max(1/mu, 1)", compiled="decay slope"),
    compiled="decay",
)
POLYNOMIAL = define(
    "polynomial",
    _polynomial,
    "x (2 - |x|), x = clip(mu w, -1, 1)",
    source="Bi-Real Net: Liu et al., ECCV 2018, approximation of the sign",
    derivative=define("polynomial slope", _polynomial_slope, "mu (2 - 2 |mu w|)+", compiled="polynomial slope"),
    compiled="polynomial",
)
SIGN_SWISH = define(
    "sign-swish",
    _sign_swish,
    "SS_mu(w) = 2 s(x) (1 + x (1 - s(x))) - 1, x = mu w",
    source="Regularized Binary Network Training: Darabi et al., 2018, https://huggingface.co/papers/1812.11800",
    derivative=define(
        "sign-swish slope",
        _sign_swish_slope,
        "mu (2 - x tanh(x/2)) / (1 + cosh x), x = mu w",
        compiled="sign-swish slope",
    ),
    compiled="sign-swish",
)
FOURIER = define(
    "fourier",
    _fourier,
    "s_mu(w) = (4/pi) sum_{i=0..mu} sin((2i+1) w/2) / (2i+1)",
    source="FDA-BNN: Xu et al., NeurIPS 2021, decomposition of the sign in sines",
    derivative=define("fourier slope", _fourier_slope, "(2/pi) sum_{i=0..mu} cos((2i+1) w/2)"),
)
SINE = define(
    "sine",
    _sine,
    "sin(mu w)",
    source="BiPer: Vargas et al., CVPR 2024",
    derivative=define("cosine", _cosine, "mu cos(mu w)"),
)

# Compositions that have one compiled form. The polynomial is flat outside of the box by itself.
define("polynomial of box", Composed(POLYNOMIAL, BOX), POLYNOMIAL.formula, compiled=POLYNOMIAL.compiled)
define(
    "polynomial slope of box",
    Composed(POLYNOMIAL.slope, BOX),
    POLYNOMIAL.slope.formula,
    compiled=POLYNOMIAL.slope.compiled,
)
define("series", Composed(FOURIER, PERIOD), "s_mu(clip(w, -pi, pi))", compiled="series")
SERIES_SLOPE = define(
    "series slope", Composed(FOURIER.slope, PERIOD), "s'_mu(w) for |w| <= pi, else 0", compiled="series slope"
)
