"""From a configuration to the options of each layer, and from the layers back to one configuration.

Each layer keeps its origin, so that a part of a model, or a model around it, can still be described.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from proxbit.config import LAYER_OPTIONS, OF_THE_PAIR, BinarizationConfig
from proxbit.errors import ModelStateError, PatternError
from proxbit.nn import Accumulator, BinaryLayer, BinaryLinear, BinaryProbabilities, Epilogue, LatentWeight, PackedLinear
from proxbit.nn.attention import LEARNED_SCALE
from proxbit.patching.attention import attention_modules
from proxbit.patching.report import ModuleDecision
from proxbit.patching.selection import CONVERTIBLE, check_patterns, explicit_patterns, matches

__all__ = [
    "ONE_SIGNED",
    "Origin",
    "config_of",
    "is_binarized",
    "layer_options",
    "leave_origin",
    "origin_of",
    "reads_one_sign",
    "take_origin",
]

# What activation checkpointing adds to the names of modules, and leaves out of those of tensors.
_WRAPPER = "_checkpoint_wrapped_module."


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


def layer_options(
    model: nn.Module, decisions: Sequence[ModuleDecision], config: BinarizationConfig
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]] | None]:
    """The options of `BinaryLinear` for every linear layer that is binarized.

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
    found = {name: _options(model, name, overrides, config) for name in linear}
    return found, overrides or None


def _options(
    model: nn.Module, name: str, overrides: dict[str, dict[str, Any]], config: BinarizationConfig
) -> dict[str, Any]:
    layer = model.get_submodule(name)
    # Asked for everywhere, a residual goes where it fits; asked for here, it must fit.
    square = layer.in_features == layer.out_features
    options = {
        "activations": config.activations,
        "activation_pair": config.activation_pair,
        "rprelu": config.rprelu,
        "residual": config.residual and square,
        "accumulator_bits": config.accumulator_bits,
        "accumulator_mode": config.accumulator_mode,
    }
    for pattern, changes in overrides.items():
        if matches(name, pattern):
            options |= changes
    bits, mode = options.pop("accumulator_bits"), str(options.pop("accumulator_mode"))
    # Asked for everywhere, an accumulator goes where there are whole numbers.
    narrow = bits is not None and (
        options["activations"] != "float" or any(_names(name, overrides, "accumulator_bits"))
    )
    accumulator = Accumulator(int(str(bits)), mode) if narrow else None
    pair = config.activation_quantizer_pair(str(options["activation_pair"]))
    epilogue = Epilogue(bool(options["rprelu"]), bool(options["residual"]), accumulator)
    return {"activations": options["activations"], "activation_pair": pair, "epilogue": epilogue}


def _names(name: str, overrides: dict[str, dict[str, Any]], field: str) -> Iterator[bool]:
    """For every override of the layer, whether it names the field."""
    return (field in changes for pattern, changes in overrides.items() if matches(name, pattern))


@dataclass(frozen=True)
class Origin:
    """Where a layer comes from.

    Args:
        config: as `to_latent` returned it.
        name: of the layer in the model that it was for.
    """

    config: BinarizationConfig
    name: str


def leave_origin(layer: nn.Module, origin: Origin) -> None:
    """Tell a layer where it comes from."""
    vars(layer)["origin"] = origin


def origin_of(layer: nn.Module) -> Origin | None:
    """Where a layer comes from; None if it is float, or nobody told it."""
    origin = vars(layer).get("origin") if is_binarized(layer) else None
    return origin if isinstance(origin, Origin) else None


def take_origin(layer: nn.Module, other: nn.Module) -> None:
    """Tell a layer that it comes from where another does."""
    if (origin := origin_of(other)) is not None:
        leave_origin(layer, origin)


def is_binarized(layer: nn.Module | None) -> bool:
    """Whether a module is a latent or packed layer."""
    return isinstance(layer, BinaryLayer)


def config_of(model: nn.Module) -> BinarizationConfig | None:
    """The configuration that makes the layers of a model what they are from those of its class.

    Args:
        model: in any state; a whole of which a part was binarized, or a part of such a whole.

    Returns:
        None if the model is float. Layers that a class makes latent or packed by itself do not count.

    Raises:
        ModelStateError: if one configuration cannot say it: some layers are latent and some packed, or they are of
            different pairs.
    """
    modules = {name.replace(_WRAPPER, ""): module for name, module in model.named_modules()}
    found = {name: origin_of(module) for name, module in modules.items()}
    origins = {name: origin for name, origin in found.items() if origin is not None}
    if not origins:
        return None
    first = next(iter(origins.values())).config
    latent = {name: isinstance(modules[name], LatentWeight) for name in origins}
    state = "latent" if all(latent.values()) else "packed"
    _check_alike(origins, latent, state)
    others = [name for name, module in modules.items() if isinstance(module, CONVERTIBLE) and name not in origins]
    include = explicit_patterns(origins, others)
    if include == first.include and all(origin == Origin(first, name) for name, origin in origins.items()):
        return first if first.state == state else first.replace(state=state)
    known = attention_modules(model)
    learned = [
        name for name, each in known.items() if isinstance(getattr(each, LEARNED_SCALE, None), BinaryProbabilities)
    ]
    return first.replace(
        state=state,
        include=include,
        overrides=_overrides(modules, origins, first, others) or None,
        learned_attention=explicit_patterns(learned, [name for name in known if name not in learned]),
    )


def _check_alike(origins: Mapping[str, Origin], latent: Mapping[str, bool], state: str) -> None:
    """Check that layers are of one state and one pair; of packed ones nothing of the pair is left but the offsets."""

    def kind(name: str) -> list[Any]:
        config = origins[name].config
        if state == "packed":
            return [config.units.has_offset]
        return [config.weights, *(getattr(config, field) for field in OF_THE_PAIR)]

    first, *rest = origins
    for name in rest:
        if latent[name] != latent[first]:
            raise ModelStateError(
                f"Some layers are latent and some packed, as {first} and {name}: no checkpoint says that of one model. "
                "Save the parts, or pack the latent one first."
            )
        if kind(name) != kind(first):
            raise ModelStateError(
                f"{first} and {name} were binarized with other pairs, {kind(first)} and {kind(name)}: no checkpoint "
                "says that of one model. Save the parts, or binarize them with one pair."
            )


def _overrides(
    modules: Mapping[str, nn.Module], origins: Mapping[str, Origin], common: BinarizationConfig, others: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """The options of linear layers that differ from the common configuration, in explicit patterns."""
    groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for name, origin in origins.items():
        layer = modules[name]
        if isinstance(layer, BinaryLinear | PackedLinear) and (changes := _changes(layer, origin, common)):
            groups.setdefault(repr(sorted(changes.items(), key=str)), (changes, []))[1].append(name)
    everything = [*origins, *others]
    return {
        pattern: changes
        for changes, names in groups.values()
        for pattern in explicit_patterns(names, [each for each in everything if each not in names])
    }


def _changes(layer: BinaryLinear | PackedLinear, origin: Origin, common: BinarizationConfig) -> dict[str, Any]:
    config = origin.config
    changes = {
        field: getattr(config, field) for field in LAYER_OPTIONS if getattr(config, field) != getattr(common, field)
    }
    # What was asked for everywhere went only where it fits.
    if "residual" in changes:
        changes["residual"] = layer.epilogue.residual
    if "accumulator_bits" in changes and layer.epilogue.accumulator is None:
        changes["accumulator_bits"] = None
    for pattern, fields in (config.overrides or {}).items():
        changes |= fields if matches(origin.name, pattern) else {}
    return changes
