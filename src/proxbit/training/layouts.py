"""How images lie in folders: splits, classes, and every file that is neither taken nor silently lost.

| path, below DATA | what it is |
|---|---|
| CLASS/file | an image of the class CLASS |
| SPLIT/CLASS/file | the same, in one of the splits; what lies beside their folders belongs to none |
| file, or SPLIT/file, named in a metadata file beside it | an image with the label of its row |
| any other depth | refused, if it is an image |

SPLIT is a folder directly in DATA that is called train or training, validation, valid, val or dev, test or testing, in
any case, and that holds folders, or a metadata file; nothing else in a path makes a split. A metadata file is
`metadata.csv`, `metadata.jsonl` or `metadata.parquet`, as the `datasets` library has them: with columns `file_name` and
`label`, numbers or text. Names of classes are compared in Unicode NFC.

Hidden files and those of operating systems are counted only. Every other file is taken, or listed with a reason.
"""

import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TypeAlias

import pyarrow as pa
from pyarrow import csv, json, parquet

from proxbit.errors import DataError
from proxbit.foreign import printable
from proxbit.training.pixels import HEIC, extensions

__all__ = [
    "LAYOUT",
    "METADATA",
    "Filed",
    "Layout",
    "LeftOut",
    "Tree",
    "layout_of",
    "nfc",
    "read_labels",
    "split_folders",
    "unlabelled_files",
    "walk",
]

Label: TypeAlias = str | int | None
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
FILE, LABELS = "file_name", ("label", "labels")
LAYOUT = "Images lie in a folder for each class, such as DATA/cat/1.jpg, or DATA/train/cat/1.jpg for parts of a set."
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
WHOLE = "train"  # as the datasets library calls a set without splits
LITTER = {"__macosx", "__pycache__", "@eadir", "desktop.ini", "ehthumbs.db", "icon\r", "thumbs.db"}
ARCHIVES = {".7z", ".bz2", ".gz", ".rar", ".tar", ".tgz", ".xz", ".zip", ".zst"}
DEEPEST_LINK = 2  # A link to a folder is followed where the folder of a split or of a class may be.


@dataclass(frozen=True)
class LeftOut:
    """A file that was not taken, and why."""

    picture: str
    reason: str


@dataclass(frozen=True)
class Filed:
    """A file in its place: to be taken, unless there is a reason against it."""

    path: Path
    label: Label
    reason: str | None = None


@dataclass
class Tree:
    """What lies below a folder, by relative path.

    Attributes:
        files: each with the reason why it is no image, or None.
        folders: without the folder itself.
        litter: how many hidden files and folders, and those of operating systems, there are.
    """

    files: dict[PurePath, str | None] = field(default_factory=dict)
    folders: list[PurePath] = field(default_factory=list)
    litter: int = 0

    def below(self, folder: PurePath) -> dict[PurePath, str | None]:
        """The files that lie in a folder, at any depth."""
        depth = len(folder.parts)
        return {path: why for path, why in self.files.items() if path.parts[:depth] == folder.parts}


@dataclass(frozen=True)
class Layout:
    """The files of each split; those that belong to none; and how many there are that do not count."""

    splits: dict[str, list[Filed]]
    left_out: tuple[LeftOut, ...]
    litter: int


def nfc(name: str) -> str:
    """A name, with each letter and its accents as one character."""
    return unicodedata.normalize("NFC", name)


def walk(folder: Path) -> Tree:
    """All that lies below a folder. Links that lead back, or deep down, are not followed; nothing is opened."""
    tree = Tree()
    ahead = [(PurePath(), frozenset({_identity(folder)}))]
    while ahead:
        place, above = ahead.pop()
        try:
            with os.scandir(folder / place) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            tree.files[place] = f"cannot be looked into: {error.strerror}"
            continue
        for entry in entries:
            path = place / entry.name
            if entry.name.startswith(".") or entry.name.casefold() in LITTER:
                tree.litter += 1
            elif not os.path.isdir(folder / path):
                tree.files[path] = _why_no_image(folder / path)
            elif (identity := _identity(folder / path)) in above:
                tree.files[path] = "a link to a folder above it"
            elif entry.is_symlink() and len(path.parts) > DEEPEST_LINK:
                tree.files[path] = "a link to a folder, below those of the classes"
            else:
                tree.folders.append(path)
                ahead.append((path, above | {identity}))
    return tree


