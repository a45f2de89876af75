"""Watching what binarized layers are given, for runs that go wrong."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from proxbit.errors import ActivationError
from proxbit.nn import latent_layers

__all__ = ["watch_activations"]


def watch_activations(model: nn.Module) -> Callable[[], None]:
    """Check the input of every latent layer before each forward; this reads it once more, and waits for the device.

    Args:
        model: a latent model.

    Returns:
        A function that ends the watch.

    Raises:
        ActivationError: by the forward, naming the layer, for an input that holds NaN or infinity, or that is one
            constant (such as all zeros), of which no sign or step says anything.
    """
    handles = [layer.register_forward_pre_hook(partial(_check, name)) for name, layer in latent_layers(model)]

    def end() -> None:
        for handle in handles:
            handle.remove()

    return end


def _check(name: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
    input = arguments[0]
    assert isinstance(input, Tensor)
    if not input.numel():
        return
    low, high = (float(bound) for bound in input.detach().aminmax())
    if not -float("inf") < low <= high < float("inf"):
        raise ActivationError(f"{name}: its input holds NaN or infinite values (smallest {low}, largest {high}).")
    if low == high:
        raise ActivationError(f"{name}: its input is {low} everywhere: there is nothing to quantize.")
