"""Which F and B the compiled kernels know, and for which latent weights they take the place of torch's operators."""

from collections.abc import Callable

import torch
from torch import Tensor

import proxbit.quantizers.family  # noqa: F401  (registers the pairs that are named below)
from proxbit.kernels import LatentRows, backend_for
from proxbit.quantizers.catalog import get_pair
from proxbit.quantizers.pairs import Composed, QuantizerPair, Surrogate
from proxbit.quantizers.proximal import IDENTITY, ProximalMap
from proxbit.quantizers.transforms import IDENTITY_TRANSFORM

__all__ = ["compiled_backward", "compiled_forward", "compiled_functions"]


def _parts(side: Callable[..., Tensor]) -> tuple[int, ...]:
    """What one side of a pair is made of. By identity: a function of the user need be neither equal to nor hashed."""
    if not isinstance(side, Composed):
        return (id(side.function if type(side) is Surrogate else side),)
    if side.proximal is IDENTITY or side.outer is IDENTITY_TRANSFORM.derivative:
        return (id(side.outer),)
    known = type(side.proximal) is ProximalMap
    return id(side.proximal.function if known else side.proximal), id(side.outer)


_KNOWN = {
    _parts(getattr(get_pair(pair), side)): function
    for pair, side, function in (
        ("bc", "forward", "sign"),
        ("bc", "backward", "one"),
        ("bnn", "forward", "sign"),
        ("bnn", "backward", "box"),
        ("parq", "forward", "clip"),
        ("md-tanh", "forward", "tanh"),
        ("tanh", "forward", "tanh"),
        ("tanh", "backward", "tanh slope"),
        ("bireal", "backward", "polynomial slope"),
        ("bireal++", "forward", "polynomial"),
        ("bireal++", "backward", "polynomial slope"),
        ("bnn+", "backward", "sign-swish slope"),
        ("bnn++", "forward", "sign-swish"),
        ("bnn++", "backward", "sign-swish slope"),
        ("ede++", "forward", "decay"),
        ("ede++", "backward", "decay slope"),
        ("fda", "backward", "series slope"),
        ("fda++", "forward", "series"),
        ("fda++", "backward", "series slope"),
    )
}


def compiled_forward(
    pair: QuantizerPair, hard: bool, rows: Tensor
) -> Callable[..., tuple[Tensor, Tensor, Tensor]] | None:
    """`quantize_rows` of a backend for F, or for its hard limit; None for torch."""
    function = ("sign" if pair.binary else None) if hard else _KNOWN.get(_parts(pair.forward))
    backend = backend_for("quantize_rows", rows)
    if function is None or backend is None:
        return None
    return lambda latent, mu, scale, divisor, factor: backend.quantize_rows(
        LatentRows(function, latent, mu, divisor, factor), scale
    )


def compiled_backward(pair: QuantizerPair, rows: Tensor) -> Callable[..., Tensor] | None:
    """`gradient_rows` of a backend for B; None for torch, as where autograd records."""
    function = _KNOWN.get(_parts(pair.backward))
    backend = None if torch.is_grad_enabled() else backend_for("quantize_rows", rows)
    if function is None or backend is None:
        return None
    return lambda latent, mu, divisor, factor, grad, overwrite=False: backend.gradient_rows(
        LatentRows(function, latent, mu, divisor, factor), grad, overwrite
    )


def compiled_functions(pair: QuantizerPair) -> tuple[str, str] | None:
    """F and B by the names that the kernels have for them; None where they do not know both."""
    forward, backward = _KNOWN.get(_parts(pair.forward)), _KNOWN.get(_parts(pair.backward))
    return None if forward is None or backward is None else (forward, backward)
