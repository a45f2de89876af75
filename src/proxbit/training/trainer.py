"""`ProxConnectTrainer`: the ProxConnect++ step inside the ordinary Trainer of transformers."""

from collections.abc import Iterable
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, has_length

from proxbit.analysis.card import quantization_card
from proxbit.errors import ConfigError, ModelStateError, ProxbitError
from proxbit.hub import binarize
from proxbit.hub.model_card import README, model_card
from proxbit.nn import latent_layers, learned_modules, soft_evaluation
from proxbit.patching import check_latents, state_of
from proxbit.quantizers import AGGREGATE, CONSTANT, MuSchedule
from proxbit.training.anomalies import watch_activations
from proxbit.training.arguments import ProxConnectArguments
from proxbit.training.calibration import calibrate, was_calibrated
from proxbit.training.callbacks import LayerScores, MuCallback, learning_rates
from proxbit.training.gallery import choose
from proxbit.training.monitor import FlipCounter, hardening_gap, overflow_penalty, overflow_shares
from proxbit.training.recipes import get_recipe
from proxbit.training.recorder import RunRecorder
from proxbit.training.run_record import run_record
from proxbit.training.saving import SavingTrainer
from proxbit.training.stages import PROGRESSIONS, Stage, stages

__all__ = ["BATCHES", "ProxConnectTrainer"]

# Batches that are looked at before the first step.
BATCHES = 4


class ProxConnectTrainer(SavingTrainer):
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
            `args.recipe`, a float model, which is made latent by the recipe.
        args: with the fields of the ProxConnect step.
        teacher: any model with the same labels, for distillation; it is put in evaluation mode.
        **kwargs: as in `transformers.Trainer`.

    Raises:
        ModelStateError: if the model is packed, or float and there is no recipe.
        ConfigError: if the teacher is not one for the model, see `DistillationTrainer`; by `train`, for the schedule
            "aggregate" and a pair with `update_from`, for a `mu_start` or `mu_end` that the schedule of mu does not
            heed, and for a progression that goes by the loss where there is none.
        LatentError: if a latent weight cannot be binarized.
    """

    args: ProxConnectArguments

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: ProxConnectArguments | None = None,
        *,
        teacher: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if model is None:
            raise ConfigError("ProxConnectTrainer needs a model; model_init is not supported.")
        args = args or ProxConnectArguments()
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
        super().__init__(model=model, args=args, teacher=teacher, **kwargs)
        self._looks_first = self._calibrated and self.eval_dataset is not None and not self.args.eval_on_start
        self.args.eval_on_start |= self._looks_first
        if PROGRESSIONS.get(self.args.progression).score is not None:
            self.add_callback(LayerScores())
        self.add_callback(MuCallback(self.model, self._begin, self._stages))
        self._flips = FlipCounter(self.model)
        self._calibration_samples: int | None = None
        self._resumed = False
        self._other_evaluations: list[dict[str, Any]] = []
        self._recorder = RunRecorder(self.model, lambda: self._flips)
        self.add_callback(self._recorder)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As the parent's; meanwhile, with `args.detect_anomalies`, the inputs of layers are watched."""
        with ExitStack() as stack:
            if self.args.detect_anomalies:
                stack.callback(watch_activations(self.model))
            return super().train(*args, **kwargs)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Look at the first examples while each process still has the whole model, before an engine takes it apart."""
        self._resumed = self.state.global_step > 0
        if not self._resumed:
            self._calibrate()
            self._score()
        return super()._prepare_for_training(*args, **kwargs)

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

    @property
    def _kept(self) -> LayerScores | None:
        """Where scores are, if the progression goes by some; restoring callbacks from a checkpoint makes it anew."""
        return next((each for each in self.callback_handler.callbacks if isinstance(each, LayerScores)), None)

    def _score(self) -> None:
        """Take what the progression goes by, before the first step; from then on checkpoints keep it."""
        score, kept = PROGRESSIONS.get(self.args.progression).score, self._kept
        if score is None or kept is None:
            return
        self.model.to(self.args.device)
        with torch.random.fork_rng():
            found = score(self.model, self._training_loss, islice(self._first_batches(), BATCHES))
        # The same in every process, to the last bit: a GPU may sum in any order.
        values = broadcast(torch.tensor(list(found.values()), device=self.args.device))
        kept.scores = dict(zip(found, values.tolist(), strict=True))

    def _training_loss(self, batch: Any) -> Tensor:
        try:
            with self.accelerator.autocast():
                return self.compute_loss(self.model, self._prepare_inputs(batch))  # type: ignore[return-value]
        except ProxbitError:
            raise
        except ValueError as error:
            raise ConfigError(
                f"progression={self.args.progression!r} takes gradients of the training loss, of which there is none: "
                f"{error}"
            ) from error

    def _calibrate(self) -> None:
        """Start what nobody has calibrated yet from the first examples, which are the same in every process."""
        if self.train_dataset is None or all(module.calibrated for _, module in learned_modules(self.model)):
            return
        self.model.to(self.args.device)
        with torch.random.fork_rng(), self.accelerator.autocast():
            seen = BATCHES * self.args.per_device_train_batch_size
            batches = list(islice(self._first_batches(), BATCHES))
            calibrate(self.model, batches, weights=False, num_images=seen)
        self._calibration_samples = min(len(self.train_dataset), seen) if has_length(self.train_dataset) else seen

    def _first_batches(self) -> Iterable[Any]:
        """The first training examples as the first process draws them, so that they are the same in all."""
        dataset, collator = self.train_dataset, self.data_collator
        if dataset is None:
            return
        if isinstance(dataset, datasets.Dataset):
            dataset = self._remove_unused_columns(dataset, description="training")
        else:
            collator = self._get_collator_with_removed_columns(collator, description="training")
        for batch in DataLoader(dataset, self.args.per_device_train_batch_size, collate_fn=collator):
            yield broadcast_object_list([batch])[0]

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
        """Evaluate the hard model; add `{prefix}_soft_*` of F_mu, and `{prefix}_gap_*` = soft - hard."""
        arguments = (dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        hard: EvalLoopOutput = super().evaluation_loop(*arguments)
        if self._recorder.writes and metric_key_prefix.startswith("eval"):
            names = self.model.config.id2label if isinstance(self.model, PreTrainedModel) else {}
            self._recorder.evaluated(choose(dataloader, hard, names))
        self._close_evaluation_bar()
        with soft_evaluation(self.model):
            soft = super().evaluation_loop(*arguments).metrics
        prefix = f"{metric_key_prefix}_"
        for key, value in soft.items():
            name = key.removeprefix(prefix)
            if key in hard.metrics and isinstance(value, float) and not name.endswith("time"):
                hard.metrics[f"{prefix}soft_{name}"] = value
                hard.metrics[f"{prefix}gap_{name}"] = value - hard.metrics[key]
        return hard

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
        callback = next(each for each in self.callback_handler.callbacks if isinstance(each, MuCallback))
        return run_record(
            self,
            self.teacher,
            callback.schedule,
            self._calibration_samples,
            resumed=self._resumed,
            others=self._other_evaluations,
        )

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
