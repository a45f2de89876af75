"""The weights of a model, as a checkpoint holds them: under which names, and in how many files."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from proxbit.checkpoint.files import weight_files
from proxbit.errors import CheckpointError, ConfigError
from proxbit.packing import packed_columns

__all__ = ["as_saved", "check_storable", "packed_spec", "save_weights"]


def as_saved(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model under the names that `save_pretrained` writes, of which some differ from those in memory.

    Args:
        model: a transformers model; of any other one the names stay.
        tensors: by their names in memory; those on the meta device do as well.

    Raises:
        ConfigError: if they cannot be written: weights that are stored as one tensor, and of which only some are 1-bit.
    """
    if not isinstance(model, PreTrainedModel):
        return dict(tensors)
    try:
        saved: dict[str, Tensor] = revert_weight_conversion(model, dict(tensors))
        return saved
    except RuntimeError as error:
        stored: dict[str, list[str]] = {}
        for name, tensor in tensors.items():
            for target in revert_weight_conversion(model, {name: tensor}):
                stored.setdefault(target, []).append(name)
        for names in stored.values():
            first, *others = sorted(names, key=lambda name: tensors[name].dtype != torch.uint8)
            if others and tensors[first].dtype == torch.uint8 != tensors[others[-1]].dtype:
                raise ConfigError(
                    f"{first} would be of 1 bit and {others[-1]} not, and transformers stores them as one: the packed "
                    "model could not be saved. Convert both, or name both in modules_to_not_convert."
                ) from error
        raise


def check_storable(model: PreTrainedModel, layers: Iterable[str]) -> None:
    """Check that a float model could be saved once it is packed.

    Args:
        model: float; it stays as it is.
        layers: names of those that will be 1-bit.

    Raises:
        ConfigError: as by `as_saved`.
    """
    tensors = {name: torch.empty_like(tensor, device="meta") for name, tensor in model.state_dict().items()}
    bits = {f"{name}.weight": packed_spec(tensors[f"{name}.weight"]) for name in layers}
    as_saved(model, tensors | bits)


def packed_spec(weight: Tensor) -> Tensor:
    """What stands in the file for a weight `[rows, ...]` once it is packed, without its bits."""
    rows, columns = weight.flatten(1).shape
    return torch.empty(rows, packed_columns(columns), dtype=torch.uint8, device="meta")


def save_weights(model: nn.Module, folder: str | Path, max_shard_size: int | str | None = None) -> list[Path]:
    """Write a model into a folder, a transformers model as `save_pretrained` does, and return its weight files.

    Args:
        model: any.
        folder: exists.
        max_shard_size: of a transformers model, as in `save_pretrained`; None: its default.

    Raises:
        CheckpointError: if there is no room for them.
    """
    try:
        if isinstance(model, PreTrainedModel):
            model.save_pretrained(folder, **({} if max_shard_size is None else {"max_shard_size": max_shard_size}))
        else:
            save_model(model, str(Path(folder) / "model.safetensors"), metadata={"format": "pt"})
    except SafetensorError as error:  # Such as a full disk.
        raise CheckpointError(f"The weights cannot be written into {folder}: {error}.") from error
    return weight_files(folder)
