"""Uploading a packed model, or when asked a latent one, to the Hub."""

import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers import AutoConfig, PreTrainedModel

from proxbit.analysis.card import QuantizationCard, quantization_card
from proxbit.checkpoint.files import CARD_NAME, check_files, folder_files, read_json, tensor_headers, weight_files
from proxbit.config import QUANT_METHOD, stored_kind
from proxbit.errors import CheckpointError, ModelStateError, ProxbitError
from proxbit.foreign import first_line, printable
from proxbit.hub.client import client, one_line
from proxbit.hub.model_card import README, is_card, model_card, rename
from proxbit.hub.release import write_release
from proxbit.hub.release_files import CONFIG, check_links, code_files, is_release_file
from proxbit.patching import state_of
from proxbit.plugin.loading import UNREADABLE, class_of, load_pretrained

__all__ = ["Upload", "prepare_upload", "push", "upload"]

# Of an earlier upload, what would be loaded instead of the new files, or contradict them.
REPLACED = ["model*.safetensors", "model.safetensors.index.json"]


@dataclass(frozen=True)
class Upload:
    """What goes to the Hub, and where.

    Args:
        folder: where the files are, until `prepare_upload` ends.
        files: their names, and bytes.
        repo: owner/name.
        revision: the branch; None: main.
        state: "packed" or "latent".
        left: names of what lies in the folder that was given, and stays there.
    """

    folder: Path
    files: dict[str, int]
    repo: str
    revision: str | None
    state: str
    left: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(self.files.values())

    @property
    def url(self) -> str:
        """Where the model will be."""
        return f"{constants.ENDPOINT}/{self.repo}" + (f"/tree/{quote(self.revision, safe='')}" if self.revision else "")


@contextmanager
def prepare_upload(
    source: PreTrainedModel | str | Path,
    repo: str,
    *,
    revision: str | None = None,
    token: bool | str | None = None,
    latent: bool = False,
    processing_class: Any = None,
    run: Mapping[str, Any] | None = None,
    tags: tuple[str, ...] = (),
    max_shard_size: int | str | None = None,
) -> Iterator[Upload]:
    """Lay out what `upload` will send, as a context. No more than the user's name is asked of the Hub.

    Args:
        source: a packed model; or the folder of one. Of a folder the files of a release are taken, with the modules
            that an `auto_map` in them names, and nothing else: see `Upload.left`. Cards that it lacks are added to the
            upload, and those that it has name `repo` in the upload.
        repo: owner/name, or a name of the user's.
        revision: a branch; `upload` makes it if there is none.
        token: as in `huggingface_hub`; None: the one that is stored.
        latent: whether a latent model may be uploaded.
        processing_class: what prepares the inputs of the model, to be saved beside it.
        run: facts of the training for the cards, see `analysis.run.RUN_FIELDS`.
        tags: of the model card, if one is written, beside those that follow from the model.
        max_shard_size: of a model's weight files, as in `save_pretrained`; those of a folder stay as they are.

    Raises:
        CheckpointError: if the folder holds no model of proxbit, or not all of it, or damaged; or if one of its files
            is a link to somewhere else.
        ModelStateError: if the model is float; or latent, and that was not asked for.
        CardError: if the record of the run, or a card in the folder, is not valid.
        HubError: if the Hub is asked for the user's name, and does not give it.
    """
    state = _stored_state(Path(source)) if isinstance(source, str | Path) else state_of(source)
    if state == "latent" and not latent:
        raise ModelStateError(
            "This model is latent, as large as a float one. Pack it first, proxbit.pack(model) or `proxbit pack`; "
            "or, if the latent weights are to be uploaded, say so: --latent, latent=True."
        )
    with one_line(repo):
        validate_repo_id(repo)
        if "/" not in repo:
            repo = f"{client(token).whoami()['name']}/{repo}"
    run = {**(run or {}), "model_id": repo}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / repo.rpartition("/")[2]
        left: tuple[str, ...] = ()
        if isinstance(source, str | Path):
            left = _copy_release(Path(source), folder, processing_class, run, tags)
        else:
            write_release(
                source, folder, processing_class=processing_class, run=run, tags=tags, max_shard_size=max_shard_size
            )
        files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
        yield Upload(folder, files, repo, revision, state, left)


