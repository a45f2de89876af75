"""Training latent models with the Trainer of transformers. Names are imported at first use: some need `train`."""

from typing import TYPE_CHECKING, Any
from warnings import warn

from proxbit.extras import lazy

if TYPE_CHECKING:
    from proxbit.training.arguments import DistillationArguments, ProxConnectArguments
    from proxbit.training.calibration import calibrate
    from proxbit.training.callback import ProxConnectCallback
    from proxbit.training.distillation import DistillationTrainer
    from proxbit.training.losses import DistillationLoss, distillation_loss, gram_loss, token_loss
    from proxbit.training.monitor import (
        FlipCounter,
        hardening_gap,
        overflow_penalty,
        overflow_shares,
        watch_activations,
    )
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

_LAZY = {
    "DistillationArguments": "proxbit.training.arguments",
    "ProxConnectArguments": "proxbit.training.arguments",
    "calibrate": "proxbit.training.calibration",
    "ProxConnectCallback": "proxbit.training.callback",
    "DistillationTrainer": "proxbit.training.distillation",
    "DistillationLoss": "proxbit.training.losses",
    "distillation_loss": "proxbit.training.losses",
    "gram_loss": "proxbit.training.losses",
    "token_loss": "proxbit.training.losses",
    "FlipCounter": "proxbit.training.monitor",
    "hardening_gap": "proxbit.training.monitor",
    "overflow_penalty": "proxbit.training.monitor",
    "overflow_shares": "proxbit.training.monitor",
    "watch_activations": "proxbit.training.monitor",
    "parameter_groups": "proxbit.training.optimizer",
    "RECIPES": "proxbit.training.recipes",
    "Recipe": "proxbit.training.recipes",
    "get_recipe": "proxbit.training.recipes",
    "register_recipe": "proxbit.training.recipes",
    "LayerScores": "proxbit.training.schedule",
    "PROGRESSIONS": "proxbit.training.schedule",
    "Progression": "proxbit.training.schedule",
    "Stage": "proxbit.training.schedule",
    "stages": "proxbit.training.schedule",
    "taylor_sensitivity": "proxbit.training.sensitivity",
    "ProxConnectTrainer": "proxbit.training.trainer",
}
# Names of before: where what they name is now, and what to use in its place.
_DEPRECATED = {"MuCallback": ("proxbit.training.callback", "ProxConnectCallback")}

if not TYPE_CHECKING:
    _find = lazy(__name__, _LAZY | {name: module for name, (module, _) in _DEPRECATED.items()})

    def __getattr__(name: str) -> Any:
        if name in _DEPRECATED:
            warn(f"{name} is deprecated: use {_DEPRECATED[name][1]}.", DeprecationWarning, stacklevel=2)
        return _find(name)
