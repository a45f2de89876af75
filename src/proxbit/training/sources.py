"""Names of models and of sets of images: a folder, or a repository of the Hub, and whether that can be asked."""

import os
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

__all__ = ["is_path", "why_nowhere"]

SECONDS = 2.0  # for the Hub to answer


def is_path(name: str) -> bool:
    """Whether a name can only be that of a folder: no repository is called so, or the folder above it is there."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return True
    return name.startswith(("~", ".")) or os.sep in name and Path(name).parent.is_dir()


def why_nowhere(name: str, kind: str) -> str | None:
    """Why there is nothing of this name; None if there is a folder or a repository, or the Hub does not say.

    One question to the Hub in a process, which waits 2 seconds at most, spares the many that loading asks.

    Args:
        name: what a user typed.
        kind: "model" or "dataset".
    """
    place = Path(name)
    if place.exists():
        return None
    if is_path(name):
        return f"there is no folder of that name{_meant(place)}"
    refusal = _asked(name, kind)
    return None if refusal is None else refusal % _meant(place)


@cache
def _asked(name: str, kind: str) -> str | None:
    """Why there is no repository, with a place for the folder that may be meant; None if there is one, or may be."""
    try:
        HfApi().repo_info(name, repo_type=kind, timeout=SECONDS)
    except RepositoryNotFoundError as error:
        private = " If it is private: `hf auth login`, or HF_TOKEN" if error.response.status_code == 401 else ""
        return f"neither a folder of that name is there%s, nor a {kind} on the Hub.{private}"
    except HfHubHTTPError:
        return None  # It is there and says something else, which loading will meet.
    except OfflineModeIsEnabled:
        return "there is no folder of that name%s, and HF_HUB_OFFLINE keeps from asking the Hub"
    except Exception:  # Whatever the client of HTTP raises without a network.
        return "there is no folder of that name%s, and the Hub cannot be reached"
    return None


def _meant(place: Path) -> str:
    """The folder beside it that is called much the same."""
    try:
        beside = [each.name for each in place.parent.iterdir() if each.is_dir()]
    except OSError:
        return ""
    near = get_close_matches(place.name, beside, n=1)
    return f" (did you mean {str(place.parent / near[0])!r}?)" if near else ""
