"""The one autograd function of the project: forward F, backward B times the gradient."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from proxbit.blocks import row_blocks
from proxbit.quantizers.compiled import compiled_backward, compiled_forward
from proxbit.quantizers.functions import ONE, SIGN
from proxbit.quantizers.pairs import QuantizerPair, compose, heuristic
from proxbit.quantizers.row_units import RowUnits
from proxbit.shards import is_sharded, on_rows, placed_like, sum_of_rows, whole_rows
from proxbit.sign import sign

__all__ = ["HardRows", "RecomputedWeight", "hard_rows", "quantize", "recomputed_weight", "update_start"]

Numbers = tuple[Tensor, Tensor]  # of each row: divisor and factor


def _blocks(rows: Tensor) -> list[slice]:
    """F and B are long chains of elementwise operations: in blocks, their temporaries are smaller than the weight."""
    return row_blocks(len(rows), rows.shape[1], rows.device)


def _by_blocks(rows: Tensor, function: Callable[[slice, Tensor | None], Tensor]) -> Tensor:
    """A tensor like `rows`, computed block by block; `function` writes into its second argument unless it is None."""
    blocks = _blocks(rows)
    if len(blocks) == 1:
        return function(blocks[0], None).to(rows.dtype)
    result = torch.empty_like(rows)
    for block in blocks:
        function(block, result[block])
    return result


def _precise(rows: Tensor) -> Tensor:
    """At least single precision: offsets, divisors and scales are sums over a row."""
    return rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows


def _centred(rows: Tensor, offset: Tensor, units: RowUnits) -> Tensor:
    return _precise(rows) if units.center == "none" else _precise(rows) - offset


def _common_divisor(latent: Tensor, units: RowUnits) -> Tensor | None:
    """The mean of the divisors of all rows of all processes, `[1, 1]`; None unless rows share one divisor."""
    if units.normalize != "tensor":
        return None
    sums = sum_of_rows(lambda part: _offset_and_divisor(part.flatten(1), units, None)[1].sum(0, keepdim=True), latent)
    return sums / len(latent)


def _offsets(rows: Tensor, units: RowUnits) -> Tensor:
    return torch.cat([units.offset(_precise(rows[block])) for block in _blocks(rows)])


def _offset_and_divisor(rows: Tensor, units: RowUnits, common: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of every row, `[rows, 1]` each."""
    offset = _offsets(rows, units)
    if common is not None:
        return offset, common.expand_as(offset)
    divisors = [units.divisor(_centred(rows[block], offset[block], units)) for block in _blocks(rows)]
    return offset, torch.cat(divisors)


class RecomputedWeight(NamedTuple):
    """A quantized weight, and how a backward pass computes it again instead of keeping it, the same to the last bit.

    Attributes:
        weight: as `quantize` returns it, without a gradient.
        saved: what is kept for the backward pass: the latent weight, mu, and two numbers a row.
        function: gives the weight: `function(*saved)`.
        gradient: `(grad, *saved)`, with the gradient of the weight, gives that of the latent weight, and may make it in
            place of the other.
    """

    weight: Tensor
    saved: tuple[Tensor, ...]
    function: Callable[..., Tensor]
    gradient: Callable[..., Tensor]


class _Modes(NamedTuple):
    """The arguments of `quantize` other than tensors."""

    pair: QuantizerPair
    units: RowUnits
    hard: bool


