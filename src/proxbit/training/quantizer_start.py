"""Where the quantizers of activations and attention of a latent model start whose weights are to be trained."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from proxbit.errors import ConfigError
from proxbit.nn import ActivationQuantizer, BinaryLinear, BinaryProbabilities, evaluating, soft_evaluation

__all__ = ["needs_examples", "start_quantizers"]

# Tokens a layer is shown. Means over more of them do not differ by what matters.
TOKENS = 8192


def start_quantizers(model: nn.Module, batches: Sequence[dict[str, Any]]) -> None:
    """Set thresholds, steps and scales of quantizers from a few batches, which run with float activations.

    The threshold of a sign is the mean of its channel, and the bias takes over what that mean contributed; scales,
    those of probabilities too, and steps are least-squares or LSQ's.

    Args:
        model: a latent model; changed in place.
        batches: keyword arguments of forward passes.

    Raises:
        ConfigError: if a layer was not reached, or given what is no number.
    """
    layers, attentions = _learning(model)
    if not layers and not attentions:
        return
    seen = _inputs(model, layers, attentions, batches)
    for name, rows in seen.items():
        if not rows:
            raise ConfigError(f"{name} was not called with these batches: nothing is known about its activations.")
        if not all(bool(torch.isfinite(values).all()) for values in rows):
            raise ConfigError(f"{name} was given NaN or infinite activations.")
    for name, module in attentions.items():
        module.calibrate(seen[name])
        module.calibrated = True
    for name, layer in layers.items():
        values = torch.cat(seen[name])
        _give_back(layer, -1)
        layer.activation.calibrate(values, may_shift=layer.bias is not None)
        _give_back(layer, 1)
        layer.activation.calibrated = True


def needs_examples(model: nn.Module) -> bool:
    """Whether a quantizer of activations or probabilities that learns has not been calibrated."""
    layers, attentions = _learning(model)
    learning = [layer.activation for layer in layers.values()], attentions.values()
    return not all(module.calibrated for module in chain(*learning))


def _learning(model: nn.Module) -> tuple[dict[str, BinaryLinear], dict[str, BinaryProbabilities]]:
    """The layers whose quantizers of activations learn, and the attentions that do, by name."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BinaryLinear)}
    attentions = {name: module for name, module in model.named_modules() if isinstance(module, BinaryProbabilities)}
    return {name: layer for name, layer in layers.items() if layer.activation.learns}, attentions


@torch.no_grad()
def _give_back(layer: BinaryLinear, times: int) -> None:
    """Add to the bias what the shift of the activation takes off, or take it away again."""
    shift = layer.activation.shift
    if layer.bias is not None and shift is not None:
        weight = layer.effective_weight(hard=False).float()
        layer.bias.add_((weight @ shift.float()).to(layer.bias.dtype), alpha=times)


@contextmanager
def _without_shift(layer: BinaryLinear) -> Iterator[None]:
    """Within the context, the bias is that of a layer which takes nothing off its input."""
    before = None if layer.bias is None else layer.bias.detach().clone()
    _give_back(layer, -1)
    try:
        yield
    finally:
        if before is not None and layer.bias is not None:
            with torch.no_grad():
                layer.bias.copy_(before)


@contextmanager
def _as_float(layer: BinaryLinear) -> Iterator[None]:
    """Within the context, the layer multiplies its input as it is."""
    parts = layer.activation, layer.epilogue, layer.rprelu
    layer.set_parts(ActivationQuantizer(layer.in_features), replace(layer.epilogue, accumulator=None), layer.rprelu)
    try:
        yield
    finally:
        layer.set_parts(*parts)


def _as_they_are(module: nn.Module, arguments: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """As a hook: probabilities that are not quantized, in units of one."""
    return arguments[0], torch.ones_like(output[1])


def _inputs(
    model: nn.Module,
    layers: dict[str, BinaryLinear],
    attentions: dict[str, BinaryProbabilities],
    batches: Sequence[dict[str, Any]],
) -> dict[str, list[Tensor]]:
    """A sample of the tokens that each layer is given, and of the rows of each attention."""
    watched: dict[str, nn.Module] = {**layers, **attentions}
    seen: dict[str, list[Tensor]] = {name: [] for name in watched}
    share = max(1, TOKENS // len(batches))

    def watch(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            tokens = arguments[0].detach().flatten(0, -2)
            seen[name].append(tokens[:: -(-len(tokens) // share)].float().cpu())

        return hook

    with ExitStack() as stack:
        for layer in layers.values():
            stack.enter_context(_without_shift(layer))
            stack.enter_context(_as_float(layer))
        for attention in attentions.values():
            stack.callback(attention.register_forward_hook(_as_they_are).remove)
        for name, module in watched.items():
            stack.callback(module.register_forward_pre_hook(watch(name)).remove)
        stack.enter_context(evaluating(model))
        stack.enter_context(soft_evaluation(model))
        stack.enter_context(torch.no_grad())
        for batch in batches:
            model(**batch)
    return seen
