"""The weight files of a model, and the card beside them that knows their checksums."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_model
from torch import nn
from transformers import PreTrainedModel

from proxbit.errors import CheckpointError

__all__ = ["CARD_NAME", "check_files", "save_weights", "sha256", "weight_files"]

CARD_NAME = "quantization_card.json"


def weight_files(folder: str | Path) -> list[Path]:
    """The weight files that `save_pretrained` wrote into a folder, in the order of their names."""
    return sorted(Path(folder).glob("model*.safetensors"))


def sha256(file: str | Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits. The file is read piece by piece."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def save_weights(model: nn.Module, folder: str | Path) -> list[Path]:
    """Write a model into a folder, a transformers model as `save_pretrained` does, and return its weight files."""
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(folder)
    else:
        save_model(model, str(Path(folder) / "model.safetensors"), metadata={"format": "pt"})
    return weight_files(folder)


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


def _checksums(card: Path) -> dict[str, str]:
    """The checksums of a card, by file name. The rest of the card is not looked at: a newer one has other fields."""
    try:
        return {name: facts["sha256"] for name, facts in json.loads(card.read_text(encoding="utf-8"))["files"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{CARD_NAME} is damaged, so the weights beside it cannot be checked ({type(error).__name__}: {error}). "
            "Download or copy it again, or delete it."
        ) from error
