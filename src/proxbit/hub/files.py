"""The weight files of a model, and the card beside them that knows their checksums."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_model
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file, extract_commit_hash

from proxbit.errors import CheckpointError
from proxbit.hub.compat import download_arguments

__all__ = ["CARD_NAME", "check_against_card", "check_files", "read_json", "save_weights", "sha256", "weight_files"]

CARD_NAME = "quantization_card.json"
# An index of a million tensors is smaller.
_JSON_BYTES = 256 * 2**20


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


def _find_card(file: str | Path, repository: str) -> Path | None:
    """The quantization card beside a weight file; None if there is none.

    Args:
        file: on this machine.
        repository: the folder or the name on the Hub that it belongs to. Of a repository on the Hub the card is
            fetched as `from_pretrained` fetched the file: same commit, token and cache.

    Raises:
        OSError: if the Hub refuses, or cannot be reached.
    """
    beside = Path(file).with_name(CARD_NAME)
    if beside.is_file():
        return beside
    commit = extract_commit_hash(str(file), None)
    if commit is None:
        return None
    arguments = download_arguments() | {"revision": commit}
    found = cached_file(repository, CARD_NAME, _raise_exceptions_for_missing_entries=False, **arguments)
    return None if found is None else Path(found)


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


def check_against_card(files: Sequence[str | Path], repository: str) -> None:
    """Check the weight files that are about to be loaded against the quantization card beside them, if there is one.

    Args:
        files: of one checkpoint, on this machine.
        repository: the folder or the name on the Hub that they belong to.

    Raises:
        CheckpointError: naming the file.
    """
    card = _find_card(files[0], repository) if files else None
    if card is not None:
        check_files(card, files)


def _facts(card: Path) -> dict[str, tuple[int | None, str]]:
    """Bytes and checksums of a card, by file name. The rest of it is not looked at: a newer one has other fields."""
    try:
        return {name: (facts.get("bytes"), facts["sha256"]) for name, facts in read_json(card)["files"].items()}
    except (CheckpointError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{CARD_NAME} is damaged, so the weights beside it cannot be checked ({type(error).__name__}: {error}). "
            "Download or copy it again, or delete it."
        ) from error
