"""Which backend runs an operation, and the operators `torch.ops.proxbit.*`: schemas, checks, fake implementations."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Protocol, overload

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from proxbit.errors import PackedFormatError
from proxbit.kernels import reference
from proxbit.kernels.arguments import LatentRows, LinearCall
from proxbit.kernels.cpu import CpuBackend, native
from proxbit.kernels.interface import FUNCTIONS
from proxbit.packing import check_bits, packed_columns

try:
    from proxbit.kernels import triton
except ImportError:  # Triton is optional: without it CUDA runs on the reference.
    triton = None  # type: ignore[assignment]

__all__ = ["LINEAR_OPERATORS", "LatentBackend", "LinearBackend", "backend_for", "run_linear"]


_IN_TRAINING = ("quantize_rows", "level_values")


class LinearBackend(Protocol):
    """A backend of the operators on packed weights.

    Attributes:
        name: "reference", "triton" or an ISA of the CPU.
    """

    name: str

    def linear(self, call: LinearCall) -> Tensor: ...


class SignsBackend(Protocol):
    """A backend of the operators between signs and bits."""

    def pack_signs(self, values: Tensor) -> Tensor: ...

    def unpack_signs(self, packed: Tensor, columns: int, dtype: torch.dtype) -> Tensor: ...


class LatentBackend(Protocol):
    """A backend of the forward and backward quantizers of latent weights."""

    def quantize_rows(self, rows: LatentRows, scale: str) -> tuple[Tensor, Tensor, Tensor]: ...

    def gradient_rows(self, rows: LatentRows, grad: Tensor, overwrite: bool = False) -> Tensor: ...


@overload
def backend_for(operation: Literal["linear"], *tensors: Tensor) -> LinearBackend: ...
@overload
def backend_for(operation: Literal["pack_signs", "unpack_signs"], *tensors: Tensor) -> SignsBackend: ...
@overload
def backend_for(operation: Literal["quantize_rows"], *tensors: Tensor) -> LatentBackend | None: ...
@overload
def backend_for(operation: Literal["level_values"], *tensors: Tensor) -> CpuBackend | None: ...
def backend_for(operation: str, *tensors: Tensor) -> Any:
    """What runs an operation on tensors of one device: Triton, the compiled kernels of the CPU, or plain torch.

    Args:
        operation: by the name of its method: "linear", "pack_signs", "unpack_signs"; "quantize_rows", with
            `gradient_rows`; "level_values", with `level_gradient`.
        *tensors: what it reads; of "linear" only `x`.

    Returns:
        A module or an object with these methods. None for the last two operations where torch's operators must do it by
        the formulas in `quantizers` and `nn`: in an exported graph, on another device, or for another dtype.
    """
    if operation in _IN_TRAINING and _is_recorded():
        return _OPERATORS if operation == "quantize_rows" and _is_compiled_for(tensors[0]) else None
    backend: Any = native() if tensors[0].is_cpu else triton
    if backend is not None and backend.takes(operation, tensors):
        return backend
    return None if operation in _IN_TRAINING else reference


def _is_recorded() -> bool:
    """Whether something looks at the operators of torch, or takes their place: it does not see what a kernel does that
    is no operator."""
    return torch.compiler.is_compiling() or torch._C._is_tracing() or _get_current_dispatch_mode() is not None


def _is_compiled_for(latent: Tensor) -> bool:
    """Whether this is `torch.compile`, for the CPU of this process. An exported graph has to run elsewhere; and for a
    GPU inductor makes one kernel of many operators."""
    if not torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting():
        return False
    return latent.is_cpu and latent.dtype is torch.float32 and latent.numel() > 0 and _has_kernels()


@torch.compiler.assume_constant_result
def _has_kernels() -> bool:
    return native() is not None


# ---- schemas

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

LINEAR_OPERATORS = {
    "float": torch.ops.proxbit.linear_w1.default,
    "int8": torch.ops.proxbit.linear_w1a8.default,
    "sign": torch.ops.proxbit.linear_w1a1.default,
}

# ---- checks

_A_ROW, _AN_INPUT = "one number a row", "one number an input"
# What is said of the levels of activations, by their format: name, how many numbers, None for one an input, and which.
_LEVELS = {"int8": ("grid", 3, "step, smallest and largest code"), "sign": ("threshold", None, _AN_INPUT)}


def _check_shapes(call: LinearCall) -> None:
    activations, x, weight, scale, bias, levels, _, norm = call
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


# ---- what they run


def run_linear(call: LinearCall) -> Tensor:
    """A linear layer on the fastest backend there is for its tensors, past torch's dispatcher."""
    _check_shapes(call)
    backend = backend_for("linear", call.x)
    if backend is not reference:
        return backend.linear(call)
    # The operators have their own rule for the precision of their sums: autocast must not reach into the torch code.
    with torch.autocast(call.x.device.type, enabled=False):
        return reference.linear(call)


def _fake_linear(call: LinearCall) -> Tensor:
    _check_shapes(call)
    return call.x.new_empty((*call.x.shape[:-1], call.weight.shape[0]))


def _of_operator(function: Callable[[LinearCall], Tensor], activations: str) -> Callable[..., Tensor]:
    return lambda *given: function(LinearCall.of_operator(activations, *given))


