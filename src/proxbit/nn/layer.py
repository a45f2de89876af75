"""The base class of all 1-bit layers: latent or packed, linear or convolutional."""

from typing import Any, ClassVar

import torch
from torch import nn

from proxbit.errors import ModelStateError
from proxbit.nn.activation_quantizer import ActivationQuantizer
from proxbit.nn.activations import make_activation
from proxbit.nn.epilogue import Epilogue, Overflow, RPReLU
from proxbit.quantizers import QuantizerPair

__all__ = ["BinaryLayer", "geometry_of"]

_GEOMETRY = {
    nn.Linear: ("in_features", "out_features"),
    nn.Conv2d: (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    ),
}


class BinaryLayer(nn.Module):
    """A layer with one bit a weight. It has an input quantizer and an epilogue; the product is in its subclasses.

    Attributes:
        float_class: the plain layer that it replaces.
        activation: quantizes the input.
        rprelu: of the epilogue, or None.
        epilogue: what follows the product.
        overflow: of the last forward pass; None without an accumulator.
    """

    float_class: ClassVar[type[nn.Linear] | type[nn.Conv2d]]
    activation: ActivationQuantizer
    rprelu: RPReLU | None
    epilogue: Epilogue
    overflow: Overflow | None

    def make_parts(
        self,
        columns: int,
        rows: int,
        activations: str = "float",
        activation_pair: QuantizerPair | None = None,
        epilogue: Epilogue | None = None,
        **kind: Any,
    ) -> None:
        """Make the input quantizer and the epilogue, on a device and of a dtype.

        Raises:
            ConfigError: for a format of activations that does not exist, or an epilogue that does not fit.
        """
        epilogue = epilogue or Epilogue()
        epilogue.check(columns, rows, activations)
        activation = make_activation(activations, columns, activation_pair, **kind)
        self.set_parts(activation, epilogue, RPReLU(rows, **kind) if epilogue.rprelu else None)

    def set_parts(self, activation: ActivationQuantizer, epilogue: Epilogue, rprelu: RPReLU | None) -> None:
        """Set the input quantizer and the epilogue."""
        self.set_activation(activation)
        self.epilogue, self.rprelu, self.overflow = epilogue, rprelu, None

    def set_activation(self, activation: ActivationQuantizer) -> None:
        """Set the input quantizer. It becomes a submodule only if it learns, which keeps lists of modules short."""
        self._modules.pop("activation", None)
        if activation.learns:
            self.activation = activation
        else:
            self.__dict__["activation"] = activation

    @property
    def activations(self) -> str:
        """The format of the activations, a key of `ACTIVATIONS`."""
        return self.activation.format

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts without the penalty, which belongs to the graph of a forward pass."""
        return {**self.__dict__, "overflow": self.overflow and self.overflow._replace(penalty=None)}

    def one_bit_weight(self) -> nn.Parameter:
        """A new parameter with the weight that is stored when packed: plus and minus the scale of the row."""
        raise NotImplementedError

    def to_float(self) -> Any:
        """A plain layer with that weight and without the input quantizer; it shares the bias where nothing changes it.

        Raises:
            ModelStateError: for an RPReLU, which no plain layer computes.
        """
        if self.rprelu is not None:
            raise ModelStateError("A layer with an RPReLU has no plain linear layer that computes the same.")
        layer = self.float_class(bias=self.bias is not None, device="meta", **geometry_of(self, self.float_class))
        layer.weight = self.one_bit_weight()
        layer.register_parameter("bias", self.bias)  # type: ignore[arg-type]
        shift = self.activation.shift
        if shift is not None and layer.bias is not None:
            # The bias made up for the shift, which the sign loses; a float layer loses nothing.
            taken = (layer.weight.detach().float() @ shift.float()).to(layer.bias.dtype)
            layer.bias = nn.Parameter(layer.bias.detach() - taken, requires_grad=layer.bias.requires_grad)
        if self.epilogue.residual:
            layer.weight.data = layer.weight.data + torch.eye(len(layer.weight)).to(layer.weight)
        return layer.train(self.training)

    def describe_parts(self) -> str:
        """Input quantizer and epilogue as a part of `extra_repr`; empty for a layer without."""
        parts = {
            f"activations={self.activations!r}": self.activations != "float",
            "residual=True": self.epilogue.residual,
            f"accumulator={self.epilogue.accumulator}": self.epilogue.accumulator is not None,
        }
        return "".join(f", {part}" for part, present in parts.items() if present)


def geometry_of(layer: nn.Module, kind: type[nn.Module]) -> dict[str, Any]:
    """The arguments that make a layer of a kind with the geometry of another one."""
    return {name: getattr(layer, name) for name in _GEOMETRY[kind]}
