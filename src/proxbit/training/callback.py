"""`ProxConnectCallback`: the ProxConnect++ step in any Trainer of transformers."""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from proxbit.errors import ModelStateError
from proxbit.nn import (
    ActivationQuantizer,
    binary_activations,
    keep_single,
    latent_layers,
    set_mu,
    start_update,
)
from proxbit.patching import check_latents, state_of
from proxbit.quantizers import MuSchedule
from proxbit.training.arguments import check_step
from proxbit.training.calibration import was_calibrated
from proxbit.training.checkpoints import load_renamed, read_resumed
from proxbit.training.lookahead import start_quantizers_from
from proxbit.training.monitor import FiniteWatch, FlipCounter, hardening_gap, overflow_shares, watch_activations
from proxbit.training.optimizer import learning_rates
from proxbit.training.recipes import DEFAULT_RECIPE, FROM_CALIBRATION, get_recipe
from proxbit.training.recorder import RunRecorder
from proxbit.training.schedule import Stage, hardening_advice, mu_schedule, rest_of, stages, stored_scores

__all__ = ["MuCallback", "ProxConnectCallback", "bring_to_single", "check_latent"]

logger = logging.getLogger(__name__)

# The hardening gap above which a user is told: a hundredth of the weights' size is below what an image shows.
SOFT = 0.01
# Of the settings of the step, where nothing else is said.
DEFAULTS: dict[str, Any] = {"mu_schedule": None, "mu_start": None, "mu_end": None, "detect_anomalies": False} | {
    name: get_recipe(DEFAULT_RECIPE).training[name] for name in ("hard_fraction", "activations_first", "progression")
}


