"""What a Trainer of latent models uploads: the packed model, with its cards."""

import copy
from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from huggingface_hub import run_as_future
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from proxbit.analysis.card import quantization_card
from proxbit.errors import ConfigError
from proxbit.hub.model_card import README, model_card
from proxbit.hub.push import push
from proxbit.plugin.sharded import is_sharded, packed_copy
from proxbit.training.arguments import check_hub_strategy

__all__ = ["upload", "upload_at_save", "write_model_card"]


def upload(
    trainer: Any,
    message: str | None,
    *,
    blocking: bool,
    token: str | None,
    revision: str | None,
    private: bool | None,
    latent: bool,
    run: Mapping[str, Any] | None,
) -> "str | Future[str] | None":
    """Upload the model of a `ProxConnectTrainer`: see its `push_to_hub`."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if latent and is_sharded(model):
        raise ConfigError(
            "No process holds the float weights of the whole model. Save it, trainer.save_model(folder); then load "
            "it in one process, and proxbit.push(model, repo, latent=True)."
        )
    packed = None if latent else packed_copy(model)  # every process has a part in it
    if not trainer.is_world_process_zero():
        return None
    trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
    trainer._finish_current_push()
    upload = partial(
        push,
        packed or copy.deepcopy(model).cpu(),
        trainer.hub_model_id or trainer.args.hub_model_id or Path(trainer.args.output_dir).absolute().name,
        message=message,
        token=token or trainer.args.hub_token,
        revision=revision or trainer.args.hub_revision,
        private=trainer.args.hub_private_repo if private is None else private,
        latent=latent,
        processing_class=trainer.processing_class,
        run=trainer.run_record() | dict(run or {}),
    )
    if blocking:
        return upload()
    future = run_as_future(upload)
    trainer.push_in_progress = PushInProgress([future])
    return future


def upload_at_save(trainer: Any) -> None:
    """With `args.push_to_hub`, at every save: the packed model, if `args.hub_strategy` says so."""
    args = trainer.args
    check_hub_strategy(args)  # It may have been set since.
    if args.hub_strategy == HubStrategy.EVERY_SAVE:
        pending = trainer.push_in_progress is not None and not trainer.push_in_progress.is_done()
        # The first process knows whether an upload is under way, and each has its part in the next one.
        if args.hub_always_push or not broadcast_object_list([pending])[0]:
            trainer.push_to_hub(f"Training in progress, step {trainer.state.global_step}", blocking=False)


def write_model_card(trainer: Any, facts: Mapping[str, Any], name: str | None, tags: Any, **metadata: Any) -> None:
    """Write the model card of proxbit into the output folder.

    Args:
        trainer: a `ProxConnectTrainer`.
        facts: for the record of the run, None where it knows better.
        name: of the model; None for that of the output folder.
        tags: one or several, or None.
        **metadata: of the card, None for what it finds itself.
    """
    if not trainer.is_world_process_zero():
        return
    run = trainer.run_record() | {key: value for key, value in facts.items() if value is not None}
    card = model_card(
        trainer.model,
        quantization_card(trainer.model, run=run),
        run=run,
        name=name or Path(trainer.args.output_dir).name,
        processing_class=trainer.processing_class,
        tags=tuple([tags] if isinstance(tags, str) else tags or ()),
        **{key: value for key, value in metadata.items() if value is not None},
    )
    card.save(Path(trainer.args.output_dir) / README)
