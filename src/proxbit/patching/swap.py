"""Putting one module in the place of another."""

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


def swap(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another, also where other modules hold it beside their registered children; its
    hooks stay.

    Some layers of transformers call their children from a list, as in the feature pyramid of MaskFormer: what is
    registered under the name alone would be saved, and never run.

    Args:
        model: changed in place.
        name: of the module that goes, as in `model.named_modules()`.
        module: what comes in its place.

    Raises:
        AttributeError: if there is no module of that name.
    """
    old = model.get_submodule(name)
    model.set_submodule(name, module)
    vars(module).update({hooks: vars(old)[hooks] for hooks in _HOOKS})
    for holder in model.modules():
        if holder is not module:  # which may keep the old one
            for key, value in vars(holder).items():
                vars(holder)[key] = _with(value, old, module)


def _with(value: Any, old: nn.Module, new: nn.Module, depth: int = 2) -> Any:
    """A value with another module, as far as two containers deep: lists and dictionaries stay the same objects."""
    if value is old:
        return new
    parts = list(value.values()) if type(value) is dict else value if type(value) in (list, tuple) else ()
    changed = [_with(each, old, new, depth - 1) for each in parts] if depth else []
    if all(after is before for after, before in zip(changed, parts, strict=False)):
        return value
    if type(value) is dict:
        value.update(zip(list(value), changed, strict=True))
    elif type(value) is list:
        value[:] = changed
    return tuple(changed) if type(value) is tuple else value
