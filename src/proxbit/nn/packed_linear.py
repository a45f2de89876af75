"""A linear layer with packed 1-bit weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from proxbit.errors import ConfigError, PackedFormatError
from proxbit.kernels import Norm, linear_kernel, linear_w1
from proxbit.nn.activation_quantizer import Folded
from proxbit.nn.cache import TensorCache
from proxbit.nn.epilogue import Epilogue
from proxbit.nn.packed import PackedWeight, add_offset, packed_product

__all__ = ["PackedLinear"]


class PackedLinear(PackedWeight):
    r"""A linear layer that holds one bit a weight. It cannot be trained; gradients flow through it to its input.

    Forward:
        y[..., o] = weight_scale[o] \sum_i (+-1)[o, i] a[..., i] + bias[o]  (+ weight_offset[o] \sum_i a[..., i])
        a = A(x): see `nn.activations`
        and then the epilogue, see `nn.Epilogue`

    Args:
        in_features: `I`.
        out_features: `O`.
        bias: whether there is a bias, `[O]`.
        offset: whether the levels are offset - scale and offset + scale, with one offset a row.
        activations: a key of `ACTIVATIONS`.
        epilogue: what follows the product; None for nothing.
        device: of the buffers and the parameters.
        dtype: of the scales, the offsets and the parameters.

    Attributes:
        weight: `bits`.
        gelu: the output is GELU(y); set by `fuse`.
        norm: normalizes the input first; set by `fuse`.
        shared: computes this layer together with others that are given the same input; set by `fuse`.
    """

    float_class = nn.Linear
    weight: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        offset: bool = False,
        activations: str = "float",
        epilogue: Epilogue | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if epilogue is not None and epilogue.accumulator is not None and offset:
            raise ConfigError("center='restore' adds floats to the sums of whole numbers that an accumulator takes.")
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(out_features, in_features, bias, offset, **kind)
        self.gelu = False
        self.norm: Callable[[], Norm] | None = None
        self.shared: Callable[[PackedLinear, Tensor], Tensor] | None = None
        self.in_features, self.out_features = in_features, out_features
        self.make_parts(in_features, out_features, activations, None, epilogue, **kind)
        self._folded: TensorCache[Folded] = TensorCache()

    def one_bit_weight(self) -> nn.Parameter:
        return nn.Parameter(self.unpacked_weight())

    @property
    def kernel(self) -> str:
        """The name of the kernel that runs this layer."""
        name = linear_kernel(self.weight, self.weight_scale)
        extras = {self.activations: self.activations != "float", "norm": self.norm is not None, "gelu": self.gelu}
        return ", ".join([name, *(extra for extra, present in extras.items() if present)])

    @property
    def is_bare(self) -> bool:
        """Whether the operator is all there is to the layer, so that its neighbours can be fused into it."""
        around = (self.weight_offset, self.rprelu, self.epilogue.accumulator)
        return not self.epilogue.residual and all(part is None for part in around)

    def folded(self) -> Folded:
        """Scale, bias and levels with what the activation quantizer learned; cached until one of them changes."""
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
        if self.epilogue.accumulator is not None:
            result = self._accumulated(input)
        elif torch.is_grad_enabled() and (input.requires_grad or (self.bias is not None and self.bias.requires_grad)):
            result = self._with_gradient(input)
        elif self.shared is not None and not torch.compiler.is_compiling():
            result = self.shared(self, input)
        else:
            # Where something is added to the product, nothing is fused.
            fused = {"gelu": self.gelu, "norm": None if self.norm is None else self.norm()}
            result = packed_product(self.activation, input, self.weight, self.folded(), **fused)
            result = add_offset(result, self.activation, input, self.weight_offset)
        return self.epilogue(result, input, self.rprelu)

    def _accumulated(self, input: Tensor) -> Tensor:
        """With sums that end in the accumulator: the operator gives whole numbers, which are exact in fp32."""
        codes, unit = self.activation.parts(input)
        dtype = torch.promote_types(codes.dtype, torch.float32)
        one = torch.ones_like(self.weight_scale, dtype=dtype)
        sums = linear_w1(codes.to(dtype), self.weight, one)
        result, self.overflow = self.epilogue.accumulate(sums, unit.to(dtype), self.weight_scale, self.bias)
        return result.to(input.dtype)

    def _with_gradient(self, input: Tensor) -> Tensor:
        """The same, of operators that have one."""
        x = input if self.norm is None else nn.functional.layer_norm(input, input.shape[-1:], *self.norm())
        if self.activation.learns:
            # The levels as floats, with the gradient of the simulation.
            result = linear_w1(self.activation(x), self.weight, self.weight_scale, self.bias)
        else:
            result = packed_product(self.activation, x, self.weight, Folded(self.weight_scale, self.bias))
        result = add_offset(result, self.activation, x, self.weight_offset)
        return nn.functional.gelu(result) if self.gelu else result

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return sizes + self.describe_parts()
