"""Labels of images from a metadata file, as the `datasets` library documents it: one row an image."""

import re
from pathlib import Path
from typing import TypeAlias

import pyarrow as pa
from pyarrow import csv, json, parquet

from proxbit.errors import DataError
from proxbit.foreign import printable

__all__ = ["METADATA", "Label", "read_labels"]

Label: TypeAlias = str | int | None
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
FILE, LABELS = "file_name", ("label", "labels")


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
