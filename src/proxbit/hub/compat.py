"""Work-arounds for faults of dependencies, each with the issue and the condition under which it can go."""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import DistError

from proxbit.errors import CheckpointError

__all__ = [
    "download_arguments",
    "is_lost_process",
    "loaded_folder",
    "missing_tensors",
    "outlines",
    "restore_outlines",
]


def download_arguments() -> dict[str, Any]:
    """What the `from_pretrained` that is running downloads with: token, revision, cache_dir and the like.

    transformers (5.15 to 5.23 at least) gives a quantizer the files of the checkpoint, and nothing to fetch another
    file of the same repository with. To be deleted once it does.

    Returns:
        Keyword arguments of `cached_file`; none where no `from_pretrained` is running.
    """
    return dict(_running("download_kwargs") or {})


def loaded_folder() -> tuple[Path, Any, str | None] | None:
    """The folder on this machine that the `from_pretrained` that is running loads, its configuration, and the variant.

    A quantizer of transformers (5.15 to 5.23 at least) is asked before the weights are opened, but not told where they
    are; what it is told comes after an index, and where `config.json` has no dtype a weight file, was read. To be
    deleted once it is told.

    Returns:
        None where no `from_pretrained` is running, or it loads no folder.
    """
    folder, config = _running("pretrained_model_name_or_path"), _running("config")
    if folder is None or config is None or _running("gguf_file") or not Path(folder).is_dir():
        return None
    return Path(folder) / (_running("subfolder") or ""), config, _running("variant")


def missing_tensors() -> list[str]:
    """The names of the tensors that the `from_pretrained` that is running did not find in the files.

    transformers (5.15 to 5.23 at least) fills them at random and warns; a quantizer is asked afterwards, and not told.
    To be deleted once it is told.
    """
    return sorted(getattr(_running("loading_info"), "missing_keys", ()))


def _running(name: str) -> Any:
    """A variable of the innermost `from_pretrained` of a model that is running; None if there is none."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "from_pretrained" and "download_kwargs" in frame.f_locals:
            return frame.f_locals.get(name)
        frame = frame.f_back
    return None


def outlines(model: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every parameter and buffer, for `restore_outlines`."""
    return {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}


def restore_outlines(model: nn.Module, wanted: dict[str, tuple[torch.Size, torch.dtype]]) -> None:
    """Give floats that were loaded the dtype that was asked for, and refuse other shapes.

    transformers 5.15 and 5.16 take both from the file where there is a quantizer; later ones take them from the model,
    as for float models. To be deleted once the oldest supported transformers does.

    Args:
        model: after loading; changed in place.
        wanted: its `outlines` before loading.

    Raises:
        CheckpointError: naming the tensor.
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        shape, dtype = wanted.get(name, (tensor.shape, tensor.dtype))
        if tensor.shape != shape:
            raise CheckpointError(
                f"{name} is {list(tensor.shape)} in the checkpoint, and the model asks for {list(shape)}. For a new "
                "head, with other labels: pip install --upgrade transformers, and ignore_mismatched_sizes=True."
            )
        if tensor.dtype != dtype and tensor.is_floating_point() and dtype.is_floating_point:
            tensor.data = tensor.data.to(dtype)


def is_lost_process(error: BaseException) -> bool:
    """Whether a collective operation failed because another process has ended, or cannot be reached.

    For gloo torch (2.10 to 2.15 at least) raises a plain RuntimeError, whose text names the file of gloo. To be deleted
    once it raises a DistError.
    """
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))
