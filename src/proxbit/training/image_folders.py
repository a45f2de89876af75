"""Images in folders, one a class, or of a dataset on the hub: read, checked, and with the labels of a model."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.exceptions import DatasetsError
from PIL import Image

from proxbit.errors import DataError
from proxbit.foreign import first_line, printable
from proxbit.training.labels import some
from proxbit.training.layouts import LAYOUT, Filed, LeftOut, layout_of, unlabelled_files
from proxbit.training.pixels import read_image
from proxbit.training.sources import why_nowhere

__all__ = [
    "Images",
    "LeftOut",
    "Splits",
    "check_classes",
    "class_names",
    "load_splits",
    "pick_split",
    "read_images",
    "relabel",
    "unlabelled",
]

IMAGE, LABEL, REASON = "image", "label", "left out"
Watch = Callable[[Iterable[Any], int], Iterable[Any]]


class Splits(datasets.DatasetDict):
    """The parts of a set of images, by name; of a folder, with what belongs to none of them.

    Attributes:
        left_out: files beside the folders of the splits.
        litter: how many hidden files, and files of operating systems, were passed over.
    """

    left_out: tuple[LeftOut, ...] = ()
    litter: int = 0


class _Image(datasets.Image):
    """A column of images that are shown as `proxbit.training.pixels` says."""

    def decode_example(self, value: Mapping[str, Any], token_per_repo_id: Any = None) -> Image.Image:
        return _decoded(value)


def _decoded(stored: Mapping[str, Any]) -> Image.Image:
    return read_image(stored["path"] if stored["bytes"] is None else stored["bytes"])


@dataclass(frozen=True)
class Images:
    """Images that can be read.

    Attributes:
        dataset: columns `image` (RGB, turned as its EXIF says) and `label` (numbers).
        names: of the labels, in their order; None if they are numbers only.
        left_out: what could not be read.
        unread: of each label of which there are files, but none that can be read: the first one.
    """

    dataset: datasets.Dataset
    names: tuple[str, ...] | None
    left_out: tuple[LeftOut, ...]
    unread: Mapping[int, LeftOut] = field(default_factory=dict)

    def counts(self) -> Counter[str]:
        """How many images of each class there are, by name; of numbers only, by number."""
        found = Counter(self.dataset[LABEL])
        numbers = range(len(self.names)) if self.names is not None else sorted(found)
        return Counter({self.names[i] if self.names is not None else str(i): found[i] for i in numbers})


def load_splits(source: str) -> Splits:
    """The parts of an image folder or of a dataset on the hub, by name.

    Raises:
        DataError: if there is none, or it holds no images.
    """
    path = Path(source)
    if path.is_dir():
        return _of_folder(path)
    if path.exists():
        raise DataError(f"{printable(source)} is a file, not a folder of images. {LAYOUT}")
    reason = why_nowhere(source, "dataset")
    try:
        # What is in the cache can be had without the Hub.
        if reason is None or _is_cached(source):
            return Splits(datasets.load_dataset(source))
    except (OSError, ValueError, DatasetsError) as error:
        reason = first_line(error)
    raise DataError(f"There is no folder and no dataset on the hub named {printable(source)!r}: {reason}.")


def _is_cached(source: str) -> bool:
    return (Path(datasets.config.HF_DATASETS_CACHE) / source.replace("/", "___")).is_dir()


def _of_folder(folder: Path) -> Splits:
    layout = layout_of(folder)
    labels = [each.label for files in layout.splits.values() for each in files if each.label is not None]
    if all(isinstance(label, int) for label in labels):
        kind = datasets.Value("int64")
    else:
        kind = datasets.ClassLabel(names=sorted({str(label) for label in labels}))
    features = datasets.Features({IMAGE: datasets.Image(), LABEL: kind, REASON: datasets.Value("string")})
    splits = Splits({name: _rows(name, files, features) for name, files in layout.splits.items()})
    splits.left_out, splits.litter = layout.left_out, layout.litter
    return splits


def _rows(split: str, files: Sequence[Filed], features: datasets.Features) -> datasets.Dataset:
    named = isinstance(features[LABEL], datasets.ClassLabel)
    columns: dict[str, list[Any]] = {
        IMAGE: [{"path": _stored(each.path), "bytes": None} for each in files],
        LABEL: [str(each.label) if named and each.label is not None else each.label for each in files],
        REASON: [each.reason for each in files],
    }
    return datasets.Dataset.from_dict(columns, features=features, split=datasets.NamedSplit(split))


def _stored(path: Path) -> str:
    """A path as text; what is no UTF-8 in it is not read, and shown as escapes."""
    return str(path).encode("utf-8", "backslashreplace").decode()


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
    if path.is_dir():
        files, others = unlabelled_files(path)
        if not files:
            first = "".join(f" {printable(each.picture)}: {each.reason}." for each in others[:1])
            raise DataError(f"{printable(source)} holds no images; {len(others)} left out.{first} {LAYOUT}")
        left_out += others
        stored = ({"path": str(files[i]), "bytes": None} for i in np.random.default_rng(seed).permutation(len(files)))
    else:
        splits = load_splits(source)
        found = splits[pick_split(splits, None, ["train"])]
        column = next((name for name, kind in found.features.items() if isinstance(kind, datasets.Image)), None)
        if column is None:
            raise DataError(f"{printable(source)!r} has no column of images, but {list(found.features)}.")
        raw = found.cast_column(column, datasets.Image(decode=False)).shuffle(seed)
        stored = (example[column] for example in raw)
    for i, each in enumerate(stored):
        try:
            yield _decoded(each)
        except DataError as error:
            left_out.append(LeftOut(str(each["path"] or f"image {i}"), str(error)))


def pick_split(splits: Mapping[str, datasets.Dataset], wanted: str | None, preferred: Sequence[str]) -> str:
    """The name of the part that is wanted; else the first preferred one that is there, else the only one.

    Raises:
        DataError: if it is not there, or nobody knows which.
    """
    if wanted is not None:
        if wanted not in splits:
            raise DataError(f"There is no split {printable(wanted)!r}; there are: {', '.join(splits)}.")
        return wanted
    found = next((name for name in preferred if name in splits), None)
    if found is None and len(splits) > 1:
        raise DataError(f"Which split? There are: {', '.join(splits)}.")
    return found or next(iter(splits))


def read_images(dataset: datasets.Dataset, watch: Watch = lambda items, total: items) -> Images:
    """Read every image once, and leave out those that cannot be read.

    Args:
        dataset: with one column of images and one of labels.
        watch: is handed the images and their number, and hands them on: a progress bar.

    Raises:
        DataError: if a column is missing, or no image is left.
    """
    image, label = _columns(dataset)
    raw = dataset.cast_column(image, datasets.Image(decode=False))
    numbers = raw[label]
    reasons = raw[REASON] if REASON in raw.column_names else [None] * len(raw)
    kept, left_out = [], []
    unread: dict[int, LeftOut] = {}
    for i, stored in enumerate(watch((raw[i][image] for i in range(len(raw))), len(raw))):
        reason = reasons[i] or ("no label" if numbers[i] is None else _why_unreadable(stored))
        if reason is None:
            kept.append(i)
        else:
            left_out.append(LeftOut(str(stored["path"] or f"image {i}"), reason))
            if numbers[i] is not None:
                unread.setdefault(int(numbers[i]), left_out[-1])
    if not kept:
        first = "".join(f" {printable(each.picture)}: {each.reason}." for each in left_out[:1])
        raise DataError(f"None of {len(raw)} images can be read.{first}")
    labels = [int(numbers[i]) for i in kept]
    readable = set(labels)
    unread = {label: first for label, first in unread.items() if label not in readable}
    chosen = dataset.select(kept).select_columns([image]).cast_column(image, _Image())
    if image != IMAGE:
        chosen = chosen.rename_column(image, IMAGE)
    chosen = _with_labels(chosen, labels)
    return Images(chosen, class_names(dataset), tuple(left_out), unread)


def _with_labels(dataset: datasets.Dataset, labels: list[int]) -> datasets.Dataset:
    """With a column more; its rows are copied for that, without the bar that the library shows."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return dataset.add_column(LABEL, labels)
    finally:
        if shown:
            datasets.enable_progress_bars()


