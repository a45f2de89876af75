"""The arguments of the Trainers: those of transformers, of distillation, and of the ProxConnect step."""

import math
from dataclasses import dataclass, field

from transformers import TrainingArguments

from proxbit.errors import ConfigError
from proxbit.quantizers import SCHEDULES

__all__ = ["DistillationArguments", "ProxConnectArguments"]


def _check_fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} must be in [0, 1], not {value}.")


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ConfigError(f"{name} must be positive, not {value}.")
    if math.isinf(value):
        raise ConfigError(f"{name} must be finite.")


@dataclass
class DistillationArguments(TrainingArguments):
    """`TrainingArguments`, and the fields below; each field's `metadata["help"]` says what it does.

    Raises:
        ConfigError: for a value that is not valid.
    """

    distillation_weight: float = field(
        default=0.5,
        metadata={"help": "With a teacher: weight of the distillation loss, in [0, 1]; the rest is the task's loss."},
    )
    distillation_temperature: float = field(
        default=2.0, metadata={"help": "With a teacher: temperature of the softened logits, > 0."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_fraction("distillation_weight", self.distillation_weight)
        _check_positive("distillation_temperature", self.distillation_temperature)


@dataclass
class ProxConnectArguments(DistillationArguments):
    """`DistillationArguments`, and the fields below; each field's `metadata["help"]` says what it does.

    Raises:
        ConfigError: for a value that is not valid.
    """

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
        default=0.1,
        metadata={"help": "The last fraction of the steps, in which F is the sign and the rest settles on what ships."},
    )
    latent_learning_rate_factor: float = field(
        default=1.0, metadata={"help": "The learning rate of latent weights, as a multiple of learning_rate."}
    )
    detect_anomalies: bool = field(
        default=False,
        metadata={"help": "Stop with the name of the layer when its input holds NaN or infinity, or is one constant."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mu_schedule is not None:
            SCHEDULES.get(self.mu_schedule)
        _check_fraction("hard_fraction", self.hard_fraction)
        _check_positive("latent_learning_rate_factor", self.latent_learning_rate_factor)
