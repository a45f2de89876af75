"""A linear layer with packed 1-bit weights."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from proxbit.errors import ConfigError, PackedFormatError
from proxbit.kernels import Norm, linear_kernel, linear_w1, pack_signs, unpack_weight
from proxbit.nn.accumulators import Accumulator
from proxbit.nn.activation_quantizer import Folded
from proxbit.nn.binary_linear import BinaryLinear
from proxbit.nn.kept import Kept
from proxbit.nn.surroundings import Surroundings, add_offset, packed_product
from proxbit.packing import check_packed, packed_columns

__all__ = ["PackedLinear"]


class PackedLinear(Surroundings):
    r"""A linear layer that holds one bit a weight. It cannot be trained; gradients flow through it to its input.

    Forward:
        y[..., o] = weight_scale[o] \sum_i (+-1)[o, i] a[..., i] + bias[o]  (+ weight_offset[o] \sum_i a[..., i])
        a = A(x): see `nn.activations`
        and then, where asked for, RPReLU(y), and + x

    Args:
        in_features: `I`.
        out_features: `O`.
        bias: whether there is a bias, `[O]`.
        offset: whether the levels are offset - scale and offset + scale, with one offset a row.
        activations: a key of `ACTIVATIONS`.
        rprelu: whether an `RPReLU` follows.
        residual: whether the input is added to the output.
        accumulator: what the sums end in; None for registers that are wide enough.
        device: of the buffers and the parameters.
        dtype: of the scales, the offsets and the parameters.

    Attributes:
        weight: `[O, ceil(I / 8)]`, uint8, see `packing.layout`. It keeps the key of the float weight, so that a
            program without the plug-in meets a size error and never a silently random layer.
        weight_scale: `[O]`.
        weight_offset: `[O]` or None.
        bias: `[O]` or None.
        gelu: the output is GELU(y); set by `fuse`.
        norm: normalizes the input first; set by `fuse`.
        shared: computes this layer together with others that are given the same input; set by `fuse`.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_offset: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        offset: bool = False,
        activations: str = "float",
        rprelu: bool = False,
        residual: bool = False,
        accumulator: Accumulator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if accumulator is not None and offset:
            raise ConfigError("center='restore' adds floats to the sums of whole numbers that an accumulator takes.")
        self.gelu = False
        self.norm: Callable[[], Norm] | None = None
        self.shared: Callable[[PackedLinear, Tensor], Tensor] | None = None
        self.in_features, self.out_features = in_features, out_features
        self.surround(activations, None, rprelu, residual, accumulator, device=device, dtype=dtype)
        width = packed_columns(in_features)
        self.weight = nn.Buffer(torch.zeros(out_features, width, dtype=torch.uint8, device=device))
        self.weight_scale = nn.Buffer(torch.ones(out_features, device=device, dtype=dtype))
        self.register_buffer("weight_offset", torch.zeros(out_features, device=device, dtype=dtype) if offset else None)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self._folded: Kept[Folded] = Kept()

    @classmethod
    def from_latent(cls, layer: BinaryLinear) -> "PackedLinear":
        """Pack a latent layer; bias, activation quantizer and RPReLU are shared with it."""
        new = cls(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            offset=layer.center == "restore",
            device="meta",
            dtype=layer.weight.dtype,
        )
        if not layer.weight.is_meta:
            values, new.weight_scale, new.weight_offset = layer.hard_rows()
            new.weight = pack_signs(values)
        new.bias = layer.bias
        new.take_surroundings(layer)
        return new.train(layer.training)

    @property
    def columns(self) -> int:
        """Bits a row."""
        return self.in_features

    def check_packed(self, name: str) -> None:
        """Raise PackedFormatError if the buffers break the format."""
        check_packed(self.weight, self.weight_scale, self.columns, name, self.weight_offset)

    def to_float(self) -> nn.Linear:
        """A plain linear layer with the weight that the bits stand for; its activations are floats."""
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        weight = unpack_weight(self.weight, self.weight_scale, self.columns)
        layer.weight = nn.Parameter(weight if self.weight_offset is None else weight + self.weight_offset[:, None])
        layer.register_parameter("bias", self.bias)
        return self.without_surroundings(layer)

    @property
    def kernel(self) -> str:
        """The name of the kernel that runs this layer."""
        name = linear_kernel(self.weight, self.weight_scale)
        extras = {self.activations: self.activations != "float", "norm": self.norm is not None, "gelu": self.gelu}
        return ", ".join([name, *(extra for extra, present in extras.items() if present)])

    @property
    def is_bare(self) -> bool:
        """Whether the operator is all there is to the layer, so that its neighbours can be fused into it."""
        around = (self.weight_offset, self.rprelu, self.accumulator)
        return not self.residual and all(part is None for part in around)

    def folded(self) -> Folded:
        """Scale, bias and levels with what the activation quantizer learned; kept while none of them changes."""
        if not self.activation.learns:
            return Folded(self.weight_scale, self.bias)
        if torch.compiler.is_compiling():
            return self.activation.fold(self.weight_scale, self.bias, self.weight)
        tensors = (self.weight, self.weight_scale, self.bias, *self.activation.parameters())
        with torch.no_grad():
            return self._folded(tensors, lambda: self.activation.fold(self.weight_scale, self.bias, self.weight))

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[-1] != self.in_features:
            raise PackedFormatError(
                f"An input of width {input.shape[-1]} came to a layer of {self.in_features} inputs."
            )
        if self.accumulator is not None:
            return self.finish(self._narrow(input), input)
        trained = self.bias is not None and self.bias.requires_grad
        if torch.is_grad_enabled() and (trained or input.requires_grad):
            return self._with_gradient(input)
        if self.shared is not None and not torch.compiler.is_compiling():
            return self.finish(self.shared(self, input), input)
        # Where something is added to the product, nothing is fused.
        fused = {"gelu": self.gelu, "norm": None if self.norm is None else self.norm()}
        result = packed_product(self.activation, input, self.weight, self.folded(), **fused)
        if self.weight_offset is not None:
            result = add_offset(result, self.activation(input), self.weight_offset)
        return self.finish(result, input)

    def _narrow(self, input: Tensor) -> Tensor:
        """With sums that end in the accumulator: the operator gives whole numbers, which are exact in fp32."""
        codes, unit = self.activation.parts(input)
        dtype = torch.promote_types(codes.dtype, torch.float32)
        one = torch.ones_like(self.weight_scale, dtype=dtype)
        sums = linear_w1(codes.to(dtype), self.weight, one)
        return self.accumulated(sums, unit.to(dtype), self.weight_scale, self.bias).to(input.dtype)

    def _with_gradient(self, input: Tensor) -> Tensor:
        """The same, of operators that have one."""
        x = input if self.norm is None else nn.functional.layer_norm(input, input.shape[-1:], *self.norm())
        if self.activation.learns:
            # The levels as floats: their gradient is that of the simulation.
            result = linear_w1(self.activation(x), self.weight, self.weight_scale, self.bias)
        else:
            result = packed_product(self.activation, x, self.weight, Folded(self.weight_scale, self.bias))
        if self.weight_offset is not None:
            result = add_offset(result, self.activation(x), self.weight_offset)
        return self.finish(nn.functional.gelu(result) if self.gelu else result, input)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return sizes + self.describe_surroundings()
