"""Models that commands read and write: a name becomes a model, a model becomes a folder."""

import os
from collections.abc import Mapping
from pathlib import Path
from textwrap import fill
from typing import Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from safetensors import SafetensorError
from torch import nn

from proxbit.checkpoint.staging import staged
from proxbit.checkpoint.weights import save_weights
from proxbit.errors import CheckpointError, ProxbitError
from proxbit.foreign import first_line, printable
from proxbit.hub.release import write_release
from proxbit.patching import state_of
from proxbit.plugin.loading import UNREADABLE, class_of, load_pretrained
from proxbit.training.sources import is_path, why_nowhere

__all__ = ["architecture", "check_new_folder", "load_model", "load_processor", "save", "save_plain"]

# What comes of a configuration that holds anything else than it should.
MISTAKES = (StrictDataclassError, *UNREADABLE)


def architecture(name: str) -> tuple[transformers.PreTrainedConfig, Any | None]:
    """The configuration of a folder or of a name on the hub, and the class that it names, if it names one.

    Raises:
        CheckpointError: if there is no such model.
    """
    if Path(name).is_file():
        raise CheckpointError(f"There is no model in {_shown(name)}: it is a file. Name the folder that it lies in.")
    options = _options(name)
    try:
        config = load_pretrained(transformers.AutoConfig, name, **options)
    except ProxbitError:
        raise
    except (*MISTAKES, OSError) as error:
        raise CheckpointError(_nowhere(name, error)) from error
    return config, class_of(config, name)


def _shown(name: str) -> str:
    return repr(printable(name))


def _options(name: str) -> dict[str, Any]:
    """With which a name is loaded: from the cache where the Hub cannot be asked.

    Raises:
        CheckpointError: if there is neither a folder nor a repository of that name.
    """
    reason = why_nowhere(name, "model")
    if reason is None:
        return {}
    if not is_path(name) and isinstance(try_to_load_from_cache(name, "config.json"), str):
        return {"local_files_only": True}
    raise CheckpointError(f"There is no model {_shown(name)}: {reason}.")


def _nowhere(name: str, error: Exception) -> str:
    """What to say where a configuration was looked for, and the search ended with this error."""
    place, reason = Path(name), first_line(error)
    if isinstance(error, StrictDataclassError):  # The second line says what, the first one only where.
        reason = " ".join(str(error).split())
    if place.is_dir() and not (place / "config.json").is_file():
        return f"There is no model in {_shown(name)}: it holds no config.json."
    if place.exists():
        return f"There is no model in {_shown(name)} that can be read: {reason}."
    private = " If it is private: `hf auth login`, or HF_TOKEN." if "private repository" in str(error) else ""
    return f"There is no model {_shown(name)}, neither in a folder nor on the hub: {reason}.{private}"


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
    options = _options(name) | changes
    loader = model_class or transformers.AutoModelForImageClassification
    try:
        model: nn.Module = load_pretrained(loader, name, dtype=dtype, use_safetensors=True, **options)
    except ProxbitError:
        raise
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"The weights of {_shown(name)} cannot be read from safetensors: {first_line(error)}."
        ) from error
    except MISTAKES as error:
        mismatch = "the weights have other sizes than its config.json says, see above"
        reason = mismatch if "ignore_mismatched_sizes" in str(error) else first_line(error)
        raise CheckpointError(f"The model of {_shown(name)} cannot be made: {reason}.") from error
    return model.eval()


def load_processor(name: str) -> Any | None:
    """The image processor that lies beside a model, or None.

    Raises:
        CheckpointError: if there is one in the folder, which cannot be read; or neither such a folder nor a repository.
    """
    options = _options(name)
    try:
        return load_pretrained(transformers.AutoImageProcessor, name, **options)
    except ProxbitError:
        raise
    except (*MISTAKES, OSError) as error:
        file = Path(name) / "preprocessor_config.json"
        if file.is_file():
            raise CheckpointError(f"{file} cannot be read: {first_line(error)}.") from error
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
        save_weights(model, made)
        if processor is not None:
            processor.save_pretrained(made)


def save(model: Any, processor: Any | None, folder: Path, run: Mapping[str, Any] | None = None) -> None:
    """Write a model, and its image processor where it has one, as `from_pretrained` reads them; print what was done.

    Args:
        model: a latent or packed one is written as a release, with its cards.
        processor: of its images.
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
