"""`write_release`: the folder that is given to others, written whole or not at all."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedModel

from proxbit.analysis.card import quantization_card
from proxbit.checkpoint.files import CARD_NAME
from proxbit.checkpoint.staging import staged
from proxbit.checkpoint.weights import save_weights
from proxbit.errors import CheckpointError, ModelStateError
from proxbit.hub.model_card import README, model_card
from proxbit.hub.release_files import code_files, is_release_file
from proxbit.patching import state_of

__all__ = ["write_release"]


class _Saves(Protocol):
    def save_pretrained(self, save_directory: str | Path) -> Any: ...


def write_release(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    processing_class: _Saves | None = None,
    run: Mapping[str, Any] | None = None,
    tags: tuple[str, ...] = (),
    max_shard_size: int | str | None = None,
) -> Path:
    """Write what is needed to use a model, and to know what it is, into a folder.

    The folder holds the weights (safetensors), `config.json`, the configuration of the processor, a model card
    (`README.md`) and `quantization_card.json` with the checksums of the weights. It is written beside its place and
    renamed, so that it is there as a whole or not at all. An older release in its place is replaced. Of two processes
    that write into one folder the second waits for its turn.

    Args:
        model: a packed model; or a latent one, to be trained on.
        folder: where to; made if it does not exist.
        processing_class: the image processor or processor of the model, whose configuration is saved too.
        run: facts of the training for the cards, such as `trainer.run_record()` gives; see `analysis.run.RUN_FIELDS`.
        tags: of the model card, beside those that follow from the model.
        max_shard_size: as in `save_pretrained`.

    Returns:
        The folder.

    Raises:
        ModelStateError: if the model is float, carries an adapter, or is no model of transformers.
        CheckpointError: if the folder holds something else than a release, is the one that this is run in, or has been
            written by another process for a minute; it is left as it is.
        CardError: if the record of the run is not valid.
    """
    folder = Path(folder).absolute()
    if not isinstance(model, PreTrainedModel):
        raise ModelStateError(f"A release is loaded with from_pretrained, so a {type(model).__name__} cannot be one.")
    if state_of(model) == "float":
        raise ModelStateError("A release is packed or latent, this model is float: save it with save_pretrained.")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelStateError(
            "This model carries an adapter, which transformers would save in its place. Save that by itself, "
            "model.save_pretrained(...), or take it off first, model.delete_adapter(...)."
        )
    with staged(folder) as made:
        _check_place(folder)
        if processing_class is not None:
            processing_class.save_pretrained(made)
        card = quantization_card(model, run=run, files=save_weights(model, made, max_shard_size))
        card.save(made)
        text = model_card(model, card, run=run, name=folder.name, processing_class=processing_class, tags=tags)
        text.save(made / README)
    return folder


def _check_place(folder: Path) -> None:
    """Raise CheckpointError if there is anything that is no release."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; a release is a folder.")
    names = sorted(path.name for path in folder.iterdir())
    code: dict[str, str] = {}
    with suppress(CheckpointError):  # A release that is damaged is one nevertheless.
        code = code_files(folder)
    others = [name for name in names if not is_release_file(name) and name not in code]
    if others or (names and CARD_NAME not in names):
        what = ", ".join((others or names)[:5])
        raise CheckpointError(
            f"{folder} holds something else than a release of proxbit ({what}{', ...' if len(others) > 5 else ''}), "
            "which would be lost. Choose another folder, or empty this one."
        )
