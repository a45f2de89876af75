"""What makes a checkpoint of a training complete: a manifest of its files, written last, and one rename."""

import json
import logging
import re
import shutil
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from proxbit.checkpoint.files import is_model_folder, read_json, sha256
from proxbit.checkpoint.staging import put
from proxbit.errors import CheckpointError
from proxbit.foreign import printable
from proxbit.plugin.loading import load_weights
from proxbit.plugin.sharded import is_sharded

__all__ = [
    "MANIFEST",
    "STAGING",
    "check_checkpoint",
    "check_place",
    "check_resumable",
    "check_start",
    "checkpoint_to_resume",
    "clear",
    "commit",
    "load_renamed",
    "new_staging",
    "read_resumed",
    "recover",
    "resume_from",
    "rotate",
    "write_manifest",
]

MANIFEST = "proxbit_manifest.json"
# Checkpoints are written in here, each run in a folder of its own. The Trainer's uploads leave out names that begin so.
STAGING = "_proxbit_saving"
_RUN = re.compile("[0-9a-f]{8}")
ASIDE = "replaced"
FORMAT = 1

# What a training that goes on needs beside weights, and how the names of its files begin: of the Trainer, FSDP (which
# has folders), and DeepSpeed, which keeps optimizer and scheduler in a folder of the step.
PARTS = {
    "optimizer": ("optimizer", "global_step"),
    "scheduler": ("scheduler", "global_step"),
    "random state": ("rng_state",),
    "state of the Trainer": (TRAINER_STATE_NAME,),
}
# Words of a command line for what `resume_from_checkpoint` takes beside folders.
WORDS = {"true": True, "last": True, "false": None}

logger = logging.getLogger(__name__)


def write_manifest(folder: Path) -> None:
    """Write down name, size in bytes and SHA-256 of every file in a folder, at any depth: it is complete now."""
    files = {name: {"size": file.stat().st_size, "sha256": sha256(file)} for name, file in _files(folder).items()}
    text = json.dumps({"format": FORMAT, "files": files}, indent=1, sort_keys=True)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def check_checkpoint(folder: Path) -> None:
    """Check that a checkpoint is what its manifest says. Files that the manifest does not know may be there too.

    Raises:
        CheckpointError: saying which file is missing, or has another size or checksum; or that there is no manifest.
    """
    known, files = _manifest(folder), _files(folder)
    for name, facts in known.items():
        if name not in files:
            raise CheckpointError(f"{name} is missing")
        if files[name].stat().st_size != facts["size"]:
            size = files[name].stat().st_size
            raise CheckpointError(f"{name} has {size:,} bytes, and {facts['size']:,} by its manifest")
    for name, facts in known.items():
        try:
            found = sha256(files[name])
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read: {error}") from error
        if found != facts["sha256"]:
            raise CheckpointError(f"{name} is damaged: its SHA-256 is not that of its manifest")


def check_resumable(folder: Path) -> None:
    """Check that a checkpoint holds more than weights: all that a training needs to go on as if it had not stopped.

    Raises:
        CheckpointError: naming what is not there, such as all but the weights with `save_only_model=True`.
    """
    names = [path.name for path in folder.iterdir()]
    missing = [what for what, starts in PARTS.items() if not any(name.startswith(starts) for name in names)]
    if missing:
        raise CheckpointError(f"it holds no {', '.join(missing)} (save_only_model=True leaves them out)")


def resume_from(wanted: str | bool | None) -> str | bool | None:
    """What `resume_from_checkpoint` means: "last" and "true", in any case, are True, and "false" is None."""
    return WORDS.get(wanted.lower(), wanted) if isinstance(wanted, str) else wanted or None


def check_start(output_dir: Path, wanted: str | bool | None) -> None:
    """Check, before anything is read, that a command which trains into a folder means what lies there.

    Args:
        output_dir: of the training.
        wanted: as `resume_from_checkpoint`.

    Raises:
        CheckpointError: if nothing is to be resumed, and checkpoints lie there; or what was named is no checkpoint.
    """
    found = _checkpoints(output_dir)
    if wanted is None and found:
        raise CheckpointError(
            f"{printable(output_dir)} holds a training with {found[-1].name}; nothing is overwritten. To go on from "
            "its last checkpoint: --resume_from_checkpoint last. To begin anew: name a new folder."
        )
    if isinstance(wanted, str) and not is_model_folder(wanted):
        raise CheckpointError(
            f"resume_from_checkpoint: {printable(wanted)!r} is no checkpoint. Name a folder, or `last` for the last "
            "one of the output folder."
        )


