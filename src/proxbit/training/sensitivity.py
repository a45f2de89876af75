"""How much the loss minds that a layer becomes binary, seen from the gradients of a few batches."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from proxbit.errors import ConfigError
from proxbit.nn import evaluating, latent_layers, soft_evaluation

__all__ = ["taylor_sensitivity"]


def taylor_sensitivity(model: nn.Module, loss: Callable[[Any], Tensor], batches: Iterable[Any]) -> dict[str, float]:
    r"""By how much the loss changes, to first order, when a layer alone goes to its hard weight.

    Gradients are those of the float model: every layer computes with its latent weight and its input as it is, and
    nothing is dropped out. A loss that is at its minimum there, such as distillation alone from a float copy of the
    model, says nothing.

    Formula:
        s = | \sum_ij g_ij (w_hard_ij - w_ij) |,   g = dL / dw at the latent weights, L averaged over the batches

    Args:
        model: a latent model; afterwards its parameters have no gradients.
        loss: `batch -> L`, 0-dimensional.
        batches: one or more.

    Returns:
        s, 0 or more, of each latent layer by its name.

    Raises:
        ConfigError: if there are no batches, the loss does not depend on a layer, or s is not finite.

    Source:
        Molchanov, Mallya, Tyree, Frosio, Kautz, Importance Estimation for Neural Network Pruning, CVPR 2019: the
        first-order criterion. Differs from it in: weights go to their hard ones, not to zero, and s is not squared.
    """
    layers = dict(latent_layers(model))
    changes: dict[str, list[float]] = {name: [] for name in layers}
    with _all_waiting(model):
        for batch in batches:
            model.zero_grad()
            loss(batch).backward()
            for name, layer in layers.items():
                if layer.weight.grad is None:
                    raise ConfigError(f"The training loss does not depend on {name}: how it minds cannot be said.")
                step = layer.effective_weight(hard=True).detach() - layer.weight.detach()
                wide = torch.promote_types(step.dtype, torch.float32)
                changes[name].append(float((layer.weight.grad.to(wide) * step.to(wide)).sum()))
    scores = {name: abs(sum(found)) / len(found) for name, found in changes.items() if found}
    if not scores:
        raise ConfigError("There is nothing to take gradients of: the data is empty.")
    for name, score in scores.items():
        if not math.isfinite(score):
            raise ConfigError(f"{name}: the gradient of the training loss holds NaN or infinite values.")
    return scores


@contextmanager
def _all_waiting(model: nn.Module) -> Iterator[None]:
    """Within the context, the model computes its float function, and every latent weight gets a gradient."""
    layers = [layer for _, layer in latent_layers(model)]
    before = [(layer.waits, layer.weight.requires_grad) for layer in layers]
    with ExitStack() as stack:
        stack.callback(model.zero_grad)
        stack.enter_context(evaluating(model))
        stack.enter_context(soft_evaluation(model))
        # Its modules are evaluated, without dropout; the model as a whole trains, so that the loss has all its parts.
        model.training = True
        for layer in layers:
            layer.waits = frozenset({"weight", "activation"})
            layer.weight.requires_grad_(True)
        try:
            yield
        finally:
            for layer, (waits, requires_grad) in zip(layers, before, strict=True):
                layer.waits = waits
                layer.weight.requires_grad_(requires_grad)
