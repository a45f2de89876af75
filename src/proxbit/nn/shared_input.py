"""Packed layers that are given the same input, computed in one call: queries, keys and values of an attention."""

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from proxbit.errors import ConfigError
from proxbit.kernels import version_of
from proxbit.nn.activation_quantizer import Folded
from proxbit.nn.cache import TensorCache
from proxbit.nn.packed import packed_product
from proxbit.nn.packed_linear import PackedLinear

__all__ = ["SharedInput"]


class SharedInput:
    """One call for several packed layers: the input is read, rounded and made into tables once.

    The first layer computes for all of them. The others return the result that it left when they are called next with
    the same tensor, in the same thread; called with anything else, or after an in-place change, they compute alone.
    In-place changes of a tensor made in inference mode go unseen: it has no version counter.

    Args:
        layers: in the order in which they are called; of one input width and one format of activations that learns
            nothing, all or none of them with a bias, with nothing around their product.

    Raises:
        ConfigError: if the layers cannot be computed together.
    """

    def __init__(self, layers: Sequence[PackedLinear]) -> None:
        if not self.fits(layers):
            raise ConfigError(
                "Layers that share an input have the same width, activations and bias, and nothing learned around them."
            )
        self.layers = list(layers)
        self._joined: TensorCache[tuple[Tensor, Folded]] = TensorCache()
        self._left: dict[int, tuple[weakref.ref[Tensor], int | None, dict[int, Tensor]]] = {}

    @staticmethod
    def fits(layers: Sequence[PackedLinear]) -> bool:
        """Whether the layers can be computed together."""
        kinds = {(layer.in_features, layer.activations, layer.bias is None, layer.gelu, layer.norm) for layer in layers}
        bare = all(layer.is_bare and not layer.activation.learns for layer in layers)
        return len(layers) > 1 and len(kinds) == 1 and bare

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts without results."""
        return {**self.__dict__, "_left": {}}

    def _join(self) -> tuple[Tensor, Folded]:
        """Weight, scale and bias of all layers."""
        biases: list[Tensor] = [layer.bias for layer in self.layers if layer.bias is not None]
        scale = torch.cat([layer.weight_scale for layer in self.layers])
        weight = torch.cat([layer.weight for layer in self.layers])
        return weight, Folded(scale, torch.cat(biases) if biases else None)

    def __call__(self, layer: PackedLinear, input: Tensor) -> Tensor:
        """The output of one of the layers.

        Args:
            layer: one of `layers`.
            input: `[..., I]`.
        """
        thread = threading.get_ident()
        extras = {"gelu": layer.gelu, "norm": layer.norm() if layer.norm is not None else None}
        if layer is not self.layers[0]:
            left = self._left.get(thread)
            if left is not None and left[0]() is input and left[1] == version_of(input) and id(layer) in left[2]:
                return left[2].pop(id(layer))
            return packed_product(layer.activation, input, layer.weight, layer.folded(), **extras)
        sizes = [each.out_features for each in self.layers]
        tensors = (t for each in self.layers for t in (each.weight, each.weight_scale, each.bias))
        weight, folded = self._joined(tensors, self._join)
        joined = packed_product(layer.activation, input, weight, folded, **extras)
        parts: Sequence[Tensor] = joined.split(sizes, dim=-1)
        self._left[thread] = (
            weakref.ref(input),
            version_of(input),
            {id(each): part for each, part in zip(self.layers[1:], parts[1:], strict=True)},
        )
        return parts[0]