def new_staging() -> str:
    """A folder for one run to save in, relative to the output folder: no other run writes there."""
    return f"{STAGING}/{uuid.uuid4().hex[:8]}"


def clear(staging: Path) -> None:
    """Delete the staging folder of a run, as far as it can be deleted, and the one that those of all runs lie in."""
    shutil.rmtree(staging, ignore_errors=True)
    with suppress(OSError):
        staging.parent.rmdir()  # unless another run has one


def commit(staging: Path, output_dir: Path, name: str) -> Path:
    """Make a checkpoint in the staging folder complete, and put it in its place with one rename.

    Args:
        staging: of this run; gone afterwards.
        output_dir: of the training.
        name: of the checkpoint, such as "checkpoint-500"; an older one of this name is replaced.

    Returns:
        Its folder.
    """
    write_manifest(staging / name)
    put(staging / name, output_dir / name, staging / ASIDE)
    clear(staging)
    return output_dir / name


def rotate(output_dir: Path, limit: int | None, keep: set[str | None]) -> None:
    """Delete the oldest checkpoints, as far as they can be deleted.

    Each is moved into a staging folder first: none is ever there in part. What no Trainer has made stays, whatever it
    is called.

    The Trainer's own rotation goes by numbers where times are close: behind a damaged checkpoint with a higher number,
    which was passed over, it would delete the new ones.

    Args:
        output_dir: of the training.
        limit: how many stay. None or not positive: all.
        keep: the folders that stay in any case: the last one, and the best.
    """
    made = [folder for folder in _checkpoints(output_dir) if _is_of_a_trainer(folder)]
    found = sorted(made, key=lambda folder: folder.stat().st_mtime_ns)
    spare = [folder for folder in found if str(folder) not in keep]
    too_many = 0 if limit is None or limit <= 0 else max(0, len(found) - limit)
    for folder in spare[:too_many]:
        staging = output_dir / new_staging()
        with suppress(OSError):
            staging.mkdir(parents=True)
            folder.rename(staging / folder.name)
            clear(staging)


def _is_of_a_trainer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (MANIFEST, TRAINER_STATE_NAME))


def recover(output_dir: Path, alone: bool = True) -> None:
    """Clear away what a training that was killed in the middle of a save has left; say so in a line of the log.

    A checkpoint that was complete, and had not been renamed yet, is put in its place.

    Args:
        output_dir: of the training.
        alone: whether no other training can be saving there, so that what is not complete will never be.
    """
    staging = output_dir / STAGING
    if not staging.is_dir():
        return
    for run in (*sorted(each for each in staging.iterdir() if _RUN.fullmatch(each.name) and each.is_dir()), staging):
        for folder in _checkpoints(run):
            _recover_one(folder, output_dir, alone)
        if alone:
            shutil.rmtree(run / ASIDE, ignore_errors=True)
        with suppress(OSError):
            run.rmdir()  # unless there is something that no save has made


def _recover_one(folder: Path, output_dir: Path, alone: bool) -> None:
    aside = folder.with_name(ASIDE)
    try:
        check_checkpoint(folder)
    except CheckpointError as error:
        if alone:
            shutil.rmtree(folder)
            logger.warning("Removed what a save that was cut short has left, %s: %s.", folder, error)
    else:
        shutil.rmtree(aside, ignore_errors=True)
        put(folder, output_dir / folder.name, aside)
        logger.warning("Put %s in its place: it was complete, but had not been renamed.", folder.name)


def check_place(output_dir: Path) -> None:
    """Raise CheckpointError if no checkpoint can be written there."""
    staging = output_dir / new_staging()
    try:
        staging.mkdir(parents=True)
        clear(staging)
    except OSError as error:
        raise CheckpointError(
            f"No checkpoint can be written into {output_dir}: {error.strerror or error}. Name another output_dir, or "
            'train without checkpoints: save_strategy="no".'
        ) from error


