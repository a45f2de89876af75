"""A linear layer with latent weights."""

from typing import Any

import torch
from torch import Tensor, nn

from proxbit.errors import ConfigError
from proxbit.kernels import pack_signs
from proxbit.nn.epilogue import Epilogue
from proxbit.nn.latent import LatentWeight
from proxbit.nn.packed import add_offset, packed_product
from proxbit.nn.recompute import linear
from proxbit.quantizers import QuantizerPair, RowUnits

__all__ = ["BinaryLinear"]


class BinaryLinear(LatentWeight, nn.Linear):
    r"""An `nn.Linear` that computes with F_mu of its weight.

    Forward:
        y = A(x) w^T + bias,   w = a F_mu(W / s), see `quantizers.quantize`; A: see `nn.activations`
        and then the epilogue, see `nn.Epilogue`

    Without gradients and with the sign as F, quantized activations are multiplied by the operators of packed layers,
    with the same rounding.

    Args:
        in_features: `I`.
        out_features: `O`.
        bias: whether there is a bias, `[O]`.
        pair: forward and backward quantizer.
        normalize: "row", "tensor", "std" or "none".
        scale: "ls" or "fixed".
        center: "none", "remove" or "restore".
        activations: a key of `ACTIVATIONS`.
        activation_pair: forward and backward quantizer of activations with two levels.
        epilogue: what follows the product; None for nothing.
        device: of the parameters.
        dtype: of the parameters.
    """

    float_class = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        pair: QuantizerPair,
        normalize: str = "row",
        scale: str = "ls",
        center: str = "none",
        activations: str = "float",
        activation_pair: QuantizerPair | None = None,
        epilogue: Epilogue | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if epilogue is not None and epilogue.accumulator is not None and center == "restore":
            raise ConfigError("center='restore' adds floats to the sums of whole numbers that an accumulator takes.")
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(in_features, out_features, bias, pair=pair, units=RowUnits(normalize, scale, center), **kind)
        self.make_parts(in_features, out_features, activations, activation_pair, epilogue, **kind)

    def forward(self, input: Tensor) -> Tensor:
        if "activation" in self.waits and not self.is_hard:
            # The bias has what a calibrated activation takes off its input.
            shift = self.activation.shift
            shifted = input if shift is None else (input - shift).to(input.dtype)
            result = linear(shifted, self.forward_weight(), self.bias)
            self.overflow = None
        elif self.epilogue.accumulator is not None:
            result = self._accumulated(input)
        elif self.is_hard and self.pair.binary and self.activations != "float" and not torch.is_grad_enabled():
            values, scale, offset = self.hard_rows()
            weight = pack_signs(values)
            folded = self.activation.fold(scale, self.bias, weight)
            result = add_offset(packed_product(self.activation, input, weight, folded), self.activation, input, offset)
        else:
            result = self.activation.linear(input, self.forward_weight(), self.bias, self.is_hard)
        return self.epilogue(result, input, self.rprelu)

    def _accumulated(self, input: Tensor) -> Tensor:
        """With sums that end in the accumulator: of codes times F in units of the row scale, +-1 where F is hard."""
        scale = self.hard_rows().scale
        codes, unit = self.activation.parts(input, self.is_hard)
        # fp32 holds whole numbers up to 2^24.
        dtype = torch.promote_types(codes.dtype, torch.float32)
        with torch.autocast(input.device.type, enabled=False):
            signs = self.effective_weight().to(dtype) / scale.to(dtype)[:, None]
            sums = nn.functional.linear(codes.to(dtype), signs)
            result, self.overflow = self.epilogue.accumulate(sums, unit.to(dtype), scale, self.bias)
        return result.to(input.dtype)

    def extra_repr(self) -> str:
        return nn.Linear.extra_repr(self) + self.describe_parts()
