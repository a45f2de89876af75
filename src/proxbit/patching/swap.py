"""Putting one module in the place of another."""

from torch import nn

__all__ = ["swap"]


def swap(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another, also in the lists that its parent keeps beside its registered children.

    Some layers of transformers call their children from such a list, as in the feature pyramid of MaskFormer: what
    is registered under the name alone would be saved, and never run.

    Args:
        model: changed in place.
        name: of the module that goes, as in `model.named_modules()`.
        module: what comes in its place.

    Raises:
        AttributeError: if there is no module of that name.
    """
    old = model.get_submodule(name)
    model.set_submodule(name, module)
    for value in vars(model.get_submodule(name.rpartition(".")[0])).values():
        if isinstance(value, list):
            value[:] = [module if each is old else each for each in value]
