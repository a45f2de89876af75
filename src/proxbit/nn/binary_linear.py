"""A linear layer with latent weights."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from proxbit.errors import ConfigError
from proxbit.kernels import pack_signs
from proxbit.nn.accumulators import Accumulator
from proxbit.nn.blockwise import linear
from proxbit.nn.latent import LatentWeight
from proxbit.nn.surroundings import Surroundings, add_offset, packed_product
from proxbit.quantizers import QuantizerPair, RowUnits

__all__ = ["BinaryLinear"]


class BinaryLinear(LatentWeight, Surroundings, nn.Linear):
    r"""An `nn.Linear` that computes with F_mu of its weight.

    Forward:
        y = A(x) w^T + bias,   w = a F_mu(W / s), see `quantizers.quantize`; A: see `nn.activations`
        and then, where asked for, RPReLU(y), and + x

    Without gradients and with the sign as F, activations that are no floats are multiplied as a packed layer does it,
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
        rprelu: whether an `RPReLU` follows.
        residual: whether the input is added to the output.
        accumulator: what the sums end in; None for registers that are wide enough. Offsets of rows go without.
        device: of the parameters.
        dtype: of the parameters.
    """

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
        rprelu: bool = False,
        residual: bool = False,
        accumulator: Accumulator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device=device, dtype=dtype)
        if accumulator is not None and center == "restore":
            raise ConfigError("center='restore' adds floats to the sums of whole numbers that an accumulator takes.")
        self.surround(activations, activation_pair, rprelu, residual, accumulator, device=device, dtype=dtype)
        self.init_latent(pair, RowUnits(normalize, scale, center))

    @classmethod
    def from_float(cls, layer: nn.Linear, pair: QuantizerPair, units: RowUnits, **options: Any) -> "BinaryLinear":
        """A latent layer that owns the parameters of `layer`; its weight becomes the latent weight."""
        sizes = layer.in_features, layer.out_features, layer.bias is not None
        new = cls(*sizes, pair=pair, device="meta", **(options | asdict(units)))
        kind: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        around = (new.activations, new.activation.pair, new.rprelu is not None, new.residual, new.accumulator)
        new.surround(*around, **kind)
        new.weight, new.bias = layer.weight, layer.bias
        return new.train(layer.training)

    def to_float(self) -> nn.Linear:
        """A plain linear layer whose weight is the hard one, plus and minus the row scale; activations are floats."""
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        with torch.no_grad():
            hard = self.effective_weight(hard=True)
        layer.weight = nn.Parameter(hard, requires_grad=self.weight.requires_grad)
        layer.bias = self.bias
        return self.without_surroundings(layer)

    def forward(self, input: Tensor) -> Tensor:
        if "activation" in self.waits and not self.is_hard:
            # The bias has what a calibrated activation takes off its input.
            shift = self.activation.shift
            shifted = input if shift is None else (input - shift).to(input.dtype)
            result = linear(shifted, self.effective_weight(), self.bias)
            self.overflow_share = self.overflow_penalty = None
        elif self.accumulator is not None:
            result = self._narrow(input)
        elif self.is_hard and self.pair.binary and self.activations != "float" and not torch.is_grad_enabled():
            values, scale, offset = self.hard_rows()
            weight = pack_signs(values)
            folded = self.activation.fold(scale, self.bias, weight)
            result = packed_product(self.activation, input, weight, folded)
            if offset is not None:
                result = add_offset(result, self.activation(input), offset)
        elif self.activations == "float":
            result = linear(input, self.effective_weight(), self.bias)
        else:
            result = self.activation.times(input, self.effective_weight(), self.bias, self.is_hard)
        return self.finish(result, input)

    def _narrow(self, input: Tensor) -> Tensor:
        """With sums that end in the accumulator: of codes times F in units of the row scale, +-1 where F is hard."""
        scale = self.hard_rows().scale
        codes, unit = self.activation.parts(input, self.is_hard)
        # fp32 holds whole numbers up to 2^24.
        dtype = torch.promote_types(codes.dtype, torch.float32)
        with torch.autocast(input.device.type, enabled=False):
            signs = self.effective_weight().to(dtype) / scale.to(dtype)[:, None]
            sums = nn.functional.linear(codes.to(dtype), signs)
            return self.accumulated(sums, unit.to(dtype), scale, self.bias).to(input.dtype)

    def extra_repr(self) -> str:
        return nn.Linear.extra_repr(self) + self.describe_surroundings()
