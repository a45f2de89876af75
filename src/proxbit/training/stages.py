"""Stages of a run: from which step on each layer has binary activations, and from which step on binary weights."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from proxbit.errors import ConfigError
from proxbit.nn import LatentWeight, latent_layers
from proxbit.registry import Registry
from proxbit.training.sensitivity import taylor_sensitivity

__all__ = ["PROGRESSIONS", "TOGETHER", "LayerScores", "Progression", "Stage", "stages", "stored_scores"]

TOGETHER = "together"
# Layers join in the first part of what is left, so that the last of them still have time to harden.
_JOINING = 0.5


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


@dataclass(frozen=True)
class Progression:
    """An order in which layers become binary.

    Args:
        key: of a layer's name and its score: layers with smaller keys join earlier, equal ones from front to back.
            None: all join at once.
        score: what gives layers their scores before the first step: `(model, loss, batches) -> scores by name`, where
            `loss(batch)` is the loss of training. None: nothing does, they are 0.
    """

    key: Callable[[str, float], float] | None
    score: Callable[[nn.Module, Callable[[Any], Tensor], Iterable[Any]], dict[str, float]] | None = None


def _is_attention(name: str) -> bool:
    return any("att" in part for part in name.split("."))


PROGRESSIONS: Registry[Progression] = Registry("progression")
PROGRESSIONS.register(TOGETHER, Progression(None))
PROGRESSIONS.register("front-to-back", Progression(lambda name, score: 0))
PROGRESSIONS.register("mlp-first", Progression(lambda name, score: _is_attention(name)))
PROGRESSIONS.register("taylor", Progression(lambda name, score: score, taylor_sensitivity))


def stages(
    model: nn.Module,
    steps: int,
    *,
    activations_first: float = 0.0,
    progression: str = TOGETHER,
    scores: Mapping[str, float] | None = None,
) -> list[Stage]:
    """When each latent layer begins to be binary.

    Args:
        model: a latent model.
        steps: of the run.
        activations_first: the first fraction of the steps, in [0, 1), in which weights are not binary yet.
        progression: "together"; or the order in which layers join, evenly over half of the steps that are left:
            "front-to-back"; "mlp-first", feed-forward and other layers before those of attention; "taylor", the layers
            first whose hard weights change the loss least.
        scores: what `Progression.score` gave, of the progression that has one.

    Raises:
        ConfigError: if the progression goes by scores, and a layer has none.

    Source:
        activations first: Liu et al., ReActNet, ECCV 2020, section 5; feed-forward first: He et al., BiViT, 2022;
        "taylor": see `taylor_sensitivity`.
    """
    layers = list(latent_layers(model))
    first = int(steps * activations_first)
    order = PROGRESSIONS.get(progression)
    key = order.key
    if key is None:
        return [Stage(layer, first, 0) for _, layer in layers]
    known = dict.fromkeys((name for name, _ in layers), 0.0) if order.score is None else scores or {}
    missing = [name for name, _ in layers if name not in known]
    if missing:
        raise ConfigError(
            f"The progression {progression!r} goes by scores of layers, and {missing[0]} has none. They are taken when "
            "a run begins: it can be resumed from checkpoints of a run with this progression only."
        )
    layers.sort(key=lambda item: key(item[0], known[item[0]]))
    window = int((steps - first) * _JOINING)
    joined = [index * window // len(layers) for index in range(len(layers))]
    return [Stage(layer, first + join, join) for (_, layer), join in zip(layers, joined, strict=True)]


class LayerScores(TrainerCallback, ExportableState):
    """Keeps what layers are ordered by in the state of the Trainer, so that a resumed run has the order it began with.

    Attributes:
        scores: of the latent layers, by name.
    """

    def __init__(self, scores: dict[str, float] | None = None) -> None:
        self.scores = scores or {}

    def state(self) -> dict[str, Any]:
        """What checkpoints hold."""
        return {"args": {"scores": self.scores}, "attributes": {}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read the scores of a run that resumes: the Trainer restores callbacks only where it is asked to."""
        if state.global_step:
            self.scores = stored_scores(state)


def stored_scores(state: TrainerState) -> dict[str, float]:
    """What layers are ordered by, as the state of a Trainer keeps it."""
    stored: Any = (state.stateful_callbacks or {}).get(LayerScores.__name__)
    return stored["args"]["scores"] if stored else {}
