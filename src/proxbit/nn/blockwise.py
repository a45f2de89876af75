"""Memory for time: what is cheap to compute is computed again in the backward pass, instead of being kept for it; and
some rows at a time, so that what lies between two operations stays in the cache of a CPU.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from proxbit.blocks import row_blocks
from proxbit.errors import ModelStateError
from proxbit.quantizers import Again, again

__all__ = ["Blockwise", "Pass", "is_plain", "linear", "product"]

Results = tuple[Tensor, ...]


def is_plain() -> bool:
    """Whether nothing is kept anyway, or a compiler decides by itself what to keep and what to fuse."""
    return not torch.is_grad_enabled() or torch.compiler.is_compiling()


class Blockwise:
    """A function of rows that do not know of each other. For the backward pass its inputs are kept, and nothing else.

    It is for passes that autograd records, see `is_plain`; its gradients cannot be differentiated once more.

    Args:
        function: `(*shared, *rows) -> results`: tensors that all rows see, and rows, `[n, ...]` each; results are
            `[n, ...]`. The same whenever it is called with the same tensors.
        width: elements of one row at the widest place of the function.
    """

    def __init__(self, function: Callable[..., Results], width: int) -> None:
        self.function, self.width = function, width

    def __call__(self, shared: Sequence[Tensor], rows: Sequence[Tensor]) -> Results:
        """The results."""
        results: Results = _Rows.apply(_Pass(self, len(shared), rows[0]), *shared, *rows)
        return results

    def times(self, weight: Tensor, bias: Tensor | None, shared: Sequence[Tensor], rows: Tensor) -> Tensor:
        """The product of the one result, `[n, I]`, and a weight; the result is not kept either.

        Args:
            weight: `[O, I]`.
            bias: `[O]` or None.
            shared: as above.
            rows: as above.

        Returns:
            `[n, O]`.
        """
        return product(_Pass(self, len(shared), rows), weight, bias, shared, rows)


class Pass(Protocol):
    """What gives a `product` its left factor, in a forward pass and in its backward pass."""

    def results(self, tensors: Sequence[Tensor]) -> Results:
        """The factor, `[n, I]`, alone."""

    def gradients(
        self, tensors: Sequence[Tensor], needs: Sequence[bool], grads: Sequence[Tensor | None], values: Tensor
    ) -> list[Tensor | None]:
        """Of the tensors that need one, by the one of the factor, which may be overwritten; `values` is given the
        factor once more."""


def product(once: Pass, weight: Tensor, bias: Tensor | None, shared: Sequence[Tensor], rows: Tensor) -> Tensor:
    """What a pass makes of rows, times a weight; see `Blockwise.times`."""
    made = again(weight) or Again(_itself, _itself, (weight,))
    result: Tensor = _Product.apply(once, made, weight.detach(), made.kept[0], bias, *shared, rows)
    return result


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear` in the dtype of the input; for the backward pass it does not keep a weight from
    `quantize`, see `again`.

    Args:
        input: `[..., I]`.
        weight: `[O, I]`.
        bias: `[O]` or None.

    Returns:
        `[..., O]`.
    """
    made = None if is_plain() else again(weight)
    if made is None:
        return nn.functional.linear(input, *_like(input, weight, bias))
    flat = input.reshape(-1, input.shape[-1])
    rows: Tensor = _Product.apply(None, made, weight.detach(), made.kept[0], bias, flat)
    return rows.view(*input.shape[:-1], len(weight))


