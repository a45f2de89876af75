"""What is around each binarized linear layer: the configuration's choice for all, its overrides, and safe defaults."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from proxbit.config import BinarizationConfig
from proxbit.errors import PatternError
from proxbit.nn import Accumulator
from proxbit.patching.report import ModuleDecision
from proxbit.patching.targets import check_patterns, explicit_patterns, matches

__all__ = ["ONE_SIGNED", "reads_one_sign", "surroundings"]

# Formats for inputs of both signs, and the one that takes their place where the input is not negative, or hardly: there
# a sign around 0 is +1 nearly always, and half of the levels of int4 are never used.
ONE_SIGNED = {"sign": "elastic", "int4": "uint4"}
# The second linear layer of a feed-forward block, which reads the output of GELU or ReLU.
_BEHIND_ACTIVATION = re.compile(
    r"(.*\.)?(fc2|dense2|lin2|linear_?2|(linear_down|projection)\.linear|linear_down|down_proj|pwconv2|pointwise_conv2)"
    r"|(?!.*atten)(.*\.)?output\.dense"
)
_GATES = re.compile(r".*gate.*|fc1_[gx]|w12")


def reads_one_sign(model: nn.Module, name: str) -> bool:
    """Whether a layer, by its name, reads what comes out of a GELU or ReLU and is multiplied with nothing else."""
    if not _BEHIND_ACTIVATION.fullmatch(name):
        return False
    parent = model.get_submodule(name.rpartition(".")[0])
    return not any(_GATES.fullmatch(child) for child, _ in parent.named_children())


def surroundings(
    model: nn.Module, decisions: Sequence[ModuleDecision], config: BinarizationConfig
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]] | None]:
    """What `BinaryLinear` is made with, for every linear layer that is binarized.

    Args:
        model: a float model.
        decisions: which modules are binarized.
        config: `activations` and its companions, and `overrides`.

    Returns:
        Keyword arguments by the name of the layer; and the overrides that a checkpoint stores: the configuration's, and
        before them those that layers with inputs of one sign got.

    Raises:
        PatternError: for a pattern of `overrides` that matches no binarized linear layer.
        ConfigError: for a residual that an override asks for around a layer that is not square.
    """
    linear = [d.name for d in decisions if d.converted and isinstance(model.get_submodule(d.name), nn.Linear)]
    given = config.overrides or {}
    for pattern in given:
        named = [d for d in decisions if matches(d.name, pattern)]
        if named and not any(d.name in linear for d in named):
            told = ", ".join(f"{d.name} ({d.kind if d.converted else d.reason})" for d in named[:3])
            raise PatternError(
                f"overrides: the pattern {pattern!r} matches no linear layer that is binarized, but {told}."
            )
    check_patterns("overrides", given, linear)
    own: dict[str, dict[str, Any]] = {}
    if config.activations in ONE_SIGNED:
        names = [name for name in linear if reads_one_sign(model, name)]
        others = [d.name for d in decisions if d.name not in names]
        own = {pattern: {"activations": ONE_SIGNED[config.activations]} for pattern in explicit_patterns(names, others)}
    overrides = {pattern: changes for pattern, changes in own.items() if pattern not in given} | given
    found = {name: _site(model, name, overrides, config) for name in linear}
    return found, overrides or None


def _site(
    model: nn.Module, name: str, overrides: dict[str, dict[str, Any]], config: BinarizationConfig
) -> dict[str, Any]:
    layer = model.get_submodule(name)
    # Asked for everywhere, a residual goes where it fits; asked for here, it must fit.
    square = layer.in_features == layer.out_features
    site = {
        "activations": config.activations,
        "activation_pair": config.activation_pair,
        "rprelu": config.rprelu,
        "residual": config.residual and square,
        "accumulator_bits": config.accumulator_bits,
        "accumulator_mode": config.accumulator_mode,
    }
    for pattern, changes in overrides.items():
        if matches(name, pattern):
            site |= changes
    bits, mode = site.pop("accumulator_bits"), str(site.pop("accumulator_mode"))
    # Asked for everywhere, an accumulator goes where there are whole numbers.
    narrow = bits is not None and (site["activations"] != "float" or any(_names(name, overrides, "accumulator_bits")))
    accumulator = Accumulator(int(str(bits)), mode) if narrow else None
    pair = config.activation_quantizer_pair(str(site["activation_pair"]))
    return site | {"activation_pair": pair, "accumulator": accumulator}


def _names(name: str, overrides: dict[str, dict[str, Any]], field: str) -> Iterator[bool]:
    """For every override of the layer, whether it names the field."""
    return (field in changes for pattern, changes in overrides.items() if matches(name, pattern))
