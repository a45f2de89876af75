"""Packed weights: what `PackedLinear` and `PackedConv2d` share, and the product of activations and packed weights."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from proxbit.kernels import linear_w1, linear_w1a1, linear_w1a8, pack_signs, unpack_weight
from proxbit.nn.activation_quantizer import ActivationQuantizer, Folded
from proxbit.nn.latent import LatentWeight
from proxbit.nn.layer import BinaryLayer, geometry_of
from proxbit.packing import check_packed, packed_columns

__all__ = ["PackedWeight", "add_offset", "packed_product"]

_OPS: dict[str, Callable[..., Tensor]] = {"float": linear_w1, "int8": linear_w1a8, "sign": linear_w1a1}


def packed_product(
    activation: ActivationQuantizer, input: Tensor, weight: Tensor, folded: Folded, **fused: Any
) -> Tensor:
    """The product of the quantized input and a packed weight, on the operator of `activation.kernel`.

    Args:
        activation: of the layer.
        input: `[..., I]`.
        weight: `[O, ceil(I / 8)]`, uint8.
        folded: what `activation.fold` gave.
        **fused: gelu and norm, as the operators take them.

    Returns:
        `[..., O]`, dtype of the input.
    """
    scale, bias, levels = folded
    rest = () if levels is None else (levels,)
    return _OPS[activation.kernel](input, weight, scale, bias, *rest, **fused)


def add_offset(result: Tensor, activation: ActivationQuantizer, input: Tensor, offset: Tensor | None) -> Tensor:
    """A product, and what the offsets of the rows of its weight add to it.

    Args:
        result: `[..., O]`.
        activation: of the layer.
        input: `[..., I]`.
        offset: `[O]` or None.
    """
    if offset is None:
        return result
    # One offset for a whole row needs the sum of the inputs only, in the precision of the op.
    values = activation(input)
    wide = torch.promote_types(values.dtype, torch.float32)
    total: Tensor = values.sum(dim=-1, keepdim=True, dtype=wide)
    return (result + total * offset.to(wide)).to(result.dtype)


class PackedWeight(BinaryLayer):
    """A layer that holds one bit a weight. It cannot be trained.

    Args:
        rows: `O`.
        columns: bits a row.
        bias: whether there is a bias, `[O]`.
        offset: whether the levels are offset - scale and offset + scale, with one offset a row.
        device: of the buffers and the bias.
        dtype: of the scales, the offsets and the bias.

    Attributes:
        bits: the packed weight, `[O, ceil(columns / 8)]`, uint8, see `packing.layout`. Its key in checkpoints is
            `weight`, as that of the float weight, so that a program without the plug-in meets a size error and never a
            silently random layer.
        weight_scale: `[O]`.
        weight_offset: `[O]` or None.
    """

    weight_scale: Tensor
    weight_offset: Tensor | None
    bias: Tensor | None

    def __init__(
        self, rows: int, columns: int, bias: bool, offset: bool, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.columns = columns
        self._buffers["weight"] = torch.zeros(rows, packed_columns(columns), dtype=torch.uint8, device=device)
        self.weight_scale = nn.Buffer(torch.ones(rows, device=device, dtype=dtype))
        self.register_buffer("weight_offset", torch.zeros(rows, device=device, dtype=dtype) if offset else None)
        self.bias = nn.Parameter(torch.zeros(rows, device=device, dtype=dtype)) if bias else None

    @classmethod
    def like(cls, layer: nn.Module, offset: bool, **options: Any) -> Self:
        """A packed layer without data (on the meta device), of the shape and the dtype of another layer."""
        assert isinstance(layer.weight, Tensor)
        kind: dict[str, Any] = {"device": "meta", "dtype": layer.weight.dtype, "bias": layer.bias is not None}
        return cls(offset=offset, **geometry_of(layer, cls.float_class), **kind, **options)

    @classmethod
    def from_latent(cls, layer: LatentWeight) -> Self:
        """Pack a latent layer; bias, input quantizer and epilogue are shared with it."""
        new = cls.like(layer, layer.units.has_offset)
        if not layer.weight.is_meta:
            values, new.weight_scale, new.weight_offset = layer.hard_rows()
            new._buffers["weight"] = pack_signs(values)
        new.bias = layer.bias  # type: ignore[assignment]
        new.set_parts(layer.activation, layer.epilogue, layer.rprelu)
        return new.train(layer.training)

    @property
    def bits(self) -> Tensor:
        packed = self._buffers["weight"]
        assert packed is not None
        return packed

    def check_packed(self, name: str) -> None:
        """Raise PackedFormatError if the buffers break the format."""
        check_packed(self.bits, self.weight_scale, self.columns, name, self.weight_offset)

    def unpacked_weight(self) -> Tensor:
        """The weight that the bits stand for, `[O, columns]`, dtype of the scales."""
        weight = unpack_weight(self.bits, self.weight_scale, self.columns)
        return weight if self.weight_offset is None else weight + self.weight_offset[:, None]
