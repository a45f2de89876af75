"""Files that are about to be loaded must be the bytes that the Hub announced, and that the quantization card says; the
client of the Hub compares no more than their number."""

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from transformers.utils.hub import cached_file, extract_commit_hash

from proxbit.checkpoint.files import CARD_NAME, check_files, sha256
from proxbit.errors import CheckpointError
from proxbit.plugin.compat import download_arguments

__all__ = ["check_against_card", "check_downloads"]


def _announced(file: Path) -> str | None:
    """What the Hub said of a cached file: sha256 if it is large, else git's sha1; None for any other file.

    In the cache of `huggingface_hub` a file is a link to `blobs/<etag>`, which may be a link itself, to a store that is
    shared between repositories and has names of another kind.
    """
    if not file.is_symlink():
        return None
    blob = Path(os.readlink(file))
    return blob.name if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob.name) else None


def _digest(file: Path, announced: str) -> str:
    """The same of the bytes that are there."""
    if len(announced) == 64:
        return sha256(file)
    data = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def check_downloads(files: Iterable[str | Path]) -> None:
    """Check the files of a checkpoint, and the JSON files beside them, against what the Hub announced.

    Args:
        files: weights. Files that are not in the cache of `huggingface_hub` are not looked at: a folder of the user's
            has nothing to compare with.

    Raises:
        CheckpointError: naming the first file with other bytes.
    """
    weights = [Path(file) for file in files]
    beside = [other for folder in {file.parent for file in weights} for other in sorted(folder.glob("*.json"))]
    for file in [*weights, *beside]:
        announced = _announced(file)
        if announced is not None and _digest(file, announced) != announced:
            raise CheckpointError(
                f"{file.name} was damaged on its way: its bytes are not those that the Hub announced ({announced}). "
                "Download it again: from_pretrained(..., force_download=True)."
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
