"""Recipes: what is binarized and how it is trained, as data with a name."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from proxbit.config import BinarizationConfig
from proxbit.registry import Registry

__all__ = ["DEFAULT_RECIPE", "FROM_CALIBRATION", "RECIPES", "Recipe", "get_recipe", "register_recipe"]


def _frozen(values: Mapping[str, Any]) -> Mapping[str, Any]:
    return MappingProxyType(dict(values))


@dataclass(frozen=True)
class Recipe:
    """A way to binarize a model and to train it. Whatever is given beside a recipe takes the place of its field.

    Args:
        summary: what it makes, in a line.
        config: fields of `BinarizationConfig` that differ from their defaults.
        training: fields of `ProxConnectArguments` that it sets.
        source: where its parts come from.
    """

    summary: str
    config: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", _frozen(self.config))
        object.__setattr__(self, "training", _frozen(self.training))
        self.binarization()

    def binarization(self, **changes: Any) -> BinarizationConfig:
        """The configuration of the recipe, with some fields changed.

        Raises:
            ConfigError: for values that are not valid.
        """
        return BinarizationConfig(**{**self.config, **changes})


RECIPES: Registry[Recipe] = Registry("recipe")
DEFAULT_RECIPE = "w1a32"


def register_recipe(name: str, recipe: Recipe) -> Recipe:
    """Make a recipe available by name.

    Raises:
        UnknownNameError: if the name is taken.
    """
    return RECIPES.register(name, recipe)


def get_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        UnknownNameError: if there is none; the message lists the valid names.
    """
    return RECIPES.get(name)


_SOFT_TO_HARD: dict[str, Any] = {
    "hard_fraction": 0.1,
    "distillation_weight": 0.5,
    "distillation_temperature": 2.0,
    "distillation_tokens": 0.0,
    "distillation_gram": 0.0,
    "activations_first": 0.0,
    "progression": "together",
    "overflow_penalty": 0.0,
    "latent_learning_rate_factor": 1.0,
}

# What a training that begins at calibrated weights does otherwise, unless it is told: its signs are a code of many that
# make up for each other, which a soft phase and large steps of the latents throw away.
FROM_CALIBRATION: Mapping[str, Any] = _frozen({"hard_fraction": 1.0, "latent_learning_rate_factor": 0.1})

register_recipe(
    "w1a32",
    Recipe(
        "1-bit weights, float activations: soft to hard, with distillation",
        {"weights": "bnn++"},
        _SOFT_TO_HARD,
        "ProxConnect++: Lu et al., NeurIPS 2023; distillation: Hinton, Vinyals, Dean, 2015",
    ),
)
register_recipe(
    "w1a8",
    Recipe(
        "1-bit weights, int8 activations by token",
        {"weights": "bnn++", "activations": "int8"},
        _SOFT_TO_HARD,
        "as w1a32",
    ),
)
register_recipe(
    "w1a4",
    Recipe(
        "1-bit weights, 4-bit activations with learned steps",
        {"weights": "bnn++", "activations": "int4"},
        _SOFT_TO_HARD,
        "as w1a32; steps: Esser et al., LSQ, ICLR 2020",
    ),
)
register_recipe(
    "w1a1",
    Recipe(
        "1-bit weights and activations, residuals around square layers",
        {"weights": "bnn++", "activations": "sign", "residual": True},
        _SOFT_TO_HARD,
        "as w1a32; thresholds: Liu et al., ReActNet, ECCV 2020; residuals: Le, Li, BinaryViT, CVPRW 2023",
    ),
)
register_recipe(
    "w1a1-two-stage",
    Recipe(
        "as w1a1, with RPReLU; activations are binarized first, weights in the second half",
        {"weights": "bnn++", "activations": "sign", "residual": True, "rprelu": True},
        {**_SOFT_TO_HARD, "activations_first": 0.5},
        "as w1a1; RPReLU, and activations first: ReActNet, sections 4.2 and 5",
    ),
)
register_recipe(
    "w1a8-acc8",
    Recipe(
        "as w1a8, with sums that end in 8 bits",
        {"weights": "bnn++", "activations": "int8", "accumulator_bits": 8},
        {**_SOFT_TO_HARD, "overflow_penalty": 1e-3},
        "as w1a8; accumulators: Ni et al., WrapNet, ICLR 2021",
    ),
)
register_recipe(
    "w1a1-acc8",
    Recipe(
        "as w1a1, with sums that end in 8 bits",
        {"weights": "bnn++", "activations": "sign", "residual": True, "accumulator_bits": 8},
        {**_SOFT_TO_HARD, "overflow_penalty": 1e-3},
        "as w1a1; accumulators: Ni et al., WrapNet, ICLR 2021",
    ),
)
register_recipe(
    "w1a32-progressive",
    Recipe(
        "as w1a32; layers are binarized one after the other, feed-forward blocks first",
        {"weights": "bnn++"},
        {**_SOFT_TO_HARD, "progression": "mlp-first"},
        "order: He, Lou, Zhang, Wu, Zhuang, BiViT, 2022",
    ),
)
