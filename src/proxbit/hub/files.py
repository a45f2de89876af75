"""The weight files of a model, and the card beside them that knows their checksums."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_model
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file, extract_commit_hash

from proxbit.errors import CheckpointError
from proxbit.hub.compat import download_arguments

__all__ = ["CARD_NAME", "check_against_card", "check_files", "save_weights", "sha256", "weight_files"]

CARD_NAME = "quantization_card.json"


def weight_files(folder: str | Path) -> list[Path]:
    """The weight files that `save_pretrained` wrote into a folder, in the order of their names."""
    return sorted(Path(folder).glob("model*.safetensors"))


def sha256(file: str | Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits. The file is read piece by piece."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def save_weights(model: nn.Module, folder: str | Path, max_shard_size: int | str | None = None) -> list[Path]:
    """Write a model into a folder, a transformers model as `save_pretrained` does, and return its weight files.

    Args:
        model: any.
        folder: exists.
        max_shard_size: of a transformers model, as in `save_pretrained`; None: its default.
    """
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(folder, **({} if max_shard_size is None else {"max_shard_size": max_shard_size}))
    else:
        save_model(model, str(Path(folder) / "model.safetensors"), metadata={"format": "pt"})
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
    known = _checksums(Path(card))
    drop = f"If that is on purpose, delete {CARD_NAME}: it describes other weights."
    for file in map(Path, files):
        if file.name not in known:
            names = ", ".join(sorted(known)) or "no file"
            raise CheckpointError(f"{file.name} is not in {CARD_NAME} beside it, which knows {names}. {drop}")
        found = sha256(file)
        if found != known[file.name]:
            raise CheckpointError(
                f"{file.name} was changed or damaged: its SHA-256 is {found}, and {CARD_NAME} beside it says "
                f"{known[file.name]}. Download or copy it again. {drop}"
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


def _checksums(card: Path) -> dict[str, str]:
    """The checksums of a card, by file name. The rest of the card is not looked at: a newer one has other fields."""
    try:
        return {name: facts["sha256"] for name, facts in json.loads(card.read_text(encoding="utf-8"))["files"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{CARD_NAME} is damaged, so the weights beside it cannot be checked ({type(error).__name__}: {error}). "
            "Download or copy it again, or delete it."
        ) from error
