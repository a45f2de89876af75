"""1-bit layers inside the adapters of PEFT: what an adapter may not do to the weight of the layer it stands beside.

PEFT takes a latent layer for the linear layer or convolution that it is a subclass of, and adds to its weight in place.
Of that only the signs would be used. PEFT is not imported for this: each of its layers registers the one that it stands
beside as `base_layer`.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from proxbit.errors import ModelStateError
from proxbit.nn.binary_conv import BinaryConv2d
from proxbit.nn.latent import LatentWeight
from proxbit.nn.layer import BinaryLayer

__all__ = ["guard_adapter"]

_BASE = "base_layer"


def _one_bit(adapter: nn.Module) -> nn.Module | None:
    """The 1-bit layer inside an adapter, also where it has several around it; None if it is another."""
    layer: Any = adapter
    while isinstance(layer, nn.Module) and _BASE in layer._modules:
        layer = layer._modules[_BASE]
    return layer if isinstance(layer, BinaryLayer) else None


def _refuse_merging(layer: nn.Module) -> None:
    kind, reason = "packed", "one bit a weight and one scale a row cannot hold what the adapter adds to each weight"
    if isinstance(layer, LatentWeight):
        kind, reason = "latent", "only the signs of its weight are used, which cannot hold what the adapter adds to it"
    raise ModelStateError(
        f"An adapter cannot be merged into a {kind} layer: {reason}. Keep it beside the {kind} model, or load it on "
        "the float one: PeftModel.from_pretrained(proxbit.dequantize(model), folder).merge_and_unload()."
    )


def merge(self: Any, *args: Any, **kwargs: Any) -> Any:
    """In the place of an adapter's own: refused while the layer inside is 1-bit."""
    if (layer := _one_bit(self)) is not None:
        _refuse_merging(layer)
    return type(self).merge(self, *args, **kwargs)


def unmerge(self: Any) -> Any:
    """In the place of an adapter's own: refused if it was merged before the layer inside became 1-bit."""
    if self.merged and (layer := _one_bit(self)) is not None:
        _refuse_merging(layer)
    return type(self).unmerge(self)


def update_layer(self: Any, *args: Any, **kwargs: Any) -> Any:
    """In the place of an adapter's own, which makes the adapter: refused if that changes, or needs, the float weight of
    a latent layer. The weight stays as it was.
    """
    layer = _one_bit(self)
    weight = layer.weight if isinstance(layer, LatentWeight) else None
    if isinstance(layer, BinaryConv2d) and hasattr(self, "lora_A"):
        raise ModelStateError(
            "LoRA makes its convolutions with the class of the layer, and a latent one is no plain convolution: take "
            "another adapter, as LoHaConfig, name linear layers alone, or call proxbit.dequantize(model) first."
        )
    before = None if weight is None or weight.is_meta else weight.detach().clone()
    result = type(self).update_layer(self, *args, **kwargs)
    if weight is None:
        return result
    if isinstance(before, Tensor) and not torch.equal(weight.data, before):
        weight.data = before
        start = getattr(kwargs.get("config"), "init_lora_weights", "this one")
        raise ModelStateError(
            f"An adapter that starts by changing the weight (init_lora_weights={start!r}) is for float layers: of a "
            "latent weight only the signs are used. Leave it at True, or choose 'gaussian' or 'orthogonal'; or call "
            "proxbit.dequantize(model) first."
        )
    if any(True for _ in getattr(self, "lora_magnitude_vector", ())):
        raise ModelStateError(
            "DoRA computes with the norms of the float weight, which a latent layer does not multiply with: leave "
            "use_dora=True out, or call proxbit.dequantize(model) first."
        )
    return result


def guard_adapter(adapter: nn.Module, name: str, layer: nn.Module | None) -> None:
    """A hook for each module that is put into another: an adapter around a 1-bit layer gets the methods above.

    Args:
        adapter: the module around.
        name: what it calls the other.
        layer: the module that it takes.
    """
    if name != _BASE or layer is None or not callable(getattr(type(adapter), "merge", None)):
        return
    # Each method asks what is inside when it is called: the layer may be dequantized, or become 1-bit, where it is.
    for method in (merge, unmerge, update_layer):
        if callable(getattr(type(adapter), method.__name__, None)):
            vars(adapter)[method.__name__] = MethodType(method, adapter)


register_module_module_registration_hook(guard_adapter)