def _identity(folder: Path) -> tuple[int, int]:
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def _why_no_image(file: Path) -> str | None:
    """What speaks against a file before it is opened."""
    try:
        found = os.stat(file)
    except OSError as error:
        return "a link to nothing" if file.is_symlink() else f"cannot be read: {error.strerror}"
    if not stat.S_ISREG(found.st_mode):
        return "neither a file nor a folder"
    if not _is_text(str(file)):
        return "its name is not UTF-8"
    kind = file.suffix.lower()
    if not kind:
        return "its name has no extension, which says that it is an image"
    if kind in ARCHIVES:
        return "an archive; unpack it"
    if kind not in extensions():
        heic = "HEIC is read where pillow-heif is installed: pip install 'proxbit[heic]'"
        return heic if kind in HEIC else f"{kind} is no format of images that is read here"
    return None if found.st_size else "an empty file"


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def split_folders(tree: Tree, flat: bool = False) -> dict[str, PurePath]:
    """The folders of the splits, by the name of the split.

    Args:
        tree: of DATA.
        flat: of images without labels: where DATA holds no folders but such, they need not hold folders.

    Raises:
        DataError: if there are two folders of one split.
    """
    top = [each for each in tree.folders if len(each.parts) == 1]
    deep = {each.parts[0] for each in tree.folders if len(each.parts) == 2}
    deep |= {each.parts[0] for each in tree.files if len(each.parts) == 2 and each.name in METADATA}
    named = [each for each in top if each.name.casefold() in SPLITS]
    if not (flat and len(named) == len(top)):
        named = [each for each in named if each.name in deep]
    found: dict[str, PurePath] = {}
    for each in sorted(named):
        split = SPLITS[each.name.casefold()]
        if split in found:
            raise DataError(f"The folders {found[split].name} and {each.name} are both the split {split}; keep one.")
        found[split] = each
    return {split: found[split] for split in SPLITS.values() if split in found}


def layout_of(data: Path) -> Layout:
    """The splits and classes of a folder of images.

    Raises:
        DataError: if it holds no images, or some at another depth than that of the classes.
    """
    tree = walk(data)
    prefixes = split_folders(tree)
    beside = dict(tree.files)
    splits: dict[str, list[Filed]] = {}
    for split, prefix in (prefixes or {WHOLE: PurePath()}).items():
        inside = tree.below(prefix)
        splits[split] = _files_of(data, prefix, inside, tree.folders)
        for path in inside:
            del beside[path]
    filed = [each for files in splits.values() for each in files]
    if not any(each.reason is None for each in filed):
        first = "".join(f" {printable(each.path)}: {each.reason}." for each in filed[:1])
        raise DataError(f"{printable(data)} holds no images; {len(filed) + len(beside)} left out.{first} {LAYOUT}")
    names = ", ".join(prefix.name for prefix in prefixes.values())
    left_out = tuple(
        LeftOut(str(data / path), why or f"beside the folders of the splits: {names}") for path, why in beside.items()
    )
    return Layout(splits, left_out, tree.litter)


def _files_of(
    data: Path, prefix: PurePath, inside: Mapping[PurePath, str | None], folders: Iterable[PurePath]
) -> list[Filed]:
    """Every file of one split."""
    depth = len(prefix.parts)
    there = [prefix / name for name in METADATA if prefix / name in inside]
    noted = next((path for path in there if os.path.isfile(data / path)), None)  # A pipe would be waited for.
    why = ""
    if noted is not None:
        try:
            rows = read_labels(data / noted)
        except DataError as error:
            why = str(error)
        else:
            return _by_metadata(data, noted, rows, inside)
    misplaced = [path for path, reason in inside.items() if reason is None and len(path.parts) != depth + 2]
    if misplaced:
        raise DataError(_elsewhere(data, sorted(misplaced), inside, why))
    filed = [Filed(data / path, _class_of(path, depth), reason) for path, reason in inside.items() if path != noted]
    known = {each.label for each in filed}
    classes = [path for path in folders if len(path.parts) == depth + 1 and path.parts[:depth] == prefix.parts]
    filed += [Filed(data / path, name, "an empty folder") for path in classes if (name := _name(path)) not in known]
    if noted is not None:
        filed.append(Filed(data / noted, None, f"{why}; the folders of the classes count"))
    return sorted(filed, key=lambda each: each.path)


