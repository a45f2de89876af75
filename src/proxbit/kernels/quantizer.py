"""Forward and backward quantizers of latent weights, compiled: all that is done to a weight in one pass over it."""

import torch
from torch import Tensor

from proxbit.errors import PackedFormatError
from proxbit.kernels.interface import FUNCTIONS, QUANTIZER_CALL
from proxbit.kernels.native import Native, address_of, aligned, mu_of, parallel_for, whole

__all__ = ["gradient_rows", "quantize_rows"]


def quantize_rows(
    level: Native, function: str, latent: Tensor, mu: Tensor, scale: str, divisor: Tensor | None, factor: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The weight of the forward pass.

    Formula:
        w = a F_mu(W / s)

    Args:
        level: the kernels to use.
        function: F, one of `interface.FUNCTIONS`.
        latent: W, `[rows, columns]`; one that `native.is_plain` is true for.
        mu: sharpness, a 0-dimensional tensor.
        scale: what a is where it is not given: "ls", <F, W> / <F, F> of each row; "fixed", s.
        divisor: s, `[rows, 1]` in fp32; None for the mean of |W| of each row, at least the smallest normal number.
        factor: a, `[rows, 1]` in fp32, or None.

    Returns:
        w, s and a.

    Raises:
        PackedFormatError: for a tensor without data, of another shape or of another dtype.
    """
    latent = aligned(latent)
    s = latent.new_empty(len(latent), 1) if divisor is None else aligned(divisor.contiguous())
    if factor is not None:
        a = aligned(factor.contiguous())
    else:
        a = s if scale == "fixed" else latent.new_empty(len(latent), 1)
    result = torch.empty_like(latent)
    find = divisor is None, factor is None and scale == "ls"
    number = mu_of(mu)
    level.library.proxbit_quantize(_call(level, function, number, (latent, None, s, a, result), find))
    return result, s, a


def gradient_rows(
    level: Native,
    function: str,
    latent: Tensor,
    mu: Tensor,
    divisor: Tensor,
    factor: Tensor,
    grad: Tensor,
    overwrite: bool = False,
) -> Tensor:
    r"""The gradient of the latent weight.

    Formula:
        dL/dW = B_mu(W / s) (a / s) \odot dL/dw

    Args:
        level: as above, and latent, mu, divisor and factor too.
        function: B, one of `interface.FUNCTIONS`.
        grad: dL/dw, `[rows, columns]`, in fp32.
        overwrite: whether the result may take the place of `grad`.

    Raises:
        PackedFormatError: for a tensor without data, of another shape or of another dtype.
    """
    # Variables, here and above, so that what is copied lives as long as the call reads it.
    latent = aligned(latent)
    s, a, grad = (aligned(each.resolve_neg().contiguous()) for each in (divisor, factor, grad))
    result, number = grad if overwrite else torch.empty_like(latent), mu_of(mu)
    level.library.proxbit_gradient(_call(level, function, number, (latent, grad, s, a, result), (False, False)))
    return result


def _call(
    level: Native, function: str, mu: Tensor, tensors: tuple[Tensor | None, ...], find: tuple[bool, bool]
) -> bytes:
    latent, grad, divisor, factor, _ = tensors
    assert latent is not None
    a_row = len(latent), 1
    for tensor, shape in ((grad, latent.shape), (divisor, a_row), (factor, a_row)):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != torch.float32):
            raise PackedFormatError(
                f"Latent weights {list(latent.shape)} go with {list(shape)} in fp32, not {list(tensor.shape)} in "
                f"{tensor.dtype}."
            )
    addresses = [address_of(each if each is None else whole(each)) for each in (mu, *tensors)]
    return QUANTIZER_CALL.pack(level.level, FUNCTIONS.index(function), *latent.shape, *addresses, *find, parallel_for())
