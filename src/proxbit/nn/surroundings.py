"""What is around the product of a binarized linear layer, latent or packed, and that product on packed weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from proxbit.errors import ConfigError, ModelStateError
from proxbit.kernels import linear_w1, linear_w1a1, linear_w1a8
from proxbit.nn.accumulators import Accumulator
from proxbit.nn.activation_quantizer import ActivationQuantizer, Folded
from proxbit.nn.activations import make_activation
from proxbit.nn.rprelu import RPReLU
from proxbit.quantizers import QuantizerPair

__all__ = ["Surroundings", "add_offset", "packed_product"]

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


def add_offset(result: Tensor, values: Tensor, offset: Tensor | None) -> Tensor:
    """A product, and what the offsets of the rows of its weight add to it.

    Args:
        result: `[..., O]`.
        values: what was multiplied, `[..., I]`.
        offset: `[O]` or None.
    """
    if offset is None:
        return result
    # One offset for a whole row needs the sum of the inputs only, in the precision of the op.
    wide = torch.promote_types(values.dtype, torch.float32)
    total = values.sum(dim=-1, keepdim=True, dtype=wide)
    return (result + total * offset.to(wide)).to(result.dtype)


class Surroundings(nn.Module):
    """What is around the product of a binarized linear layer, latent or packed.

    Attributes:
        activation: what becomes of the input.
        rprelu: what becomes of the output, or None.
        residual: whether the input is added to what comes out.
        accumulator: what the sums end in; None for registers that are wide enough.
        overflow_share: the share of the sums of the last forward pass that did not fit; None without an accumulator.
        overflow_penalty: by how much they did not fit on average, with a gradient; likewise.
    """

    activation: ActivationQuantizer
    rprelu: RPReLU | None
    residual: bool
    accumulator: Accumulator | None
    overflow_share: Tensor | None
    overflow_penalty: Tensor | None

    def surround(
        self,
        activations: str,
        activation_pair: QuantizerPair | None,
        rprelu: bool,
        residual: bool,
        accumulator: Accumulator | None = None,
        **kind: Any,
    ) -> None:
        """Set them, on a device and of a dtype.

        Raises:
            ConfigError: for a format of activations that does not exist, or a residual where the layer is not square.
        """
        if accumulator is not None and activations == "float":
            raise ConfigError("An accumulator of few bits sums whole numbers: choose other activations than 'float'.")
        columns, rows = int(self.in_features), int(self.out_features)  # type: ignore[arg-type]
        if residual and columns != rows:
            raise ConfigError(f"A residual needs as many outputs as inputs; this layer has {columns} and {rows}.")
        self.set_activation(activations, make_activation(activations, columns, activation_pair, **kind))
        self.rprelu = RPReLU(rows, **kind) if rprelu else None
        self.residual = residual
        self.accumulator, self.overflow_share, self.overflow_penalty = accumulator, None, None

    def set_activation(self, activations: str, activation: ActivationQuantizer) -> None:
        """Set the activation quantizer and its name. One that learns nothing is no submodule: it would be noise."""
        self.activations = activations
        self._modules.pop("activation", None)
        if activation.learns:
            self.activation = activation
        else:
            self.__dict__["activation"] = activation

    def take_surroundings(self, other: "Surroundings") -> None:
        """Use those of another layer."""
        self.set_activation(other.activations, other.activation)
        self.rprelu, self.residual = other.rprelu, other.residual
        self.accumulator, self.overflow_share, self.overflow_penalty = other.accumulator, None, None

    def accumulated(self, sums: Tensor, unit: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """The product, from sums of whole numbers that the accumulator may not hold.

        Args:
            sums: of codes and signs, `[..., O]`.
            unit: of the codes, one number or `[..., 1]`.
            scale: of the weights, `[O]`.
            bias: `[O]` or None.
        """
        assert self.accumulator is not None
        self.overflow_share = self.accumulator.overflows(sums.detach())
        self.overflow_penalty = self.accumulator.penalty(sums) if torch.is_grad_enabled() else None
        result = self.accumulator(sums) * (unit * scale.to(sums.dtype))
        return result if bias is None else result + bias.to(sums.dtype)

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts without the penalty, which belongs to the graph of a forward pass."""
        return {**self.__dict__, "overflow_penalty": None}

    def finish(self, result: Tensor, input: Tensor) -> Tensor:
        """The output, from the product and the input."""
        if self.rprelu is not None:
            result = self.rprelu(result)
        result = result + input if self.residual else result
        # What is learned is in single precision, also in a model of half; autocast sees to dtypes itself.
        kind = input.device.type
        cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        return result if cast else result.to(input.dtype)

    def without_surroundings(self, layer: nn.Linear) -> nn.Linear:
        """A plain layer that does the same, of one that has the right weight and bias.

        Raises:
            ModelStateError: for an RPReLU, which no plain layer computes.
        """
        if self.rprelu is not None:
            raise ModelStateError("A layer with an RPReLU has no plain linear layer that computes the same.")
        shift = self.activation.shift
        if shift is not None and layer.bias is not None:
            # The sign forgot it, and the bias has made up for that; a float layer forgets nothing.
            taken = (layer.weight.detach().float() @ shift.float()).to(layer.bias.dtype)
            layer.bias = nn.Parameter(layer.bias.detach() - taken, requires_grad=layer.bias.requires_grad)
        if self.residual:
            layer.weight.data = layer.weight.data + torch.eye(layer.in_features).to(layer.weight)
        return layer.train(self.training)

    def describe_surroundings(self) -> str:
        """As a part of `extra_repr`; empty for a plain layer."""
        parts = {
            f"activations={self.activations!r}": self.activations != "float",
            "residual=True": self.residual,
            f"accumulator={self.accumulator}": self.accumulator is not None,
        }
        return "".join(f", {part}" for part, present in parts.items() if present)
