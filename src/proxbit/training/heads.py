"""The head of a classifier, made one for other classes."""

import copy
from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from proxbit.errors import CheckpointError
from proxbit.training.image_folders import labels_meant, numbers_of_labels

__all__ = ["give_labels"]


def give_labels(model: PreTrainedModel, names: Sequence[str]) -> list[str]:
    """Give a classifier these labels. The rows of labels that it has stay with them; the others are new and random.

    Args:
        model: whose head, or heads, are `nn.Linear`; changed in place, with its configuration.
        names: of the classes, in the order of their numbers.

    Returns:
        The names whose rows were kept.

    Raises:
        CheckpointError: if its head is of another kind.
    """
    old = numbers_of_labels(model.config)
    meant = labels_meant(names, old)
    taken = Counter(label for labels in meant.values() for label in labels)
    rows = {
        i: old[labels[0]]
        for i, labels in enumerate(meant.values())
        if len(labels) == 1 and taken[labels[0]] == 1 and 0 <= old[labels[0]] < model.config.num_labels
    }
    heads = _heads(model)
    for path in heads:
        model.set_submodule(path, _head(model, model.get_submodule(path), len(names), rows))
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: i for i, name in enumerate(names)}
    model.num_labels = len(names)
    return [name for i, name in enumerate(names) if i in rows]


def _heads(model: PreTrainedModel) -> list[str]:
    """The layers whose size follows the number of labels: those that differ in a model of one label more."""
    wide = copy.deepcopy(model.config)
    wide.num_labels = model.config.num_labels + 1
    with torch.device("meta"):
        own, other = (type(model)(config).state_dict() for config in (model.config, wide))
    found = list(dict.fromkeys(name.rpartition(".")[0] for name in own if own[name].shape != other[name].shape))
    kinds = sorted({type(model.get_submodule(each)).__name__ for each in found} - {"Linear"})
    if kinds or not found:
        raise CheckpointError(
            f"{type(model).__name__} cannot be given a new head: it is {kinds or 'not found'}, and only nn.Linear is "
            "replaced. Name the classes of the images as its labels, or give it a head in a script of your own."
        )
    return found


def _head(model: PreTrainedModel, old: nn.Module, size: int, rows: dict[int, int]) -> nn.Linear:
    assert isinstance(old, nn.Linear)
    made = nn.Linear(old.in_features, size, old.bias is not None)
    model._init_weights(made)
    made.to(old.weight.device, old.weight.dtype)
    with torch.no_grad():
        for new, number in rows.items():
            made.weight[new] = old.weight[number]
            if made.bias is not None:
                made.bias[new] = old.bias[number]
    return made.train(old.training)
