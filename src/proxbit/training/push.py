"""`PushingTrainer`: a Trainer of latent models that uploads packed ones."""

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
from proxbit.training.distillation import DistillationTrainer

__all__ = ["PushingTrainer"]


class PushingTrainer(DistillationTrainer):
    """A `DistillationTrainer` of a latent model. To the Hub goes what ships: the packed model, with its cards."""

    def run_record(self) -> dict[str, Any]:
        """What is known of this run, for the cards; see `analysis.run.RUN_FIELDS`."""
        raise NotImplementedError

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        latent: bool = False,
        run: Mapping[str, Any] | None = None,
    ) -> "str | Future[str] | None":
        """Upload what ships: the packed model, its configuration, the processor, and both cards.

        A copy is packed; the model of the trainer stays latent, and can be trained on. The repository is
        `args.hub_model_id`, or one of the user's that is called as the output folder is.

        Args:
            commit_message: of the commit.
            blocking: whether to return only when it is uploaded.
            token, revision, private: instead of `args.hub_token`, `args.hub_revision` and `args.hub_private_repo`.
            latent: upload the latent model instead, for others to train on.
            run: facts for the cards that `run_record` does not know, such as `{"license": "mit"}`.

        Returns:
            The address of the commit, or its future; None in all processes but the first.

        Raises:
            ConfigError: for `latent` under FSDP or ZeRO-3, where no process holds the float weights of the whole model.
            ModelStateError: if the model is no model of transformers.
            HubError: if the Hub refuses, or is not reached.
        """
        model = self.accelerator.unwrap_model(self.model)
        if latent and is_sharded(model):
            raise ConfigError(
                "No process holds the float weights of the whole model. Save it, trainer.save_model(folder); then load "
                "it in one process, and proxbit.push(model, repo, latent=True)."
            )
        packed = None if latent else packed_copy(model)  # every process has a part in it
        if not self.is_world_process_zero():
            return None
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._finish_current_push()
        upload = partial(
            push,
            packed or copy.deepcopy(model).cpu(),
            self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name,
            message=commit_message,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            private=self.args.hub_private_repo if private is None else private,
            latent=latent,
            processing_class=self.processing_class,
            run=self.run_record() | dict(run or {}),
        )
        if blocking:
            return upload()
        future = run_as_future(upload)
        self.push_in_progress = PushInProgress([future])
        return future

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """With `args.push_to_hub`, at every save: the packed model, if `args.hub_strategy` says so."""
        check_hub_strategy(self.args)  # It may have been set since.
        if self.args.hub_strategy == HubStrategy.EVERY_SAVE:
            pending = self.push_in_progress is not None and not self.push_in_progress.is_done()
            # The first process knows whether an upload is under way, and each has its part in the next one.
            if self.args.hub_always_push or not broadcast_object_list([pending])[0]:
                self.push_to_hub(f"Training in progress, step {self.state.global_step}", blocking=False)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write `README.md` into the output folder: the model card of proxbit. Arguments as in `transformers.Trainer`;
        of several data sets or tasks the first one is named.
        """
        if not self.is_world_process_zero():
            return
        given = {
            "license": license,
            "base_model": finetuned_from,
            "dataset_id": _first(dataset_tags),
            "dataset": _first(dataset),
            "dataset_config": _first(dataset_args),
        }
        run = self.run_record() | {name: value for name, value in given.items() if value is not None}
        metadata = {"language": language, "pipeline_tag": _first(tasks)}
        card = model_card(
            self.model,
            quantization_card(self.model, run=run),
            run=run,
            name=model_name or Path(self.args.output_dir).name,
            processing_class=self.processing_class,
            tags=tuple([tags] if isinstance(tags, str) else tags or ()),
            **{name: value for name, value in metadata.items() if value is not None},
        )
        card.save(Path(self.args.output_dir) / README)


def _first(values: str | list[str] | None) -> str | None:
    return next(iter(values), None) if isinstance(values, list) else values
