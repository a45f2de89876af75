"""Packed linear layers on CUDA, in Triton: bits are read as they are stored, and become signs inside a tile."""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from proxbit.kernels.arguments import LinearCall
from proxbit.kernels.reference import quantize_activations

__all__ = ["linear", "runs_on"]

# Ampere.
_OLDEST = (8, 0)
# Rows of int8 activations start where the widest loads can.
_ALIGNMENT = 16
_CHUNK = 1024


@triton.jit
def _round_to_int8(
    x_ptr: tl.tensor,
    q_ptr: tl.tensor,
    step_ptr: tl.tensor,
    x_stride: tl.tensor,
    columns: tl.tensor,
    padded: tl.tensor,
    CHUNK: tl.constexpr,
) -> None:
    """`reference.quantize_activations` of one row a program; columns from `columns` to `padded` get 0."""
    token = tl.program_id(0).to(tl.int64)
    peaks = tl.full((CHUNK,), 0.0, tl.float32)
    for start in range(0, columns, CHUNK):
        column = start + tl.arange(0, CHUNK)
        size = tl.abs(tl.load(x_ptr + token * x_stride + column, mask=column < columns, other=0.0).to(tl.float32))
        # NaN counts as infinity: a maximum may pass over it.
        peaks = tl.maximum(peaks, tl.where(size < float("inf"), size, float("inf")))
    peak = tl.max(peaks, axis=0)
    is_finite = peak < float("inf")
    is_valid = is_finite & (peak >= 1e-30)
    divisor = tl.where(is_valid, peak, 1.0)
    factor = tl.math.div_rn(tl.full((), 127.0, tl.float32), divisor)
    step = tl.where(is_valid, tl.math.div_rn(divisor, tl.full((), 127.0, tl.float32)), 0.0)
    tl.store(step_ptr + token, tl.where(is_finite, step, float("nan")))
    for start in range(0, padded, CHUNK):
        column = start + tl.arange(0, CHUNK)
        x = tl.load(x_ptr + token * x_stride + column, mask=column < columns, other=0.0).to(tl.float32)
        # At 1.5 * 2^23 the neighbours of an fp32 number are whole: adding rounds, halves to even.
        q = (tl.where(is_valid, x * factor, 0.0) + 12582912.0) - 12582912.0
        tl.store(q_ptr + token * padded + column, q.to(tl.int8), mask=column < padded)


