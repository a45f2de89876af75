"""Fusing packed layers with what comes before and behind them, by watching the model run once."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from proxbit.errors import ModelStateError
from proxbit.kernels import Norm
from proxbit.nn import PackedLinear, SharedInput
from proxbit.patching.swap import swap
from proxbit.patching.targets import state_of

__all__ = ["FusedActivation", "FusedLayerNorm", "fuse_layers", "unfuse_layers"]

GELU = torch.ops.aten.gelu.default


class FusedActivation(nn.Module):
    """Stands where an activation function was that the packed layer before it computes now."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original

    def forward(self, input: Tensor) -> Tensor:
        return input


class FusedLayerNorm(nn.LayerNorm):
    """A layer normalization that the packed layers behind it compute now."""

    def forward(self, input: Tensor) -> Tensor:
        return input


def _norm_of(module: nn.LayerNorm) -> Norm:
    return Norm(module.weight, module.bias, module.eps)


@dataclass
class _Call:
    """One call of a module: by which name, on which tensor, with which result."""

    name: str
    module: nn.Module
    input: Tensor
    output: Tensor


@dataclass
class _Watch(TorchDispatchMode):
    """Every operation that reads a tensor, by the identity of the tensor, which is kept alive."""

    uses: dict[int, list[tuple[Any, bool]]] = field(default_factory=dict)
    kept: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        exact = func is GELU and (kwargs or {}).get("approximate", "none") == "none"
        for argument in torch.utils._pytree.arg_tree_leaves(*args, **(kwargs or {})):
            if isinstance(argument, Tensor):
                self.kept.append(argument)
                self.uses.setdefault(id(argument), []).append((func, exact))
        return func(*args, **(kwargs or {}))


def _run(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[list[_Call], _Watch, list[Any]]:
    """The calls of packed layers and of modules without children, in order; what reads their results; what the model
    returns."""
    calls: list[_Call] = []

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if len(args) == 1 and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                calls.append(_Call(name, module, args[0], output))

        return hook

    handles = [
        module.register_forward_hook(note(name))
        for name, module in model.named_modules()
        if isinstance(module, PackedLinear) or not any(True for _ in module.children())
    ]
    training, watch = model.training, _Watch()
    try:
        with torch.no_grad(), watch:
            returned = model.eval()(**inputs)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return calls, watch, torch.utils._pytree.tree_leaves(returned)


def _activations_to_fuse(calls: list[_Call], watch: _Watch) -> dict[str, PackedLinear]:
    """The activation modules, by name, that do nothing but the exact GELU of one packed layer each."""
    linear = {id(call.output): call for call in calls if isinstance(call.module, PackedLinear)}
    found: dict[str, PackedLinear] = {}
    refused = set()
    for call in calls:
        before = linear.get(id(call.input))
        if isinstance(call.module, PackedLinear):
            continue
        # Read once, by a GELU whose result is what the module returns: then nothing else sees the sums.
        alone = before is not None and watch.uses.get(id(call.input)) == [(GELU, True)]
        plain = not any(True for _ in call.module.parameters()) and not any(True for _ in call.module.buffers())
        once = before is not None and sum(each.module is before.module for each in calls) == 1
        bare = before is not None and isinstance(before.module, PackedLinear) and before.module.is_bare
        if alone and plain and once and bare and torch.equal(nn.functional.gelu(call.input), call.output):
            assert before is not None and isinstance(before.module, PackedLinear)
            if call.name in found:
                refused.add(call.name)
            found[call.name] = before.module
        else:
            refused.add(call.name)
    return {name: layer for name, layer in found.items() if name not in refused}


def _norms_to_fuse(calls: list[_Call], watch: _Watch, returned: list[Any]) -> dict[str, list[PackedLinear]]:
    """The layer normalizations, by name, whose results nothing but packed layers read, and these layers."""
    times: dict[int, int] = {}
    for call in calls:
        times[id(call.module)] = times.get(id(call.module), 0) + 1
    found: dict[str, list[PackedLinear]] = {}
    for call in calls:
        norm = call.module
        if type(norm) is not nn.LayerNorm or norm.weight is None or norm.bias is None or len(norm.normalized_shape) > 1:
            continue
        readers = [each.module for each in calls if each.input is call.output]
        layers = [reader for reader in readers if isinstance(reader, PackedLinear)]
        alone = len(watch.uses.get(id(call.output), [])) == len(readers) == len(layers) > 0
        alone = alone and all(layer.is_bare for layer in layers)
        once = all(times[id(module)] == 1 for module in (norm, *layers))
        if alone and once and not any(each is call.output for each in returned):
            found[call.name] = layers
    return found


def _inputs_to_share(calls: list[_Call]) -> list[list[PackedLinear]]:
    """Packed layers of one parent that are called one after the other on the same tensor, each of them once."""
    packed = [call for call in calls if isinstance(call.module, PackedLinear)]
    groups: list[list[_Call]] = []
    for call in packed:
        last = groups[-1][-1] if groups else None
        parent = call.name.rpartition(".")[0]
        if last is not None and last.input is call.input and last.name.rpartition(".")[0] == parent:
            groups[-1].append(call)
        else:
            groups.append([call])
    layers = [[call.module for call in group if isinstance(call.module, PackedLinear)] for group in groups]
    return [
        group
        for group in layers
        if SharedInput.fits(group) and all(sum(call.module is layer for call in packed) == 1 for layer in group)
    ]


def fuse_layers(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Let packed layers compute the layer normalization before them and the GELU behind them, and read together what
    they are given together.

    Args:
        model: a packed model; changed in place. Its tensors and their names stay as they are.
        inputs: keyword arguments of one forward pass, from which it is seen what follows what.

    Raises:
        ModelStateError: if the model is not packed.
    """
    if state_of(model) != "packed":
        raise ModelStateError(f"fuse takes a packed model, this one is {state_of(model)}.")
    unfuse_layers(model)
    calls, watch, returned = _run(model, inputs)
    for name, layers in _norms_to_fuse(calls, watch, returned).items():
        module = model.get_submodule(name)
        assert isinstance(module, nn.LayerNorm)
        # Its class alone changes: parameters, names and hooks stay.
        norm = partial(_norm_of, module)
        module.__class__ = FusedLayerNorm
        for layer in layers:
            layer.norm = norm
    for group in _inputs_to_share(calls):
        shared = SharedInput(group)
        for layer in group:
            layer.shared = shared
    for name, layer in _activations_to_fuse(calls, watch).items():
        layer.gelu = True
        swap(model, name, FusedActivation(model.get_submodule(name)))


def unfuse_layers(model: nn.Module) -> None:
    """Undo `fuse_layers`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, FusedActivation):
            swap(model, name, module.original)
        elif isinstance(module, FusedLayerNorm):
            module.__class__ = nn.LayerNorm  # type: ignore[assignment]
        elif isinstance(module, PackedLinear):
            module.gelu, module.norm, module.shared = False, None, None
