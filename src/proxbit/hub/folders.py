"""Checks of a checkpoint's folder before transformers reads a weight in it."""

import re
from collections.abc import Collection
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from proxbit.errors import CheckpointError
from proxbit.hub.checkpoint import tensor_headers
from proxbit.hub.files import read_json
from proxbit.packing import BITS_PER_BYTE

__all__ = ["check_folder", "check_sizes", "folder_files"]

# Characters of the name of a file.
_NAME = 255
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


def folder_files(folder: Path, variant: str | None = None, name: str | None = None) -> list[Path]:
    """The weight files of a checkpoint, of which each is a file of the folder itself.

    Args:
        folder: on this machine.
        variant: as `from_pretrained` takes it.
        name: the file or the index that `config.json` names, as `transformers_weights`.

    Raises:
        CheckpointError: if there are none, the index of shards is damaged, or it names anything else than safetensors
            of this folder.
    """
    if name is not None:
        _plain(name, "config.json")
    part = "" if variant is None else f".{variant}"
    candidates = [f"model{part}.safetensors", f"model.safetensors.index{part}.json"] if name is None else [name]
    first = next((each for each in candidates if (folder / each).is_file()), None)
    if first is None:
        others = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        found = f" It holds {', '.join(others)}: packed checkpoints are safetensors files; nothing is unpickled."
        raise CheckpointError(f"{folder} has no file {' or '.join(candidates)}.{found if others else ''}")
    if first.endswith(".safetensors"):
        return [folder / first]
    index = read_json(folder / first)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not isinstance(index.get("metadata"), dict) or not places:
        raise CheckpointError(f"{first} is damaged: it must hold `metadata` and a `weight_map` of tensors to files.")
    files = [folder / each for each in sorted({_plain(place, first) for place in places.values()})]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file.name} is missing: {first} beside it says that it holds weights.")
    return files


def _plain(name: Any, where: str) -> str:
    """The name of a safetensors file, or of an index, that leads out of no folder."""
    if isinstance(name, str) and 0 < len(name) <= _NAME and name == Path(name).name and not {"\\", "\0"} & set(name):
        if re.search(r"\.safetensors(\.index(\..+)?\.json)?$", name):
            return name
        raise CheckpointError(f"{where} names {name!r}: weights are safetensors files; nothing is unpickled.")
    raise CheckpointError(f"{where} names {str(name)[:_NAME]!r}, which is not the name of a file in the same folder.")


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
