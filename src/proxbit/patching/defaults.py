"""Which layers stay float by default, and why: by their names, by what they do, and by where they are in the model.

Text layers and heads are found without a forward pass, so that a model needs no weights for it.
"""

import re
from collections.abc import Iterator, Mapping

from torch import nn

from proxbit.patching.static_analysis import fed_arguments, returned

__all__ = [
    "CONVERTIBLE",
    "DEFAULT_SKIPS",
    "backbone",
    "default_reason",
    "heads",
    "placed_reasons",
    "text_layers",
    "vocabularies",
]

CONVERTIBLE = (nn.Linear, nn.Conv2d)
PIXEL_CHANNELS = 4
# A table of so few rows is of kinds, as of segments of a text or corners of a box, and not of words.
KINDS = 4

# Segments of a module's name, and why a module below such a segment stays as it is.
DEFAULT_SKIPS: tuple[tuple[str, str], ...] = (
    (r"embed.*|.*embeddings?|.*_embed|.*embedder|patch.*proj.*", "embedding"),
    (r".*position.*|.*rel_pos.*|cpb_mlp|meta_mlp", "position encoding"),
    (r"sampling_offsets|attention_weights", "where deformable attention looks"),
    (r"(text|language)_(model|encoder|decoder|backbone|transformer)", "text side"),
    (r"(.*_)?stem", "stem"),
    (r"pooler|att(entio)?n_pool(ing)?", "pooler"),
    (
        r"(.*_)?(head|heads|classifier|fc)|(head|classifier)_.*|bbox_attention|(visual|text|mask)_projection|.+_predictor|logits",
        "head",
    ),
)


def _within(name: str, owner: str) -> bool:
    """Whether a module is another one, or lies in it; everything lies in the module without a name, the model."""
    return not owner or name == owner or name.startswith(f"{owner}.")


def _holds(owner: str, names: list[str]) -> bool:
    return any(_within(name, owner) for name in names)


