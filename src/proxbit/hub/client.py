"""The client of the Hub, and its errors in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from proxbit.errors import HubError
from proxbit.foreign import first_line

__all__ = ["client", "one_line"]

AGAIN = "Run the same again: it goes on where it stopped"
ADVICE = {
    401: "the Hub does not know who you are. Run `hf auth login`, or give a token that may write (HF_TOKEN, --token)",
    403: "this token may not write there. Take a repository of your own, or a token that may write",
    404: "there is no such repository or branch, or this token does not see it",
    429: f"too many requests. {AGAIN}, later",
}


def client(token: bool | str | None = None) -> HfApi:
    """The client of the Hub.

    Args:
        token: as in `huggingface_hub`; None: the one that is stored.
    """
    return HfApi(token=token, library_name="proxbit", library_version=version("proxbit"))


@contextmanager
def one_line(repo: str) -> Iterator[None]:
    """Make one line of whatever the client raises, which says what to do.

    Args:
        repo: what is being uploaded to.

    Raises:
        HubError: in its place.
    """
    try:
        yield
    except Exception as error:
        raise HubError(f"{repo} was not uploaded: {_reason(error)}.") from error


def _reason(error: BaseException) -> str:
    """What went wrong, and what to do about it: the answer of the Hub, or else the first error of the chain."""
    while not isinstance(error, HfHubHTTPError | ValueError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, ValueError):  # What the client, or the Hub through it, has against a name or a model card.
        return " ".join(str(error).split()).rstrip(".")
    if isinstance(error, OfflineModeIsEnabled):
        return first_line(error)
    if not isinstance(error, HfHubHTTPError):
        return f"{first_line(error)}. {AGAIN}"
    status = error.response.status_code
    if status >= 500:
        return f"the Hub failed ({status}). {AGAIN}"
    wait = error.response.headers.get("Retry-After", "")
    return f"{ADVICE.get(status, first_line(error))} ({status}{f'; wait {wait} s' if wait.isdigit() else ''})"
