"""Selection of the modules that are binarized: by patterns on their names in memory, else by defaults."""

import difflib
import glob
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from proxbit.config import BinarizationConfig
from proxbit.errors import PatternError
from proxbit.nn import LatentWeight, PackedWeight
from proxbit.patching.defaults import CONVERTIBLE, default_reason, placed_reasons
from proxbit.patching.report import ModuleDecision
from proxbit.patching.static_analysis import weights_read

__all__ = [
    "CONVERTIBLE",
    "call_layers",
    "check_patterns",
    "explicit_patterns",
    "matches",
    "select",
    "state_of",
]

# Layers whose weight their owner reads unless it is told to call them, and the attribute that tells it: in timm,
# attention that has biases beside its layer.
SWITCHES = {"qkv": "qkv_bias_separate"}


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern (fnmatch, case-sensitive) names the module or one of the modules it lies in."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(len(parts), 0, -1))


def _reads_weight(model: nn.Module, name: str) -> bool:
    """Whether a module that a layer lies in reads its weight beside calling the layer, or goes by the dtype of it."""
    parts = name.split(".")
    # The device of a layer stays, and packed convolutions have weights to look at.
    harmless = {"device"} if isinstance(model.get_submodule(name), nn.Linear) else {"device", "dtype"}
    for end in range(len(parts)):
        owner, inside = model.get_submodule(".".join(parts[:end])), parts[end:]
        for path, what in weights_read(type(owner)):  # type: ignore[arg-type]
            spelled = path.split(".")
            named = len(spelled) == len(inside) and all(map(fnmatchcase, inside, spelled))
            if named and what not in harmless and not hasattr(owner, SWITCHES.get(path, "")):
                return True
    return False


def call_layers(model: nn.Module, names: Iterable[str]) -> None:
    """Tell the modules that can be told to call these layers, instead of reading their weights."""
    for name in names:
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        if hasattr(owner, SWITCHES.get(child, "")):
            setattr(owner, SWITCHES[child], True)


def check_patterns(field: str, patterns: Iterable[str], names: list[str]) -> None:
    """Raise PatternError, with near misses, for a pattern that matches none of the names."""
    for pattern in patterns:
        if any(matches(name, pattern) for name in names):
            continue
        near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
        near = near or [name for name in names if name.split(".")[-1] in pattern][:3]
        hint = f" Near misses: {', '.join(near)}." if near else ""
        raise PatternError(
            f"{field}: the pattern {pattern!r} matches no module.{hint} "
            "Patterns name modules as model.named_modules() does, which can differ from the names in a checkpoint."
        )


def select(model: nn.Module, config: BinarizationConfig) -> list[ModuleDecision]:
    """Decide, for every linear and convolutional module, whether it is binarized.

    Args:
        model: a float model.
        config: `include` and `modules_to_not_convert`.

    Returns:
        One decision a module, in the order of `model.named_modules()`.

    Raises:
        PatternError: for a pattern that matches nothing, tied weights that would be split, or an empty selection.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    candidates = {name: module for name, module in modules.items() if isinstance(module, CONVERTIBLE)}
    check_patterns("include", config.include or (), [n for n, m in candidates.items() if type(m) in CONVERTIBLE])
    check_patterns("modules_to_not_convert", config.modules_to_not_convert or (), list(modules))
    placed = placed_reasons(model) if config.include is None else {}
    decisions = []
    for name, module in candidates.items():
        reason, converted = _decide(name, module, config, placed)
        if converted and _reads_weight(model, name):
            reason, converted = "its model reads its weight, or the dtype of it, by itself", False
        weight = getattr(module, "weight", None)
        weights = weight.numel() if isinstance(weight, Tensor) and not is_lazy(weight) else 0
        decisions.append(ModuleDecision(name, type(module).__name__, weights, converted, reason))
    if not any(decision.converted for decision in decisions):
        left = "\n".join(f"  {decision.name}: {decision.reason}" for decision in decisions[:10])
        raise PatternError(
            f"Nothing to binarize in {type(model).__name__}: it has {len(decisions)} linear and convolutional modules, "
            f"all left as they are.\n{left}\nName some with include=[...]."
        )
    _check_tied(model, decisions)
    return decisions


def _decide(name: str, module: nn.Module, config: BinarizationConfig, placed: Mapping[str, str]) -> tuple[str, bool]:
    if type(module) not in CONVERTIBLE:
        return f"{type(module).__name__} computes in its own way", False
    if not isinstance(vars(module)["_parameters"].get("weight"), nn.Parameter):
        return "its weight is made of other tensors", False
    if "forward" in vars(module):
        return "its forward was replaced, as by the hooks of accelerate", False
    for pattern in config.modules_to_not_convert or ():
        if matches(name, pattern):
            return f"modules_to_not_convert: {pattern}", False
    if config.include is not None:
        hits = [pattern for pattern in config.include if matches(name, pattern)]
        return (f"include: {hits[0]}", True) if hits else ("not in include", False)
    reason = default_reason(name, module, placed)
    return (reason, False) if reason else ("default", True)


def _check_tied(model: nn.Module, decisions: list[ModuleDecision]) -> None:
    """Binarizing a weight that another module uses too would split the two."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for decision in decisions:
        if not decision.converted:
            continue
        weight = model.get_submodule(decision.name).weight
        twins = [name for name in owners[id(weight)] if name != f"{decision.name}.weight"]
        if twins:
            raise PatternError(
                f"{decision.name}.weight is tied: it is also {', '.join(twins)}. Binarizing it would split the two. "
                f"Leave it as it is with modules_to_not_convert=['{decision.name}'], or untie the weights first."
            )


def explicit_patterns(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Patterns that match exactly `names` and none of `others`: what a checkpoint stores, so that it stays loadable
    when the defaults change. Layer numbers become `*` where that matches nothing else.
    """
    names, others = list(names), list(others)
    chosen: list[str] = []
    for name in names:
        exact = glob.escape(name)
        wildcard = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", exact)
        pattern = exact if any(matches(other, wildcard) for other in others) else wildcard
        if pattern not in chosen:
            chosen.append(pattern)
    return chosen


def state_of(model: nn.Module) -> str:
    """The state of a model: "float", "latent" or "packed"."""
    kinds = [type(module) for module in model.modules()]
    if any(issubclass(kind, PackedWeight) for kind in kinds):
        return "packed"
    return "latent" if any(issubclass(kind, LatentWeight) for kind in kinds) else "float"
