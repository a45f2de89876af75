"""A 2-D convolution with packed 1-bit weights."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from proxbit.nn.layer import geometry_of
from proxbit.nn.packed import PackedWeight

__all__ = ["PackedConv2d"]


class PackedConv2d(PackedWeight):
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
    """

    float_class = nn.Conv2d
    conv: nn.Conv2d

    def __init__(
        self,
        bias: bool = True,
        *,
        offset: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **arguments: Any,
    ) -> None:
        # A convolution without a weight, so that padding modes stay the business of nn.Conv2d.
        conv = nn.Conv2d(bias=False, device="meta", **arguments)
        shape = conv.weight.shape
        conv.register_parameter("weight", None)
        super().__init__(shape[0], math.prod(shape[1:]), bias, offset, device, dtype)
        self.weight_shape = shape
        # No submodule: transformers initialises every nn.Conv2d that it finds.
        self.__dict__["conv"] = conv
        for name, value in geometry_of(conv, nn.Conv2d).items():  # MobileNets read them to pad by themselves.
            setattr(self, name, value)
        self.make_parts(conv.in_channels, conv.out_channels)

    @property
    def weight(self) -> Tensor:
        """The float weight, `[out_channels, in / groups, kh, kw]`, expanded at each access.

        While the buffer has no data yet (the meta device), it is the buffer itself, for whoever is about to fill it.
        """
        return self.bits if self.bits.is_meta else self.unpacked_weight().view(self.weight_shape)

    def one_bit_weight(self) -> nn.Parameter:
        return nn.Parameter(self.weight)

    @property
    def kernel(self) -> str:
        """The name of the kernel that runs this layer."""
        return "expand + conv2d"

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight.to(input.dtype)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        result: Tensor = self.conv._conv_forward(input, weight, bias)
        return self.epilogue(result, input, self.rprelu)
