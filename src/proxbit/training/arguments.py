"""`ProxConnectArguments`: the arguments of the Trainer, and those of the ProxConnect step."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from proxbit.errors import ConfigError
from proxbit.quantizers import AGGREGATE, SCHEDULES

__all__ = ["ProxConnectArguments"]


@dataclass
class ProxConnectArguments(TrainingArguments):
    """`TrainingArguments`, and the fields below; each field's `metadata["help"]` says what it does.

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
    distillation_weight: float = field(
        default=0.5,
        metadata={"help": "With a teacher: weight of the distillation loss, in [0, 1]; the rest is the task's loss."},
    )
    distillation_temperature: float = field(
        default=2.0, metadata={"help": "With a teacher: temperature of the softened logits, > 0."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mu_schedule is not None and self.mu_schedule != AGGREGATE:
            SCHEDULES.get(self.mu_schedule)
        for name, low, high in (("hard_fraction", 0.0, 1.0), ("distillation_weight", 0.0, 1.0)):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"{name} must be in [{low:g}, {high:g}], not {getattr(self, name)}.")
        for name in ("latent_learning_rate_factor", "distillation_temperature"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, not {getattr(self, name)}.")
