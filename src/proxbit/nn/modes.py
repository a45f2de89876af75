"""Modes, for a while: training and evaluation, and attention on floats."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn

__all__ = ["attends_in_floats", "evaluating", "float_attention"]

_floats: ContextVar[bool] = ContextVar("proxbit_float_attention", default=False)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the context, a model and all its modules are in evaluation mode; then each is in its own mode again.

    `model.train(mode)` would put a frozen part, which its owner keeps in evaluation mode, into training mode.
    """
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def float_attention() -> Iterator[None]:
    """Within the context, in this thread, attention on quantized operands computes with floats instead."""
    token = _floats.set(True)
    try:
        yield
    finally:
        _floats.reset(token)


def attends_in_floats() -> bool:
    """Whether the caller is within `float_attention`."""
    return not torch.compiler.is_compiling() and _floats.get()
