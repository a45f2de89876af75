"""`ProxConnectTrainer`: the ProxConnect++ step inside the ordinary Trainer of transformers."""

import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel, ProgressCallback, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, has_length

from proxbit.errors import ConfigError
from proxbit.nn import HALF, dtype_around, learned_modules, soft_evaluation, unrounded
from proxbit.patching import state_of
from proxbit.plugin import binarize
from proxbit.plugin.sharded import is_sharded
from proxbit.training.arguments import ProxConnectArguments
from proxbit.training.calibration import calibrate, was_calibrated
from proxbit.training.callback import ProxConnectCallback, bring_to_single, check_latent
from proxbit.training.distillation import check_arguments
from proxbit.training.lookahead import BATCHES, Lookahead, first_batches_of, is_used_up, layer_scores
from proxbit.training.losses import check_teacher
from proxbit.training.monitor import overflow_penalty
from proxbit.training.optimizer import decayed_names, separate_latents
from proxbit.training.recipes import get_recipe
from proxbit.training.recorder import choose
from proxbit.training.run_record import run_record
from proxbit.training.saving import SavingTrainer
from proxbit.training.schedule import PROGRESSIONS, LayerScores
from proxbit.training.upload import upload, upload_at_save, write_model_card

__all__ = ["ProxConnectTrainer"]

Callback = TypeVar("Callback", bound=TrainerCallback)

logger = logging.getLogger(__name__)


