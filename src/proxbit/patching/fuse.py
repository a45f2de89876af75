"""Fusing packed layers with what comes before and behind them, from a trace of one forward pass."""

from functools import partial

import torch
from torch import Tensor, nn

from proxbit.errors import ModelStateError
from proxbit.kernels import Norm
from proxbit.nn import PackedLinear, SharedInput
from proxbit.patching.selection import state_of
from proxbit.patching.swap import swap
from proxbit.patching.trace import Call, Trace, Use, norms_before, trace

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
    """A layer normalization that the packed layers behind it compute now.

    Attributes:
        original: the class that it was of.
    """

    original: type[nn.LayerNorm]

    def forward(self, input: Tensor) -> Tensor:
        return input


def _norm_of(module: nn.LayerNorm) -> Norm:
    return Norm(module.weight, module.bias, module.eps)


def _is_exact_gelu(use: Use) -> bool:
    return use.function is GELU and use.options.get("approximate", "none") == "none"


def _activations_to_fuse(seen: Trace) -> dict[str, PackedLinear]:
    """The activation modules, by name, that do nothing but the exact GELU of one packed layer each."""
    linear = {id(call.output): call for call in seen.calls if isinstance(call.module, PackedLinear)}
    found: dict[str, PackedLinear] = {}
    refused = set()
    for call in seen.calls:
        before = linear.get(id(call.input))
        if isinstance(call.module, PackedLinear):
            continue
        # Read once, by a GELU whose result is what the module returns: then nothing else sees the sums.
        alone = before is not None and [_is_exact_gelu(use) for use in seen.uses_of(call.input)] == [True]
        plain = not any(True for _ in call.module.parameters()) and not any(True for _ in call.module.buffers())
        once = before is not None and seen.times[id(before.module)] == 1
        bare = before is not None and isinstance(before.module, PackedLinear) and before.module.is_bare
        if alone and plain and once and bare and torch.equal(nn.functional.gelu(call.input), call.output):
            assert before is not None and isinstance(before.module, PackedLinear)
            if call.name in found:
                refused.add(call.name)
            found[call.name] = before.module
        else:
            refused.add(call.name)
    return {name: layer for name, layer in found.items() if name not in refused}


def _inputs_to_share(seen: Trace) -> list[list[PackedLinear]]:
    """Packed layers of one parent that are called one after the other on the same tensor, each of them once."""
    packed = [call for call in seen.calls if isinstance(call.module, PackedLinear)]
    groups: list[list[Call]] = []
    for call in packed:
        last = groups[-1][-1] if groups else None
        parent = call.name.rpartition(".")[0]
        if last is not None and last.input is call.input and last.name.rpartition(".")[0] == parent:
            groups[-1].append(call)
        else:
            groups.append([call])
    layers = [[call.module for call in group if isinstance(call.module, PackedLinear)] for group in groups]
    return [group for group in layers if SharedInput.fits(group) and all(seen.times[id(layer)] == 1 for layer in group)]


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
    seen = trace(model, inputs)
    bare = [module for module in model.modules() if isinstance(module, PackedLinear) and module.is_bare]
    for name, layers in norms_before(seen, bare).items():
        module = model.get_submodule(name)
        assert isinstance(module, nn.LayerNorm)
        # Its class alone changes: parameters, names and hooks stay.
        norm = partial(_norm_of, module)
        module.original = type(module)  # type: ignore[assignment]
        module.__class__ = FusedLayerNorm
        for layer in layers:
            layer.norm = norm
    activations = _activations_to_fuse(seen)
    for layer in activations.values():
        layer.gelu = True
    swap(model, {name: FusedActivation(model.get_submodule(name)) for name in activations})
    # Last: layers of which one has a norm or a GELU that the others have not do not fit together.
    for group in _inputs_to_share(seen):
        shared = SharedInput(group)
        for layer in group:
            layer.shared = shared


def unfuse_layers(model: nn.Module) -> None:
    """Undo `fuse_layers`."""
    fused = {name: module for name, module in model.named_modules() if isinstance(module, FusedActivation)}
    swap(model, {name: module.original for name, module in fused.items()})
    for module in model.modules():
        if isinstance(module, FusedLayerNorm):
            module.__class__ = vars(module).pop("original")
        elif isinstance(module, PackedLinear):
            module.gelu, module.norm, module.shared = False, None, None
