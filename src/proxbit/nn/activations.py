"""What a linear layer makes of its activations before it multiplies them, as a float layer can simulate it."""

from collections.abc import Callable

from torch import Tensor

from proxbit.errors import ConfigError
from proxbit.kernels import FORMATS, quantize_activations
from proxbit.sign import sign

__all__ = ["check_activations", "simulate_activations"]


def _float(x: Tensor) -> Tensor:
    return x


def _int8(x: Tensor) -> Tensor:
    q, step = quantize_activations(x.detach())
    return x + ((q * step).to(x.dtype) - x).detach()


def _sign(x: Tensor) -> Tensor:
    box = x.clamp(-1, 1)
    return box + (sign(x) - box).detach()


_SIMULATED: dict[str, Callable[[Tensor], Tensor]] = {"float": _float, "int8": _int8, "sign": _sign}
assert set(_SIMULATED) == set(FORMATS)


def check_activations(activations: str) -> None:
    """Raise ConfigError for a format that does not exist."""
    if activations not in _SIMULATED:
        raise ConfigError(f"activations must be one of {', '.join(_SIMULATED)}; not {activations!r}.")


def simulate_activations(x: Tensor, activations: str) -> Tensor:
    r"""The activations as a packed layer multiplies them, in float.

    Formula:
        float: x
        int8:  step round(x / step), step = max |x| / 127 of each token; backward: straight through
        sign:  +1 where x \ge 0, else -1; backward: 1[|x| \le 1], as in binarized networks

    Args:
        x: `[..., I]`, floating point.
        activations: "float", "int8" or "sign".

    Returns:
        Same shape and dtype.
    """
    return _SIMULATED[activations](x)
