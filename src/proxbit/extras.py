"""Packages that only some users need: what is missing is named together with the extra of proxbit that installs it."""

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import requires
from re import match
from types import ModuleType
from typing import Any

from proxbit.errors import MissingPackageError

__all__ = ["import_with_extras", "lazy"]

# Modules that are not named as their packages.
PACKAGES = {"PIL": "pillow", "huggingface_hub": "huggingface-hub", "yaml": "pyyaml"}


def import_with_extras(module: str, what: str) -> ModuleType:
    """Import a module of proxbit that needs optional packages.

    Args:
        module: its full name.
        what: the user's name for what is asked for, such as `proxbit.calibrate`.

    Raises:
        MissingPackageError: if a package that an extra of proxbit installs is missing.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        extras = _extras_of(PACKAGES.get(missing, missing))
        if not extras:
            raise
        raise MissingPackageError(
            f"{what} needs the package {PACKAGES.get(missing, missing)}, which is not installed: "
            f"pip install 'proxbit[{extras[0]}]', or 'proxbit[all]' for every command and the Trainer."
        ) from error


def lazy(package: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """A `__getattr__` for a package whose names are imported at first use.

    Args:
        package: its `__name__`.
        names: for each name, the module that has it.
    """

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_with_extras(names[name], f"{package}.{name}"), name)

    return find


def _extras_of(package: str) -> list[str]:
    """The extras that install a package, those for users first."""
    found = (match(rf"{package}\b(?!-).*\bextra == ['\"](\w+)['\"]", line) for line in requires("proxbit") or ())
    extras = {line[1] for line in found if line}
    return [extra for extra in ("cli", "train", "onnx", "peft") if extra in extras]
