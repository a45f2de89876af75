"""Recomputation: what is cheap to compute is computed again in the backward pass, instead of being saved for it.

It works on a block of rows at a time, so that intermediate results stay in the cache of a CPU. Its inputs are saved
with `save_for_backward`, so that gradient checkpointing and offloading, which hook into that, work on top. Saved-tensor
hooks of its own would break them: of nested hooks only the innermost are called.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from proxbit.blocks import row_blocks
from proxbit.errors import ModelStateError
from proxbit.kernels import CpuBackend, Levels, backend_for
from proxbit.quantizers import RecomputedWeight

__all__ = ["KernelRecipe", "Recipe", "RowRecipe", "is_plain", "kernel_recipe", "linear", "product", "recompute"]

Results = tuple[Tensor, ...]


def is_plain() -> bool:
    """Whether nothing is saved anyway, or a compiler decides by itself what to save and what to fuse."""
    return not torch.is_grad_enabled() or torch.compiler.is_compiling()


class Recipe(Protocol):
    """How results are computed from the tensors that are saved, in a forward pass and again in its backward pass."""

    def results(self, tensors: Sequence[Tensor]) -> Results:
        """The results, without a gradient."""

    def gradients(
        self,
        tensors: Sequence[Tensor],
        needs: Sequence[bool],
        grads: Sequence[Tensor | None],
        values: Tensor | None = None,
    ) -> list[Tensor | None]:
        """Of the tensors that need one, by those of the results.

        With `values`, there is one result: it is written there once more, and its gradient may be overwritten.
        """


class RowRecipe:
    """A function of rows that do not depend on each other, a block of rows at a time.

    Args:
        function: `(*shared, *rows) -> results`: tensors that all rows see, and rows, `[n, ...]` each; results are
            `[n, ...]`. The same whenever it is called with the same tensors.
        width: elements of one row at the widest place of the function.
        shared: how many tensors all rows see.
        kind: the type of the device.
    """

    def __init__(self, function: Callable[..., Results], width: int, shared: int, kind: str) -> None:
        self.function, self.width, self.shared = function, width, shared
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


class KernelRecipe:
    """Activations on levels by the compiled kernels: one pass over a scale, a threshold and rows, `[1]`, `[I]` and
    `[n, I]`, or fewer of them, where operators take twenty.

    Args:
        backend: the kernels.
        levels: what they make of the rows.
    """

    def __init__(self, backend: CpuBackend, levels: Levels) -> None:
        # A clone: the schedule changes mu in place before the backward pass, where gradients are accumulated.
        mu = None if levels.mu is None else levels.mu.clone()
        self.backend, self.levels = backend, levels._replace(mu=mu)

    def results(self, tensors: Sequence[Tensor]) -> Results:
        scale, threshold = _numbers(tensors)
        return (self.backend.level_values(self.levels, tensors[-1].detach(), scale, threshold),)

    def gradients(
        self,
        tensors: Sequence[Tensor],
        needs: Sequence[bool],
        grads: Sequence[Tensor | None],
        values: Tensor | None = None,
    ) -> list[Tensor | None]:
        grad, rows = grads[0], tensors[-1]
        assert grad is not None and values is not None
        made = values if values.dtype is rows.dtype else torch.empty_like(rows)
        learned = self.backend.level_gradient(self.levels, rows, *_numbers(tensors), made, grad)
        if made is not values:
            values.copy_(made)
        return [*learned[: len(tensors) - 1], grad]


def _numbers(tensors: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    numbers = [*tensors[:-1], None, None]
    return numbers[0], numbers[1]


def kernel_recipe(levels: Levels | None, numbers: Sequence[Tensor], rows: Tensor) -> KernelRecipe | None:
    """The recipe, or None where torch's operators must do it."""
    if levels is None:
        return None
    backend = backend_for("level_values", *(each.detach() for each in (*numbers, rows)))
    return None if backend is None else KernelRecipe(backend, levels)


def recompute(
    function: Callable[..., Results], width: int, shared: Sequence[Tensor], rows: Sequence[Tensor]
) -> Results:
    """`function(*shared, *rows)`; for the backward pass these tensors are saved, and nothing else.

    It is for passes that autograd records, see `is_plain`; its gradients cannot be differentiated once more.

    Args:
        function: as in `RowRecipe`.
        width: as in `RowRecipe`.
        shared: tensors that all rows see.
        rows: `[n, ...]` each.
    """
    recipe = RowRecipe(function, width, len(shared), rows[0].device.type)
    results: Results = _Recompute.apply(recipe, *shared, *rows)
    return results


