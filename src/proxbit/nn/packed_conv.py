"""A 2-D convolution with packed 1-bit weights."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from proxbit.kernels import pack_signs, unpack_weight
from proxbit.nn.binary_conv import BinaryConv2d, conv_arguments
from proxbit.packing import check_packed, packed_columns

__all__ = ["PackedConv2d"]


class PackedConv2d(nn.Module):
    """A convolution that holds one bit a weight and expands them for each call. It cannot be trained.

    Args:
        bias: whether there is a bias, `[out_channels]`.
        offset: whether the levels are offset - scale and offset + scale, with one offset an output channel.
        device: of the buffers and the bias.
        dtype: of the scales, the offsets and the bias.
        **arguments: the geometry, as in `nn.Conv2d`.

    Attributes:
        weight: in the checkpoint, `[out_channels, ceil(in / groups * kh * kw / 8)]`, uint8. Read as an attribute, it is
            the float weight those bits stand for: vision models cast their pixels to `projection.weight.dtype`.
        weight_scale: `[out_channels]`.
        weight_offset: `[out_channels]` or None.
        bias: `[out_channels]` or None.
    """

    geometry: nn.Conv2d
    weight_scale: Tensor
    weight_offset: Tensor | None

    def __init__(
        self,
        bias: bool = True,
        *,
        offset: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__()
        # The geometry is a convolution without data, so that padding modes stay the business of nn.Conv2d. It is no
        # submodule: transformers initialises every nn.Conv2d that it finds.
        geometry = nn.Conv2d(bias=False, device="meta", **arguments)
        self.weight_shape = geometry.weight.shape
        geometry.register_parameter("weight", None)
        self.__dict__["geometry"] = geometry
        for name, value in conv_arguments(geometry).items():  # MobileNets look at them to pad by themselves.
            setattr(self, name, value)
        rows, width = self.weight_shape[0], packed_columns(self.columns)
        self._buffers["weight"] = torch.zeros(rows, width, dtype=torch.uint8, device=device)
        self.weight_scale = nn.Buffer(torch.ones(rows, device=device, dtype=dtype))
        self.register_buffer("weight_offset", torch.zeros(rows, device=device, dtype=dtype) if offset else None)
        self.bias: Tensor | None = nn.Parameter(torch.zeros(rows, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_latent(cls, layer: BinaryConv2d) -> "PackedConv2d":
        """Pack a latent layer; the bias is shared with it."""
        new = cls(
            bias=layer.bias is not None,
            offset=layer.units.has_offset,
            device="meta",
            dtype=layer.weight.dtype,
            **conv_arguments(layer),
        )
        if not layer.weight.is_meta:
            values, new.weight_scale, new.weight_offset = layer.hard_rows()
            new._buffers["weight"] = pack_signs(values)
        new.bias = layer.bias
        return new.train(layer.training)

    @property
    def columns(self) -> int:
        """Bits a row."""
        return math.prod(self.weight_shape[1:])

    def check_packed(self, name: str) -> None:
        """Raise PackedFormatError if the buffers break the format."""
        check_packed(self.bits, self.weight_scale, self.columns, name, self.weight_offset)

    @property
    def bits(self) -> Tensor:
        """The packed weight, uint8."""
        packed = self._buffers["weight"]
        assert packed is not None
        return packed

    @property
    def weight(self) -> Tensor:
        """The float weight, `[out_channels, in / groups, kh, kw]`, expanded at each access.

        While the buffer has no data yet (the meta device), it is the buffer itself, for whoever is about to fill it.
        """
        if self.bits.is_meta:
            return self.bits
        weight = unpack_weight(self.bits, self.weight_scale, self.columns)
        if self.weight_offset is not None:
            weight = weight + self.weight_offset[:, None]
        return weight.view(self.weight_shape)

    def to_float(self) -> nn.Conv2d:
        """A plain convolution whose weight is plus and minus the scale of its output channel."""
        layer = nn.Conv2d(bias=self.bias is not None, device="meta", **conv_arguments(self.geometry))
        layer.weight = nn.Parameter(self.weight)
        layer.bias = self.bias
        return layer.train(self.training)

    @property
    def kernel(self) -> str:
        """The name of the kernel that runs this layer."""
        return "expand + conv2d"

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight.to(input.dtype)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        result: Tensor = self.geometry._conv_forward(input, weight, bias)
        return result
