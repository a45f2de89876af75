"""Weights of a checkpoint for a model that is there already."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from proxbit.errors import CheckpointError, ConfigError
from proxbit.hub.checkpoint import tensor_headers
from proxbit.hub.folders import folder_files
from proxbit.hub.loading import load_pretrained
from proxbit.packing import packed_columns
from proxbit.patching import check_latents

__all__ = ["as_saved", "check_storable", "is_model_folder", "load_weights", "packed_outline"]


def is_model_folder(folder: str | Path) -> bool:
    """Whether a folder is what `save_pretrained` writes: a configuration beside safetensors."""
    folder = Path(folder)
    return (folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))


def load_weights(model: PreTrainedModel, folder: str | Path) -> None:
    """Put the weights of a checkpoint into a model of the same kind and state.

    The Trainer of transformers (5.15 to 5.23 at least) reads checkpoints with `load_state_dict(strict=False)`, without
    the renaming that `save_pretrained` did, so resuming or loading the best model keeps the weights of renamed layers
    as they happen to be: https://github.com/huggingface/transformers/issues/48805. To be deleted once the oldest
    supported transformers applies weight conversions there.

    Args:
        model: float or latent; changed in place, parameters stay the same objects.
        folder: a checkpoint of the same layers and state.

    Raises:
        CheckpointError: naming the file, or what is missing, too much, or of another shape.
        LatentError: if a latent weight that was loaded cannot be binarized.
    """
    own = model.state_dict()
    names = _saved_names(model, own)
    if names is None:
        loaded = load_pretrained(type(model), folder)
        model.load_state_dict(loaded.state_dict())
        return
    found: dict[str, Tensor] = {}
    for file in folder_files(Path(folder)):
        tensor_headers(file)
        found |= {names.get(name, name): tensor for name, tensor in load_file(file).items()}
    _check_fit(found, own, set(model._keys_to_ignore_on_save or ()), folder)
    model.load_state_dict(found, strict=False)
    check_latents(model)


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
    bits = {f"{name}.weight": packed_outline(tensors[f"{name}.weight"]) for name in layers}
    as_saved(model, tensors | bits)


def packed_outline(weight: Tensor) -> Tensor:
    """What stands in the file for a weight `[rows, ...]` once it is packed, without its bits."""
    rows, columns = weight.flatten(1).shape
    return torch.empty(rows, packed_columns(columns), dtype=torch.uint8, device="meta")


def _saved_names(model: PreTrainedModel, own: dict[str, Tensor]) -> dict[str, str] | None:
    """The names of a model's tensors by those that `save_pretrained` gives them; None if it does more than rename.

    A new model from the folder would have the names too, but only the layers that the configuration knows: not a head
    of one's own, and not fewer blocks.
    """
    names = {id(tensor): name for name, tensor in own.items()}
    saved = as_saved(model, own)
    found = {name: names[id(tensor)] for name, tensor in saved.items() if id(tensor) in names}
    return found if len(found) == len(saved) == len(own) else None


def _check_fit(found: dict[str, Tensor], own: dict[str, Tensor], unsaved: set[str], folder: str | Path) -> None:
    """Check that tensors of a folder are those of a model. Of tied ones `save_pretrained` writes only one."""
    loaded = {own[name].data_ptr() for name in found if name in own}
    missing = [name for name in own.keys() - found.keys() - unsaved if own[name].data_ptr() not in loaded]
    other = [name for name in found.keys() & own.keys() if found[name].shape != own[name].shape]
    problems = {"missing": missing, "not in the model": found.keys() - own.keys(), "of another shape": other}
    told = [
        f"{', '.join(sorted(names)[:5])}{', ...' if len(names) > 5 else ''}: {what}"
        for what, names in problems.items()
        if names
    ]
    if told:
        raise CheckpointError(
            f"The weights in {folder} are not those of this model ({'; '.join(told)}). Load them into the model that "
            "was trained: the same layers, the same head, binarized in the same way."
        )
