"""Checks of packed checkpoint files, from their headers, before any weight is loaded."""

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from proxbit.errors import CheckpointError
from proxbit.nn import LatentWeight, PackedWeight, learned_modules
from proxbit.packing import packed_columns

__all__ = [
    "check_complete",
    "check_dtypes",
    "check_learned",
    "check_loaded",
    "check_packed_files",
    "check_size",
    "is_of_saved_class",
    "reset_learned",
    "tensor_headers",
]

# What a model may be larger than twice its files: the head of another task, with tens of thousands of labels.
_NEW_BYTES = 2**30
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def tensor_headers(file: str | Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every tensor of a safetensors file.

    Raises:
        CheckpointError: naming the file, if it is another kind of file or not whole.
    """
    if Path(file).suffix != ".safetensors":
        raise CheckpointError(f"{Path(file).name}: packed checkpoints are safetensors files; nothing is unpickled.")
    if not Path(file).is_file():
        raise CheckpointError(f"{Path(file).name} cannot be read: it is no file.")
    try:
        with safe_open(file, framework="pt") as tensors:
            slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118
            return {key: (piece.get_dtype(), tuple(piece.get_shape())) for key, piece in slices.items()}
    except (OSError, MemoryError, RuntimeError) as error:  # The last ones where a file is too large to be mapped.
        raise CheckpointError(f"{Path(file).name} cannot be read: {error}") from error
    except SafetensorError as error:
        raise CheckpointError(
            f"{Path(file).name} is truncated or damaged ({error}). Download or copy it again."
        ) from error


def check_packed_files(files: Sequence[str], layers: Sequence[tuple[str, PackedWeight]], whole: bool = True) -> None:
    """Check that the files hold a packed weight and a scale, of the right shapes, for every packed layer.

    Names on disk differ from those in memory, so layers and tensors are compared by shape and number. A layer that the
    files lack would otherwise be filled with arbitrary bits.

    Args:
        files: the safetensors files of the checkpoint.
        layers: names and packed layers of the model about to be filled.
        whole: whether it is of the class that was saved; the files may hold more than a part of that needs.

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
    if whole and offsets > wanted:
        raise CheckpointError(
            f"This checkpoint holds {offsets} tensors weight_offset, but its configuration asks for {wanted}."
        )
    shapes = {name: (len(layer.weight_scale), packed_columns(layer.columns)) for name, layer in layers}
    expected: Counter[tuple[int, ...]] = Counter(shapes.values())
    missing, extra = expected - found, found - expected
    if (whole and extra) or not _are_joined(missing, apart, joined.values()):
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
