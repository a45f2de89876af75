"""What is around the product of a binarized linear layer, latent or packed, and that product on packed weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from proxbit.errors import ConfigError, ModelStateError
from proxbit.kernels import linear_w1, linear_w1a1, linear_w1a8
from proxbit.nn.activations import ActivationQuantizer, Folded, make_activation
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
    scale, bias, threshold = folded
    rest = () if threshold is None else (threshold,)
    return _OPS[activation.kernel](activation.prepare(input), weight, scale, bias, *rest, **fused)


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
    """

    activation: ActivationQuantizer
    rprelu: RPReLU | None
    residual: bool

    def surround(
        self,
        activations: str,
        activation_pair: QuantizerPair | None,
        rprelu: bool,
        residual: bool,
        **kind: Any,
    ) -> None:
        """Set them, on a device and of a dtype.

        Raises:
            ConfigError: for a format of activations that does not exist, or a residual where the layer is not square.
        """
        columns, rows = int(self.in_features), int(self.out_features)  # type: ignore[arg-type]
        if residual and columns != rows:
            raise ConfigError(f"A residual needs as many outputs as inputs; this layer has {columns} and {rows}.")
        self.set_activation(activations, make_activation(activations, columns, activation_pair, **kind))
        self.rprelu = RPReLU(rows, **kind) if rprelu else None
        self.residual = residual

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

    def finish(self, result: Tensor, input: Tensor) -> Tensor:
        """The output, from the product and the input."""
        if self.rprelu is not None:
            result = self.rprelu(result)
        return result + input if self.residual else result

    def without_surroundings(self, layer: nn.Linear) -> nn.Linear:
        """A plain layer that does the same, of one that has the right weight and bias.

        Raises:
            ModelStateError: for an RPReLU, which no plain layer computes.
        """
        if self.rprelu is not None:
            raise ModelStateError("A layer with an RPReLU has no plain linear layer that computes the same.")
        if self.residual:
            layer.weight.data = layer.weight.data + torch.eye(layer.in_features).to(layer.weight)
        return layer.train(self.training)

    def describe_surroundings(self) -> str:
        """As a part of `extra_repr`; empty for a plain layer."""
        parts = {
            f"activations={self.activations!r}": self.activations != "float",
            "residual=True": self.residual,
        }
        return "".join(f", {part}" for part, present in parts.items() if present)