def _owners(name: str) -> Iterator[str]:
    """The names of the modules that one lies in, the nearest first, the model last."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _asked(module: nn.Module, method: str) -> nn.Module | None:
    """What a model of transformers says that its first or last layer is; None for other modules, and without a word."""
    try:
        answer = getattr(module, method)()
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return answer if isinstance(answer, nn.Module) else None


def vocabularies(model: nn.Module) -> list[str]:
    """The embeddings that token ids go into: those that models of transformers name as their first layer, and those
    that a module calls on what it was given. Embeddings of positions and queries are called on numbers made on the way,
    or not at all.
    """
    modules = dict(model.named_modules())
    firsts = {name: first for name, m in modules.items() if (first := _asked(m, "get_input_embeddings")) is not None}
    declared = {id(first) for first in firsts.values() if isinstance(first, nn.Embedding)}
    found = [name for name, module in modules.items() if id(module) in declared]
    others = [name for name, first in firsts.items() if not isinstance(first, nn.Embedding) and not _holds(name, found)]
    for name, module in modules.items():
        if not isinstance(module, nn.Embedding) or module.num_embeddings <= KINDS or name in found:
            continue
        if not any(_within(name, other) for other in others) and _is_fed_arguments(modules, name):
            found.append(name)
    return found


def _is_fed_arguments(modules: Mapping[str, nn.Module], name: str) -> bool:
    """Whether a module that another one lies in calls it on what it was given itself."""
    for owner in _owners(name):
        if name.removeprefix(f"{owner}.") in fed_arguments(type(modules[owner])):  # type: ignore[arg-type]
            return True
    return False


def _takes_no_tokens(module: nn.Module) -> bool:
    """Whether a module without a vocabulary is a side of its own, or where one begins: a model of transformers, or what
    reads the pixels.
    """
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        return module.in_channels <= PIXEL_CHANNELS
    return _is_of_transformers(module)


def text_layers(model: nn.Module, vocabularies: list[str]) -> set[str]:
    """The layers on the text sides of a model. A text side is the largest part around a vocabulary in which nothing
    reads images. Where the layers behind a vocabulary lie beside what reads images, as in GIT, it is all of that part
    but the image sides in it.
    """
    if not vocabularies:
        return set()
    modules = dict(model.named_modules())
    starts = [name for name, m in modules.items() if not _holds(name, vocabularies) and _takes_no_tokens(m)]
    images = [[start, *(o for o in _owners(start) if o and not _holds(o, vocabularies))][-1] for start in starts]
    layers = [name for name, m in modules.items() if isinstance(m, CONVERTIBLE)]
    behind = [name for name in layers if name not in starts]
    found: set[str] = set()
    for vocabulary in vocabularies:
        owners = [name for name in _owners(vocabulary) if _holds(name, behind)]
        side = [*owners[:1], *(name for name in owners[1:] if not _holds(name, starts))]
        found |= {name for name in layers if side and _within(name, side[-1])}
    return {name for name in found if not any(_within(name, image) for image in images)}


def backbone(model: nn.Module) -> str:
    """The attribute that holds the base model of a task model, as transformers names it; empty if there is none."""
    prefix = getattr(model, "base_model_prefix", "")
    return prefix if prefix in dict(model.named_children()) else ""


def heads(model: nn.Module, vocabularies: list[str]) -> set[str]:
    """The layers whose outputs are the answers of the model: those that models of transformers name as their last
    layer, those that share their weight with the embedding of a vocabulary, and, where there is no backbone to lie
    beside, those that it returns.
    """
    modules = dict(model.named_modules())
    lasts = {id(last) for m in modules.values() if (last := _asked(m, "get_output_embeddings")) is not None}
    tied = {id(modules[name].weight) for name in vocabularies}
    found = {name for name, module in modules.items() if id(module) in lasts}
    found |= {
        name
        for name, m in modules.items()
        if isinstance(m, nn.Linear) and id(vars(m)["_parameters"].get("weight")) in tied
    }
    return found if backbone(model) else found | set(_returned_layers(model, ""))


def _returned_layers(module: nn.Module, name: str) -> Iterator[str]:
    """The layers, by name within the model, whose outputs a module returns. A model of transformers returns its states
    beside its answers: of those that it is made of, nothing is taken but single layers.
    """
    if type(module) is nn.Sequential and name:
        chains = frozenset({tuple(reversed([key for key, _ in module.named_children()]))})
    else:
        chains = returned(type(module))  # type: ignore[arg-type]
    for chain in chains:
        children = (_child(module, path) for path in chain)
        part, child = next((found for found in children if any(True for _ in found[1].parameters())), ("", None))
        inner = f"{name}.{part}".removeprefix(".")
        if isinstance(child, CONVERTIBLE):
            yield inner
        elif child is not None and (type(child) is nn.Sequential or not _is_of_transformers(module, child)):
            yield from _returned_layers(child, inner)


def _is_of_transformers(*modules: nn.Module) -> bool:
    return any(hasattr(module, "base_model_prefix") for module in modules)


def _child(module: nn.Module, path: str) -> tuple[str, nn.Module]:
    """The module that a path names, and its name; of a list, the last. A module without anything if there is none."""
    names: list[str] = []
    for child in path.split("."):
        children = dict(module.named_children())
        names.append(next(reversed(children), "") if child == "*" else child)
        module = children.get(names[-1], nn.Module())
    return ".".join(names), module


def _named_reason(name: str, module: nn.Module) -> str | None:
    """Why a module is left alone by its name."""
    segments = name.split(".")
    # In a pyramid, the "patch embedding" of a later stage is a downsampling convolution like any other.
    later_stage = any(segment.isdigit() and int(segment) > 0 for segment in segments)
    downsampling = isinstance(module, nn.Conv2d) and module.in_channels > PIXEL_CHANNELS and later_stage
    for segment in segments:
        for expression, reason in DEFAULT_SKIPS:
            if re.fullmatch(expression, segment) and not (reason == "embedding" and downsampling):
                return reason
    return None


def placed_reasons(model: nn.Module) -> dict[str, str]:
    """Why layers are left alone by where they are in the model, by their names."""
    words = vocabularies(model)
    found = dict.fromkeys(heads(model, words), "head")
    if body := backbone(model):
        layers = (name for name, module in model.named_modules() if isinstance(module, CONVERTIBLE))
        beside = (name for name in layers if not name.startswith(f"{body}."))
        found |= dict.fromkeys(beside, "outside the backbone: task head")
    return found | dict.fromkeys(text_layers(model, words), "text side")


def default_reason(name: str, module: nn.Module, placed: Mapping[str, str]) -> str | None:
    """Why a module is left alone by default; None if it is binarized."""
    if reason := _named_reason(name, module) or placed.get(name):
        return reason
    if not module.weight.requires_grad:
        return "frozen: it would stay at its signs"
    if isinstance(module, nn.Conv2d):
        if module.groups > 1 and module.groups == module.in_channels:
            return "depthwise convolution"
        if module.in_channels <= PIXEL_CHANNELS:
            return "reads the pixels"
    return None