def _like(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in the dtype of an input: latent weights are in single precision, also in a model of half."""
    return weight.to(input.dtype), None if bias is None else bias.to(input.dtype)


def _itself(weight: Tensor, *kept: Tensor) -> Tensor:
    return weight


class _Pass:
    """One forward pass, and its backward pass."""

    def __init__(self, blockwise: Blockwise, shared: int, rows: Tensor) -> None:
        kind = rows.device.type
        self.function, self.width, self.shared = blockwise.function, blockwise.width, shared
        self.autocast = partial(torch.autocast, kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))

    def _parts(self, tensors: Sequence[Tensor]) -> list[tuple[slice, list[Tensor]]]:
        """By block of rows, what the function is called with."""
        shared, rows = tensors[: self.shared], tensors[self.shared :]
        blocks = row_blocks(len(rows[0]), self.width, rows[0].device)
        return [(block, [*shared, *(each[block] for each in rows)]) for block in blocks]

    def results(self, tensors: Sequence[Tensor]) -> Results:
        parts, results = self._parts(tensors), Results()
        for block, part in parts:
            made = self.function(*part)
            if len(parts) == 1:
                return made
            results = results or tuple(each.new_empty(len(tensors[self.shared]), *each.shape[1:]) for each in made)
            for whole, each in zip(results, made, strict=True):
                whole[block] = each
        return results

    def gradients(
        self,
        tensors: Sequence[Tensor],
        needs: Sequence[bool],
        grads: Sequence[Tensor | None],
        values: Tensor | None = None,
    ) -> list[Tensor | None]:
        """Of the tensors that need one, by those of the results.

        With `values`, that is given the one result once more, and its gradient becomes that of the rows in place.
        """
        wanted = [i for i, need in enumerate(needs) if need]
        found: dict[int, Tensor] = {}
        if values is not None and grads[0] is not None:
            found[self.shared] = grads[0]
        parts = self._parts(tensors)
        for block, part in parts:
            with torch.enable_grad(), self.autocast():
                inputs = [each.detach().requires_grad_(need) for each, need in zip(part, needs, strict=True)]
                made = self.function(*inputs)
            if values is not None:
                values[block] = made[0].detach()
            pairs = [(result, grad[block]) for result, grad in zip(made, grads, strict=True) if grad is not None]
            if not wanted or not pairs:
                continue
            results, gradients = zip(*pairs, strict=True)
            pieces = torch.autograd.grad(results, [inputs[i] for i in wanted], gradients, materialize_grads=True)
            for i, piece in zip(wanted, pieces, strict=True):
                if i < self.shared:
                    found[i] = found[i] + piece if i in found else piece
                elif len(parts) == 1:
                    found[i] = piece
                else:
                    found.setdefault(i, torch.empty_like(tensors[i]))[block] = piece
        return [found.get(i) for i in range(len(tensors))]


def _refuse_create_graph() -> None:
    if torch.is_grad_enabled():
        raise ModelStateError("Quantized activations and attention have no second derivative: leave out create_graph.")


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, once: _Pass, *tensors: Tensor) -> Results:
        ctx.save_for_backward(*tensors)
        ctx.once = once
        ctx.set_materialize_grads(False)
        return once.results(tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_create_graph()
        return None, *ctx.once.gradients(ctx.saved_tensors, ctx.needs_input_grad[1:], grads)


class _Product(torch.autograd.Function):
    """Of what a pass makes of its rows, or of rows as they are, and a weight.

    It has the gradient of the latent weight, not of the weight: nobody else owns that one, which is overwritten.
    """

    @staticmethod
    def forward(
        ctx: Any,
        once: Pass | None,
        made: Again,
        weight: Tensor,
        latent: Tensor,
        bias: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*made.kept, *tensors)
        ctx.once, ctx.made, ctx.dtype = once, made._replace(kept=()), weight.dtype
        ctx.kept = len(made.kept)
        ctx.bias_dtype = None if bias is None else bias.dtype
        values = once.results(tensors)[0] if once else tensors[0]
        return nn.functional.linear(values, *_like(values, weight, bias))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), saved = grads, ctx.saved_tensors
        kept, tensors = saved[: ctx.kept], saved[ctx.kept :]
        _, _, _, of_latent, of_bias, *needs = ctx.needs_input_grad
        values, back = tensors[-1], None
        if ctx.once or needs[-1]:
            # Under autocast the product was one of fewer bits, and so are its gradients.
            back = (grad @ ctx.made.function(*kept).to(grad.dtype)).to(values.dtype)
        found = [back]
        if ctx.once:
            _refuse_create_graph()
            values = torch.empty_like(values, dtype=grad.dtype)
            found = ctx.once.gradients(tensors, needs, [back], values)
        latent_grad = None
        if of_latent:
            weight_grad = (grad.t() @ values.to(grad.dtype)).to(ctx.dtype)
            latent_grad = ctx.made.gradient(weight_grad, *kept)
        bias_grad = grad.sum(0).to(ctx.bias_dtype) if of_bias else None
        return None, None, None, latent_grad, bias_grad, *found