def _name(path: PurePath) -> str:
    return nfc(path.name if _is_text(path.name) else printable(path.name))


def _class_of(path: PurePath, depth: int) -> str | None:
    return _name(PurePath(path.parts[depth])) if len(path.parts) > depth + 1 else None


def _elsewhere(data: Path, misplaced: list[PurePath], inside: Mapping[PurePath, str | None], why: str) -> str:
    """What to say of images at another depth."""
    total = sum(reason is None for reason in inside.values())
    top = {path.parts[0] for path in inside if len(path.parts) > 1}
    wrapped = len(top) == 1 and all(len(path.parts) > 2 for path in misplaced)
    hint = f" If its classes are the folders in {printable(data / top.pop())}, name that." if wrapped else ""
    metadata = f" Its metadata file {why}." if why else ""
    return (
        f"{printable(data)} holds {len(misplaced)} of {total} images at another depth than that of the classes, such "
        f"as {printable(misplaced[0])}.{metadata} {LAYOUT}{hint}"
    )


def _by_metadata(
    data: Path, noted: PurePath, rows: Iterable[tuple[str, Label]], inside: Mapping[PurePath, str | None]
) -> list[Filed]:
    """The files of one split whose labels are in a metadata file."""
    filed, rest = [], {path: reason for path, reason in inside.items() if path != noted}
    for name, label in rows:
        path = PurePath(os.path.normpath(noted.parent / name)) if "\0" not in name else noted
        missing = None if path in inside and path != noted else f"named in {noted.name}, but not there"
        filed.append(Filed(data / noted.parent / name, nfc(label) if isinstance(label, str) else label, missing))
        if missing is None:
            filed[-1] = Filed(data / path, filed[-1].label, inside[path])
            rest.pop(path, None)
    filed += [Filed(data / path, None, reason or f"not named in {noted.name}") for path, reason in rest.items()]
    return filed


def unlabelled_files(data: Path) -> tuple[list[Path], list[LeftOut]]:
    """The images of a folder, or of its split `train`, at any depth; and what else lies there.

    Raises:
        DataError: if there are two folders of one split.
    """
    tree = walk(data)
    prefix = split_folders(tree, flat=True).get("train", PurePath())
    inside = tree.below(prefix)
    images = sorted(data / path for path, why in inside.items() if why is None)
    return images, [LeftOut(str(data / path), why) for path, why in inside.items() if why is not None]


def read_labels(file: Path) -> list[tuple[str, Label]]:
    """The name of each image, and its label: numbers if all are, else text.

    Raises:
        DataError: if it cannot be read, or has no such columns; its text goes on after the name of the file.
    """
    try:
        table = _table(file)
        column = next((name for name in LABELS if table.column_names.count(name) == 1), None)
        if column is None or table.column_names.count(FILE) != 1:
            raise DataError(f"has no columns {FILE!r} and {LABELS[0]!r}")
        names, labels = table[FILE].to_pylist(), table[column].to_pylist()
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"cannot be read ({printable(error).rstrip('.')})") from error
    kinds = {type(each) for each in labels if each is not None}
    if {type(each) for each in names} - {str} or not (kinds <= {str} or kinds <= {int}):
        raise DataError(f"has columns {FILE!r} and {column!r} that are not text, or numbers of classes")
    if file.suffix == ".csv":
        labels = [each or None for each in labels]
        if all(each is None or re.fullmatch(r"-?[0-9]{1,9}", each) for each in labels):
            labels = [None if each is None else int(each) for each in labels]
    return list(zip(names, labels, strict=True))


def _table(file: Path) -> pa.Table:
    if file.suffix == ".jsonl":
        return json.read_json(file)
    if file.suffix == ".parquet":
        return parquet.ParquetFile(file).read()
    # Text, whatever it looks like: a class may be called "true".
    text = dict.fromkeys((FILE, *LABELS), pa.string())
    return csv.read_csv(
        file,
        parse_options=csv.ParseOptions(newlines_in_values=True),
        convert_options=csv.ConvertOptions(column_types=text, strings_can_be_null=False),
    )
