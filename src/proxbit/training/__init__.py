"""Training latent models with the Trainer of transformers."""

from importlib import import_module
from typing import Any
from warnings import warn

from proxbit.training.arguments import DistillationArguments, ProxConnectArguments
from proxbit.training.calibration import calibrate
from proxbit.training.callback import ProxConnectCallback
from proxbit.training.distillation import DistillationTrainer
from proxbit.training.losses import DistillationLoss, distillation_loss, gram_loss, token_loss
from proxbit.training.monitor import FlipCounter, hardening_gap, overflow_penalty, overflow_shares, watch_activations
from proxbit.training.optimizer import parameter_groups
from proxbit.training.recipes import RECIPES, Recipe, get_recipe, register_recipe
from proxbit.training.schedule import PROGRESSIONS, LayerScores, Progression, Stage, stages
from proxbit.training.sensitivity import taylor_sensitivity
from proxbit.training.trainer import ProxConnectTrainer

__all__ = [
    "PROGRESSIONS",
    "RECIPES",
    "DistillationArguments",
    "DistillationLoss",
    "DistillationTrainer",
    "FlipCounter",
    "LayerScores",
    "Progression",
    "ProxConnectArguments",
    "ProxConnectCallback",
    "ProxConnectTrainer",
    "Recipe",
    "Stage",
    "calibrate",
    "distillation_loss",
    "get_recipe",
    "gram_loss",
    "hardening_gap",
    "overflow_penalty",
    "overflow_shares",
    "parameter_groups",
    "register_recipe",
    "stages",
    "taylor_sensitivity",
    "token_loss",
    "watch_activations",
]

# Names of before: where what they name is now, and what to use in its place.
_DEPRECATED = {"MuCallback": ("proxbit.training.callback", "ProxConnectCallback")}


def __getattr__(name: str) -> Any:
    if name in _DEPRECATED:
        module, successor = _DEPRECATED[name]
        warn(f"{name} is deprecated: use {successor}.", DeprecationWarning, stacklevel=2)
        return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