def product(
    recipe: Recipe, tensors: Sequence[Tensor], weight: Tensor | RecomputedWeight, bias: Tensor | None
) -> Tensor:
    """The product of the one result of a recipe, `[n, I]`, and a weight, `[O, I]`; neither factor is saved.

    Args:
        recipe: makes the result.
        tensors: of these; the rows come last.
        weight: `[O, I]`.
        bias: `[O]` or None.

    Returns:
        `[n, O]`.
    """
    if isinstance(weight, Tensor):
        weight = RecomputedWeight(weight.detach(), (weight,), _itself, _itself)
    result: Tensor = _Product.apply(recipe, weight, weight.saved[0], bias, *tensors)
    return result


def linear(input: Tensor, weight: Tensor | RecomputedWeight, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear` in the dtype of the input; a weight that can be computed again is not saved.

    Args:
        input: `[..., I]`.
        weight: `[O, I]`.
        bias: `[O]` or None.

    Returns:
        `[..., O]`.
    """
    if isinstance(weight, Tensor):
        return nn.functional.linear(input, *_like(input, weight, bias))
    flat = input.reshape(-1, input.shape[-1])
    rows: Tensor = _Product.apply(None, weight, weight.saved[0], bias, flat)
    return rows.view(*input.shape[:-1], rows.shape[-1])


def _like(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in the dtype of an input: latent weights are in single precision, also in a model of half."""
    return weight.to(input.dtype), None if bias is None else bias.to(input.dtype)


def _itself(weight: Tensor, *saved: Tensor) -> Tensor:
    return weight


def _refuse_create_graph() -> None:
    if torch.is_grad_enabled():
        raise ModelStateError("Quantized activations and attention have no second derivative: leave out create_graph.")


class _Recompute(torch.autograd.Function):
    """The results of a recipe."""

    @staticmethod
    def forward(ctx: Any, recipe: Recipe, *tensors: Tensor) -> Results:
        ctx.save_for_backward(*tensors)
        ctx.recipe = recipe
        ctx.set_materialize_grads(False)
        return recipe.results(tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_create_graph()
        return None, *ctx.recipe.gradients(ctx.saved_tensors, ctx.needs_input_grad[1:], grads)


class _Product(torch.autograd.Function):
    """Of the result of a recipe, or of rows as they are, and a weight.

    It has the gradient of the latent weight, not of the weight: nobody else owns that one, which is overwritten.
    """

    @staticmethod
    def forward(
        ctx: Any,
        recipe: Recipe | None,
        weight: RecomputedWeight,
        latent: Tensor,
        bias: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*weight.saved, *tensors)
        ctx.recipe, ctx.of_weight = recipe, len(weight.saved)
        ctx.weight_again, ctx.latent_gradient, ctx.dtype = weight.function, weight.gradient, weight.weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        values = recipe.results(tensors)[0] if recipe else tensors[0]
        return nn.functional.linear(values, *_like(values, weight.weight, bias))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), saved = grads, ctx.saved_tensors
        of_weight, tensors = saved[: ctx.of_weight], saved[ctx.of_weight :]
        _, _, need_latent, need_bias, *needs = ctx.needs_input_grad
        values, back = tensors[-1], None
        if ctx.recipe or needs[-1]:
            # Under autocast the product was one of fewer bits, and so are its gradients.
            back = (grad @ ctx.weight_again(*of_weight).to(grad.dtype)).to(values.dtype)
        found = [back]
        if ctx.recipe:
            _refuse_create_graph()
            values = torch.empty_like(values, dtype=grad.dtype)
            found = ctx.recipe.gradients(tensors, needs, [back], values)
        latent_grad = None
        if need_latent:
            weight_grad = (grad.t() @ values.to(grad.dtype)).to(ctx.dtype)
            latent_grad = ctx.latent_gradient(weight_grad, *of_weight)
        bias_grad = grad.sum(0).to(ctx.bias_dtype) if need_bias else None
        return None, None, latent_grad, bias_grad, *found