for _format, _operator in LINEAR_OPERATORS.items():
    _LIBRARY.impl(_operator, _of_operator(run_linear, _format), "CompositeExplicitAutograd")
    torch.library.register_fake(_operator, _of_operator(_fake_linear, _format), lib=_LIBRARY)

_implements = partial(torch.library.impl, _LIBRARY, dispatch_key="CompositeExplicitAutograd")
_has_shape = partial(torch.library.register_fake, lib=_LIBRARY)


@_implements("linear_w1_grad_input")
def _(grad: Tensor, weight: Tensor, scale: Tensor, columns: int) -> Tensor:
    check_bits(weight, columns)
    with torch.autocast(grad.device.type, enabled=False):
        return reference.linear_w1_grad_input(grad, weight, scale, columns)


@_has_shape("proxbit::linear_w1_grad_input")
def _(grad: Tensor, weight: Tensor, scale: Tensor, columns: int) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], columns))


@_implements("pack_signs")
def _(values: Tensor) -> Tensor:
    if values.dim() != 2 or values.dtype.is_complex:
        raise PackedFormatError(f"Signs are packed of real [rows, columns], not {values.dtype} {list(values.shape)}.")
    return backend_for("pack_signs", values).pack_signs(values)


@_has_shape("proxbit::pack_signs")
def _(values: Tensor) -> Tensor:
    return values.new_empty((values.shape[0], packed_columns(values.shape[1])), dtype=torch.uint8)


def _unpack_signs(packed: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    check_bits(packed, columns)
    return backend_for("unpack_signs", packed).unpack_signs(packed, columns, dtype)


_implements("unpack_signs")(_unpack_signs)


@_has_shape("proxbit::unpack_signs")
def _(packed: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    return packed.new_empty((packed.shape[0], columns), dtype=dtype)


@_implements("unpack_weight")
def _(weight: Tensor, scale: Tensor, columns: int) -> Tensor:
    return _unpack_signs(weight, columns, scale.dtype) * scale.unsqueeze(1)


@_has_shape("proxbit::unpack_weight")
def _(weight: Tensor, scale: Tensor, columns: int) -> Tensor:
    return scale.new_empty((weight.shape[0], columns))


# ---- the quantizers of latent weights as operators, for graphs of torch.compile

_SCALES = ("ls", "fixed")


def _checked(rows: LatentRows, scale: str = "ls") -> tuple[CpuBackend, LatentRows]:
    """The compiled kernels, and the rows as these read them."""
    backend, latent = native(), rows.latent
    if backend is None:
        raise PackedFormatError("This operator is one of the compiled kernels, without which this process runs.")
    if rows.function not in FUNCTIONS or scale not in _SCALES:
        raise PackedFormatError(
            f"Functions of latent weights are {', '.join(FUNCTIONS)}, and scales {', '.join(_SCALES)}; not "
            f"{rows.function!r} and {scale!r}."
        )
    if latent.dtype != torch.float32 or latent.dim() != 2 or not latent.numel() or rows.mu.numel() != 1:
        raise PackedFormatError(
            f"Latent weights are [rows, columns] in fp32, with one mu; not {list(latent.shape)} in {latent.dtype} with "
            f"{list(rows.mu.shape)}."
        )
    return backend, rows._replace(latent=latent.contiguous())


@torch.library.custom_op("proxbit::quantize_rows", mutates_args=(), device_types="cpu")
def _quantize_rows(
    function: str, latent: Tensor, mu: Tensor, scale: str, divisor: Tensor | None, factor: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    backend, rows = _checked(LatentRows(function, latent, mu, divisor, factor), scale)
    result, s, a = backend.quantize_rows(rows, scale)
    return result, s.clone(), a.clone()  # An operator does not return what it was given, nor one tensor twice.


@_quantize_rows.register_fake
def _(function: str, latent: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = latent.shape[0]
    return latent.new_empty(latent.shape), latent.new_empty(rows, 1), latent.new_empty(rows, 1)


@torch.library.custom_op("proxbit::gradient_rows", mutates_args=(), device_types="cpu")
def _gradient_rows(function: str, latent: Tensor, mu: Tensor, divisor: Tensor, factor: Tensor, grad: Tensor) -> Tensor:
    backend, rows = _checked(LatentRows(function, latent, mu, divisor, factor))
    return backend.gradient_rows(rows, grad)


@_gradient_rows.register_fake
def _(function: str, latent: Tensor, *others: Any) -> Tensor:
    return latent.new_empty(latent.shape)


class _Operators:
    """The backend that a compiler sees."""

    def quantize_rows(self, rows: LatentRows, scale: str) -> tuple[Tensor, Tensor, Tensor]:
        result: tuple[Tensor, Tensor, Tensor] = _quantize_rows(
            rows.function, rows.latent, rows.mu, scale, rows.divisor, rows.factor
        )
        return result

    def gradient_rows(self, rows: LatentRows, grad: Tensor, overwrite: bool = False) -> Tensor:
        """A compiler finds by itself what may lie in the place of what."""
        result: Tensor = _gradient_rows(rows.function, rows.latent, rows.mu, rows.divisor, rows.factor, grad)
        return result


_OPERATORS = _Operators()