class ProxConnectTrainer(SavingTrainer):
    """A `Trainer` for latent models. It differs from its parent in this:

    - a `ProxConnectCallback` takes the step, with the settings of `args`, unless `callbacks` hold one;
    - latent weights are a parameter group of their own: no weight decay, a learning rate factor of their own;
    - with a teacher, the loss is mixed with distillation, see `DistillationTrainer`;
    - `evaluate` reports the hard model, which is what ships, with soft values and their gap beside it;
    - quantizers of activations and attention that have not been calibrated start from the first training examples, see
      `calibrate`;
    - layers may join in the order of a `Progression`; what it goes by is taken from the same examples, and kept in
      checkpoints;
    - with accumulators of few bits, the loss grows by what overflows, and logs hold `overflow_share`;
    - logs hold `mu`, `flip_ratio` (since the log before) and `hardening_gap`, wherever `report_to` sends them;
    - the output folder gets a `proxbit_run.jsonl`, from which `proxbit report` makes a page;
    - `run_record` tells what cards say of the training, and `create_model_card` writes the model card of proxbit;
    - `push_to_hub` uploads the packed model, with its cards;
    - a model that `calibrate` has fitted is trained with hard weights and small steps of the latents unless told
      otherwise, is evaluated before the first step, and with `load_best_model_at_end` that start is kept if it is best;
    - checkpoints are complete or not there, and nothing is lost when something breaks, see `SavingTrainer`.

    Args:
        model: a latent model, from `proxbit.binarize` or `from_pretrained(..., quantization_config=...)`; or, with
            `args.recipe`, a float model, which is made latent by the recipe. Latent weights in half precision come to
            single precision, with a line in the log. None: `model_init` makes one for each training.
        args: with the fields of the ProxConnect step.
        teacher: any model with the same labels, for distillation; it is put in evaluation mode.
        data_collator, train_dataset, eval_dataset, processing_class, model_init, *others, **kwargs: as in
            `transformers.Trainer`.

    Raises:
        ModelStateError: if the model is packed, or float and there is no recipe.
        ConfigError: if `args` are those of transformers; if the teacher is not one for the model, see
            `DistillationTrainer`; by `train`, for the schedule "aggregate" and a pair with `update_from`, for a
            `mu_start` or `mu_end` that the schedule of mu does not heed, and for a progression that goes by the loss
            where there is none.
        LatentError: if a latent weight cannot be binarized.
    """

    args: ProxConnectArguments

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: ProxConnectArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        *others: Any,
        teacher: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        args = args or ProxConnectArguments()
        check_arguments(args, ProxConnectArguments)
        if (model is None) == (model_init is None):
            raise ConfigError("ProxConnectTrainer needs a model, or model_init, which makes one: one of the two.")
        self._calibrated = False
        if model is not None:
            model = self._latent(model, args)
        data = (data_collator, train_dataset, eval_dataset, processing_class)
        super().__init__(model, args, *data, model_init, *others, teacher=teacher, **kwargs)
        self._looks_first = self._calibrated and self.eval_dataset is not None and not self.args.eval_on_start
        self.args.eval_on_start |= self._looks_first
        self._resumed = False
        self._lookahead: Lookahead | None = None
        self._calibration_samples: int | None = None
        self._other_evaluations: list[dict[str, Any]] = []
        if PROGRESSIONS.get(self.args.progression).score is not None and self._scores is None:
            self.add_callback(LayerScores())
        callback = self._callback(ProxConnectCallback)
        if callback is None:
            callback = ProxConnectCallback()
            self.add_callback(callback)
        self.proxconnect: ProxConnectCallback = callback
        self.proxconnect.follow(self.model)
        self.proxconnect.finite = self._finite
        self.proxconnect.reads_checkpoints = False  # This Trainer does.

    def _callback(self, kind: type[Callback]) -> Callback | None:
        """The callback of a kind."""
        return next((each for each in self.callback_handler.callbacks if isinstance(each, kind)), None)

    @property
    def _scores(self) -> LayerScores | None:
        """Where scores are, if the progression goes by some; restoring callbacks from a checkpoint makes it anew."""
        return self._callback(LayerScores)

    def _latent(self, model: nn.Module, args: ProxConnectArguments) -> nn.Module:
        """The model that is given, checked, and made latent if there is a recipe."""
        if state_of(model) == "float" and args.recipe is not None:
            model = binarize(model, get_recipe(args.recipe).binarization())
        check_latent(model, "ProxConnectTrainer")
        self._calibrated = was_calibrated(model)
        if self._calibrated:
            args.begin_at_calibration()
        return model

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As the Trainer's; a float model is made latent by the recipe."""
        model = self._latent(super().call_model_init(trial), self.args)
        check_teacher(model, self.teacher, self.args.distillation_weight)
        return model

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As the parent's."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.proxconnect.end_watch()

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Look at the first examples while each process still has the full model, before an engine shards it."""
        bring_to_single(self.model)
        engine = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if engine and not is_sharded(self.model) and dtype_around(self.model) in HALF:
            self.model.float()  # Engines take one dtype.
        self.proxconnect.follow(self.model)
        self._resumed = self.state.global_step > 0
        if not self._resumed:
            self._calibrate()
            self._score()
        return super()._prepare_for_training(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As the Trainer's; what is looked at before the first step is given back to a stream."""
        full: Any = self.train_dataset  # type: ignore[has-type]
        self._lookahead = Lookahead(full) if isinstance(full, IterableDataset) else None
        self.train_dataset = full if self._lookahead is None else self._lookahead
        try:
            return super().get_train_dataloader()  # type: ignore[no-any-return]
        finally:
            self.train_dataset = full

    def _first_batches(self) -> Iterable[Any]:
        return first_batches_of(self, self._lookahead)

    def _calibrate(self) -> None:
        """Start what nobody has calibrated yet from the first examples."""
        if self.train_dataset is None or all(module.calibrated for _, module in learned_modules(self.model)):
            return
        self.model.to(self.args.device)
        with torch.random.fork_rng(), self.accelerator.autocast():
            seen = BATCHES * self.args.per_device_train_batch_size
            calibrate(self.model, list(self._first_batches()), weights=False, num_images=seen)
        self._calibration_samples = min(len(self.train_dataset), seen) if has_length(self.train_dataset) else seen

    def _score(self) -> None:
        """Take what the progression goes by, before the first step; from then on checkpoints keep it."""
        score, kept = PROGRESSIONS.get(self.args.progression).score, self._scores
        if score is not None and kept is not None:
            kept.scores = layer_scores(self, score, self._first_batches())
            self.state.stateful_callbacks[LayerScores.__name__] = kept.state()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, unless all steps are done: it would take one more, in a run that resumes from its end."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def penalty(self) -> Tensor | None:
        """By how much the sums of narrow accumulators overflow, if that has a weight."""
        return self.args.overflow_penalty * overflow_penalty(self.model) if self.args.overflow_penalty else None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of the Trainer, with the latents in a last group of their own."""
        if self.optimizer is None:
            optimizer: torch.optim.Optimizer = super().create_optimizer(model)
            rate = self.args.learning_rate * self.args.latent_learning_rate_factor
            separate_latents(optimizer, self.model if model is None else model, rate)
        return self.optimizer  # type: ignore[no-any-return]

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As the Trainer's, without what is learned beside the weights: it does not decay."""
        return decayed_names(model, super().get_decay_parameter_names(model))

    def _evaluate(
        self, trial: Any, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False
    ) -> dict[str, float]:
        """As the Trainer's; the start of a calibrated model is a checkpoint, which may be the best one in the end."""
        at_start = skip_scheduler and self._calibrated
        if at_start and self._looks_first and self.state.global_step > 0:
            return {}  # A run that goes on has looked at its start.
        metrics: dict[str, float] = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        if at_start and self.args.load_best_model_at_end and self._determine_best_metric(metrics, trial):
            self._save_checkpoint(self.model_wrapped, trial)
            self.state.best_model_checkpoint = self._complete
        return metrics

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the Trainer's; remembers what is of other data than its own, of which cards tell."""
        if eval_dataset is self.eval_dataset:
            eval_dataset = None
        logged = len(self.state.log_history)
        metrics: dict[str, float] = super().evaluate(eval_dataset, *args, **kwargs)
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            self._other_evaluations += self.state.log_history[logged:]
        return metrics

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate the hard model; add `{prefix}_soft_*` of F_mu, and `{prefix}_gap_*` = soft - hard.

        The soft values are left out where the data can be read only once.
        """
        with unrounded(self.model):  # by `bf16_full_eval`
            return self._evaluate_twice(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)

    def _evaluate_twice(self, dataloader: Any, description: str, *rest: Any) -> EvalLoopOutput:
        metric_key_prefix: str = rest[-1]
        arguments = (dataloader, description, *rest)
        hard: EvalLoopOutput = super().evaluation_loop(*arguments)
        recorder = self.proxconnect.recorder
        if recorder.writes and metric_key_prefix.startswith("eval"):
            names = self.model.config.id2label if isinstance(self.model, PreTrainedModel) else {}
            recorder.keep(choose(dataloader, hard, names))
        self._close_evaluation_bar()
        if self._is_used_up(dataloader):
            logger.warning("The data of %s can be read once: soft values are left out.", description)
            return hard
        with soft_evaluation(self.model):
            soft = super().evaluation_loop(*arguments).metrics
        prefix = f"{metric_key_prefix}_"
        for key, value in soft.items():
            name = key.removeprefix(prefix)
            if key in hard.metrics and isinstance(value, float) and not name.endswith("time"):
                hard.metrics[f"{prefix}soft_{name}"] = value
                hard.metrics[f"{prefix}gap_{name}"] = value - hard.metrics[key]
        return hard

    def _is_used_up(self, dataloader: Any) -> bool:
        """Whether there is nothing left for a second pass, where the first process may read for all."""
        dataset = getattr(dataloader, "dataset", None)
        if not isinstance(dataset, IterableDataset) or dataloader.num_workers:  # which read copies
            return False
        return bool(broadcast_object_list([is_used_up(dataset)])[0])

    def _close_evaluation_bar(self) -> None:
        """The bar of the hard pass is full; the soft pass gets one of its own."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback) and callback.prediction_bar is not None:
                callback.prediction_bar.close()
                callback.prediction_bar = None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add mu, flip ratio and hardening gap to the logs of training, before any reporter has them."""
        if "loss" in logs:
            logs |= self.proxconnect.measures()
        super().log(logs, start_time)

    def run_record(self) -> dict[str, Any]:
        """What is known of this run, for `write_release` and the cards; add what only you know, such as the license.

        Returns:
            The fields of `analysis.run.RUN_FIELDS`, JSON types, None for what is unknown.
        """
        return run_record(
            self,
            self.teacher,
            self.proxconnect.schedule,
            self._calibration_samples,
            resumed=self._resumed,
            others=self._other_evaluations,
        )

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
        return upload(
            self,
            commit_message,
            blocking=blocking,
            token=token,
            revision=revision,
            private=private,
            latent=latent,
            run=run,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """With `args.push_to_hub`, once a checkpoint is complete."""
        if not self._staging:
            upload_at_save(self)

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
        facts = {
            "license": license,
            "base_model": finetuned_from,
            "dataset_id": _first(dataset_tags),
            "dataset": _first(dataset),
            "dataset_config": _first(dataset_args),
        }
        write_model_card(self, facts, model_name, tags, language=language, pipeline_tag=_first(tasks))


def _first(values: str | list[str] | None) -> str | None:
    return next(iter(values), None) if isinstance(values, list) else values
