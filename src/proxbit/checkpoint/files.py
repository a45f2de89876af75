"""The files of a checkpoint: which they are, what their headers and JSON hold, and whether their bytes are whole."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from proxbit.errors import CheckpointError

__all__ = [
    "CARD_NAME",
    "check_files",
    "folder_files",
    "is_model_folder",
    "read_json",
    "sha256",
    "tensor_headers",
    "weight_files",
]

CARD_NAME = "quantization_card.json"
# An index of a million tensors is smaller.
_JSON_BYTES = 256 * 2**20
# Characters of the name of a file.
_NAME = 255


def is_model_folder(folder: str | Path) -> bool:
    """Whether a folder is what `save_pretrained` writes: a configuration beside safetensors."""
    folder = Path(folder)
    return (folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))


def weight_files(folder: str | Path) -> list[Path]:
    """The weight files that `save_pretrained` wrote into a folder, in the order of their names."""
    return sorted(Path(folder).glob("model*.safetensors"))


def sha256(file: str | Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits. The file is read piece by piece."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_json(file: str | Path) -> Any:
    """What a JSON file beside the weights holds.

    Raises:
        CheckpointError: naming the file, if it cannot be read, is no JSON, or is too large or too deep for what is
            written there.
    """
    file = Path(file)
    if not file.is_file():  # A pipe would be waited for.
        raise CheckpointError(f"{file.name} cannot be read: there is no such file.")
    try:
        with open(file, "rb") as stream:
            content = stream.read(_JSON_BYTES + 1)
        if len(content) > _JSON_BYTES:
            raise CheckpointError(f"{file.name} is damaged: it has more than {_JSON_BYTES:,} bytes.")
        return json.loads(content)
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file.name} cannot be read ({type(error).__name__}: {error}). Download or copy it again."
        ) from error


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


def check_files(card: str | Path, files: Sequence[str | Path]) -> None:
    """Check that weight files hold the bytes that a quantization card says.

    Args:
        card: the card's file.
        files: weight files; the card knows them by their names.

    Raises:
        CheckpointError: naming the file.
    """
    known = _facts(Path(card))
    drop = f"If that is on purpose, delete {CARD_NAME}: it describes other weights."
    for file in map(Path, files):
        if file.name not in known:
            names = ", ".join(sorted(known)) or "no file"
            raise CheckpointError(f"{file.name} is not in {CARD_NAME} beside it, which knows {names}. {drop}")
        size, announced = known[file.name]
        # A file of another size is not read: it may be terabytes of nothing.
        is_whole = size is None or file.stat().st_size == size
        found = f"SHA-256 is {sha256(file)}" if is_whole else f"size is {file.stat().st_size} bytes"
        wanted = f"SHA-256 is {announced}" if is_whole else f"size is {size} bytes"
        if found != wanted:
            raise CheckpointError(
                f"{file.name} was changed or damaged: its {found}, and {CARD_NAME} beside it says that its {wanted}. "
                f"Download or copy it again. {drop}"
            )


def _facts(card: Path) -> dict[str, tuple[int | None, str]]:
    """Bytes and checksums of a card, by file name. The rest of it is not looked at: a newer one has other fields."""
    try:
        return {name: (facts.get("bytes"), facts["sha256"]) for name, facts in read_json(card)["files"].items()}
    except (CheckpointError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{CARD_NAME} is damaged, so the weights beside it cannot be checked ({type(error).__name__}: {error}). "
            "Download or copy it again, or delete it."
        ) from error