def upload(
    planned: Upload,
    *,
    private: bool | None = None,
    token: bool | str | None = None,
    message: str | None = None,
    description: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload, in one commit. What is on the Hub already is not sent again, so an interrupted upload goes on. A model
    card that somebody wrote there stays, and a warning says so, where the new one is made by proxbit.

    Args:
        planned: what to upload, and where to.
        private: whether a new repository is private; None: the default of the owner.
        token: as in `huggingface_hub`; None: the one that is stored.
        message, description: of the commit.
        create_pr: whether to open a pull request with the commit.

    Returns:
        The address of the commit.

    Raises:
        HubError: if the Hub refuses, or is not reached; it says what to do.
    """
    api = client(token)
    with one_line(planned.repo):
        api.create_repo(planned.repo, private=private, exist_ok=True)
        if planned.revision is not None and not planned.revision.startswith("refs/"):  # of a pull request
            api.create_branch(planned.repo, branch=planned.revision, exist_ok=True)
        names = list(planned.files)
        if README in names and _would_replace(api, planned):
            names.remove(README)
            stays = f"The {README} of {planned.repo} is no model card of proxbit, and stays"
            warnings.warn(f"{stays}: delete it there for a new one.", stacklevel=3)
        commit = api.upload_folder(
            repo_id=planned.repo,
            folder_path=planned.folder,
            allow_patterns=names,
            delete_patterns=REPLACED,
            revision=planned.revision,
            commit_message=message or f"Upload a {planned.state} model",
            commit_description=description,
            create_pr=create_pr,
        )
    return commit.commit_url


def _would_replace(api: HfApi, planned: Upload) -> bool:
    """Whether a model card of proxbit would take the place of a text on the Hub that somebody wrote."""
    if not is_card((planned.folder / README).read_text(encoding="utf-8")):
        return False
    try:
        there = api.hf_hub_download(planned.repo, README, revision=planned.revision)
    except EntryNotFoundError:
        return False
    return not is_card(Path(there).read_text(encoding="utf-8", errors="replace"))


def push(
    source: PreTrainedModel | str | Path,
    repo: str,
    *,
    private: bool | None = None,
    message: str | None = None,
    description: str | None = None,
    create_pr: bool = False,
    token: bool | str | None = None,
    **preparation: Any,
) -> str:
    """Upload a packed model, or the folder of one, to the Hub: weights, configuration, preprocessor and cards.

    Args:
        source, repo, token: see `prepare_upload`.
        private, message, description, create_pr: see `upload`.
        **preparation: `revision`, `latent`, `processing_class`, `run`, `tags` and `max_shard_size`; see
            `prepare_upload`.

    Returns:
        The address of the commit.

    Raises:
        ProxbitError: see `prepare_upload` and `upload`.
    """
    with prepare_upload(source, repo, token=token, **preparation) as planned:
        return upload(
            planned, private=private, token=token, message=message, description=description, create_pr=create_pr
        )


def _stored_state(folder: Path) -> str:
    """What the configuration in a folder says that the model is."""
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} holds no model: there is no {CONFIG}.")
    found = read_json(folder / CONFIG)
    if not isinstance(found, dict):
        raise CheckpointError(f"{folder / CONFIG} is damaged: it is no configuration of a model.")
    kind, state = stored_kind(found.get("quantization_config"), str(folder / CONFIG))
    if kind != QUANT_METHOD:
        raise ModelStateError(
            f"The model in {folder} is {kind}, not one of proxbit. Pack one and save it: "
            "proxbit.pack(proxbit.binarize(model)).save_pretrained(...); any folder at all is uploaded by `hf upload`."
        )
    return str(state)


def _copy_release(
    source: Path, folder: Path, processing_class: Any, run: Mapping[str, Any], tags: tuple[str, ...]
) -> tuple[str, ...]:
    """Copy a release, and what makes a folder that `save_pretrained` wrote into one; tell what was left out."""
    names = _release_of(source)
    folder.mkdir()
    for name in names:
        shutil.copyfile(source / name, folder / name)
    _complete(source, folder, processing_class, run, tags)
    others = [file for file in sorted(source.iterdir()) if file.name not in names]
    return tuple(f"{file.name}/" if file.is_dir() else file.name for file in others)


def _release_of(source: Path) -> list[str]:
    """The names of the files that make up the release in a folder."""
    weights = folder_files(source)
    for file in weights:
        tensor_headers(file)
    taken = {file.name for file in weights}
    if "model.safetensors" not in taken:
        taken.add("model.safetensors.index.json")
    code = code_files(source)
    for name, named_by in code.items():
        if not (source / name).is_file():
            raise CheckpointError(
                f"{printable(name)} is not in {source}, and {named_by} there names it: what is uploaded could not be "
                "loaded. Put the file there, or load the model and upload that, proxbit.push(model, ...)."
            )
    found = [file.name for file in source.iterdir() if is_release_file(file.name) and file.is_file()]
    names = sorted({name for name in found if not name.startswith("model") or name in taken} | code.keys())
    check_links(source, names)
    return names


def _complete(source: Path, folder: Path, processing_class: Any, run: Mapping[str, Any], tags: tuple[str, ...]) -> None:
    """Add what the copy of a folder lacks to a release."""
    if processing_class is not None:
        processing_class.save_pretrained(folder)
    weights = weight_files(folder)
    if (folder / CARD_NAME).is_file():
        check_files(folder / CARD_NAME, weights)
        _name_cards(folder, run["model_id"])
    missing = [name for name in (CARD_NAME, README) if not (folder / name).is_file()]
    if not missing:
        return
    model = _load(source)
    if CARD_NAME in missing:
        quantization_card(model, run=run, files=weights).save(folder)
    if README in missing:
        processor = next(folder.glob("*processor_config.json"), None)
        card = QuantizationCard.load(folder)
        text = model_card(model, card, run=run, name=folder.name, processing_class=processor, tags=tags)
        text.save(folder / README)


def _name_cards(folder: Path, repo: str) -> None:
    """Write the place on the Hub into the cards of a release, which was written before it had one."""
    card, readme = QuantizationCard.load(folder), folder / README
    replace(card, model_id=repo).save(folder)
    if readme.is_file():
        text = rename(readme.read_bytes().decode("utf-8"), card.model_id, repo)
        readme.write_bytes(text.encode("utf-8"))


def _load(folder: Path) -> PreTrainedModel:
    """The model of a folder, in the class that its configuration names."""
    try:
        config = load_pretrained(AutoConfig, folder)
        kind = class_of(config, folder)
        if kind is None:
            named = (config.architectures or ["no class"])[0]
            raise CheckpointError(
                f"{folder / CONFIG} names {named}, which transformers does not have: cards cannot be written. Load "
                "the model and upload that, proxbit.push(model, ...)."
            )
        model: PreTrainedModel = load_pretrained(kind, folder)
        return model
    except ProxbitError:
        raise
    except (*UNREADABLE, OSError) as error:
        raise CheckpointError(f"The model in {folder} cannot be loaded: {first_line(error)}.") from error