class ProxConnectCallback(TrainerCallback):
    """The ProxConnect++ step in any `transformers.Trainer` or subclass of it.

        Trainer(model, args, ..., callbacks=[ProxConnectCallback()])

    The model is latent, from `proxbit.binarize`. With this callback:

    - mu follows its schedule, which depends on the optimizer step alone: a run that resumes goes on where it stopped;
      the last steps are hard, so that the weights of the end are those that `proxbit.pack` stores;
    - pairs with `update_from` take their steps from P(w*), and layers may join in the order of a `Progression`;
    - quantizers of activations that have not been calibrated start from the first training examples;
    - training logs hold `mu`, `flip_ratio` (since the log before) and `hardening_gap`, with narrow accumulators
      `overflow_share`, and `proxbit report` makes a page from the `proxbit_run.jsonl` in the output folder;
    - a run that resumes, or loads its best model, has all of its weights, which the Trainer of transformers skips where
      `save_pretrained` renames them (https://github.com/huggingface/transformers/issues/48805);
    - training stops with an error before weights that are NaN or infinite are saved, at the next log otherwise.

    Some of what `ProxConnectTrainer` does is out of reach for a callback:

    - Parameter groups: without weight decay and with one learning rate none are needed; otherwise give the Trainer an
      optimizer with the groups of `parameter_groups`.
    - Losses: `compute_loss_func=DistillationLoss(...)` teaches; `overflow_penalty(model)` can be added in a
      `compute_loss` of your own.
    - A Trainer calls the reporters of `report_to` before its callbacks. For logs with mu there, pass reporters behind
      this callback: `report_to="none", callbacks=[ProxConnectCallback(), TensorBoardCallback()]`.
    - Evaluations are of the hard model only, which is what ships; uploads are of the latent model, `proxbit.push`
      uploads the packed one.
    - What a progression such as "taylor" goes by is not measured: pass it to `LayerScores`, which keeps it in
      checkpoints too.
    - Streams cannot be looked at without being consumed, and a sharded model cannot be calibrated: call
      `proxbit.calibrate(model, data, weights=False)` before.

    Args:
        mu_schedule, mu_start, mu_end, hard_fraction, activations_first, progression, detect_anomalies: as the fields of
            `ProxConnectArguments`. None: what the Trainer's arguments say, if they have such a field, else the default
            of that field.

    Raises:
        ConfigError: for a value that is not valid, at once; when training begins, for values that do not suit the
            quantizer pair, and as `calibrate`.
        ModelStateError: if the model is not latent.
        LatentError: if a latent weight cannot be binarized.
        LossError: while training, for weights that are NaN or infinite.
        ActivationError: with `detect_anomalies`, by the forward pass.
    """

    def __init__(
        self,
        *,
        mu_schedule: str | None = None,
        mu_start: float | None = None,
        mu_end: float | None = None,
        hard_fraction: float | None = None,
        activations_first: float | None = None,
        progression: str | None = None,
        detect_anomalies: bool | None = None,
    ) -> None:
        self.given: dict[str, Any] = {
            "mu_schedule": mu_schedule,
            "mu_start": mu_start,
            "mu_end": mu_end,
            "hard_fraction": hard_fraction,
            "activations_first": activations_first,
            "progression": progression,
            "detect_anomalies": detect_anomalies,
        }
        check_step(**DEFAULTS | {"hard_fraction": 0.0} | _known(self.given))
        self.model: nn.Module | None = None
        self.settings: dict[str, Any] = {}
        self.schedule: MuSchedule | None = None
        self.best: int | None = None
        self.finite: FiniteWatch | None = None
        self.reads_checkpoints = True
        self._late: list[tuple[Stage, MuSchedule]] = []
        self._activations: list[tuple[ActivationQuantizer, int, MuSchedule]] = []
        self._end_watch: Callable[[], None] | None = None

    def follow(self, model: nn.Module) -> None:
        """Take up a model, while this process has all of its weights.

        Raises:
            ModelStateError: if it is not latent.
            LatentError: if a latent weight cannot be binarized.
        """
        if model is self.model:
            return
        check_latent(model, type(self).__name__)
        self.model = model
        self.flips = FlipCounter(model)
        self.recorder = RunRecorder(model)

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Take up the model before an optimizer or an engine does."""
        self.follow(model)
        bring_to_single(model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Make the schedule and go to where training starts or resumes."""
        self.follow(model)
        if self.reads_checkpoints and state.global_step > 0:
            read_resumed(model, args, state)
        bring_to_single(model)
        self.end_watch()
        self.settings = self._settings(args, model)
        if state.global_step == 0:
            start_quantizers_from(model, train_dataloader, args.per_device_train_batch_size)
        self.finite = self.finite or FiniteWatch()
        self.finite.reset()
        self.flips, self.best = FlipCounter(model), None
        steps = state.max_steps
        self.schedule = self._schedule(steps, lambda: learning_rates(optimizer, lr_scheduler, model, steps))
        self._plan(self._stages(steps, stored_scores(state)))
        self._apply(state.global_step)
        if self.settings["detect_anomalies"]:
            self._end_watch = watch_activations(model)
        self.recorder.begin(args, state, self.settings, self.flips)

    def _settings(self, args: TrainingArguments, model: nn.Module) -> dict[str, Any]:
        """What is given to this callback, or else in the arguments of the Trainer, or else the default."""
        of_args = {name: getattr(args, name, None) for name in self.given}
        of_start = FROM_CALIBRATION if was_calibrated(model) else {}
        defaults = DEFAULTS | {name: value for name, value in of_start.items() if name in self.given}
        settings = defaults | _known(of_args) | _known(self.given)
        check_step(**settings)
        return settings

    def _schedule(self, steps: int, rates: Callable[[], Sequence[float]]) -> MuSchedule:
        assert self.model is not None
        kind, start, end = (self.settings[name] for name in ("mu_schedule", "mu_start", "mu_end"))
        return mu_schedule(
            [layer for _, layer in latent_layers(self.model)],
            steps,
            kind=kind,
            start=start,
            end=end,
            hard_fraction=self.settings["hard_fraction"],
            learning_rates=rates,
        )

    def _stages(self, steps: int, scores: Mapping[str, float]) -> list[Stage]:
        assert self.model is not None
        return stages(
            self.model,
            steps,
            activations_first=self.settings["activations_first"],
            progression=self.settings["progression"],
            scores=scores,
        )

    def _plan(self, stages: list[Stage]) -> None:
        """Give layers that begin late, and quantizers of activations, schedules of their own."""
        assert self.model is not None and self.schedule is not None
        schedule = self.schedule
        self._late = [(stage, rest_of(schedule, stage.weight)) for stage in stages if stage.weight or stage.activation]
        # Activations have units of their own: their pairs go their own default ways.
        begins = {id(stage.layer): stage.activation for stage in stages}
        self._activations = []
        for name, quantizer in binary_activations(self.model):
            own = MuSchedule(*quantizer.pair.schedule, steps=schedule.steps, hard_fraction=schedule.hard_fraction)
            begin = begins.get(id(self.model.get_submodule(name)), 0)
            self._activations.append((quantizer, begin, rest_of(own, begin)))
        for _, layer in latent_layers(self.model):  # A run that stopped early leaves layers that wait.
            layer.waits = frozenset()

    def _apply(self, step: int) -> None:
        """Set mu, and whether F is hard, as they are in the optimizer step with this number."""
        assert self.model is not None and self.schedule is not None
        set_mu(self.model, self.schedule.mu(step), hard=self.schedule.is_hard(step))
        for stage, schedule in self._late:
            stage.layer.mu.fill_(schedule.mu(max(0, step - stage.weight)))
            begins = {"weight": stage.weight, "activation": stage.activation}
            stage.layer.waits = frozenset(what for what, begin in begins.items() if step < begin)
        for quantizer, begin, own in self._activations:
            quantizer.mu.fill_(own.mu(max(0, step - begin)))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set mu for the step that begins."""
        self._apply(state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put P(w*) in the place of w*, for pairs that update from there."""
        assert self.model is not None
        start_update(self.model)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look for NaN and infinite values in weights that are about to be saved."""
        if control.should_save:
            self._check_finite(state)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """As at the end of a step."""
        if control.should_save:
            self._check_finite(state)
        self.recorder.end_epoch(args, state, control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Hand what an evaluation has shown to the recorder."""
        self.recorder.evaluated(args, state, kwargs.get("processing_class"))

    def _check_finite(self, state: TrainerState) -> None:
        if self.finite is not None:
            self.finite.check(state.global_step, self.model)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add what is measured to the logs of training."""
        logs = {} if logs is None else logs
        if "loss" in logs or "train_loss" in logs:
            self._check_finite(state)
        if "loss" in logs and "mu" not in logs:
            measures = self.measures()
            logs |= measures
            state.log_history[-1] |= measures
        self.recorder.log(args, state, logs)

    def measures(self) -> dict[str, float]:
        """mu, the flip ratio since the call before, the hardening gap, and what overflows in narrow accumulators."""
        assert self.model is not None
        layer = next(layer for _, layer in latent_layers(self.model))
        measures = {
            "mu": float(layer.mu),
            "flip_ratio": self.flips.flip_ratio(),
            "hardening_gap": hardening_gap(self.model),
        }
        overflows = overflow_shares(self.model)
        if overflows:
            measures["overflow_share"] = sum(overflows.values()) / len(overflows)
        return measures

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go to the mu of the best model if it is loaded; warn if its weights are far from those that ship."""
        assert self.model is not None
        self.end_watch()
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.best = state.best_global_step or 0
            if self.reads_checkpoints:
                load_renamed(self.model, state.best_model_checkpoint)
            self._apply(max(0, self.best - 1))  # the number of the last step before it was saved
        gap = hardening_gap(self.model)
        if gap > SOFT and state.is_world_process_zero:
            layer = next(layer for _, layer in latent_layers(self.model))
            assert self.schedule is not None
            advice = hardening_advice(self.schedule, layer.pair, state.global_step, best=self.best is not None)
            what = "Training ended soft" if self.best is None else f"The best model, of step {self.best}, is soft"
            warnings.warn(
                f"{what}, at mu = {float(layer.mu):.3g}: the hardening gap |soft - hard| / |hard| of the weights is "
                f"{gap:.3f}, so the packed model is not the one that was trained. {advice}",
                stacklevel=2,
            )
        self.recorder.end(args, state, kwargs.get("processing_class"))

    def end_watch(self) -> None:
        """Stop looking at the inputs of layers. Training does so at its end; after an error, call it."""
        if self._end_watch is not None:
            self._end_watch()
            self._end_watch = None


