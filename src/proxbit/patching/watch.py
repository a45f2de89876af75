"""Watching a model run once: which module is given which tensor, and what reads the result."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from proxbit.nn import Surroundings, evaluating

__all__ = ["Call", "Seen", "Use", "norms_before", "watch"]

Layer = TypeVar("Layer", bound=nn.Module)


class Call(NamedTuple):
    """A call of a module on one tensor, with one tensor as its result."""

    name: str
    module: nn.Module
    input: Tensor
    output: Tensor


class Use(NamedTuple):
    """An operation that reads a tensor, and the module that it is part of; None between modules.

    Attributes:
        tensors: what it reads.
        result: what it makes, if that is one tensor.
    """

    function: Any
    options: dict[str, Any]
    within: nn.Module | None
    tensors: tuple[Tensor, ...]
    result: Tensor | None


@dataclass
class Seen:
    """One forward pass. Modules are binarized linear layers, whatever they hold, and modules without children.

    Attributes:
        calls: in order.
        times: how often a module was called, with whatever arguments, by its identity.
        uses: by the identity of the tensor, which is kept alive.
        returned: the leaves of what the model returned.
    """

    calls: list[Call] = field(default_factory=list)
    times: Counter[int] = field(default_factory=Counter)
    uses: dict[int, list[Use]] = field(default_factory=dict)
    returned: list[Any] = field(default_factory=list)
    _kept: list[Tensor] = field(default_factory=list)

    def uses_of(self, tensor: Tensor) -> list[Use]:
        """What reads a tensor."""
        return self.uses.get(id(tensor), [])

    def keep(self, tensor: Tensor, use: Use) -> None:
        """Note that a tensor is read."""
        self._kept.append(tensor)
        self.uses.setdefault(id(tensor), []).append(use)


class _Watch(TorchDispatchMode):
    """Notes every operation and, with its hooks, every call."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = Seen()
        self.within: list[nn.Module] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        leaves = torch.utils._pytree.arg_tree_leaves(*args, **options)
        tensors = tuple(each for each in leaves if isinstance(each, Tensor))
        result = func(*args, **options)
        made = result if isinstance(result, Tensor) else None
        for tensor in tensors:
            self.seen.keep(tensor, Use(func, options, self.within[0] if self.within else None, tensors, made))
        return result

    def hook(self, name: str, module: nn.Module) -> list[Any]:
        """Follow the calls of a module. Modules inside of it are part of it. The handles of the hooks."""

        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.within.append(module)
            self.seen.times[id(module)] += 1

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.within.pop()
            if not self.within and len(args) == 1 and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                self.seen.calls.append(Call(name, module, args[0], output))

        return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


def watch(model: nn.Module, inputs: dict[str, Tensor]) -> Seen:
    """Run a model once, in evaluation mode and without gradients.

    Args:
        model: any module; it is left as it was.
        inputs: keyword arguments of one forward pass.
    """
    mode = _Watch()
    handles = [
        handle
        for name, module in model.named_modules()
        if isinstance(module, Surroundings) or not any(True for _ in module.children())
        for handle in mode.hook(name, module)
    ]
    try:
        with evaluating(model), torch.no_grad(), mode:
            returned = model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    mode.seen.returned = torch.utils._pytree.tree_leaves(returned)
    return mode.seen


def _is_layer_norm(norm: nn.Module, call: Call) -> TypeGuard[nn.LayerNorm]:
    """Whether a call is a layer normalization of the last dimension, with a weight and a bias; also by a class that
    only computes it in its own way, as timm's does."""
    if not isinstance(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None:
        return False
    if call.input.shape[-1:] != norm.normalized_shape:
        return False
    return type(norm) is nn.LayerNorm or torch.equal(nn.LayerNorm.forward(norm, call.input), call.output)


def norms_before(seen: Seen, layers: Iterable[Layer]) -> dict[str, list[Layer]]:
    """The layer normalizations whose results go into some of the layers and nowhere else.

    Args:
        seen: one forward pass.
        layers: those that may read the result.

    Returns:
        The layers that read it, by the name of the normalization. Each of them was called once, and the normalization
        too; it has a weight and a bias, for the last dimension.
    """
    among = {id(layer): layer for layer in layers}
    found: dict[str, list[Layer]] = {}
    for call in seen.calls:
        norm = call.module
        if not _is_layer_norm(norm, call):
            continue
        read = [among[id(each.module)] for each in seen.calls if each.input is call.output and id(each.module) in among]
        elsewhere = {id(use.within) for use in seen.uses_of(call.output)} - {id(layer) for layer in read}
        kept = any(each is call.output for each in seen.returned)
        once = all(seen.times[id(module)] == 1 for module in (norm, *read))
        if read and once and not elsewhere and not kept:
            found[call.name] = read
    return found
