"""The operators `torch.ops.proxbit.*`: schema, shapes, gradient and FLOP formula, and the kernel each call runs on."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from proxbit.errors import ModelStateError, PackedFormatError
from proxbit.kernels import reference
from proxbit.kernels.activations import INT8, level_values
from proxbit.kernels.native import Native, native, native_for
from proxbit.kernels.reference import Norm, with_levels, without_levels
from proxbit.packing import check_bits, packed_columns

try:
    from proxbit.kernels import triton_linear
except ImportError:  # Triton is optional: without it CUDA runs on the reference.
    triton_linear = None  # type: ignore[assignment]

__all__ = [
    "linear_kernel",
    "linear_w1",
    "linear_w1a1",
    "linear_w1a8",
    "pack_signs",
    "round_activations",
    "unpack_signs",
    "unpack_weight",
]

_LIBRARY = torch.library.Library("proxbit", "DEF")
_FUSED = "bool gelu=False, Tensor? norm_weight=None, Tensor? norm_bias=None, float norm_eps=0.0"
_LIBRARY.define(f"linear_w1(Tensor x, Tensor weight, Tensor scale, Tensor? bias, {_FUSED}) -> Tensor")
_LIBRARY.define(
    f"linear_w1a8(Tensor x, Tensor weight, Tensor scale, Tensor? bias, Tensor? grid=None, {_FUSED}) -> Tensor"
)
_LIBRARY.define(
    f"linear_w1a1(Tensor x, Tensor weight, Tensor scale, Tensor? bias, Tensor? threshold, {_FUSED}) -> Tensor"
)
_LIBRARY.define("linear_w1_grad_input(Tensor grad, Tensor weight, Tensor scale, int columns) -> Tensor")
_LIBRARY.define("pack_signs(Tensor values) -> Tensor")
_LIBRARY.define("unpack_signs(Tensor packed, int columns, ScalarType dtype) -> Tensor")
_LIBRARY.define("unpack_weight(Tensor weight, Tensor scale, int columns) -> Tensor")

# The portable kernels beat torch for few rows only; from here on it pays to expand the weight and multiply.
_PORTABLE_ROWS = 16
_A_ROW, _AN_INPUT = "one number a row", "one number an input"
# What is said of the levels of activations, by their format: name, how many numbers, None for one an input, and which.
_LEVELS = {"int8": ("grid", 3, "step, smallest and largest code"), "sign": ("threshold", None, _AN_INPUT)}


def _check_shapes(
    activations: str,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    levels: Tensor | None = None,
    norm: Norm | None = None,
) -> None:
    if (  # All is well, said as briefly as it can be: this runs before every call.
        weight.dtype is torch.uint8
        and weight.dim() == 2
        and x.dim()
        and x.dtype.is_floating_point
        and not scale.dtype.is_complex
        and (x.shape[-1] + 7) // 8 == weight.shape[1]
        and scale.shape == weight.shape[:1]
        and (bias is None or bias.shape == scale.shape)
        and (levels is None or levels.shape == (_LEVELS[activations][1] or x.shape[-1],))
        and (norm is None or norm.weight.shape == norm.bias.shape == x.shape[-1:])
    ):
        return
    if weight.dtype != torch.uint8 or weight.dim() != 2:
        raise PackedFormatError(
            f"A packed linear layer has weights in uint8 [rows, bytes], not {weight.dtype} {list(weight.shape)}."
        )
    if not x.dtype.is_floating_point:
        raise PackedFormatError(f"The input of a packed linear layer must be floating point, not {x.dtype}.")
    if not x.dim() or scale.dtype.is_complex:
        raise PackedFormatError(
            f"A packed linear layer takes [..., inputs] and real scales, not {list(x.shape)} and {scale.dtype}."
        )
    columns, rows = x.shape[-1], weight.shape[0]
    if packed_columns(columns) != weight.shape[1]:
        raise PackedFormatError(
            f"An input of width {columns} needs {packed_columns(columns)} bytes a row, the packed weight has "
            f"{weight.shape[1]}."
        )
    vectors = {"scale": (scale, rows, _A_ROW), "bias": (bias, rows, _A_ROW)}
    if levels is not None:
        name, count, which = _LEVELS[activations]
        vectors[name] = (levels, count or columns, which)
    if norm is not None:
        vectors["norm_weight"] = (norm.weight, columns, _AN_INPUT)
        vectors["norm_bias"] = (norm.bias, columns, _AN_INPUT)
    for name, (numbers, size, which) in vectors.items():
        if numbers is not None and numbers.shape != (size,):
            raise PackedFormatError(f"{name} must be {which}, [{size}], not {list(numbers.shape)}.")


def _check_values(values: Tensor) -> None:
    if values.dim() != 2 or values.dtype.is_complex:
        raise PackedFormatError(f"Signs are packed of real [rows, columns], not {values.dtype} {list(values.shape)}.")


def _native_for(x: Tensor) -> Native | None:
    """The compiled kernels, where they take this tensor."""
    return native() if x.is_cpu and Native.takes(x) else None


def _linear(
    activations: str,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    levels: Tensor | None = None,
    gelu: bool = False,
    norm: Norm | None = None,
) -> Tensor:
    _check_shapes(activations, x, weight, scale, bias, levels, norm)
    if not x.is_cpu and triton_linear is not None and triton_linear.takes(x):
        values = x if norm is None else norm(x).to(x.dtype)
        result = triton_linear.linear(activations, values, weight, scale, bias, levels)
        return torch.nn.functional.gelu(result) if gelu else result
    compiled = _native_for(x)
    few = x.numel() < _PORTABLE_ROWS * max(1, x.shape[-1])
    if compiled is not None and (few or not compiled.is_portable):
        return compiled.linear(activations, x, weight, scale, bias, levels, gelu, norm)
    # The ops have their own rule for the precision of their sums: autocast must not reach into the torch code.
    with torch.autocast(x.device.type, enabled=False):
        if activations == "float":
            return reference.linear_w1(x, weight, scale, bias, gelu, norm)
        linear = reference.linear_w1a8 if activations == "int8" else reference.linear_w1a1
        return linear(x, weight, scale, bias, levels, gelu, norm)


def _linear_w1_grad_input(grad: Tensor, weight: Tensor, scale: Tensor, columns: int) -> Tensor:
    check_bits(weight, columns)
    with torch.autocast(grad.device.type, enabled=False):
        return reference.linear_w1_grad_input(grad, weight, scale, columns)


def _pack_signs(values: Tensor) -> Tensor:
    _check_values(values)
    compiled = _native_for(values)
    return reference.pack_signs(values) if compiled is None else compiled.pack_signs(values)


def _unpack_signs(packed: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    check_bits(packed, columns)
    compiled = native() if packed.is_cpu else None
    if compiled is None:
        return reference.unpack_signs(packed, columns, dtype)
    return compiled.unpack_signs(packed, columns).to(dtype)


def _unpack_weight(weight: Tensor, scale: Tensor, columns: int) -> Tensor:
    return _unpack_signs(weight, columns, scale.dtype) * scale.unsqueeze(1)


for _name, _function in {
    "linear_w1_grad_input": _linear_w1_grad_input,
    "pack_signs": _pack_signs,
    "unpack_signs": _unpack_signs,
    "unpack_weight": _unpack_weight,
}.items():
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")


def _fake_linear(
    activations: str,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    levels: Tensor | None = None,
    gelu: bool = False,
    norm: Norm | None = None,
) -> Tensor:
    _check_shapes(activations, x, weight, scale, bias, levels, norm)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("proxbit::linear_w1_grad_input", lib=_LIBRARY)
def _(grad: Tensor, weight: Tensor, scale: Tensor, columns: int) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], columns))


@torch.library.register_fake("proxbit::pack_signs", lib=_LIBRARY)
def _(values: Tensor) -> Tensor:
    return values.new_empty((values.shape[0], packed_columns(values.shape[1])), dtype=torch.uint8)


@torch.library.register_fake("proxbit::unpack_signs", lib=_LIBRARY)
def _(packed: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    return packed.new_empty((packed.shape[0], columns), dtype=dtype)


@torch.library.register_fake("proxbit::unpack_weight", lib=_LIBRARY)
def _(weight: Tensor, scale: Tensor, columns: int) -> Tensor:
    return scale.new_empty((weight.shape[0], columns))


def _passed(activations: str, x: Tensor, levels: Tensor | None = None) -> Tensor | None:
    """Where the gradient of `x` passes straight through its rounding; None for everywhere."""
    if activations == "sign":
        # What is near the threshold: the box of binarized networks.
        near: Tensor = (x if levels is None else x - levels).abs() <= 1
        return near
    if levels is None:
        return None
    # In the precision of the forward pass: a step that is rounded would clip elsewhere.
    wide = torch.promote_types(x.dtype, torch.float32)
    (step, lowest, highest), x = levels.to(wide), x.to(wide)
    on_grid: Tensor = (x >= lowest * step) & (x <= highest * step)
    return on_grid


def _save_for_backward(activations: str, ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scale, bias, *levels, gelu, norm_weight, _, _ = inputs
    if gelu or norm_weight is not None:
        raise RuntimeError("Fused GELU and LayerNorm have no gradient: call torch.nn.functional's and the linear op.")
    ctx.save_for_backward(weight, scale, _passed(activations, x, *levels))
    ctx.inputs, ctx.columns, ctx.bias_dtype = len(inputs), x.shape[-1], None if bias is None else bias.dtype


def _refuse_tangents(*tensors: Tensor | None) -> None:
    """Raise ModelStateError for a tensor with a tangent: the operators would drop it, and the derivative would be 0."""
    if forward_ad._current_level < 0:
        return
    # One that is wrapped may hide the tangent of an outer transform.
    hides = torch._C._functorch.is_functorch_wrapped_tensor
    if any(hides(each) or forward_ad.unpack_dual(each).tangent is not None for each in tensors if each is not None):
        raise ModelStateError("Packed layers have no forward-mode derivative: use backward, or dequantize the model.")


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients for the input and the bias; bits and scales are what they are, and rounding is passed straight."""
    _refuse_tangents(grad)
    weight, scale, passed = ctx.saved_tensors
    grad_bias = None if ctx.bias_dtype is None else grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    grad_input = torch.ops.proxbit.linear_w1_grad_input(grad, weight, scale, ctx.columns)
    if passed is not None:
        grad_input = grad_input * passed
    return (grad_input, None, None, grad_bias, *([None] * (ctx.inputs - 4)))


