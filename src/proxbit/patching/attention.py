"""Attention modules of transformers models, and the learned scale that those with binary operands get."""

import inspect
from itertools import chain
from types import CodeType

from torch import nn

from proxbit.config import BinarizationConfig
from proxbit.nn import BinaryProbabilities
from proxbit.nn.attention import BINARY, LEARNED_SCALE
from proxbit.patching.selection import check_patterns, explicit_patterns, matches

__all__ = ["attention_modules", "learn_scales", "learned_attentions", "unlearn_scales"]

# Where transformers keeps its attention implementations. A module that calls one looks it up here, by the name in its
# configuration, and passes itself; transformers changes the implementation of no model that does otherwise.
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model that call the attention implementation of its configuration, by name."""
    return {name: module for name, module in model.named_modules() if _INTERFACE in _names_in_forward(type(module))}


def _names_in_forward(kind: type[nn.Module]) -> tuple[str, ...]:
    """The global names and attributes that its forward reads; none where that is no Python function."""
    code = getattr(inspect.unwrap(getattr(kind, "forward", None)), "__code__", None)  # type: ignore[arg-type]
    return code.co_names if isinstance(code, CodeType) else ()


def _runs_binary(module: nn.Module) -> bool:
    return getattr(getattr(module, "config", None), "_attn_implementation", None) == BINARY


def learned_attentions(model: nn.Module, config: BinarizationConfig) -> tuple[list[str], list[str]]:
    """Which attention modules learn the scale of their binary probabilities.

    Returns:
        Their names, and patterns that match exactly these.

    Raises:
        PatternError: for a pattern of `learned_attention` that matches no attention module.
    """
    known = attention_modules(model)
    given = config.learned_attention
    if given is None:
        names = [name for name, module in known.items() if _runs_binary(module)]
    else:
        check_patterns("learned_attention", given, list(known))
        names = [name for name in known if any(matches(name, pattern) for pattern in given)]
    return names, explicit_patterns(names, [name for name in known if name not in names])


def learn_scales(model: nn.Module, names: list[str]) -> None:
    """Give each of these attention modules a `BinaryProbabilities`."""
    for name in names:
        module = model.get_submodule(name)
        like = next(chain(module.parameters(), model.parameters()))
        module.add_module(LEARNED_SCALE, BinaryProbabilities(device=like.device, dtype=like.dtype))


def unlearn_scales(model: nn.Module) -> None:
    """Take them away again."""
    for module in model.modules():
        if isinstance(getattr(module, LEARNED_SCALE, None), BinaryProbabilities):
            delattr(module, LEARNED_SCALE)
