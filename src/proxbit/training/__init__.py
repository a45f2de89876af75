"""Training latent models with the Trainer of transformers."""

from proxbit.training.arguments import DistillationArguments, ProxConnectArguments
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
    "distillation_loss",
    "hardening_gap",
]