def _weight(
    rows: Tensor, mu: Tensor, modes: _Modes, common: Tensor | None, known: Numbers | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The weight, its divisors and its factors."""
    compiled = compiled_forward(modes.pair, modes.hard, rows) if modes.units.center == "none" else None
    if compiled is None:
        return _by_operators(rows, mu, modes, common, known)
    divisor, factor = known or (None, None)
    if known is None and modes.units.normalize != "row":  # which is the one divisor that the kernels find
        _, divisor = _offset_and_divisor(rows, modes.units, common)
    return compiled(rows, mu, modes.units.scale, divisor, factor)


def _by_operators(
    rows: Tensor, mu: Tensor, modes: _Modes, common: Tensor | None, known: Numbers | None
) -> tuple[Tensor, Tensor, Tensor]:
    pair, units, hard = modes
    offset, divisor = _offset_and_divisor(rows, units, common) if known is None else (None, known[0])
    factors: list[Tensor] = []

    def weight(block: slice, out: Tensor | None) -> Tensor:
        c = units.offset(_precise(rows[block])) if offset is None else offset[block]
        w = _centred(rows[block], c, units)
        if hard and pair.binary:
            quantized = sign(w)  # not of w / s, which may underflow to zero
        else:
            u = w / divisor[block]
            quantized = pair.hard(u) if hard else pair.forward(u, mu)
        factors.append(units.factor(w, quantized, divisor[block]) if known is None else known[1][block])
        if units.has_offset:
            a = factors[-1]
            if hard:  # as they are stored when packed
                c, a = (number.to(rows.dtype).to(w.dtype) for number in (c, a))
            return torch.addcmul(c, quantized, a, out=out)
        return torch.mul(quantized, factors[-1], out=out)

    return _by_blocks(rows, weight), divisor, torch.cat(factors)


def _gradient(
    modes: _Modes, overwrite: bool, grad: Tensor, latent: Tensor, mu: Tensor, divisor: Tensor, factor: Tensor
) -> Tensor:
    """The gradient of the latent weight from that of the weight; the kernels may write it over `grad`."""
    pair, units = modes.pair, modes.units
    rows, grad = latent.flatten(1), grad.flatten(1)
    compiled = compiled_backward(pair, rows) if units.center == "none" and grad.dtype is rows.dtype else None
    if compiled is not None:
        return compiled(rows, mu, divisor, factor, grad, overwrite=overwrite).view_as(latent)
    gain = factor / divisor

    def gradient(block: slice, out: Tensor | None) -> Tensor:
        # The offset is recomputed: unlike divisor and factor it is a function of the latent weight here.
        offset = units.offset(_precise(rows[block]))
        u = _centred(rows[block], offset, units) / divisor[block]
        multiplier = pair.backward(u, mu) * gain[block]
        if units.center == "none":
            return torch.mul(multiplier, grad[block], out=out)
        piece = multiplier * grad[block]
        through_mean = -piece.mean(dim=1, keepdim=True)
        if units.has_offset:
            through_mean = through_mean + _precise(grad[block]).mean(dim=1, keepdim=True)
        return torch.add(piece, through_mean, out=out)

    return _by_blocks(rows, gradient).view_as(latent)


class _ForwardBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, latent: Tensor, mu: Tensor, modes: _Modes, common: Tensor | None, known: Numbers | None
    ) -> Tensor:
        rows = latent.flatten(1)
        result, divisor, factor = _weight(rows, mu, modes, common, known)
        # A clone: the schedule changes mu in place between steps, and with gradient accumulation a backward
        # must see the mu of its own forward.
        ctx.save_for_backward(latent, mu.clone(), divisor, factor)
        ctx.modes = modes
        return result.view_as(latent)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _gradient(ctx.modes, False, grads[0], *ctx.saved_tensors), None, None, None, None


def quantize(
    latent: Tensor,
    mu: Tensor,
    pair: QuantizerPair,
    units: RowUnits | None = None,
    *,
    hard: bool = False,
    **fields: str,
) -> Tensor:
    r"""The weight that the forward pass sees, with the backward of the pair.

    Forward:
        w = a F_mu((W - c) / s), and + c with center="restore";  with `hard`, F is the nearest level
    Backward:
        dL/dW = (a / s) B_mu((W - c) / s) \odot dL/dw, with s and a held constant; derivatives of it are those of B.
        c is a linear function of W and is differentiated: "remove" takes the row mean off that product, "restore" then
        adds the row mean of dL/dw.

    Args:
        latent: W, `[rows, ...]`, floating point, one row per output channel; a DTensor too. If it is sharded by rows,
            nothing is communicated; if columns are sharded, full rows are gathered and sharded again.
        mu: sharpness, a 0-dimensional tensor (a tensor, so that compiled graphs are not re-compiled at each step).
        pair: F and B.
        units: how s, a and c are found; None for `RowUnits(**fields)`.
        hard: use the nearest level as F, the sign for a binary pair. B stays that of the pair.
        **fields: those of `RowUnits`, in place of `units`.

    Returns:
        Same shape and dtype as `latent`. Only the latent, two numbers a row and mu are saved for the backward pass.

    Raises:
        ConfigError: for other row units than these.

    Source:
        ProxConnect++: Lu et al., NeurIPS 2023. Differs from it in the row units: inside one step s and a are constants
        and centring is a projection, so a sound pair stays sound.
    """
    modes = _Modes(pair, RowUnits(**fields) if units is None else units, hard)
    with torch.no_grad():
        common = _common_divisor(latent, modes.units)

    def weight(rows: Tensor) -> Tensor:
        result: Tensor = _ForwardBackward.apply(rows, mu, modes, common, None)
        return result

    return placed_like(on_rows(weight, latent), latent)


def recomputed_weight(
    latent: Tensor,
    mu: Tensor,
    pair: QuantizerPair,
    units: RowUnits,
    *,
    hard: bool = False,
) -> RecomputedWeight | None:
    """The same weight for an operation that does not keep it until its backward pass.

    Args:
        latent: as in `quantize`.
        mu: as in `quantize`.
        pair: as in `quantize`.
        units: as in `quantize`.
        hard: as in `quantize`.

    Returns:
        None for a weight that has no gradient or is put together from several processes. None on accelerators too:
        operator by operator, F reads and writes more memory than the copy is worth.
    """
    if is_sharded(latent) or latent.device.type != "cpu" or not latent.requires_grad:
        return None
    modes = _Modes(pair, units, hard)
    with torch.no_grad():
        common = _common_divisor(latent, units)
        weight, divisor, factor = _weight(latent.flatten(1), mu, modes, common, None)

    def function(latent: Tensor, mu: Tensor, *numbers: Tensor) -> Tensor:
        result: Tensor = _ForwardBackward.apply(latent, mu, modes, common, numbers)
        return result

    saved = latent, mu.clone(), divisor, factor
    return RecomputedWeight(weight.view_as(latent), saved, function, partial(_gradient, modes, True))


def update_start(
    latent: Tensor, mu: Tensor, pair: QuantizerPair, units: RowUnits | None = None, **arguments: Any
) -> Tensor:
    """Where a step of the optimizer starts: at the latent weight, or at P of it where the pair says so.

    Args:
        latent: W.
        mu: as in `quantize`.
        pair: its `update_from` is P.
        units: as in `quantize`.
        **arguments: as in `quantize`.

    Returns:
        W itself, or P(W) as `quantize` would give it: same shape and dtype.
    """
    if pair.update_from is None:
        return latent
    return quantize(latent, mu, heuristic(pair.update_from, ONE, levels=pair.levels), units, **arguments)


class HardRows(NamedTuple):
    """What is stored when a latent weight is packed.

    Attributes:
        values: W - c, `[rows, columns]`; their signs are the bits.
        scale: a, `[rows]`, dtype of the latent.
        offset: c, `[rows]`, dtype of the latent; None unless it is restored.
    """

    values: Tensor
    scale: Tensor
    offset: Tensor | None


@torch.no_grad()
def hard_rows(latent: Tensor, units: RowUnits | None = None, **fields: str) -> HardRows:
    """The signs of a latent weight, and the numbers that go with each row.

    Args:
        latent: `[rows, ...]`, floating point.
        units: as in `quantize`.
        **fields: as in `quantize`.
    """
    units = RowUnits(**fields) if units is None else units
    latent = whole_rows(latent.detach())
    common = _common_divisor(latent, units)
    modes = _Modes(compose(SIGN), units, hard=True)

    def parts(part: Tensor) -> tuple[Tensor | None, ...]:
        rows = part.flatten(1)
        _, _, factor = _weight(rows, rows.new_zeros(()), modes, common, None)
        offset = _offsets(rows, units)
        values = _centred(rows, offset, units)
        stored = [number.squeeze(1).to(latent.dtype).contiguous() for number in (factor, offset)]
        return values, stored[0], stored[1] if units.has_offset else None

    return HardRows(*on_rows(parts, latent))  # type: ignore[arg-type]