@register_flop_formula(torch.ops.proxbit.linear_w1_grad_input)
def _(grad_shape: Any, weight_shape: Any, scale_shape: Any, columns: int, *args: Any, **kwargs: Any) -> int:
    return int(2 * math.prod(grad_shape) * columns)


def _linear_flops(x_shape: Any, weight_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(2 * math.prod(x_shape) * weight_shape[0])


_OPS = {
    "float": torch.ops.proxbit.linear_w1.default,
    "int8": torch.ops.proxbit.linear_w1a8.default,
    "sign": torch.ops.proxbit.linear_w1a1.default,
}
for _format, _op in _OPS.items():
    _wrap, _save = with_levels if _format in _LEVELS else without_levels, partial(_save_for_backward, _format)
    _LIBRARY.impl(_op, _wrap(partial(_linear, _format)), "CompositeExplicitAutograd")
    torch.library.register_fake(_op, _wrap(partial(_fake_linear, _format)), lib=_LIBRARY)
    torch.library.register_autograd(_op, _backward, setup_context=_save, lib=_LIBRARY)
    register_flop_formula(_op.overloadpacket)(_linear_flops)


def _nobody_watches(x: Tensor) -> bool:
    """Whether a call may go past torch's dispatcher, which takes longer than the sums of a few tokens do: an ordinary
    tensor on the CPU, and no compiler, tracer, profiler, transform or mode that would have to see the operator."""
    return (
        type(x) is Tensor
        and x.is_cpu
        and not torch.compiler.is_compiling()
        and not torch.autograd.profiler._is_profiler_enabled
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._get_tracing_state() is None
        and torch._C._functorch.maybe_current_level() is None
    )


def _call(
    activations: str,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    levels: Tensor | None,
    gelu: bool,
    norm: Norm | None,
) -> Tensor:
    _refuse_tangents(x, bias)
    trained = x.requires_grad or (bias is not None and bias.requires_grad)
    if (trained and torch.is_grad_enabled()) or not _nobody_watches(x):
        arguments = (bias, gelu) if activations == "float" else (bias, levels, gelu)
        result: Tensor = _OPS[activations](x, weight, scale, *arguments, *(norm or ()))
        return result
    return _linear(activations, x, weight, scale, bias, levels, gelu, norm)


def linear_w1(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    gelu: bool = False,
    norm: Norm | None = None,
) -> Tensor:
    """`reference.linear_w1`, on the fastest kernel there is for these tensors."""
    return _call("float", x, weight, scale, bias, None, gelu, norm)


def linear_w1a8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    grid: Tensor | None = None,
    gelu: bool = False,
    norm: Norm | None = None,
) -> Tensor:
    """`reference.linear_w1a8`, on the fastest kernel there is for these tensors."""
    return _call("int8", x, weight, scale, bias, grid, gelu, norm)


