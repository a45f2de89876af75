"""The same model in several precisions, to be timed against each other."""

import copy
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic

from proxbit.config import BinarizationConfig
from proxbit.errors import ModelStateError
from proxbit.nn import BinaryLayer
from proxbit.patching import IMAGE_ERRORS, blank_image, packed_layers, state_of
from proxbit.plugin import binarize, dequantize, fuse, pack

__all__ = ["forward_calls", "fused_copy", "images", "variants"]


def int8_dynamic(model: nn.Module) -> nn.Module:
    """A copy of a float model whose linear layers torch.ao multiplies in int8, activations rounded at each call."""
    with warnings.catch_warnings():
        # It is on its way out of torch, and still the int8 that a user of torch has at hand.
        warnings.simplefilter("ignore")
        converted: nn.Module = quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    return converted


def fused_copy(model: nn.Module, config: BinarizationConfig | None = None) -> nn.Module:
    """A packed copy of a model, fused as far as it goes.

    Args:
        model: in any state.
        config: for a float model; the default is `BinarizationConfig()`. A latent or packed one has its own.
    """
    new = copy.deepcopy(model)
    if state_of(new) == "float":
        binarize(new, config)
    return fuse(new if state_of(new) == "packed" else pack(new))


def variants(model: nn.Module, configs: Sequence[BinarizationConfig] = ()) -> dict[str, nn.Module]:
    """A model as float, bf16, int8 dynamic and packed, by name; the float one first.

    Args:
        model: in any state; a latent or packed one is made float by its hard weights, without what is learned around
            its layers: it is there to be timed.
        configs: packed copies to make of a float model; none: one, with the default configuration.

    Returns:
        Models in evaluation mode. There is no "int8 dynamic" where this build of torch has no int8 operators.
    """
    model = copy.deepcopy(model).eval()
    if state_of(model) == "float":
        packed = [fused_copy(model, config) for config in configs or [BinarizationConfig()]]
        plain = model
    else:
        packed = [fused_copy(model)]
        plain = _plain(copy.deepcopy(model))
    plain = plain.float()
    made = {"float": plain, "bf16": copy.deepcopy(plain).bfloat16()}
    if any(engine != "none" for engine in torch.backends.quantized.supported_engines):
        made["int8 dynamic"] = int8_dynamic(plain)
    return made | {f"packed, {_activations(one)}": one for one in packed}


def _plain(model: nn.Module) -> nn.Module:
    """As a float model of this architecture would be."""
    for layer in model.modules():
        if isinstance(layer, BinaryLayer):
            layer.rprelu = None
    with warnings.catch_warnings():
        # That its outputs are others.
        warnings.simplefilter("ignore")
        return dequantize(model)


def _activations(model: nn.Module) -> str:
    return next((getattr(layer, "activations", "float") for _, layer in packed_layers(model)), "float")


def images(model: nn.Module, batch: int) -> dict[str, Tensor]:
    """Random images of the size in the model's configuration, as keyword arguments of a forward pass."""
    return {name: torch.randn(batch, *blank.shape[1:]) for name, blank in blank_image(model).items()}


def forward_calls(models: dict[str, nn.Module], batch: int) -> dict[str, Callable[[], object]]:
    """Forward passes of models on the same images, each in the model's own precision.

    Raises:
        ModelStateError: if a model does not take an image alone.
    """
    made = images(next(iter(models.values())), batch)
    calls = {name: _forward_call(model, made) for name, model in models.items()}
    try:
        next(iter(calls.values()))()
    except IMAGE_ERRORS as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ModelStateError(f"{type(next(iter(models.values()))).__name__} takes no image alone: {reason}") from error
    return calls


def _forward_call(model: nn.Module, made: dict[str, Tensor]) -> Callable[[], object]:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    inputs = {name: tensor.to(dtype) for name, tensor in made.items()}

    def call() -> object:
        with torch.inference_mode():
            return model(**inputs)

    return call
