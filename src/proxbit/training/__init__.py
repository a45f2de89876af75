"""Training latent models with the Trainer of transformers."""

from proxbit.training.anomalies import watch_activations
from proxbit.training.arguments import DistillationArguments, ProxConnectArguments
from proxbit.training.calibration import calibrate
from proxbit.training.callbacks import LayerScores, MuCallback
from proxbit.training.distillation import DistillationTrainer
from proxbit.training.losses import distillation_loss, gram_loss, token_loss
from proxbit.training.monitor import FlipCounter, hardening_gap, overflow_shares
from proxbit.training.recipes import RECIPES, Recipe, get_recipe, register_recipe
from proxbit.training.sensitivity import taylor_sensitivity
from proxbit.training.stages import PROGRESSIONS, Progression, Stage, stages
from proxbit.training.trainer import ProxConnectTrainer

__all__ = [
    "PROGRESSIONS",
    "RECIPES",
    "DistillationArguments",
    "DistillationTrainer",
    "FlipCounter",
    "LayerScores",
    "MuCallback",
    "Progression",
    "ProxConnectArguments",
    "ProxConnectTrainer",
    "Recipe",
    "Stage",
    "calibrate",
    "distillation_loss",
    "get_recipe",
    "gram_loss",
    "hardening_gap",
    "overflow_shares",
    "register_recipe",
    "stages",
    "taylor_sensitivity",
    "token_loss",
    "watch_activations",
]
