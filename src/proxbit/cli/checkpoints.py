"""Models that commands read and write: a name becomes a model, a model becomes a folder."""

import os
from collections.abc import Mapping
from pathlib import Path
from textwrap import fill
from typing import Any

import torch
import transformers
from rich.console import Console
from safetensors import SafetensorError
from torch import nn

from proxbit.errors import CheckpointError
from proxbit.hub.client import first_line
from proxbit.hub.release import write_release
from proxbit.hub.staging import staged
from proxbit.patching import state_of

__all__ = ["architecture", "check_new_folder", "load_model", "load_processor", "save", "save_plain"]


def architecture(name: str) -> tuple[transformers.PreTrainedConfig, Any | None]:
    """The configuration of a folder or of a name on the hub, and the class that it names, if it names one.

    Raises:
        CheckpointError: if there is no such model.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"There is no model {name!r}, neither in a folder nor on the hub: {first_line(error)}"
        ) from error
    return config, getattr(transformers, next(iter(config.architectures or []), ""), None)


def load_model(name: str, dtype: torch.dtype | str = "auto", **changes: Any) -> nn.Module:
    """The model of a folder or of the hub, in any state and in the class that its configuration names.

    Args:
        name: a folder, or a name on the hub.
        dtype: of the floats; "auto" is that of the file.
        **changes: further arguments of `from_pretrained`.

    Raises:
        CheckpointError: if there is no such model, or its weights are missing, damaged or not in safetensors.
    """
    _, model_class = architecture(name)
    loader = model_class or transformers.AutoModelForImageClassification
    try:
        model: nn.Module = loader.from_pretrained(name, dtype=dtype, use_safetensors=True, **changes)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"The weights of {name!r} cannot be read from safetensors: {first_line(error)}"
        ) from error
    return model.eval()


def load_processor(name: str) -> Any | None:
    """The image processor that lies beside a model, or None."""
    try:
        return transformers.AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError):
        return None


def check_new_folder(folder: Path) -> None:
    """Raise CheckpointError unless a folder can be made there, or is there and empty."""
    if folder.is_dir() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} is a folder with files in it; nothing is overwritten. Name a new folder.")
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; name a new folder.")
    above = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise CheckpointError(f"{folder} cannot be made: {above} is no folder that can be written to.")


def save_plain(model: Any, processor: Any | None, folder: Path) -> None:
    """Write a model, and its image processor where it has one, without cards: the whole folder or nothing."""
    with staged(folder.absolute()) as made:
        model.save_pretrained(made)
        if processor is not None:
            processor.save_pretrained(made)


def save(model: Any, processor: Any | None, folder: Path, run: Mapping[str, Any] | None = None) -> None:
    """Write a model, and its image processor where it has one, as `from_pretrained` reads them; print what was done.

    Args:
        model: a latent or packed one is written as a release, with its cards.
        processor: of its pictures.
        folder: new.
        run: facts of the training, for the cards.
    """
    if state_of(model) == "float":
        save_plain(model, processor, folder)
    else:
        write_release(model, folder, processing_class=processor, run=run)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    console = Console()
    for line in (*str(model.binarization_report).splitlines(), f"Wrote {folder}, {size:,} bytes"):
        if console.is_terminal:
            line = fill(line, console.width, subsequent_indent="    ", break_on_hyphens=False)
        console.print(line, highlight=False, markup=False, soft_wrap=True)
