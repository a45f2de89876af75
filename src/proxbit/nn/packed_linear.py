"""A linear layer with packed 1-bit weights."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from proxbit.errors import PackedFormatError
from proxbit.kernels import Norm, linear_kernel, linear_w1, linear_w1a1, linear_w1a8, pack_signs, unpack_weight
from proxbit.nn.activations import check_activations, simulate_activations
from proxbit.nn.binary_linear import BinaryLinear
from proxbit.packing import check_packed, packed_columns

__all__ = ["PackedLinear"]

_OPS: dict[str, Callable[..., Tensor]] = {
    "float": linear_w1,
    "int8": linear_w1a8,
    "sign": linear_w1a1,
}


class PackedLinear(nn.Module):
    r"""A linear layer that holds one bit a weight. It cannot be trained; gradients flow through it to its input.

    Forward:
        y[..., o] = weight_scale[o] \sum_i (+-1)[o, i] a[..., i] + bias[o]  (+ weight_offset[o] \sum_i a[..., i])
        a = A(x): see `simulate_activations`

    Args:
        in_features: `I`.
        out_features: `O`.
        bias: whether there is a bias, `[O]`.
        offset: whether the levels are offset - scale and offset + scale, with one offset a row.
        activations: "float", "int8" or "sign".
        device: of the buffers and the bias.
        dtype: of the scales, the offsets and the bias.

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_activations(activations)
        self.activations = activations
        self.gelu = False
        self.norm: Callable[[], Norm] | None = None
        self.shared: Callable[[PackedLinear, Tensor, Callable[..., Tensor]], Tensor] | None = None
        self.in_features, self.out_features = in_features, out_features
        width = packed_columns(in_features)
        self.weight = nn.Buffer(torch.zeros(out_features, width, dtype=torch.uint8, device=device))
        self.weight_scale = nn.Buffer(torch.ones(out_features, device=device, dtype=dtype))
        self.register_buffer("weight_offset", torch.zeros(out_features, device=device, dtype=dtype) if offset else None)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_latent(cls, layer: BinaryLinear) -> "PackedLinear":
        """Pack a latent layer; the bias is shared with it."""
        new = cls(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            offset=layer.center == "restore",
            activations=layer.activations,
            device="meta",
            dtype=layer.weight.dtype,
        )
        if not layer.weight.is_meta:
            values, new.weight_scale, new.weight_offset = layer.hard_rows()
            new.weight = pack_signs(values)
        new.bias = layer.bias
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
        return layer.train(self.training)

    @property
    def kernel(self) -> str:
        """The name of the kernel that runs this layer."""
        name = linear_kernel(self.weight, self.weight_scale)
        extras = {self.activations: self.activations != "float", "norm": self.norm is not None, "gelu": self.gelu}
        return ", ".join([name, *(extra for extra, present in extras.items() if present)])

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[-1] != self.in_features:
            raise PackedFormatError(
                f"An input of width {input.shape[-1]} came to a layer of {self.in_features} inputs."
            )
        op = _OPS[self.activations]
        trained = self.bias is not None and self.bias.requires_grad
        plain = self.weight_offset is None and not (torch.is_grad_enabled() and (trained or input.requires_grad))
        if plain and self.shared is not None and not torch.compiler.is_compiling():
            return self.shared(self, input, op)
        norm = self.norm() if self.norm is not None else None
        if norm is not None and not plain:
            input, norm = nn.functional.layer_norm(input, input.shape[-1:], *norm), None
        result = op(input, self.weight, self.weight_scale, self.bias, gelu=self.gelu and plain, norm=norm)
        if self.weight_offset is not None:
            # One offset for a whole row needs the sum of the inputs only, in the precision of the op.
            wide = torch.promote_types(input.dtype, torch.float32)
            total = simulate_activations(input, self.activations).sum(dim=-1, keepdim=True, dtype=wide)
            result = (result + total * self.weight_offset.to(wide)).to(result.dtype)
        return nn.functional.gelu(result) if self.gelu and not plain else result

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return sizes if self.activations == "float" else f"{sizes}, activations={self.activations!r}"
