"""Checks of a checkpoint: of its folder, before a weight is read; of its files, before they fill a model; and of the
model that was filled."""

import copy
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from proxbit.checkpoint.files import folder_files, tensor_headers
from proxbit.errors import CheckpointError
from proxbit.nn import LatentWeight, PackedWeight, learned_modules
from proxbit.packing import BITS_PER_BYTE, packed_columns

__all__ = [
    "check_complete",
    "check_dtypes",
    "check_folder",
    "check_learned",
    "check_loaded",
    "check_packed_files",
    "check_size",
    "check_sizes",
    "is_of_saved_class",
    "reset_learned",
]

# What a model may be larger than twice its files: the head of another task, with tens of thousands of labels.
_NEW_BYTES = 2**30
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Words in the names of those fields of a configuration that say how many layers there are.
_DEPTH = ("layers", "depth", "blocks")
# Beginnings of the names of those whose entries are the numbers of layers of stages, which add up.
_STAGES = ("depth", "num_", "n_")
# Lists up to here are not compared with the files: means of colours, identifiers of tokens.
_ANY_LENGTH = 64
# Whole numbers up to here are not compared with the files: labels of a new head, identifiers of tokens.
_ANY_SIZE = 2**24
# Tables whose keys are names that somebody gave.
_LABELS = ("id2label", "label2id")
# Ends of the names of fields that count something; of some of them there must be one.
_SIZES = ("size", "dim", "heads", "channels", "layers", "labels")
_DIVISORS = ("heads", "patch_size")


def check_folder(folder: Path, config: Any, variant: str | None = None) -> None:
    """Check the names and the headers of the weight files, and that the configuration asks for no more layers than they
    can fill: transformers makes all of them before it compares.

    Args:
        folder: of a packed or latent checkpoint, on this machine.
        config: the configuration in it.
        variant: as `from_pretrained` takes it.

    Raises:
        CheckpointError: naming the file, or the field of the configuration.
    """
    files = folder_files(folder, variant, getattr(config, "transformers_weights", None))
    tensors = sum(len(tensor_headers(file)) for file in files)
    try:
        values = config.to_dict()
    except (AttributeError, TypeError) as error:
        raise CheckpointError(f"config.json holds a value of a wrong kind ({error}).") from error
    if is_dataclass(config):  # What the class does not know reaches no layer.
        values = {field.name: values[field.name] for field in fields(config) if field.name in values}
    check_sizes(values, tensors, sum(file.stat().st_size for file in files))
    _check_patterns(getattr(config, "quantization_config", None), tensors)


def _check_length(values: Collection[Any], tensors: int, where: str, what: str = "entries") -> None:
    if len(values) > max(tensors, _ANY_LENGTH):
        raise CheckpointError(
            f"config.json: {where} has {len(values):,} {what}, but the weight files hold {tensors} tensors."
        )


def _check_patterns(stored: Any, tensors: int) -> None:
    """Check that a configuration of proxbit has no more patterns than the files have tensors."""
    values = stored if isinstance(stored, dict) else getattr(stored, "__dict__", {})
    for name in ("include", "modules_to_not_convert", "learned_attention", "overrides"):
        patterns = values.get(name)
        if isinstance(patterns, list | dict):
            _check_length(patterns, tensors, name, "patterns")


def check_sizes(values: Any, tensors: int, stored: int, where: str = "") -> None:
    """Check the whole numbers of a configuration: a layer has one tensor at least, and one axis of a tensor is not
    many times longer than all of them, nor negative.

    Args:
        values: of `config.json`, as JSON types.
        tensors: how many the files hold.
        stored: bytes of the files.
        where: the field that `values` is of.

    Raises:
        CheckpointError: naming the field.
    """
    if isinstance(values, dict):
        for key, value in values.items():
            if key not in _LABELS:
                check_sizes(value, tensors, stored, str(key))
    elif isinstance(values, list | tuple):
        _check_length(values, tensors, where)
        for value in values:
            check_sizes(value, tensors, stored, where)
        if where.startswith(_STAGES) and all(type(value) is int for value in values):
            check_sizes(sum(values), tensors, stored, where)
    elif isinstance(values, int):
        _check_number(values, tensors, stored, where)


