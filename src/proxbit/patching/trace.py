"""A trace of one forward pass: which module is given which tensor, and what reads the result."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from proxbit.nn import BinaryLayer, evaluating

__all__ = ["IMAGE_ERRORS", "Call", "Trace", "Use", "blank_image", "norms_before", "trace"]

# What a model raises that does not take an image alone, or not such a one.
IMAGE_ERRORS = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError)

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
class Trace:
    """One forward pass. Modules are 1-bit layers, whatever they hold, and modules without children.

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


class _Tracer(TorchDispatchMode):
    """Notes every operation and, with its hooks, every call."""

    def __init__(self) -> None:
        super().__init__()
        self.trace = Trace()
        self.within: list[nn.Module] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        leaves = torch.utils._pytree.arg_tree_leaves(*args, **options)
        tensors = tuple(each for each in leaves if isinstance(each, Tensor))
        result = func(*args, **options)
        made = result if isinstance(result, Tensor) else None
        for tensor in tensors:
            self.trace.keep(tensor, Use(func, options, self.within[0] if self.within else None, tensors, made))
        return result

    def hook(self, name: str, module: nn.Module) -> list[Any]:
        """Follow the calls of a module. Modules inside of it are part of it. The handles of the hooks."""

        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.within.append(module)
            self.trace.times[id(module)] += 1

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.within.pop()
            if not self.within and len(args) == 1 and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                self.trace.calls.append(Call(name, module, args[0], output))

        return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


def trace(model: nn.Module, inputs: dict[str, Tensor]) -> Trace:
    """Run a model once, in evaluation mode and without gradients.

    Args:
        model: any module; it is left as it was.
        inputs: keyword arguments of one forward pass.
    """
    mode = _Tracer()
    handles = [
        handle
        for name, module in model.named_modules()
        if isinstance(module, BinaryLayer) or not any(True for _ in module.children())
        for handle in mode.hook(name, module)
    ]
    try:
        with evaluating(model), torch.no_grad(), mode:
            returned = model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    mode.trace.returned = torch.utils._pytree.tree_leaves(returned)
    return mode.trace


def blank_image(model: nn.Module) -> dict[str, Tensor]:
    """One black image of the size, dtype and device that the model takes, as keyword arguments of its forward."""
    config = getattr(model, "config", None)
    config = getattr(config, "vision_config", config)
    of_timm = getattr(config, "pretrained_cfg", None) or {}
    side = getattr(config, "image_size", of_timm.get("input_size", 224))
    height, width = (side, side) if isinstance(side, int) else tuple(side)[-2:]
    floats = (p for p in model.parameters() if p.is_floating_point())
    like = next(floats, torch.empty(0))
    shape = (1, getattr(config, "num_channels", 3), height, width)
    return {"pixel_values": torch.zeros(shape, dtype=like.dtype, device=like.device)}


def _is_layer_norm(norm: nn.Module, call: Call) -> TypeGuard[nn.LayerNorm]:
    """Whether a call is a layer normalization of the last dimension, with a weight and a bias; also by a class that
    only computes it in its own way, as timm's does."""
    if not isinstance(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None:
        return False
    if call.input.shape[-1:] != norm.normalized_shape:
        return False
    return type(norm) is nn.LayerNorm or torch.equal(nn.LayerNorm.forward(norm, call.input), call.output)


def norms_before(trace: Trace, layers: Iterable[Layer]) -> dict[str, list[Layer]]:
    """The layer normalizations whose results go into some of the layers and nowhere else.

    Args:
        trace: one forward pass.
        layers: those that may read the result.

    Returns:
        The layers that read it, by the name of the normalization. Each of them was called once, and the normalization
        too; it has a weight and a bias, for the last dimension.
    """
    among = {id(layer): layer for layer in layers}
    found: dict[str, list[Layer]] = {}
    for call in trace.calls:
        norm = call.module
        if not _is_layer_norm(norm, call):
            continue
        read = [
            among[id(each.module)] for each in trace.calls if each.input is call.output and id(each.module) in among
        ]
        elsewhere = {id(use.within) for use in trace.uses_of(call.output)} - {id(layer) for layer in read}
        kept = any(each is call.output for each in trace.returned)
        once = all(trace.times[id(module)] == 1 for module in (norm, *read))
        if read and once and not elsewhere and not kept:
            found[call.name] = read
    return found
