"""Forward and backward quantizers of latent weights on CUDA: a row a program, as in csrc/elementwise/latents.h."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from proxbit.kernels.arguments import LatentRows

__all__ = ["gradient_rows", "quantize_rows"]

_CHUNK = 1024
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _logistic(size: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """a, tanh(a / 2) and s(a) (1 - s(a)) with s the logistic function, for a = min(size, 60) of a size that is >= 0."""
    a = tl.where(size > 60.0, 60.0, size)  # NaN stays
    # e^-a = 2^n e^r: adding 1.5 * 2^23 rounds, and leaves n in the lowest bits.
    shifted = a * -1.44269504 + 12582912.0
    n = shifted - 12582912.0
    r = n * 2.12194440e-4 + (n * -0.693359375 - a)
    rest = r * (1 + r * (1 / 2 + r * (1 / 6 + r * (1 / 24 + r * (1 / 120 + r * (1 / 720 + r * (1 / 5040)))))))
    power = ((shifted.to(tl.int32, bitcast=True) + 127) << 23).to(tl.float32, bitcast=True)
    # e^-a - 1, exact near zero too, where the power is 1.
    less_one = power * rest + (power - 1.0)
    inverse = 1.0 / (2.0 + less_one)
    return a, -less_one * inverse, (power * rest + power) * inverse * inverse


@triton.jit
def _series(u: tl.tensor, mu: tl.tensor, OF_SLOPE: tl.constexpr) -> tl.tensor:
    """Clenshaw's sum in the form of Reinsch, see csrc/elementwise/latents.h."""
    size = tl.abs(u)
    y = 0.5 * tl.where(size > 3.14159265, 3.14159265, size)
    far = y > 0.785398163
    s = tl.sin(tl.where(far, 1.57079637 - y, y))
    c = -4.0 * s * s
    b = tl.zeros(u.shape, tl.float32)
    d = tl.zeros(u.shape, tl.float32)
    for i in tl.static_range(32):
        share = mu + (i - 30)
        share = tl.where(share < 0.0, 0.0, tl.where(share > 1.0, 1.0, share))
        if not OF_SLOPE:
            share /= 63 - 2 * i
        d = c * b + (d + (tl.where(far, -share, share) if i % 2 == 0 else share))
        b += d
    sines = s * (2.0 * b - d)
    cosines = tl.sqrt(1.0 + 0.25 * c) * d
    if OF_SLOPE:
        return 0.636619772 * tl.where(far, sines, cosines)
    else:
        sum = 1.27323954 * tl.where(far, cosines, sines)
        return tl.where(u < 0.0, -sum, sum)


@triton.jit
def _smooth_value(u: tl.tensor, mu: tl.tensor, FUNCTION: tl.constexpr) -> tl.tensor:
    x = mu * u
    gain = tl.where(mu < 1.0, 1.0 / mu, 1.0) if FUNCTION == "decay" or FUNCTION == "decay slope" else 1.0
    if FUNCTION == "tanh" or FUNCTION == "decay":
        _, t, _ = _logistic(2.0 * tl.abs(x))
        return tl.where(x < 0.0, -t, t) * gain
    elif FUNCTION == "tanh slope" or FUNCTION == "decay slope":
        _, _, c = _logistic(2.0 * tl.abs(x))
        return 4.0 * mu * c * gain
    elif FUNCTION == "sign-swish":
        a, t, c = _logistic(tl.abs(x))
        value = t + 2.0 * a * c
        return tl.where(x < 0.0, -value, value)
    elif FUNCTION == "sign-swish slope":
        a, t, c = _logistic(tl.abs(x))
        return 2.0 * mu * c * (2.0 - a * t)
    else:
        tl.static_assert(FUNCTION == "series" or FUNCTION == "series slope", "a function without a formula")
        return _series(u, mu, FUNCTION == "series slope")


@triton.jit
def _value(w: tl.tensor, divisor: tl.tensor, mu: tl.tensor, FUNCTION: tl.constexpr) -> tl.tensor:
    """F_mu(w / divisor) or B_mu(w / divisor)."""
    u = w / divisor
    x = mu * u
    if FUNCTION == "one":
        return tl.full(w.shape, 1.0, tl.float32)
    elif FUNCTION == "box":
        return tl.where(tl.abs(u) <= 1.0, 1.0, 0.0)
    elif FUNCTION == "sign":
        return tl.where(w >= 0.0, 1.0, -1.0)
    elif FUNCTION == "clip":
        return tl.where(x > 1.0, 1.0, tl.where(x < -1.0, -1.0, x))
    elif FUNCTION == "polynomial":
        bounded = tl.where(x > 1.0, 1.0, tl.where(x < -1.0, -1.0, x))
        return bounded * (2.0 - tl.abs(bounded))
    elif FUNCTION == "polynomial slope":
        left = 2.0 - 2.0 * tl.abs(x)
        return tl.where(left < 0.0, 0.0, left) * mu
    else:
        return _smooth_value(u, mu, FUNCTION)


