"""What a configuration says of a part of the model that it is for."""

from collections.abc import Iterable

from torch import nn

from proxbit.config import BinarizationConfig
from proxbit.patching.attention import attention_modules
from proxbit.patching.report import BinarizationReport
from proxbit.patching.targets import explicit_patterns, matches

__all__ = ["config_of_part"]


def config_of_part(
    model: nn.Module, report: BinarizationReport, config: BinarizationConfig, name: str
) -> BinarizationConfig:
    """The configuration that binarizes a part of a model as it was binarized within the whole.

    Args:
        model: latent, with names that `config` is about.
        report: which modules were converted.
        config: as `to_latent` returned it.
        name: of the part; empty for the whole.

    Returns:
        The same with the names of the part; of `overrides`, what they come to, layer by layer.
    """
    if not name:
        return config

    def below(names: Iterable[str]) -> list[str]:
        return [each.removeprefix(f"{name}.") for each in names if each.startswith(f"{name}.")]

    converted, left = below(report.converted), below(report.left)
    groups: dict[str, tuple[dict[str, object], list[str]]] = {}
    for layer in converted:
        changes: dict[str, object] = {}
        for pattern, fields in (config.overrides or {}).items():
            changes |= fields if matches(f"{name}.{layer}", pattern) else {}
        if changes:
            groups.setdefault(repr(sorted(changes.items(), key=str)), (changes, []))[1].append(layer)
    everything = [*converted, *left]
    overrides = {
        pattern: changes
        for changes, layers in groups.values()
        for pattern in explicit_patterns(layers, [each for each in everything if each not in layers])
    }
    known = attention_modules(model)
    learned = [each for each in known if any(matches(each, pattern) for pattern in config.learned_attention or ())]
    return config.replace(
        include=explicit_patterns(converted, left),
        overrides=overrides or None,
        learned_attention=explicit_patterns(below(learned), below(each for each in known if each not in learned)),
    )
