"""The operators as functions: how they are called, their gradient and their FLOP formula."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from proxbit.errors import ModelStateError
from proxbit.kernels.arguments import INT8, LinearCall, Norm
from proxbit.kernels.dispatch import LINEAR_OPERATORS, backend_for, run_linear
from proxbit.kernels.reference import quantize_activations

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


for _format, _operator in LINEAR_OPERATORS.items():
    _save = partial(_save_for_backward, _format)
    torch.library.register_autograd(_operator, _backward, setup_context=_save)
    register_flop_formula(_operator.overloadpacket)(_linear_flops)


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


def _linear(call: LinearCall) -> Tensor:
    x, bias = call.x, call.bias
    _refuse_tangents(x, bias)
    trained = x.requires_grad or (bias is not None and bias.requires_grad)
    if (trained and torch.is_grad_enabled()) or not _nobody_watches(x):
        activations, *tensors, levels, gelu, norm = call
        rest = (gelu,) if activations == "float" else (levels, gelu)
        result: Tensor = LINEAR_OPERATORS[activations](*tensors, *rest, *(norm or ()))
        return result
    return run_linear(call)


def linear_w1(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    gelu: bool = False,
    norm: Norm | None = None,
) -> Tensor:
    r"""A linear layer with packed 1-bit weights, on the fastest kernel there is for these tensors.

    Formula:
        y[..., o] = scale[o] \sum_i (+-1)[o, i] x[..., i] + bias[o], summed in fp32 (fp64 for fp64 inputs).

    Args:
        x: `[..., I]`, fp16, bf16, fp32 or fp64.
        weight: `[O, ceil(I / 8)]`, uint8, see `packing.layout`.
        scale: `[O]`, floating point.
        bias: `[O]` or None.
        gelu: return GELU(y) = y Phi(y), before it is rounded to the dtype of `x`.
        norm: normalizes `x` first, without rounding to its dtype.

    Returns:
        `[..., O]`, dtype of `x`.

    Raises:
        PackedFormatError: for tensors that do not go together, or without data.
    """
    return _linear(LinearCall("float", x, weight, scale, bias, None, gelu, norm))


def linear_w1a8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    grid: Tensor | None = None,
    gelu: bool = False,
    norm: Norm | None = None,
) -> Tensor:
    r"""`linear_w1` with activations quantized to int8, token by token or on one grid.

    Formula:
        y[..., o] = (\sum_i (+-1)[o, i] q[..., i]) (step[...] scale[o]) + bias[o], the sum exact, the rest in fp32;
        q and step: `reference.quantize_activations`

    Args:
        x: as of `linear_w1`, and weight, scale, bias, gelu and norm too.
        weight: as above.
        scale: as above.
        bias: as above.
        grid: as of `reference.quantize_activations`.
        gelu: as above.
        norm: as above.
    """
    return _linear(LinearCall("int8", x, weight, scale, bias, grid, gelu, norm))


def linear_w1a1(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    threshold: Tensor | None = None,
    gelu: bool = False,
    norm: Norm | None = None,
) -> Tensor:
    r"""`linear_w1` with the signs of its activations.

    Formula:
        y[..., o] = scale[o] \sum_i (+-1)[o, i] a[..., i] + bias[o],   a = +1 where x[..., i] \ge threshold[i], else -1

    Args:
        x: as of `linear_w1`, and weight, scale, bias, gelu and norm too.
        weight: as above.
        scale: as above.
        bias: as above.
        threshold: `[I]`, or None for 0.
        gelu: as above.
        norm: as above.
    """
    return _linear(LinearCall("sign", x, weight, scale, bias, threshold, gelu, norm))


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
    backend = backend_for("level_values", x)
    if backend is not None:
        return backend.level_values(INT8, x, None, None)
    q, step = quantize_activations(x)
    return (q * step).to(x.dtype)


def linear_kernel(weight: Tensor, scale: Tensor) -> str:
    """The name of the backend that runs a packed linear layer on inputs of the dtype of its scales: an ISA of the CPU,
    'triton', or 'reference'."""
    return "reference" if weight.device != scale.device else backend_for("linear", scale).name