class MuCallback(ProxConnectCallback):
    """Deprecated: what `ProxConnectCallback` was called when it took the model, and functions of the steps."""

    def __init__(
        self,
        model: nn.Module,
        begin: Callable[[int], MuSchedule] | None = None,
        stages: Callable[[int], list[Stage]] | None = None,
    ) -> None:
        super().__init__()
        self._begin, self._order = begin, stages

    def _schedule(self, steps: int, rates: Callable[[], Sequence[float]]) -> MuSchedule:
        return self._begin(steps) if self._begin else super()._schedule(steps, rates)

    def _stages(self, steps: int, scores: Mapping[str, float]) -> list[Stage]:
        return self._order(steps) if self._order else super()._stages(steps, scores)


def check_latent(model: nn.Module, who: str) -> None:
    """Check that a model can be trained.

    Args:
        model: any.
        who: trains it, for the message.

    Raises:
        ModelStateError: if it is not latent.
        LatentError: if a latent weight cannot be binarized.
    """
    state = state_of(model)
    if state != "latent":
        hint = (
            "A packed model cannot be trained; load its latent checkpoint instead."
            if state == "packed"
            else "Call proxbit.binarize(model, config) first, or name a recipe: ProxConnectArguments(recipe=...)."
        )
        raise ModelStateError(f"{who} trains latent models, this one is {state}. {hint}")
    check_latents(model)


def bring_to_single(model: nn.Module) -> None:
    """Bring latents and learned scales to single precision, and say so in the log."""
    half = keep_single(model)
    if half:
        logger.warning(
            "%d latent weights and learned scales, the first %s, were in half precision, which loses small steps: "
            "they are trained in fp32. For compute in half precision: dtype=torch.float32, bf16=True.",
            len(half),
            half[0],
        )


def _known(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is not None."""
    return {name: value for name, value in settings.items() if value is not None}