def _check_number(value: int, tensors: int, stored: int, where: str) -> None:
    if value > tensors and any(word in where for word in _DEPTH):
        raise CheckpointError(f"config.json: {where} is {value}, but the weight files hold {tensors} tensors.")
    if where.endswith(_DIVISORS) and value == 0 or where.endswith(_SIZES) and value < 0:
        raise CheckpointError(f"config.json: {where} is {value}; it must be positive.")
    if abs(value) > BITS_PER_BYTE * stored + _ANY_SIZE:
        number = value if abs(value) < 10**20 else "beyond 10^20"
        raise CheckpointError(f"config.json: {where} is {number}, but the weight files hold {stored:,} bytes.")


def check_packed_files(files: Sequence[str], layers: Sequence[tuple[str, PackedWeight]], complete: bool = True) -> None:
    """Check that the files hold a packed weight and a scale, of the right shapes, for every packed layer.

    Names on disk differ from those in memory, so layers and tensors are compared by shape and number. A layer that the
    files lack would otherwise be filled with arbitrary bits.

    Args:
        files: the safetensors files of the checkpoint.
        layers: names and packed layers of the model about to be filled.
        complete: whether the model is of the class that was saved; the files may hold more than a part of it needs.

    Raises:
        CheckpointError: naming the file or the tensors, and what was expected.
    """
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in files:
        tensors |= tensor_headers(file)
    scales = {key.removesuffix("_scale"): shape for key, (_, shape) in tensors.items() if key.endswith(".weight_scale")}
    # transformers writes the weights of some layers as one, rows upon rows, and what else they have layer by layer.
    joined = {
        key: shape
        for key, (dtype, shape) in tensors.items()
        if key.endswith(".weight") and dtype == "U8" and len(shape) == 2 and key not in scales
    }
    found: Counter[tuple[int, ...]] = Counter()
    apart: Counter[tuple[int, ...]] = Counter()
    for key in sorted(scales):
        dtype, shape = tensors.get(key, ("missing", ()))
        if joined and dtype == "missing":
            apart[scales[key]] += 1
        elif dtype != "U8" or shape[:1] != scales[key]:
            raise CheckpointError(
                f"{key}: expected packed bits, U8 [{', '.join(map(str, scales[key]))}, ...], "
                f"beside its scales; found {dtype} {list(shape)}."
            )
        else:
            found[shape] += 1
    offsets = sum(key.endswith(".weight_offset") for key in tensors)
    wanted = sum(layer.weight_offset is not None for _, layer in layers)
    if complete and offsets > wanted:
        raise CheckpointError(
            f"This checkpoint holds {offsets} tensors weight_offset, but its configuration asks for {wanted}."
        )
    shapes = {name: (len(layer.weight_scale), packed_columns(layer.columns)) for name, layer in layers}
    expected: Counter[tuple[int, ...]] = Counter(shapes.values())
    missing, extra = expected - found, found - expected
    if (complete and extra) or not _are_joined(missing, apart, joined.values()):
        names = [name for name, shape in shapes.items() if shape in missing]
        raise CheckpointError(
            "The packed weights of this checkpoint do not fit the model: "
            f"expected {dict(missing)} ([rows, bytes]: how many), found {dict(extra + Counter(joined.values()))} "
            f"instead. Layers concerned: {', '.join(names[:5]) or 'none'}{', ...' if len(names) > 5 else ''}."
        )


def _are_joined(
    shapes: Counter[tuple[int, ...]], scales: Counter[tuple[int, ...]], joined: Iterable[tuple[int, ...]]
) -> bool:
    """Whether packed weights, and the scales of as many layers, may be those of layers of these shapes."""
    rows: Counter[tuple[int, ...]] = Counter()
    of_layers: Counter[int] = Counter()
    of_files: Counter[int] = Counter()
    for shape, number in shapes.items():
        rows[shape[:1]] += number
        of_layers[shape[1]] += number * shape[0]
    for shape in joined:
        of_files[shape[1]] += shape[0]
    return rows == scales and of_layers == of_files


