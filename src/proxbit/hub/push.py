"""Uploading a packed model, or when asked a latent one, to the Hub."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from proxbit.config import QUANT_METHOD
from proxbit.errors import CheckpointError, HubError, ModelStateError
from proxbit.hub.checkpoint import tensor_headers

__all__ = ["Upload", "plan_upload", "upload"]

CONFIG, WEIGHTS, INDEX, CARD = "config.json", "model.safetensors", "model.safetensors.index.json", "README.md"

# Nothing else leaves the machine: no pickles, no states of optimizers, no checkpoints in folders of their own.
SUFFIXES = (".safetensors", ".json", ".md", ".txt")

# Of an earlier upload, what would be loaded instead of the new files, or contradict them.
REPLACED = ["model*.safetensors", "model*.safetensors.index.json", "quantization_card.json"]

AGAIN = "Run the same again: it goes on where it stopped"
ADVICE = {
    401: "the Hub does not know who you are. Run `hf auth login`, or give a token that may write (HF_TOKEN, --token)",
    403: "this token may not write there. Take a repository of your own, or a token that may write",
    404: "there is no such repository or branch, or this token does not see it",
    429: f"too many requests. {AGAIN}, later",
}


@dataclass(frozen=True)
class Upload:
    """What goes to the Hub, and where.

    Args:
        folder: where the files are.
        files: their names, and bytes.
        repo: owner/name.
        revision: the branch; None: main.
        state: "packed" or "latent".
    """

    folder: Path
    files: dict[str, int]
    repo: str
    revision: str | None
    state: str

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(self.files.values())

    @property
    def url(self) -> str:
        """Where the model will be."""
        return f"{constants.ENDPOINT}/{self.repo}" + (f"/tree/{quote(self.revision, safe='')}" if self.revision else "")


def plan_upload(
    folder: str | Path, repo: str, *, revision: str | None = None, latent: bool = False, token: str | None = None
) -> Upload:
    """Look at a folder and say what `upload` will do with it. Nothing is sent.

    Args:
        folder: what `save_pretrained` of a packed model wrote; subfolders are left where they are.
        repo: owner/name, or a name of the user's.
        revision: a branch; it is made if there is none.
        latent: whether a latent model may be uploaded.
        token: as in `huggingface_hub`; None: the one that is stored.

    Raises:
        CheckpointError: if the folder holds no model of proxbit, or not all of it.
        ModelStateError: if the model is latent, and that was not asked for.
        HubError: if the Hub is asked for the user's name, and does not give it.
    """
    folder = Path(folder)
    state = _stored_state(folder)
    if state == "latent" and not latent:
        raise ModelStateError(
            f"The model in {folder} is latent, as large as a float one. Pack it first: proxbit.pack(model)"
            ".save_pretrained(...); or, if the latent weights are to be uploaded, say so: --latent, latent=True."
        )
    _check_weights(folder, state)
    chosen = sorted(file for file in folder.iterdir() if file.is_file() and file.suffix in SUFFIXES)
    if "/" not in repo:
        with _client(repo):
            repo = f"{_api(token).whoami()['name']}/{repo}"
    return Upload(folder, {file.name: file.stat().st_size for file in chosen}, repo, revision, state)


def upload(
    planned: Upload, *, private: bool | None = None, token: str | None = None, message: str | None = None
) -> str:
    """Upload, in one commit. What is on the Hub already is not sent again, so an interrupted upload goes on.

    Args:
        planned: what to upload, and where to.
        private: whether a new repository is private; None: the default of the owner.
        token: as in `huggingface_hub`; None: the one that is stored.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        HubError: if the Hub refuses, or is not reached; it says what to do.
    """
    api = _api(token)
    with _client(planned.repo):
        api.create_repo(planned.repo, private=private, exist_ok=True)
        if planned.revision is not None:
            api.create_branch(planned.repo, branch=planned.revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=planned.repo,
            folder_path=planned.folder,
            allow_patterns=list(planned.files),
            delete_patterns=REPLACED,
            revision=planned.revision,
            commit_message=message or f"Upload a {planned.state} model",
        )
    return commit.commit_url


def _api(token: str | None) -> HfApi:
    return HfApi(token=token, library_name="proxbit", library_version=version("proxbit"))


def _stored_state(folder: Path) -> str:
    """What the configuration in a folder says that the model is."""
    try:
        stored = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("quantization_config") or {}
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no model: there is no {CONFIG}.") from None
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / CONFIG} cannot be read: {_first_line(error)}") from error
    if stored.get("quant_method") != QUANT_METHOD:
        kind = stored.get("quant_method") or "float"
        raise ModelStateError(
            f"The model in {folder} is {kind}, not one of proxbit. Pack one and save it: "
            "proxbit.pack(proxbit.binarize(model)).save_pretrained(...); any folder at all is uploaded by `hf upload`."
        )
    return str(stored.get("state"))


def _check_weights(folder: Path, state: str) -> None:
    """Check that the weights are there and whole, and packed where they should be."""
    index = folder / INDEX
    names = [WEIGHTS]
    if not (folder / WEIGHTS).is_file() and index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{INDEX} is damaged: {_first_line(error)}") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}: a model is uploaded whole, and as safetensors.")
    headers: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name in names:
        headers |= tensor_headers(folder / name)
    packed = [key for key in headers if headers[key][0] == "U8" and f"{key}_scale" in headers]
    if state == "packed" and not packed:
        raise CheckpointError(f"The configuration in {folder} says packed, but no weight in it is.")


@contextmanager
def _client(repo: str) -> Iterator[None]:
    """Make one line of whatever the client of the Hub raises."""
    try:
        yield
    except Exception as error:
        raise HubError(f"{repo} was not uploaded: {_reason(error)}.") from error


def _reason(error: BaseException) -> str:
    """What went wrong, and what to do about it: the answer of the Hub, or else the first error of the chain."""
    while not isinstance(error, HfHubHTTPError) and error.__cause__ is not None:
        error = error.__cause__
    if not isinstance(error, HfHubHTTPError):
        retry = "" if isinstance(error, ValueError | OfflineModeIsEnabled) else f". {AGAIN}"
        return f"{_first_line(error)}{retry}"
    status = error.response.status_code
    if status >= 500:
        return f"the Hub failed ({status}). {AGAIN}"
    wait = error.response.headers.get("Retry-After", "")
    return f"{ADVICE.get(status, _first_line(error))} ({status}{f'; wait {wait} s' if wait.isdigit() else ''})"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
