"""The one autograd function of the project: forward F, backward B times the gradient."""

from typing import Any

import torch
from torch import Tensor

from proxbit.quantizers.pairs import QuantizerPair
from proxbit.quantizers.scaling import normalizer, output_scale
from proxbit.sign import sign

__all__ = ["hard_scale", "quantize"]


def _as_rows(latent: Tensor) -> Tensor:
    """`[rows, columns]` in at least single precision: scales are sums over a row."""
    rows = latent.flatten(1)
    return rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows


class _ForwardBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, latent: Tensor, mu: Tensor, pair: QuantizerPair, normalize: str, scale: str, hard: bool
    ) -> Tensor:
        rows = _as_rows(latent)
        divisor = normalizer(rows, normalize)
        quantized = sign(rows) if hard else pair.forward(rows / divisor, mu)
        factor = output_scale(rows, quantized, divisor, scale)
        # A clone: the schedule changes mu in place between steps, and with gradient accumulation a backward
        # must see the mu of its own forward.
        ctx.save_for_backward(latent, factor, mu.clone())
        ctx.pair, ctx.normalize = pair, normalize
        return (quantized * factor).to(latent.dtype).view_as(latent)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        latent, factor, mu = ctx.saved_tensors
        rows = _as_rows(latent)
        divisor = normalizer(rows.detach(), ctx.normalize)
        multiplier = ctx.pair.backward(rows / divisor, mu)
        grad = grads[0].flatten(1) * multiplier * (factor / divisor)
        return grad.to(latent.dtype).view_as(latent), None, None, None, None, None


def quantize(
    latent: Tensor, mu: Tensor, pair: QuantizerPair, *, normalize: str = "row", scale: str = "ls", hard: bool = False
) -> Tensor:
    r"""The weight that the forward pass sees, with the backward of the pair.

    Forward:
        w = a F_mu(W / s);  with `hard`, w = a sign(W / s)
    Backward:
        dL/dW = (a / s) B_mu(W / s) \odot dL/dw, with s and a held constant; derivatives of it are those of B.

    Args:
        latent: W, `[rows, ...]`, floating point, one row per output channel.
        mu: sharpness, a 0-dimensional tensor (a tensor, so that compiled graphs are not re-compiled at each step).
        pair: F and B.
        normalize: how s is found, see `quantizers.scaling.normalizer`.
        scale: how a is found, see `quantizers.scaling.output_scale`.
        hard: use the sign as F. B stays that of the pair.

    Returns:
        Same shape and dtype as `latent`. Only the latent, one number a row and mu are kept for the backward pass.

    Source:
        ProxConnect++: Lu et al., NeurIPS 2023. Differs from it in the row normalisation and scale, both detached:
        inside one step they are constants, so a sound pair stays sound.
    """
    result: Tensor = _ForwardBackward.apply(latent, mu, pair, normalize, scale, hard)
    return result


def hard_scale(latent: Tensor, *, normalize: str, scale: str) -> Tensor:
    """The row scale that goes with the signs of a latent weight: what is stored when it is packed.

    Args:
        latent: `[rows, ...]`, floating point.
        normalize: as in `quantize`.
        scale: as in `quantize`.

    Returns:
        `[rows]`, dtype of `latent`.
    """
    rows = _as_rows(latent.detach())
    divisor = normalizer(rows, normalize)
    factor = output_scale(rows, sign(rows), divisor, scale)
    return factor.squeeze(1).to(latent.dtype).contiguous()
