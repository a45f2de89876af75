"""How a model is binarized, from its layers: each keeps where it comes from, in whatever whole or part it is."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from proxbit.config import OF_THE_PAIR, SITE, BinarizationConfig
from proxbit.errors import ModelStateError
from proxbit.nn import BinaryProbabilities, LatentWeight, PackedConv2d, PackedLinear
from proxbit.nn.attention import LEARNED_SCALE
from proxbit.nn.surroundings import Surroundings
from proxbit.patching.attention import attention_modules
from proxbit.patching.targets import CONVERTIBLE, explicit_patterns, matches

__all__ = ["Origin", "config_of", "is_binarized", "leave_origin", "origin_of", "take_origin"]

# What activation checkpointing adds to the names of modules, and leaves out of those of tensors.
_WRAPPER = "_checkpoint_wrapped_module."


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
    return isinstance(layer, LatentWeight | PackedLinear | PackedConv2d)


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
    """What the linear layers have around them beside what the common configuration gives them, in explicit patterns."""
    groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for name, origin in origins.items():
        layer = modules[name]
        if isinstance(layer, Surroundings) and (changes := _changes(layer, origin, common)):
            groups.setdefault(repr(sorted(changes.items(), key=str)), (changes, []))[1].append(name)
    everything = [*origins, *others]
    return {
        pattern: changes
        for changes, names in groups.values()
        for pattern in explicit_patterns(names, [each for each in everything if each not in names])
    }


def _changes(layer: Surroundings, origin: Origin, common: BinarizationConfig) -> dict[str, Any]:
    config = origin.config
    changes = {field: getattr(config, field) for field in SITE if getattr(config, field) != getattr(common, field)}
    # What was asked for everywhere went only where it fits.
    if "residual" in changes:
        changes["residual"] = layer.residual
    if "accumulator_bits" in changes and layer.accumulator is None:
        changes["accumulator_bits"] = None
    for pattern, fields in (config.overrides or {}).items():
        changes |= fields if matches(origin.name, pattern) else {}
    return changes
