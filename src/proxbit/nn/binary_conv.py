"""A 2-D convolution with latent weights."""

from typing import Any

from torch import Tensor, nn

from proxbit.nn.latent import LatentWeight
from proxbit.quantizers import QuantizerPair, RowUnits

__all__ = ["BinaryConv2d"]


class BinaryConv2d(LatentWeight, nn.Conv2d):
    r"""An `nn.Conv2d` that computes with F_mu of its weight; a row is an output channel, `[in / groups, kh, kw]`.

    Args:
        pair: forward and backward quantizer.
        normalize: "row", "tensor", "std" or "none".
        scale: "ls" or "fixed".
        center: "none", "remove" or "restore".
        **arguments: those of `nn.Conv2d`.
    """

    float_class = nn.Conv2d

    def __init__(
        self, *, pair: QuantizerPair, normalize: str = "row", scale: str = "ls", center: str = "none", **arguments: Any
    ) -> None:
        super().__init__(pair=pair, units=RowUnits(normalize, scale, center), **arguments)
        self.make_parts(self.in_channels, self.out_channels)

    def forward(self, input: Tensor) -> Tensor:
        if self.bias is not None and self.bias.dtype != self.weight.dtype:
            # Models cast images to the dtype of the weight, here the latent one.
            input = input.to(self.bias.dtype)
        result: Tensor = self._conv_forward(input, self.effective_weight().to(input.dtype), self.bias)
        return self.epilogue(result, input, self.rprelu)