@triton.jit
def _take_signs(
    x_ptr: tl.tensor,
    threshold_ptr: tl.tensor,
    q_ptr: tl.tensor,
    x_stride: tl.tensor,
    columns: tl.tensor,
    padded: tl.tensor,
    CHUNK: tl.constexpr,
) -> None:
    """+1 where x reaches its threshold, else -1, for one row a program; columns from `columns` to `padded` get 0."""
    token = tl.program_id(0).to(tl.int64)
    for start in range(0, padded, CHUNK):
        column = start + tl.arange(0, CHUNK)
        inside = column < columns
        x = tl.load(x_ptr + token * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        if threshold_ptr is None:
            positive = x >= 0.0
        else:
            positive = x >= tl.load(threshold_ptr + column, mask=inside, other=0.0).to(tl.float32)
        signs = tl.where(inside, tl.where(positive, 1, -1), 0).to(tl.int8)
        tl.store(q_ptr + token * padded + column, signs, mask=column < padded)


@triton.jit
def _multiply(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    step_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    tokens: tl.tensor,
    columns: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    x_stride: tl.tensor,
    weight_stride: tl.tensor,
    SUM: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """y[t, r] = (sum_c (+-1)[r, c] x[t, c]) (step[t] scale[r]) + bias[r], a tile of `ROWS` x `TOKENS` a program.

    The weight is the left factor: tensor cores take that one from registers, where the signs are made.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    plus = tl.full((1, 1), 1.0, tl.float32).to(x_ptr.dtype.element_ty)
    minus = tl.full((1, 1), -1.0, tl.float32).to(x_ptr.dtype.element_ty)
    x_rows = x_ptr + token.to(tl.int64)[None, :] * x_stride
    weight_rows = weight_ptr + row.to(tl.int64)[:, None] * weight_stride
    sums = tl.full((ROWS, TOKENS), 0, SUM)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        byte = start // 8 + tl.arange(0, COLUMNS // 8)
        # Beyond the last column the activation is 0, so that any sign will do.
        x = tl.load(x_rows + column[:, None], mask=(token < tokens)[None, :] & (column < columns)[:, None], other=0)
        packed = tl.load(weight_rows + byte[None, :], mask=(row < rows)[:, None] & (byte < width)[None, :], other=0)
        # Eight bits beside each other in one thread, in the order of their columns.
        bits = tl.join(packed, packed >> 4)
        bits = tl.join(bits, bits >> 2)
        bits = tl.join(bits, bits >> 1).reshape(ROWS, COLUMNS)
        sums = tl.dot(tl.where((bits & 1) != 0, plus, minus), x, sums, input_precision="ieee", out_dtype=SUM)
    factor = tl.load(scale_ptr + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    if step_ptr is not None:
        factor = tl.load(step_ptr + token, mask=token < tokens, other=0.0)[None, :] * factor
    y = sums.to(tl.float32) * factor
    if bias_ptr is not None:
        y += tl.load(bias_ptr + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    inside = (row < rows)[:, None] & (token < tokens)[None, :]
    tl.store(y_ptr + token.to(tl.int64)[None, :] * rows + row[:, None], y.to(y_ptr.dtype.element_ty), mask=inside)


def _blocks(tokens: int, dtype: torch.dtype) -> dict[str, int]:
    """The tile of a program: small where there are few tokens, so that all processors get one."""
    if dtype == torch.float32:  # Tensor cores would round its last bits away.
        return {"ROWS": 32, "TOKENS": 32, "COLUMNS": 32, "num_warps": 4, "num_stages": 2}
    if tokens <= 16:
        return {"ROWS": 16, "TOKENS": 16, "COLUMNS": 128, "num_warps": 1, "num_stages": 4}
    if tokens <= 256:
        return {"ROWS": 64, "TOKENS": 64, "COLUMNS": 128, "num_warps": 4, "num_stages": 3}
    return {"ROWS": 128, "TOKENS": 128, "COLUMNS": 64, "num_warps": 8, "num_stages": 3}


@cache
def runs_on(device: torch.device) -> bool:
    """Whether its tensor cores multiply bf16 and int8."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _OLDEST


def _adjacent(values: Tensor) -> Tensor:
    """The same values, neighbours of a row beside each other in memory."""
    return values if values.stride(-1) == 1 else values.contiguous()


def _to_int8(activations: str, x: Tensor, levels: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Activations as whole numbers, `[tokens, columns]` padded with 0 to aligned rows, and the step of every token."""
    tokens, columns = x.shape
    padded = -(-columns // _ALIGNMENT) * _ALIGNMENT
    q = x.new_empty((tokens, padded), dtype=torch.int8)
    if activations == "sign":
        _take_signs[(tokens,)](
            x, None if levels is None else levels.contiguous(), q, x.stride(0), columns, padded, CHUNK=_CHUNK
        )
        return q, None
    if levels is not None:
        codes, step = quantize_activations(x, levels)
        q[:, :columns], q[:, columns:] = codes, 0
        return q, step.flatten()
    step = x.new_empty(tokens, dtype=torch.float32)
    # A fused multiplication and addition would round once where the formula rounds twice, here and below.
    _round_to_int8[(tokens,)](x, q, step, x.stride(0), columns, padded, CHUNK=_CHUNK, enable_fp_fusion=False)
    return q, step


def linear(call: LinearCall) -> Tensor:
    r"""A packed linear layer, see `ops.linear_w1`, `linear_w1a8` and `linear_w1a1`; tensors are on one GPU, x in fp16,
    bf16 or fp32.

    Formula:
        y[..., o] = (\sum_i (+-1)[o, i] a[..., i]) (step[...] scale[o]) + bias[o]; a and step are x and 1 for "float",
        summed in fp32; those of `quantize_activations` for "int8"; the signs of x - levels and 1 for "sign". Whole
        numbers are summed exactly, in int32, and the rest is rounded as in the reference.
    """
    activations, x, weight, scale, bias, levels, gelu, norm = call
    x = x if norm is None else norm(x).to(x.dtype)
    rows = weight.shape[0]
    result = x.new_empty((*x.shape[:-1], rows))
    if result.numel() == 0:
        return result
    weight, flat = _adjacent(weight), _adjacent(x.reshape(result.numel() // rows, x.shape[-1]))
    tokens, step = len(flat), None
    with torch.cuda.device_of(x):
        if activations != "float":
            flat, step = _to_int8(activations, flat, levels)
        blocks = _blocks(tokens, flat.dtype)
        _multiply[(triton.cdiv(rows, blocks["ROWS"]), triton.cdiv(tokens, blocks["TOKENS"]))](
            flat,
            weight,
            step,
            scale.contiguous(),
            None if bias is None else bias.contiguous(),
            result,
            tokens,
            flat.shape[1],
            rows,
            weight.shape[1],
            flat.stride(0),
            weight.stride(0),
            SUM=tl.float32 if step is None and activations == "float" else tl.int32,
            enable_fp_fusion=False,
            **blocks,
        )
    return torch.nn.functional.gelu(result) if gelu else result
