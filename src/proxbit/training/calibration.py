"""Calibration: where the quantizers of activations and attention of a latent model start, seen from a few batches."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import default_data_collator

from proxbit.errors import ConfigError, ModelStateError
from proxbit.nn import ActivationQuantizer, BinaryLinear, BinaryProbabilities, evaluating, soft_evaluation
from proxbit.patching import state_of

__all__ = ["BATCHES", "calibrate"]

# Batches that are looked at before training.
BATCHES = 4
# Tokens a layer is shown. Means over more of them do not differ by what matters.
TOKENS = 8192


def calibrate(model: nn.Module, data: Iterable[Any], *, batches: int = BATCHES, batch_size: int = 16) -> nn.Module:
    """Set thresholds, steps and scales of quantizers from a few batches, which run with float activations.

    The threshold of a sign is the mean of its channel, and the bias takes over what that mean contributed; scales,
    those of probabilities too, and steps are least-squares or LSQ's. `ProxConnectTrainer` does this by itself before a
    first training.

    Args:
        model: a latent model; changed in place.
        data: batches (dicts of keyword arguments, or tensors), such as a DataLoader, or one of them; or a map-style
            dataset, from whose examples batches are made.
        batches: how many to look at, >= 1.
        batch_size: of batches that are made.

    Returns:
        The same model.

    Raises:
        ModelStateError: if the model is not latent.
        ConfigError: if `data` is empty, or a layer was not reached.
    """
    if state_of(model) != "latent":
        raise ModelStateError(f"calibrate takes a latent model, this one is {state_of(model)}.")
    for name, number in {"batches": batches, "batch_size": batch_size}.items():
        if not isinstance(number, int) or number < 1:
            raise ConfigError(f"{name} must be a whole number, at least 1, not {number!r}.")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BinaryLinear)}
    layers = {name: layer for name, layer in layers.items() if layer.activation.learns}
    attentions = {name: module for name, module in model.named_modules() if isinstance(module, BinaryProbabilities)}
    if not layers and not attentions:
        return model
    seen = _inputs(model, layers, attentions, islice(_batches(data, batch_size), batches), batches)
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
    return model


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


def _batches(data: Iterable[Any], batch_size: int) -> Iterator[dict[str, Any]]:
    if isinstance(data, Tensor | Mapping):
        data = [data]
    elif isinstance(data, Dataset) or (hasattr(data, "__getitem__") and not isinstance(data, list | tuple)):
        data = DataLoader(data, batch_size=batch_size, collate_fn=_collate)  # type: ignore[arg-type]
    if not isinstance(data, Iterable):
        raise ConfigError(f"calibrate takes batches, or a dataset, not {data!r}.")
    for batch in data:
        if isinstance(batch, Tensor):
            batch = {"pixel_values": batch}
        if not isinstance(batch, Mapping):
            raise ConfigError(
                "calibrate: a batch is a dictionary of what the model takes, as {'pixel_values': ...}, or a tensor of "
                f"pictures, not a {type(batch).__name__}."
            )
        lengths = [len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim]
        if not lengths or 0 in lengths:
            found = {key: getattr(value, "shape", type(value).__name__) for key, value in batch.items()}
            raise ConfigError(f"calibrate: a batch holds tensors with at least one example, not {found}.")
        yield dict(batch)


def _collate(examples: list[Any]) -> Any:
    for example in examples:
        if not isinstance(example, Mapping):
            raise ConfigError(
                "calibrate: an example is a dictionary of what the model takes, as {'pixel_values': ...}, not a "
                f"{type(example).__name__}."
            )
    return default_data_collator(examples)


@contextmanager
def _as_float(layer: BinaryLinear) -> Iterator[None]:
    """Within the context, the layer multiplies its input as it is."""
    name, before, accumulator = layer.activations, layer.activation, layer.accumulator
    layer.accumulator = None
    layer.set_activation("float", ActivationQuantizer(layer.in_features))
    try:
        yield
    finally:
        layer.set_activation(name, before)
        layer.accumulator = accumulator


def _as_they_are(module: nn.Module, arguments: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """As a hook: probabilities that are not quantized, in units of one."""
    return arguments[0], torch.ones_like(output[1])


def _inputs(
    model: nn.Module,
    layers: dict[str, BinaryLinear],
    attentions: dict[str, BinaryProbabilities],
    batches: Iterable[dict[str, Any]],
    count: int,
) -> dict[str, list[Tensor]]:
    """A sample of the tokens that each layer is given, and of the rows of each attention."""
    watched: dict[str, nn.Module] = {**layers, **attentions}
    seen: dict[str, list[Tensor]] = {name: [] for name in watched}
    share = max(1, TOKENS // count)

    def watch(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            tokens = arguments[0].detach().flatten(0, -2)
            seen[name].append(tokens[:: -(-len(tokens) // share)].float().cpu())

        return hook

    device = next(model.parameters()).device
    some = False
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
            some = True
            inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
            inputs.pop("labels", None)
            model(**inputs)
    if not some:
        raise ConfigError("There is nothing to calibrate with: the data is empty.")
    return seen
