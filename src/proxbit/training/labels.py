"""Labels: which of a model's the classes of a data set are, and a head for other ones."""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from proxbit.errors import CheckpointError, DataError
from proxbit.foreign import printable
from proxbit.training.layouts import nfc

__all__ = ["give_labels", "labels_meant", "match_labels", "numbers_of_labels", "some"]


def numbers_of_labels(config: Any) -> dict[str, int]:
    """The number of each label of a classifier, by name; from `id2label` where its configuration has no more."""
    found: dict[str, int] = config.label2id or {label: number for number, label in (config.id2label or {}).items()}
    return found


def labels_meant(names: Iterable[str], label2id: Iterable[str]) -> dict[str, list[str]]:
    """The labels that each class may be: that very one, else those that are the same in Unicode NFC, else those that
    differ in upper and lower case, "_", "-" and spaces only."""
    spelled: list[tuple[Callable[[str], str], dict[str, list[str]]]] = [(alike, {}) for alike in (str, nfc, _plain)]
    for label in label2id:
        for alike, found in spelled:
            found.setdefault(alike(label), []).append(label)
    return {name: next((found[alike(name)] for alike, found in spelled if alike(name) in found), []) for name in names}


def match_labels(names: Sequence[str] | None, label2id: Mapping[str, int], what: str) -> dict[int, int]:
    """The model's number of each class of a dataset.

    Args:
        names: the dataset's classes, in the order of its numbers; None: its numbers are the model's.
        label2id: of the model's configuration; a class is the label that `labels_meant` names.
        what: the model, for the message.

    Raises:
        DataError: if a class is none of the model's labels, or may be several, or two classes are the same one.
    """
    if names is None:
        return {i: i for i in label2id.values()}
    if [nfc(name) for name in names] == [nfc(name) for name in sorted(label2id, key=lambda name: label2id[name])]:
        return {i: i for i in range(len(names))}
    meant = labels_meant(names, label2id)
    strange = [name for name, labels in meant.items() if not labels]
    if strange:
        raise DataError(
            f"These classes of the images are no labels of {what}: {some(strange)}. Its labels are: "
            f"{some(list(label2id))}. Name the folders as the labels, or set label2id in its config.json."
        )
    taken: dict[str, str] = {}
    for name, labels in meant.items():
        if len(labels) > 1:
            raise DataError(
                f"The class {some([name])} of the images may be any of these labels of {what}: {some(labels)}. "
                "Name its folder exactly as one of them."
            )
        if labels[0] in taken:
            raise DataError(
                f"The classes {some([taken[labels[0]]])} and {some([name])} of the images are both the label "
                f"{some(labels)} of {what}. Put their images into one folder, or name one exactly as another of its "
                f"labels: {some(list(label2id))}."
            )
        taken[labels[0]] = name
    return {i: label2id[meant[name][0]] for i, name in enumerate(names)}


def _plain(name: str) -> str:
    return nfc(name).casefold().replace("_", " ").replace("-", " ").strip()


def some(names: Sequence[str], most: int = 10) -> str:
    """Names for a message: the first ones, fit to print, and how many there are."""
    rest = f", ... ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(repr(printable(name)) for name in names[:most]) + rest


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