def linear_w1a1(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    threshold: Tensor | None = None,
    gelu: bool = False,
    norm: Norm | None = None,
) -> Tensor:
    """`reference.linear_w1a1`, on the fastest kernel there is for these tensors."""
    return _call("sign", x, weight, scale, bias, threshold, gelu, norm)


def pack_signs(values: Tensor) -> Tensor:
    """`packing.pack_signs`, on the fastest kernel there is for this tensor."""
    result: Tensor = torch.ops.proxbit.pack_signs.default(values)
    return result


def unpack_signs(packed: Tensor, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """`packing.unpack_signs`, on the fastest kernel there is for this tensor."""
    result: Tensor = torch.ops.proxbit.unpack_signs.default(packed, columns, dtype)
    return result


def unpack_weight(weight: Tensor, scale: Tensor, columns: int) -> Tensor:
    """`reference.unpack_weight`, on the fastest kernel there is for these tensors."""
    result: Tensor = torch.ops.proxbit.unpack_weight.default(weight, scale, columns)
    return result


def round_activations(x: Tensor) -> Tensor:
    """What W1A8 multiplies, as floats: q times step of `quantize_activations`, without a gradient.

    Args:
        x: `[..., I]`, floating point.

    Returns:
        Same shape and dtype.
    """
    x = x.detach()
    compiled = native_for(x)
    if compiled is not None:
        return level_values(compiled, INT8, x, None, None)
    q, step = reference.quantize_activations(x)
    return (q * step).to(x.dtype)


def linear_kernel(weight: Tensor, scale: Tensor) -> str:
    """The name of the kernel that runs a packed linear layer on inputs of the dtype of its scales: an instruction level
    of the compiled kernels, 'triton', or 'reference'."""
    if weight.device != scale.device:
        return "reference"
    if triton_linear is not None and triton_linear.takes(scale):
        return "triton"
    compiled = _native_for(scale)
    return "reference" if compiled is None else compiled.name