@triton.jit
def _quantize(
    latent_ptr: tl.tensor,
    divisor_ptr: tl.tensor,
    factor_ptr: tl.tensor,
    result_ptr: tl.tensor,
    mu: tl.tensor,
    columns: tl.tensor,
    FUNCTION: tl.constexpr,
    DIVISOR: tl.constexpr,
    FACTOR: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """result = a F(w / s) of one row; s the "mean" of |w| or "given"; a "ls", "fixed" or "given"."""
    row = tl.program_id(0).to(tl.int64)
    latents = latent_ptr + row * columns
    if DIVISOR == "mean":
        sums = tl.full((CHUNK,), 0.0, tl.float32)
        for start in range(0, columns, CHUNK):
            column = start + tl.arange(0, CHUNK)
            sums += tl.abs(tl.load(latents + column, mask=column < columns, other=0.0).to(tl.float32))
        mean = tl.sum(sums, axis=0) / columns
        divisor = tl.where(mean < _TINY, _TINY, mean)
        tl.store(divisor_ptr + row, divisor)
    else:
        divisor = tl.load(divisor_ptr + row)
    if FACTOR == "ls":
        products = tl.full((CHUNK,), 0.0, tl.float32)
        energies = tl.full((CHUNK,), 0.0, tl.float32)
        for start in range(0, columns, CHUNK):
            column = start + tl.arange(0, CHUNK)
            w = tl.load(latents + column, mask=column < columns, other=0.0).to(tl.float32)
            q = tl.where(column < columns, _value(w, divisor, mu, FUNCTION), 0.0)
            products += q * w
            energies += q * q
        energy = tl.sum(energies, axis=0)
        factor = tl.sum(products, axis=0) / tl.where(energy < _TINY, _TINY, energy)
        tl.store(factor_ptr + row, factor)
    elif FACTOR == "fixed":
        factor = divisor
    else:
        factor = tl.load(factor_ptr + row)
    for start in range(0, columns, CHUNK):
        column = start + tl.arange(0, CHUNK)
        w = tl.load(latents + column, mask=column < columns, other=0.0).to(tl.float32)
        weight = _value(w, divisor, mu, FUNCTION) * factor
        tl.store(result_ptr + row * columns + column, weight.to(result_ptr.dtype.element_ty), mask=column < columns)


@triton.jit
def _gradient(
    latent_ptr: tl.tensor,
    divisor_ptr: tl.tensor,
    factor_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    result_ptr: tl.tensor,
    mu: tl.tensor,
    columns: tl.tensor,
    FUNCTION: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """result = B(w / s) (a / s) grad of one row."""
    row = tl.program_id(0).to(tl.int64)
    divisor = tl.load(divisor_ptr + row)
    gain = tl.load(factor_ptr + row) / divisor
    for start in range(0, columns, CHUNK):
        column = start + tl.arange(0, CHUNK)
        place = row * columns + column
        w = tl.load(latent_ptr + place, mask=column < columns, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + place, mask=column < columns, other=0.0).to(tl.float32)
        result = _value(w, divisor, mu, FUNCTION) * gain * grad
        tl.store(result_ptr + place, result.to(result_ptr.dtype.element_ty), mask=column < columns)


def _number(mu: Tensor) -> float:
    """What a tensor of the CPU holds, without an operator that would show as a wait for the GPU."""
    return float(mu.detach().cpu().numpy())


def quantize_rows(rows: LatentRows, scale: str) -> tuple[Tensor, Tensor, Tensor]:
    """See `cpu.CpuBackend.quantize_rows`; the latent is dense, in fp16, bf16 or fp32."""
    function, latent, mu, divisor, factor = rows
    count, columns = latent.shape
    s = latent.new_empty(count, 1, dtype=torch.float32) if divisor is None else divisor.contiguous()
    kind = scale if factor is None else "given"
    a = s if kind == "fixed" else torch.empty_like(s) if factor is None else factor.contiguous()
    result = torch.empty_like(latent)
    modes = {"FUNCTION": function, "DIVISOR": "mean" if divisor is None else "given", "FACTOR": kind}
    with torch.cuda.device_of(latent):
        _quantize[(count,)](latent, s, a, result, _number(mu), columns, **modes, CHUNK=_CHUNK)
    return result, s, a


def gradient_rows(rows: LatentRows, grad: Tensor, overwrite: bool = False) -> Tensor:
    """See `cpu.CpuBackend.gradient_rows`; tensors are those of `quantize_rows`."""
    function, latent, mu, divisor, factor = rows
    assert divisor is not None and factor is not None
    count, columns = latent.shape
    s, a, grad = divisor.contiguous(), factor.contiguous(), grad.contiguous()
    result = grad if overwrite else torch.empty_like(latent)
    with torch.cuda.device_of(latent):
        _gradient[(count,)](latent, s, a, grad, result, _number(mu), columns, FUNCTION=function, CHUNK=_CHUNK)
    return result
