"""For which latent weights the compiled kernels take the place of torch's operators, by the name in the table."""

from collections.abc import Callable

import torch
from torch import Tensor

from proxbit.kernels import LatentRows, backend_for
from proxbit.quantizers.functions import SIGN, Function
from proxbit.quantizers.pairs import QuantizerPair

__all__ = ["compiled_backward", "compiled_forward", "compiled_functions"]


def _name(side: Callable[..., Tensor]) -> str | None:
    """The compiled form of one side of a pair. A subclass may compute something else."""
    return side.compiled if type(side) is Function else None


def compiled_forward(
    pair: QuantizerPair, hard: bool, rows: Tensor
) -> Callable[..., tuple[Tensor, Tensor, Tensor]] | None:
    """`quantize_rows` of a backend for F, or for its hard limit; None for torch."""
    function = (SIGN.compiled if pair.binary else None) if hard else _name(pair.forward)
    backend = backend_for("quantize_rows", rows)
    if function is None or backend is None:
        return None
    return lambda latent, mu, scale, divisor, factor: backend.quantize_rows(
        LatentRows(function, latent, mu, divisor, factor), scale
    )


def compiled_backward(pair: QuantizerPair, rows: Tensor) -> Callable[..., Tensor] | None:
    """`gradient_rows` of a backend for B; None for torch, as where autograd records."""
    function = _name(pair.backward)
    backend = None if torch.is_grad_enabled() else backend_for("quantize_rows", rows)
    if function is None or backend is None:
        return None
    return lambda latent, mu, divisor, factor, grad, overwrite=False: backend.gradient_rows(
        LatentRows(function, latent, mu, divisor, factor), grad, overwrite
    )


def compiled_functions(pair: QuantizerPair) -> tuple[str, str] | None:
    """F and B by the names that the kernels have for them; None where they do not know both."""
    forward, backward = _name(pair.forward), _name(pair.backward)
    return None if forward is None or backward is None else (forward, backward)