def checkpoint_to_resume(output_dir: Path, wanted: str | bool | None) -> str | None:
    """What a training resumes from.

    Args:
        output_dir: of the training.
        wanted: True, "true" or "last" for the last complete checkpoint in the output folder; the ones that are passed
            over are named in the log. A folder: this one; without a manifest, as the Trainer of transformers writes it,
            it is taken unchecked, with a line in the log. None or False: nothing.

    Returns:
        Its folder, or None.

    Raises:
        CheckpointError: if the folder that was named is damaged, or holds weights alone; or if none is complete.
    """
    wanted = resume_from(wanted)
    if wanted is None or wanted is False:
        return None
    if wanted is not True:
        _check_named(Path(wanted))
        return str(wanted)
    passed = []
    for folder in reversed(_checkpoints(output_dir)):
        try:
            check_checkpoint(folder)
            check_resumable(folder)
        except CheckpointError as error:
            logger.warning("Passed over %s, which is not complete: %s.", folder, error)
            passed.append(f"{folder.name} ({error})")
        else:
            return str(folder)
    others = f" Not complete: {', '.join(passed)}." if passed else ""
    raise CheckpointError(
        f"There is no complete checkpoint in {output_dir} to resume from.{others} Name a folder, or train from the "
        "start: train() without resume_from_checkpoint."
    )


def _check_named(folder: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"There is no checkpoint {folder}.")
    if STAGING in (above.name for above in folder.absolute().parents[:2]):
        raise CheckpointError(f"{folder} is what a save that was cut short has left, no checkpoint.")
    if not (folder / MANIFEST).exists():
        logger.warning("%s has no %s: whether it is complete is not known.", folder, MANIFEST)
    else:
        try:
            check_checkpoint(folder)
        except CheckpointError as error:
            raise CheckpointError(
                f"{folder} is not complete: {error}. resume_from_checkpoint=True takes the last one that is. If the "
                f"change is on purpose, delete its {MANIFEST}."
            ) from error
    try:
        check_resumable(folder)
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder} cannot be resumed from: {error}. To train on from its weights, with a learning rate and a mu "
            "that begin anew, load it with from_pretrained and leave resume_from_checkpoint out."
        ) from error


def _checkpoints(folder: Path) -> list[Path]:
    """The folders called checkpoint-N, by N."""
    found = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        prefix, _, number = path.name.rpartition("-")
        if prefix == PREFIX_CHECKPOINT_DIR and number.isdecimal() and path.is_dir():
            found[int(number)] = path
    return [found[number] for number in sorted(found)]


def _files(folder: Path) -> dict[str, Path]:
    """All files but the manifest, by their names relative to the folder."""
    found = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    return {name: found[name] for name in sorted(found) if name != MANIFEST}


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and checksum of each file, by name."""
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"it has no {MANIFEST}")
    try:
        found = read_json(folder / MANIFEST)
        version, files = found["format"], found["files"].items()
        if version == FORMAT:
            return {name: {"size": facts["size"], "sha256": facts["sha256"]} for name, facts in files}
    except (CheckpointError, TypeError, KeyError, AttributeError) as error:
        cause = error.__cause__ or error
        raise CheckpointError(f"its {MANIFEST} is damaged ({type(cause).__name__}: {cause})") from error
    raise CheckpointError(f"its {MANIFEST} has format {version}, and this version reads {FORMAT}")


def load_renamed(model: nn.Module, folder: str | Path) -> None:
    """Read the weights of a checkpoint anew, with the names that `save_pretrained` gave them: see `load_weights`.

    What is sharded over processes, or no model of transformers, is left as the Trainer has read it.
    """
    if isinstance(model, PreTrainedModel) and not is_sharded(model) and is_model_folder(folder):
        load_weights(model, folder)


def read_resumed(model: nn.Module, args: TrainingArguments, state: TrainerState) -> None:
    """Read the weights anew that a training resumes from; a line of the log says so where they are not found.

    Args:
        model: of the training.
        args: of the Trainer. A checkpoint is in its output folder, or is named by `resume_from_checkpoint`.
        state: that the Trainer has read from the checkpoint.
    """
    folders = [Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"]
    if isinstance(args.resume_from_checkpoint, str):
        folders.insert(0, Path(args.resume_from_checkpoint))
    for folder in folders:
        if (folder / TRAINER_STATE_NAME).is_file():
            stored = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
            if (stored.global_step, stored.log_history) == (state.global_step, state.log_history):
                return load_renamed(model, folder)
    logger.warning(
        "The checkpoint of step %d is not in %s: whether all of its weights were read is not known. Move it there, or "
        "name it in TrainingArguments(resume_from_checkpoint=...) too.",
        state.global_step,
        args.output_dir,
    )
