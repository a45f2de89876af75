"""Parameter groups of an optimizer for latent models, and the learning rates of their schedule."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer

from proxbit.errors import MuRangeError
from proxbit.nn import latent_layers, learned_modules

__all__ = ["decayed_names", "learning_rates", "parameter_groups", "separate_latents"]


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    latent_learning_rate_factor: float = 1.0,
) -> list[dict[str, Any]]:
    """The groups with which `ProxConnectTrainer` makes its optimizer, for any optimizer of `torch.optim`.

        Trainer(..., optimizers=(torch.optim.AdamW(parameter_groups(model, learning_rate=1e-3)), None))

    Args:
        model: a latent model.
        learning_rate: of all groups but the last.
        weight_decay: of the first group: weights that transformers lets decay, without latents and what is learned
            beside them.
        latent_learning_rate_factor: the learning rate of the latents, as a multiple of `learning_rate`.

    Returns:
        Three groups: what decays, what does not, and the latent weights.
    """
    decayed = set(decayed_names(model, Trainer.get_decay_parameter_names(None, model)))
    latents = _latents(model)
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": weight_decay, "lr": learning_rate},
        {"params": [], "weight_decay": 0.0, "lr": learning_rate},
        {"params": [], "weight_decay": 0.0, "lr": learning_rate * latent_learning_rate_factor},
    ]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[2 if id(parameter) in latents else name not in decayed]["params"].append(parameter)
    return groups


def separate_latents(optimizer: Optimizer, model: nn.Module, learning_rate: float) -> None:
    """Move the latent weights from the groups of an optimizer into a last one, with this rate and without decay."""
    latents = _latents(model)
    moved = []
    for group in optimizer.param_groups:
        moved += [parameter for parameter in group["params"] if id(parameter) in latents]
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in latents]
    optimizer.add_param_group({"params": moved, "weight_decay": 0.0, "lr": learning_rate})


def decayed_names(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The names of parameters that decay, without those that are learned beside the weights."""
    learned = [name for name, _ in learned_modules(model)]
    return [name for name in names if name.rpartition(".")[0] not in learned]


def learning_rates(optimizer: Any, scheduler: Any, model: nn.Module, steps: int) -> list[float]:
    """The learning rate of the latents at every step, from the scheduler's own formula.

    Raises:
        MuRangeError: for a learning rate that is not a function of the step.
    """
    inner = getattr(scheduler, "scheduler", scheduler)
    if not isinstance(inner, torch.optim.lr_scheduler.LambdaLR):
        raise MuRangeError(
            "The schedule 'aggregate' needs a learning rate that is a function of the step (a LambdaLR, such as "
            f"linear, cosine or constant), not {type(inner).__name__}."
        )
    latents = _latents(model)
    groups = enumerate(optimizer.param_groups)
    index = next((i for i, group in groups if any(id(parameter) in latents for parameter in group["params"])), -1)
    return [float(inner.base_lrs[index] * inner.lr_lambdas[index](step)) for step in range(steps)]


def _latents(model: nn.Module) -> set[int]:
    """The identities of the latent weights that are trained."""
    return {id(layer.weight) for _, layer in latent_layers(model) if layer.weight.requires_grad}