def check_classes(images: Images, where: str) -> None:
    """Raise DataError unless there are images of two classes at least, and of each class some that can be read.

    Args:
        images: what was read.
        where: it was read from, for the message.
    """
    counts, place = images.counts(), printable(where)
    if images.unread:
        empty = [images.names[i] if images.names is not None else str(i) for i in images.unread]
        first = next(iter(images.unread.values()))
        raise DataError(
            f"{place}: no image of these classes can be read: {some(empty)}; {len(images.left_out)} files are "
            f"left out. {printable(first.picture)}: {printable(first.reason)}. Mend the files, or remove the folders."
        )
    there = [name for name, count in counts.items() if count]
    if len(there) < 2:
        raise DataError(
            f"{place} holds one class only, {some(there)}, with {counts.total()} images; two are the least that can "
            f"be told apart. {LAYOUT}"
        )


def _columns(dataset: datasets.Dataset) -> tuple[str, str]:
    """The names of the columns of images and of labels."""
    features = dataset.features
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    named = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    numbers = [name for name in ("label", "labels") if name in features and features[name].dtype.startswith("int")]
    labels = named or numbers
    if len(images) != 1 or len(labels) != 1:
        raise DataError(
            f"One column of images and one of class labels are needed; found {images} and {labels} among "
            f"{list(features)}. {LAYOUT}"
        )
    return images[0], labels[0]


def class_names(dataset: datasets.Dataset) -> tuple[str, ...] | None:
    """The names of the labels of a dataset, in their order; None if they are numbers only."""
    feature = dataset.features[_columns(dataset)[1]]
    return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def _why_unreadable(stored: Mapping[str, Any]) -> str | None:
    try:
        _decoded(stored)
    except DataError as error:
        return str(error)
    return None


def relabel(images: Images, numbers: Mapping[int, int], what: str) -> datasets.Dataset:
    """The images with the model's numbers as labels.

    Raises:
        DataError: for a label that has none.
    """
    labels = images.dataset[LABEL]
    strange = sorted(set(labels) - set(numbers))
    if strange:
        raise DataError(f"Images with the labels {strange[:10]}: those of {what} are 0 to {max(numbers.values())}.")
    return _with_labels(images.dataset.remove_columns(LABEL), [numbers[label] for label in labels])
