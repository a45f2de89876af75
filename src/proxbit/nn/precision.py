"""Parameters that a latent model keeps in single precision, because small steps add up in them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from proxbit.nn.latent import latent_layers
from proxbit.nn.learned import learned_modules

__all__ = ["HALF", "dtype_around", "keep_single", "trained_in_small_steps", "unrounded"]

HALF = (torch.float16, torch.bfloat16)


def trained_in_small_steps(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Latent weights, and the scales, steps, thresholds and slopes that are learned beside them, with their names.

    A sign flips after many steps, each of them smaller than what half precision adds to a weight; and where F is sharp,
    gradients of latent weights are smaller than any number of fp16.
    """
    for name, layer in latent_layers(model):
        if isinstance(layer.weight, nn.Parameter):
            yield f"{name}.weight", layer.weight
    for name, module in learned_modules(model):
        for key, parameter in module.named_parameters():
            yield f"{name}.{key}", parameter


@torch.no_grad()
def keep_single(model: nn.Module) -> list[str]:
    """Bring these parameters of a latent model from fp16 or bf16 to fp32; they stay the same objects.

    Under ZeRO-3, which takes parameters apart and has single precision of its own, they are left as they are.

    Returns:
        The names of those that were in half precision.
    """
    half = [(name, each) for name, each in trained_in_small_steps(model) if each.dtype in HALF]
    half = [(name, each) for name, each in half if not hasattr(each, "ds_id")]
    for _, parameter in half:
        grad, parameter.grad = parameter.grad, None
        parameter.data = parameter.data.float()
        parameter.grad = None if grad is None else grad.float()
    return [name for name, _ in half]


@contextmanager
def unrounded(model: nn.Module) -> Iterator[None]:
    """At the end of the context these parameters are as at its start, whatever dtype the model was given in it."""
    before = [(each, each.data) for _, each in trained_in_small_steps(model)]
    try:
        yield
    finally:
        for parameter, data in before:
            if parameter.dtype != data.dtype:
                parameter.data = data.to(parameter.device)


def dtype_around(model: nn.Module) -> torch.dtype:
    """The dtype in which a model computes: that of the other parameters; of these if there are no others."""
    kept = {id(parameter): parameter.dtype for _, parameter in trained_in_small_steps(model)}
    floats = [each for each in model.parameters() if each.is_floating_point()]
    around = [each.dtype for each in floats if id(each) not in kept]
    return next(iter((*around, *kept.values())), torch.get_default_dtype())
