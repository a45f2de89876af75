"""Memory for time: what is cheap to compute is computed again in the backward pass, instead of being kept for it."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["recomputed"]

Made = TypeVar("Made", Tensor, tuple[Tensor, Tensor])


def recomputed(function: Callable[..., Made], *inputs: Tensor, random: bool = False) -> Made:
    """Call a function; for the backward pass keep its inputs only, and call it again there.

    A compiler decides by itself what to keep: there, and where no gradient is asked for, this is a plain call.

    Args:
        function: of tensors, the same whenever it is called with the same ones.
        *inputs: what is kept.
        random: whether it draws random numbers, which are then the same in the second call.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(*inputs)
    result: Made = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=random)
    return result
