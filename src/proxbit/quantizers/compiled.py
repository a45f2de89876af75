"""For which latent weights the compiled kernels take the place of torch's operators, by the name in the table."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from proxbit.kernels import latent_kernels
from proxbit.quantizers.functions import SIGN, Function
from proxbit.quantizers.pairs import QuantizerPair

__all__ = ["compiled_backward", "compiled_forward", "compiled_functions"]


def _name(side: Callable[..., Tensor]) -> str | None:
    """The compiled form of one side of a pair. A subclass may compute something else."""
    return side.compiled if type(side) is Function else None


def compiled_forward(
    pair: QuantizerPair, hard: bool, rows: Tensor
) -> Callable[..., tuple[Tensor, Tensor, Tensor]] | None:
    """`kernels.LatentKernels.quantize` for F, or for its hard limit; None for torch."""
    function = (SIGN.compiled if pair.binary else None) if hard else _name(pair.forward)
    kernels = latent_kernels(rows)
    return None if function is None or kernels is None else partial(kernels.quantize, function)


def compiled_backward(pair: QuantizerPair, rows: Tensor) -> Callable[..., Tensor] | None:
    """`kernels.LatentKernels.gradient` for B; None for torch, as where autograd records."""
    function = _name(pair.backward)
    kernels = None if torch.is_grad_enabled() else latent_kernels(rows)
    return None if function is None or kernels is None else partial(kernels.gradient, function)


def compiled_functions(pair: QuantizerPair) -> tuple[str, str] | None:
    """F and B by the names that the kernels have for them; None where they do not know both."""
    forward, backward = _name(pair.forward), _name(pair.backward)
    return None if forward is None or backward is None else (forward, backward)
