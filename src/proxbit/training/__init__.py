"""Training latent models with the Trainer of transformers."""

from proxbit.training.anomalies import watch_activations
from proxbit.training.arguments import DistillationArguments, ProxConnectArguments
from proxbit.training.calibration import calibrate
from proxbit.training.callbacks import MuCallback
from proxbit.training.distillation import DistillationTrainer
from proxbit.training.losses import distillation_loss
from proxbit.training.monitor import FlipCounter, hardening_gap
from proxbit.training.trainer import ProxConnectTrainer

__all__ = [
    "DistillationArguments",
    "DistillationTrainer",
    "FlipCounter",
    "MuCallback",
    "ProxConnectArguments",
    "ProxConnectTrainer",
    "calibrate",
    "distillation_loss",
    "hardening_gap",
    "watch_activations",
]
