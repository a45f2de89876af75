"""`ProxConnectTrainer`: the ProxConnect++ step inside the ordinary Trainer of transformers."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from proxbit.errors import ConfigError, ModelStateError
from proxbit.nn import HALF, dtype_around, keep_single, latent_layers, learned_modules, soft_evaluation, unrounded
from proxbit.patching import check_latents, state_of
from proxbit.plugin import binarize
from proxbit.plugin.sharded import is_sharded
from proxbit.quantizers import AGGREGATE, CONSTANT, MuSchedule
from proxbit.training.anomalies import watch_activations
from proxbit.training.arguments import ProxConnectArguments
from proxbit.training.calibration import was_calibrated
from proxbit.training.callbacks import MuCallback, learning_rates
from proxbit.training.distillation import check_arguments
from proxbit.training.first_look import FirstLookTrainer
from proxbit.training.gallery import choose
from proxbit.training.lookahead import is_used_up
from proxbit.training.monitor import FlipCounter, hardening_gap, overflow_penalty, overflow_shares
from proxbit.training.recipes import get_recipe
from proxbit.training.recorder import RunRecorder
from proxbit.training.run_record import run_record
from proxbit.training.stages import Stage, stages

__all__ = ["ProxConnectTrainer"]

logger = logging.getLogger(__name__)


class ProxConnectTrainer(FirstLookTrainer):
    """A `Trainer` for latent models. It differs from its parent in this:

    - mu follows its schedule, a pure function of the optimizer step; the last steps are hard;
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
    _mu: MuCallback
    _recorder: RunRecorder

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
        self._followed: nn.Module | None = None
        self._calibrated = False
        if model is not None:
            model = self._latent(model, args)
        data = (data_collator, train_dataset, eval_dataset, processing_class)
        super().__init__(model, args, *data, model_init, *others, teacher=teacher, **kwargs)
        self._looks_first = self._calibrated and self.eval_dataset is not None and not self.args.eval_on_start
        self.args.eval_on_start |= self._looks_first
        self._resumed = False
        self._other_evaluations: list[dict[str, Any]] = []
        self._follow()

    def _latent(self, model: nn.Module, args: ProxConnectArguments) -> nn.Module:
        """The model that is given, checked, and made latent if there is a recipe."""
        state = state_of(model)
        if state == "float" and args.recipe is not None:
            model = binarize(model, get_recipe(args.recipe).binarization())
            state = "latent"
        if state != "latent":
            hint = (
                "A packed model cannot be trained; load its latent checkpoint instead."
                if state == "packed"
                else "Call proxbit.binarize(model, config) first, or name a recipe: ProxConnectArguments(recipe=...)."
            )
            raise ModelStateError(f"ProxConnectTrainer trains latent models, this one is {state}. {hint}")
        check_latents(model)
        self._calibrated = was_calibrated(model)
        if self._calibrated:
            args.begin_at_calibration()
        return model

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As the Trainer's; a float model is made latent by the recipe."""
        model = self._latent(super().call_model_init(trial), self.args)
        self._check_teacher(model, self.teacher, self.args.distillation_weight)
        return model

    def _follow(self) -> None:
        """Let the callbacks of the step follow the model, which `model_init` makes anew for each training."""
        if self._followed is not None:
            self.remove_callback(self._mu)
            self.remove_callback(self._recorder)
        self._followed = self.model
        self._mu = MuCallback(self.model, self._begin, self._stages)
        self._flips = FlipCounter(self.model)
        self._recorder = RunRecorder(self.model, lambda: self._flips)
        self.add_callback(self._mu)
        self.add_callback(self._recorder)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As the parent's; meanwhile, with `args.detect_anomalies`, the inputs of layers are watched."""
        with ExitStack() as stack:
            if self.args.detect_anomalies:
                stack.callback(watch_activations(self.model))
            return super().train(*args, **kwargs)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Look at the first examples while each process still has the whole model, before an engine takes it apart."""
        self._keep_single()
        if self.model_init is not None and self.model is not self._followed:
            self._follow()
        self._resumed = self.state.global_step > 0
        if not self._resumed:
            self._calibrate()
            self._score()
        return super()._prepare_for_training(*args, **kwargs)

    def _keep_single(self) -> None:
        """See that latents are in single precision, whatever was done to the model; engines take one dtype alone."""
        half = keep_single(self.model)
        if half:
            logger.warning(
                "%d latent weights and learned scales, the first %s, were in half precision, which loses small steps: "
                "they are trained in fp32. For compute in half precision: dtype=torch.float32, bf16=True.",
                len(half),
                half[0],
            )
        whole = not is_sharded(self.model)
        if (self.is_fsdp_enabled or self.is_deepspeed_enabled) and whole and dtype_around(self.model) in HALF:
            self.model.float()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, unless all steps are done: it would take one more, in a run that resumes from its end."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _load_best_model(self) -> None:
        """As the parent's; mu is that of the step which the model is of."""
        super()._load_best_model()
        self._mu.went_back(self.state.best_global_step or 0)

    def _begin(self, steps: int) -> MuSchedule:
        """Count flips from here on; return the schedule of this run, checked against the range of every pair in use."""
        self._flips = FlipCounter(self.model)
        layers = [layer for _, layer in latent_layers(self.model)]
        kind, start, end = layers[0].pair.schedule
        kind = self.args.mu_schedule or kind
        if any(layer.pair.update_from is not None for layer in layers):
            self._check_updates(kind)
        start, end = self._check_ends(kind, start, end)
        schedule = MuSchedule(
            kind=kind,
            start=start,
            end=end,
            steps=steps,
            hard_fraction=self.args.hard_fraction,
            learning_rates=learning_rates(self.lr_scheduler, steps) if kind == AGGREGATE else (),
        )
        for layer in layers:
            for step in (0, steps):
                layer.pair.check_mu(schedule.mu(step))
        return schedule

    def _check_ends(self, kind: str, start: float, end: float) -> tuple[float, float]:
        """Where mu starts and ends: what the arguments say, or else the pair. They say nothing that does nothing."""
        given = self.args.mu_start, self.args.mu_end
        start, end = (own if value is None else value for own, value in zip((start, end), given, strict=True))
        if kind == AGGREGATE and given != (None, None):
            raise ConfigError(
                "mu_schedule 'aggregate' starts at 1 and adds the learning rates up: mu_start and mu_end would do "
                "nothing. Leave them at None, or set mu_schedule to linear, log or sigmoid."
            )
        if kind == CONSTANT and given[1] not in (None, start):
            raise ConfigError(
                f"mu_schedule 'constant' (None stands for that of the pair) stays at {start:g}: mu_end={end:g} would "
                "do nothing. Leave it at None, or set mu_schedule to linear, log or sigmoid."
            )
        return start, start if kind == CONSTANT else end

    def _check_updates(self, kind: str) -> None:
        if kind == AGGREGATE:
            raise ConfigError(
                "A pair with `update_from` applies P at every step anew: with the mu of the schedule 'aggregate' it "
                "never learns. Leave mu_schedule, mu_start and mu_end at None for the default schedule of the pair."
            )
        if self.is_deepspeed_enabled:
            raise ConfigError(
                "A pair with `update_from` changes weights before each step, and DeepSpeed takes steps on a copy of "
                "its own: it would do nothing. Take another pair, or FSDP2."
            )

    def _stages(self, steps: int) -> list[Stage]:
        return stages(
            self.model,
            steps,
            activations_first=self.args.activations_first,
            progression=self.args.progression,
            scores=self._kept.scores if self._kept else {},
        )

    def penalty(self) -> Tensor | None:
        """By how much the sums of narrow accumulators overflow, if that has a weight."""
        return self.args.overflow_penalty * overflow_penalty(self.model) if self.args.overflow_penalty else None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of the Trainer, with the latents in a last group of their own."""
        if self.optimizer is not None:
            return self.optimizer  # type: ignore[no-any-return]
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        latents = {
            id(parameter)
            for _, layer in latent_layers(self.model if model is None else model)
            for name, parameter in layer.named_parameters(recurse=False)
            if name == "weight" and parameter.requires_grad
        }
        moved = []
        for group in optimizer.param_groups:
            moved += [parameter for parameter in group["params"] if id(parameter) in latents]
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in latents]
        learning_rate = self.args.learning_rate * self.args.latent_learning_rate_factor
        optimizer.add_param_group({"params": moved, "weight_decay": 0.0, "lr": learning_rate})
        return optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As the Trainer's, without what is learned beside the weights: it does not decay."""
        learned = [name for name, _ in learned_modules(model)]
        names: list[str] = super().get_decay_parameter_names(model)
        return [name for name in names if name.rpartition(".")[0] not in learned]

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
        if self._recorder.writes and metric_key_prefix.startswith("eval"):
            names = self.model.config.id2label if isinstance(self.model, PreTrainedModel) else {}
            self._recorder.evaluated(choose(dataloader, hard, names))
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
        """Add mu, flip ratio and hardening gap to the logs of training."""
        if "loss" in logs:
            layer = next(layer for _, layer in latent_layers(self.model))
            logs["mu"] = float(layer.mu)
            logs["flip_ratio"] = self._flips.flip_ratio()
            logs["hardening_gap"] = hardening_gap(self.model)
            overflows = overflow_shares(self.model)
            if overflows:
                logs["overflow_share"] = sum(overflows.values()) / len(overflows)
        super().log(logs, start_time)

    def run_record(self) -> dict[str, Any]:
        """What is known of this run, for `write_release` and the cards; add what only you know, such as the license.

        Returns:
            The fields of `analysis.run.RUN_FIELDS`, JSON types, None for what is unknown.
        """
        return run_record(
            self,
            self.teacher,
            self._mu.schedule,
            self._calibration_samples,
            resumed=self._resumed,
            others=self._other_evaluations,
        )
