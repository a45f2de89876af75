"""A 2-D convolution with latent weights."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from proxbit.nn.latent import LatentWeight
from proxbit.quantizers import QuantizerPair, RowUnits

__all__ = ["BinaryConv2d", "conv_arguments"]


def conv_arguments(layer: "nn.Conv2d | Any") -> dict[str, Any]:
    """The arguments that make a convolution of the same geometry as `layer`."""
    return {
        "in_channels": layer.in_channels,
        "out_channels": layer.out_channels,
        "kernel_size": layer.kernel_size,
        "stride": layer.stride,
        "padding": layer.padding,
        "dilation": layer.dilation,
        "groups": layer.groups,
        "padding_mode": layer.padding_mode,
    }


class BinaryConv2d(LatentWeight, nn.Conv2d):
    r"""An `nn.Conv2d` that computes with F_mu of its weight; a row is an output channel, `[in / groups, kh, kw]`.

    Args:
        pair: forward and backward quantizer.
        normalize: "row", "tensor", "std" or "none".
        scale: "ls" or "fixed".
        center: "none", "remove" or "restore".
        **arguments: those of `nn.Conv2d`.
    """

    def __init__(
        self, *, pair: QuantizerPair, normalize: str = "row", scale: str = "ls", center: str = "none", **arguments: Any
    ) -> None:
        nn.Conv2d.__init__(self, **arguments)
        self.init_latent(pair, RowUnits(normalize, scale, center))

    @classmethod
    def from_float(cls, layer: nn.Conv2d, pair: QuantizerPair, units: RowUnits) -> "BinaryConv2d":
        """A latent layer that owns the parameters of `layer`; its weight becomes the latent weight."""
        bias = layer.bias is not None
        new = cls(pair=pair, bias=bias, device="meta", **asdict(units), **conv_arguments(layer))
        new.weight, new.bias = layer.weight, layer.bias
        return new.train(layer.training)

    def to_float(self) -> nn.Conv2d:
        """A plain convolution whose weight is the hard one, plus and minus the scale of its output channel."""
        layer = nn.Conv2d(bias=self.bias is not None, device="meta", **conv_arguments(self))
        with torch.no_grad():
            hard = self.effective_weight(hard=True)
        layer.weight = nn.Parameter(hard, requires_grad=self.weight.requires_grad)
        layer.bias = self.bias
        return layer.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        if self.bias is not None and self.bias.dtype != self.weight.dtype:
            # Models bring images to the dtype of the weight, which is that of the latent.
            input = input.to(self.bias.dtype)
        result: Tensor = self._conv_forward(input, self.effective_weight().to(input.dtype), self.bias)
        return result
