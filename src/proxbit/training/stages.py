"""Stages of a run: from which step on each layer has binary activations, and from which step on binary weights."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from proxbit.nn import LatentWeight, latent_layers
from proxbit.registry import Registry

__all__ = ["PROGRESSIONS", "TOGETHER", "Stage", "stages"]

TOGETHER = "together"
# Layers join in the first part of what is left, so that the last of them still have time to harden.
_JOINING = 0.5

Key = Callable[[str, int], tuple[int, int]]


@dataclass(frozen=True)
class Stage:
    """When a layer begins to be binary.

    Attributes:
        layer: a latent layer.
        weight: the step from which on training uses F of its weight; before, the latent weight itself.
        activation: likewise of its activations.
    """

    layer: LatentWeight
    weight: int
    activation: int


def _is_attention(name: str) -> bool:
    return any("att" in part for part in name.split("."))


PROGRESSIONS: Registry[Key | None] = Registry("progression")
PROGRESSIONS.register(TOGETHER, None)
PROGRESSIONS.register("front-to-back", lambda name, place: (0, place))
PROGRESSIONS.register("mlp-first", lambda name, place: (int(_is_attention(name)), place))


def stages(model: nn.Module, steps: int, *, activations_first: float = 0.0, progression: str = TOGETHER) -> list[Stage]:
    """When each latent layer begins to be binary.

    Args:
        model: a latent model.
        steps: of the run.
        activations_first: the first fraction of the steps, in [0, 1), in which weights are not binary yet.
        progression: "together"; or the order in which layers join, evenly over half of the steps that are left:
            "front-to-back"; "mlp-first", feed-forward and other layers before those of attention.

    Source:
        activations first: Liu et al., ReActNet, ECCV 2020, section 5; feed-forward first: He et al., BiViT, 2022.
    """
    layers = list(latent_layers(model))
    first = int(steps * activations_first)
    key = PROGRESSIONS.get(progression)
    if key is None:
        return [Stage(layer, first, 0) for _, layer in layers]
    places = {name: key(name, place) for place, (name, _) in enumerate(layers)}
    order = sorted(layers, key=lambda item: places[item[0]])
    window = int((steps - first) * _JOINING)
    joined = [index * window // len(order) for index in range(len(order))]
    return [Stage(layer, first + join, join) for (_, layer), join in zip(order, joined, strict=True)]
