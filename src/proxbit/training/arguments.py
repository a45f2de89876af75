"""The arguments of the Trainers: those of transformers, of distillation, and of the ProxConnect step."""

import math
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from proxbit.errors import ConfigError
from proxbit.quantizers import SCHEDULES
from proxbit.training.checkpoints import resume_from
from proxbit.training.recipes import DEFAULT_RECIPE, FROM_CALIBRATION, Recipe, get_recipe
from proxbit.training.schedule import PROGRESSIONS

__all__ = [
    "DISTILLATION",
    "DistillationArguments",
    "ProxConnectArguments",
    "check_distillation",
    "check_hub_strategy",
    "check_step",
]

# The fields that say how a teacher teaches.
DISTILLATION = ("distillation_weight", "distillation_temperature", "distillation_tokens", "distillation_gram")


def _check_fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} must be in [0, 1], not {value}.")


def _check_not_negative(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ConfigError(f"{name} must be finite and not negative, not {value}.")


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ConfigError(f"{name} must be positive, not {value}.")
    if math.isinf(value):
        raise ConfigError(f"{name} must be finite.")


def check_hub_strategy(args: TrainingArguments) -> None:
    """Raise ConfigError for a strategy that would upload checkpoints: latent weights, and the rest as pickles."""
    strategy = HubStrategy(args.hub_strategy)
    if args.push_to_hub and strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise ConfigError(
            f"hub_strategy={strategy.value!r} would publish checkpoints: latent weights and pickles. Take 'end' or "
            "'every_save', which upload the packed model; trainer.push_to_hub(latent=True) uploads the latent one."
        )


def check_distillation(
    distillation_weight: float,
    distillation_temperature: float,
    distillation_tokens: float,
    distillation_gram: float,
) -> None:
    """Raise ConfigError for a weight or a temperature that is not valid."""
    _check_fraction("distillation_weight", distillation_weight)
    _check_positive("distillation_temperature", distillation_temperature)
    _check_not_negative("distillation_tokens", distillation_tokens)
    _check_not_negative("distillation_gram", distillation_gram)


def check_step(
    mu_schedule: str | None, hard_fraction: float, activations_first: float, progression: str, **others: Any
) -> None:
    """Check settings of the step.

    Raises:
        ConfigError: for a value that is not valid; `UnknownNameError` for a name that is not known.
    """
    if mu_schedule is not None:
        SCHEDULES.get(mu_schedule)
    PROGRESSIONS.get(progression)
    _check_fraction("hard_fraction", hard_fraction)
    if not 0 <= activations_first <= 1 - hard_fraction or activations_first == 1:
        raise ConfigError(
            "activations_first must be in [0, 1), and end before the hard part: with hard_fraction "
            f"{hard_fraction:g} at most {1 - hard_fraction:g}, not {activations_first}."
        )


@dataclass
class DistillationArguments(TrainingArguments):
    """`TrainingArguments`, and the fields below; each field's `metadata["help"]` says what it does.

    Raises:
        ConfigError: for a value that is not valid.
    """

    distillation_weight: float = field(
        default=None,  # type: ignore[assignment]
        metadata={
            "help": "With a teacher: weight of the distillation loss, in [0, 1]; the rest is the task's loss. None: "
            "that of the recipe, or 0.5."
        },
    )
    distillation_temperature: float = field(
        default=None,  # type: ignore[assignment]
        metadata={"help": "With a teacher: temperature of the softened logits, > 0. None: that of the recipe, or 2."},
    )
    distillation_tokens: float = field(
        default=None,  # type: ignore[assignment]
        metadata={
            "help": "With a teacher of the same width: weight of the squared distance of the last block's tokens, "
            ">= 0, beside the other losses. None: that of the recipe, or 0."
        },
    )
    distillation_gram: float = field(
        default=None,  # type: ignore[assignment]
        metadata={
            "help": "With a teacher: weight of the distance of the Gram matrices of the last block's tokens, >= 0, "
            "beside the other losses. None: that of the recipe, or 0."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.fill_in(get_recipe(DEFAULT_RECIPE))
        check_distillation(**{name: getattr(self, name) for name in DISTILLATION})

    def fill_in(self, recipe: Recipe) -> None:
        """Set what is None to the values of a recipe, as far as these arguments have its fields."""
        for name, value in recipe.training.items():
            if hasattr(self, name) and getattr(self, name) is None:
                setattr(self, name, value)


@dataclass
class ProxConnectArguments(DistillationArguments):
    """`DistillationArguments`, and the fields below; each field's `metadata["help"]` says what it does.

    Raises:
        ConfigError: for a value that is not valid.
    """

    recipe: str | None = field(
        default=None,
        metadata={
            "help": "Name of a recipe (see `proxbit recipes`): what is None here takes its values, and a model that is "
            "still float is binarized by its configuration. None: the values of w1a32."
        },
    )
    mu_schedule: str | None = field(
        default=None,
        metadata={"help": "constant, linear, log, sigmoid or aggregate. None: the default of the quantizer pair."},
    )
    mu_start: float | None = field(
        default=None, metadata={"help": "Sharpness at the first optimizer step. None: the default of the pair."}
    )
    mu_end: float | None = field(
        default=None, metadata={"help": "Sharpness at the end of the soft part. None: the default of the pair."}
    )
    hard_fraction: float = field(
        default=None,  # type: ignore[assignment]
        metadata={
            "help": "The last fraction of the steps, in which F is the sign and the rest settles on what ships. None: "
            "that of the recipe, or 0.1; 1 for a model that was calibrated."
        },
    )
    activations_first: float = field(
        default=None,  # type: ignore[assignment]
        metadata={
            "help": "The first fraction of the steps, in [0, 1), in which activations are quantized and weights are "
            "not. None: that of the recipe, or 0."
        },
    )
    progression: str = field(
        default=None,  # type: ignore[assignment]
        metadata={
            "help": "The order in which layers are binarized: together, front-to-back, mlp-first, or taylor, the least "
            "sensitive ones first by the gradient of the first examples. None: that of the recipe, or together."
        },
    )
    latent_learning_rate_factor: float = field(
        default=None,  # type: ignore[assignment]
        metadata={
            "help": "The learning rate of latent weights, as a multiple of learning_rate. None: that of the recipe, or "
            "1; 0.1 for a model that was calibrated."
        },
    )
    overflow_penalty: float = field(
        default=None,  # type: ignore[assignment]
        metadata={
            "help": "With accumulators of few bits: weight of the loss by which sums overflow, >= 0. None: that of the "
            "recipe, or 0."
        },
    )
    detect_anomalies: bool = field(
        default=False,
        metadata={"help": "Stop with the name of the layer when its input holds NaN or infinity, or is one constant."},
    )

    def __post_init__(self) -> None:
        self._open = frozenset(name for name in FROM_CALIBRATION if getattr(self, name) is None)
        if self.recipe is not None:
            recipe = get_recipe(self.recipe)
            inherited = {item.name for item in fields(TrainingArguments)}
            valid = sorted({item.name for item in fields(self) if item.default is None} - inherited - {"recipe"})
            unknown = sorted(set(recipe.training) - set(valid))
            if unknown:
                raise ConfigError(f"The recipe {self.recipe!r} sets {unknown}; a recipe sets some of {valid}.")
            self.fill_in(recipe)
        super().__post_init__()
        check_hub_strategy(self)
        resume: str | bool | None = self.resume_from_checkpoint  # type: ignore[has-type]
        self.resume_from_checkpoint = resume_from(resume)
        check_step(self.mu_schedule, self.hard_fraction, self.activations_first, self.progression)
        _check_not_negative("overflow_penalty", self.overflow_penalty)
        _check_positive("latent_learning_rate_factor", self.latent_learning_rate_factor)

    def begin_at_calibration(self) -> None:
        """Set what nobody has given to what suits a model whose weights were fitted by `calibrate`."""
        for name in self._open:
            setattr(self, name, FROM_CALIBRATION[name])
        self.activations_first = min(self.activations_first, 1 - self.hard_fraction)