def check_size(files: Sequence[str], model: nn.Module) -> None:
    """Check that a model without data, about to be filled, is not much larger than what it is filled from.

    A new head may have any size that a machine has memory for; the sizes in a damaged `config.json` may not.

    Raises:
        CheckpointError: if the model is larger than 1 GiB beyond twice the files.
    """
    stored = sum(Path(file).stat().st_size for file in files)
    wanted = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if wanted > 2 * stored + _NEW_BYTES:
        raise CheckpointError(
            f"config.json describes a model of {wanted:,} bytes, but its weight files have {stored:,} bytes."
        )


def is_of_saved_class(model: nn.Module) -> bool:
    """Whether a model is of the class that its configuration says was saved. Another may have a head of its own."""
    return type(model).__name__ in (getattr(model.config, "architectures", None) or ())


def check_complete(model: PreTrainedModel, missing: Sequence[str], stored: dict[str, Any] | None) -> None:
    """Check that a model got all of its tensors that are binarized; and, if it is of the class that was saved, all that
    this class has by itself.

    Another class may have a head of its own, and a keyword may ask for more, as `use_mask_token=True`: transformers
    fills these at random and warns, as it does for float models.

    Args:
        model: loaded from a checkpoint of proxbit.
        missing: names of the tensors that were filled at random.
        stored: what `config.json` holds.

    Raises:
        CheckpointError: naming the tensors.
    """
    layers = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, LatentWeight))
    lost = [name for name in missing if name.startswith(layers)]
    if missing and not lost and is_of_saved_class(model):
        asked = set() if stored is None else _asked_for(model, stored)
        lost = [name for name in missing if name not in asked]
    if lost:
        names = f"{', '.join(lost[:5])}{', ...' if len(lost) > 5 else ''}"
        raise CheckpointError(
            f"{names}: not in the checkpoint, which says that it is of a {type(model).__name__}. If that was made "
            "without them, load it so, as with add_pooling_layer=False; else copy the files again."
        )


def _asked_for(model: PreTrainedModel, stored: dict[str, Any]) -> set[str]:
    """The names of those tensors of a model that its class does not have by itself, with the stored configuration."""
    with torch.device("meta"):
        plain = type(model)._from_config(type(model.config).from_dict(copy.deepcopy(stored)))
    return set(model.state_dict()) - set(plain.state_dict())


def check_dtypes(model: nn.Module, wanted: Mapping[str, tuple[torch.Size, torch.dtype]]) -> None:
    """Check that what a model computes with is in a floating-point type that layers take.

    Args:
        model: after loading.
        wanted: its `outlines` before loading.

    Raises:
        CheckpointError: naming the parameter or the buffer.
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        is_float = isinstance(tensor, nn.Parameter) or (name in wanted and wanted[name][1].is_floating_point)
        if is_float and tensor.dtype not in _FLOATS:
            raise CheckpointError(
                f"{name} is {tensor.dtype} in the checkpoint; it must be one of {', '.join(map(str, _FLOATS))}."
            )


def check_loaded(layers: Sequence[tuple[str, PackedWeight]]) -> None:
    """Check that bits and scales of every packed layer came from the checkpoint.

    transformers marks what it loads, and fills a buffer that the checkpoint does not name with arbitrary bytes.

    Raises:
        CheckpointError: naming the layer and the tensor.
    """
    for name, layer in layers:
        for key, tensor in layer.state_dict(keep_vars=True).items():
            if key.startswith("weight") and not getattr(tensor, "_is_hf_initialized", False):
                raise CheckpointError(
                    f"{name}.{key} is not in the checkpoint, or has another shape there: the layer was not loaded."
                )


def check_learned(model: nn.Module) -> None:
    """Check that what a model learned beside its weights came from the checkpoint, and is finite.

    Raises:
        CheckpointError: naming the layer and the tensor.
    """
    for name, module in learned_modules(model):
        for key, parameter in module.named_parameters():
            if not getattr(parameter, "_is_hf_initialized", False):
                raise CheckpointError(f"{name}.{key} is not in the checkpoint, or has another shape there.")
            if not bool(torch.isfinite(parameter).all()):
                raise CheckpointError(f"{name}.{key} holds NaN or infinite values.")
        module.calibrated = True


def reset_learned(model: nn.Module) -> None:
    """Set what a model learns beside its weights to where it starts."""
    for _, module in learned_modules(model):
        module.reset_parameters()
