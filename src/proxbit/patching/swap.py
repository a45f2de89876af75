"""Replacing submodules of a model, wherever it holds them."""

from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["swap"]

# What is asked of a module from outside; handles remove from the very dictionaries.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


# How transformers marks a module that has its weights: others are filled at random when a model around them is made.
_HAS_WEIGHTS = "_is_hf_initialized"


def swap(model: nn.Module, replacements: Mapping[str, nn.Module]) -> None:
    """Put modules in the place of others, also where modules hold them beside their registered children; hooks stay,
    and the mark of transformers that weights are there.

    Some layers of transformers call their children from a list, as in the feature pyramid of MaskFormer: what is
    registered under the name alone would be saved, and never run.

    Args:
        model: changed in place.
        replacements: what comes, by the name of the module that goes, as in `model.named_modules()`.

    Raises:
        AttributeError: if there is no module of a name; the model is then unchanged.
    """
    old = {name: model.get_submodule(name) for name in replacements}
    new = {id(old[name]): module for name, module in replacements.items()}
    for name, module in replacements.items():
        model.set_submodule(name, module)
        vars(module).update({hooks: vars(old[name])[hooks] for hooks in _HOOKS})
        tensors = (*module.parameters(), *module.buffers())
        if vars(old[name]).get(_HAS_WEIGHTS) or not any(tensor.is_meta for tensor in tensors):
            vars(module)[_HAS_WEIGHTS] = True
    replacing = {id(module) for module in replacements.values()}
    for holder in model.modules():
        if id(holder) not in replacing:  # which may keep the old one
            for key, value in vars(holder).items():
                vars(holder)[key] = _with(value, new)


def _with(value: Any, new: Mapping[int, nn.Module], depth: int = 2) -> Any:
    """A value with other modules, as far as two containers deep: lists and dictionaries stay the same objects."""
    if isinstance(value, nn.Module):
        return new.get(id(value), value)
    parts = list(value.values()) if type(value) is dict else value if type(value) in (list, tuple) else ()
    changed = [_with(each, new, depth - 1) for each in parts] if depth else []
    if all(after is before for after, before in zip(changed, parts, strict=False)):
        return value
    if type(value) is dict:
        value.update(zip(list(value), changed, strict=True))
    elif type(value) is list:
        value[:] = changed
    return tuple(changed) if type(value) is tuple else value
