"""Pictures in folders, one a class, or of a dataset on the hub: read, checked, and with the labels of a model."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.exceptions import DatasetsError
from PIL import Image, ImageOps, UnidentifiedImageError

from proxbit.errors import DataError

__all__ = [
    "LeftOut",
    "Pictures",
    "class_names",
    "load_splits",
    "match_labels",
    "pick_split",
    "read_pictures",
    "relabel",
    "unlabelled",
]

IMAGE, LABEL = "image", "label"
LAYOUT = "Pictures lie in a folder for each class, such as DATA/cat/1.jpg, or DATA/train/cat/1.jpg for parts of a set."
Watch = Callable[[Iterable[Any], int], Iterable[Any]]


@dataclass(frozen=True)
class LeftOut:
    """A picture that was not read, and why."""

    picture: str
    reason: str


@dataclass(frozen=True)
class Pictures:
    """Pictures that can be read.

    Attributes:
        dataset: columns `image` (RGB, turned as its EXIF says) and `label` (numbers).
        names: of the labels, in their order; None if they are numbers only.
        left_out: what could not be read.
    """

    dataset: datasets.Dataset
    names: tuple[str, ...] | None
    left_out: tuple[LeftOut, ...]


def load_splits(source: str) -> datasets.DatasetDict:
    """The parts of an image folder or of a dataset on the hub, by name.

    Raises:
        DataError: if there is none, or it holds no pictures.
    """
    path = Path(source)
    if path.exists() and not path.is_dir():
        raise DataError(f"{source} is a file, not a folder of pictures. {LAYOUT}")
    try:
        if path.is_dir():
            return datasets.load_dataset("imagefolder", data_dir=str(path), drop_labels=False)
        return datasets.load_dataset(source)
    except (OSError, ValueError, DatasetsError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        if path.is_dir():
            raise DataError(f"{source} holds no pictures that can be read as a dataset: {reason}. {LAYOUT}") from error
        raise DataError(f"There is no folder and no dataset on the hub named {source!r}: {reason}") from error


def unlabelled(source: str, seed: int, left_out: list[LeftOut]) -> Iterator[Image.Image]:
    """The images of a folder, however deep, or of a dataset on the hub, in random order: RGB, turned as EXIF says.

    Args:
        source: a folder, of which the part `train` is taken where there is one; or a name on the hub, likewise.
        seed: of the order.
        left_out: gets what could not be read, as far as the images are asked for.

    Raises:
        DataError: if there are no images.
    """
    path = Path(source)
    if not path.is_dir():
        splits = load_splits(source)
        found = splits[pick_split(splits, None, ["train"])]
        column = next((name for name, kind in found.features.items() if isinstance(kind, datasets.Image)), None)
        if column is None:
            raise DataError(f"{source!r} has no column of images, but {list(found.features)}.")
        yield from (example[column].convert("RGB") for example in found.shuffle(seed))
        return
    part = path / "train"
    kinds = {kind for kind, form in Image.registered_extensions().items() if form in Image.OPEN}
    files = sorted(each for each in (part if part.is_dir() else path).rglob("*") if each.suffix.lower() in kinds)
    if not files:
        raise DataError(f"{source} holds no images. {LAYOUT}")
    for i in np.random.default_rng(seed).permutation(len(files)):
        stored = {"path": str(files[i]), "bytes": None}
        reason = _why_unreadable(stored)
        if reason is None:
            with Image.open(files[i]) as image:
                yield ImageOps.exif_transpose(image).convert("RGB")
        else:
            left_out.append(LeftOut(str(files[i]), reason))


def pick_split(splits: Mapping[str, datasets.Dataset], wanted: str | None, preferred: Sequence[str]) -> str:
    """The name of the part that is wanted; else the first preferred one that is there, else the only one.

    Raises:
        DataError: if it is not there, or nobody knows which.
    """
    if wanted is not None:
        if wanted not in splits:
            raise DataError(f"There is no split {wanted!r}; there are: {', '.join(splits)}.")
        return wanted
    found = next((name for name in preferred if name in splits), None)
    if found is None and len(splits) > 1:
        raise DataError(f"Which split? There are: {', '.join(splits)}.")
    return found or next(iter(splits))


def read_pictures(dataset: datasets.Dataset, watch: Watch = lambda items, total: items) -> Pictures:
    """Read every picture once, and leave out those that cannot be read.

    Args:
        dataset: with one column of pictures and one of labels.
        watch: is handed the pictures and their number, and hands them on: a progress bar.

    Raises:
        DataError: if a column is missing, or no picture is left.
    """
    image, label = _columns(dataset)
    raw = dataset.cast_column(image, datasets.Image(decode=False))
    numbers = raw[label]
    kept, left_out = [], []
    for i, stored in enumerate(watch((raw[i][image] for i in range(len(raw))), len(raw))):
        reason = "no label" if numbers[i] is None else _why_unreadable(stored)
        if reason is None:
            kept.append(i)
        else:
            left_out.append(LeftOut(str(stored["path"] or f"picture {i}"), reason))
    if not kept:
        first = "".join(f" {each.picture}: {each.reason}." for each in left_out[:1])
        raise DataError(f"None of {len(raw)} pictures can be read.{first}")
    labels = [int(numbers[i]) for i in kept]
    chosen = dataset.select(kept).select_columns([image]).cast_column(image, datasets.Image(mode="RGB"))
    if image != IMAGE:
        chosen = chosen.rename_column(image, IMAGE)
    chosen = chosen.add_column(LABEL, labels)
    return Pictures(chosen, class_names(dataset), tuple(left_out))


def _columns(dataset: datasets.Dataset) -> tuple[str, str]:
    """The names of the columns of pictures and of labels."""
    features = dataset.features
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    named = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    numbers = [name for name in ("label", "labels") if name in features and features[name].dtype.startswith("int")]
    labels = named or numbers
    if len(images) != 1 or len(labels) != 1:
        raise DataError(
            f"One column of pictures and one of class labels are needed; found {images} and {labels} among "
            f"{list(features)}. {LAYOUT}"
        )
    return images[0], labels[0]


def class_names(dataset: datasets.Dataset) -> tuple[str, ...] | None:
    """The names of the labels of a dataset, in their order; None if they are numbers only."""
    feature = dataset.features[_columns(dataset)[1]]
    return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def _why_unreadable(stored: dict[str, Any]) -> str | None:
    try:
        with Image.open(stored["path"] if stored["bytes"] is None else BytesIO(stored["bytes"])) as picture:
            ImageOps.exif_transpose(picture).convert("RGB")
    except UnidentifiedImageError:
        return "not a picture"
    except Exception as error:  # Pillow's many readers raise whatever they meet in a damaged file.
        return str(error) or type(error).__name__
    return None


def match_labels(names: Sequence[str] | None, label2id: Mapping[str, int], what: str) -> dict[int, int]:
    """The model's number of each class of a dataset.

    Args:
        names: the dataset's classes, in the order of its numbers; None: its numbers are the model's.
        label2id: of the model's configuration. A class that is none of its labels is the one that differs in upper and
            lower case, "_", "-" and spaces only.
        what: the model, for the message.

    Raises:
        DataError: if a class is none of the model's labels, or may be several, or two classes are the same one.
    """
    if names is None or list(names) == sorted(label2id, key=lambda name: label2id[name]):
        return {i: i for i in (range(len(names)) if names else label2id.values())}
    alike: dict[str, list[str]] = {}
    for label in label2id:
        alike.setdefault(_plain(label), []).append(label)
    meant = {name: [name] if name in label2id else alike.get(_plain(name), []) for name in names}
    strange = [name for name, labels in meant.items() if not labels]
    if strange:
        raise DataError(
            f"These classes of the pictures are no labels of {what}: {_some(strange)}. Its labels are: "
            f"{_some(list(label2id))}. Name the folders as the labels, or set label2id in its config.json."
        )
    taken: dict[str, str] = {}
    for name, labels in meant.items():
        if len(labels) > 1:
            raise DataError(
                f"The class {name!r} of the pictures may be any of these labels of {what}: {_some(labels)}. Name its "
                "folder exactly as one of them."
            )
        if labels[0] in taken:
            raise DataError(
                f"The classes {taken[labels[0]]!r} and {name!r} of the pictures are both the label {labels[0]!r} of "
                f"{what}. Put their pictures into one folder, or name one exactly as another of its labels: "
                f"{_some(list(label2id))}."
            )
        taken[labels[0]] = name
    return {i: label2id[meant[name][0]] for i, name in enumerate(names)}


def relabel(pictures: Pictures, numbers: Mapping[int, int], what: str) -> datasets.Dataset:
    """The pictures with the model's numbers as labels.

    Raises:
        DataError: for a label that has none.
    """
    labels = pictures.dataset[LABEL]
    strange = sorted(set(labels) - set(numbers))
    if strange:
        raise DataError(f"Pictures with the labels {strange[:10]}: those of {what} are 0 to {max(numbers.values())}.")
    return pictures.dataset.remove_columns(LABEL).add_column(LABEL, [numbers[label] for label in labels])


def _plain(name: str) -> str:
    return name.casefold().replace("_", " ").replace("-", " ").strip()


def _some(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(map(repr, names[:most])) + (f", ... ({len(names)} in all)" if len(names) > most else "")
