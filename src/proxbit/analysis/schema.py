"""Schemas as data: tables of fields, from which checks and documents are made."""

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from proxbit.foreign import printable

__all__ = ["KINDS", "MOST", "Field", "Kind", "cell", "field_table", "line", "problems"]

# Entries of a list, and characters of a line, that are shown: enough for all that proxbit writes itself.
MOST, LINE = 100, 20_000
# What GFM reads, and how it is written instead: marks anywhere, underscores but in a word, entities, tags; addresses,
# with and without `http`, and those of mail, which are made links from the text that is left after all escapes.
_MARKDOWN = (
    (r"([\\`*\[~$])", r"\\\1"),
    (r"(?<![^\W_])_|_(?![^\W_])", r"\_"),
    (r"&(?=#?\w+;)", "&amp;"),
    (r"<", "&lt;"),
    (r"(?i)\b(https?|ftp|mailto|xmpp):", r"\1\:"),
    (r"(?i)\bwww\.", r"www\."),
    (r"(?<=\S)@(?=\S)", "<!-- -->@"),
)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_file(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == {"bytes", "sha256"}
        and _is_whole(value["bytes"])
        and _is_digest(value["sha256"])
    )


def _is_latency(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == {"batch", "rounds", "milliseconds", "spread", "machine"}
        and _is_whole(value["batch"])
        and _is_whole(value["rounds"])
        and _is_text(value["machine"])
        and all(_named(_is_number)(value[name]) for name in ("milliseconds", "spread"))
        and value["milliseconds"].keys() == value["spread"].keys()
    )


def _is_json(value: Any) -> bool:
    try:
        return bool(json.loads(json.dumps(value, allow_nan=False)) == value)
    except (TypeError, ValueError, RecursionError):
        return False


def _each(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _named(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(_is_text(name) and check(each) for name, each in value.items())


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _errors(value: Mapping[str, Mapping[str, float]]) -> str:
    """Of many layers, their number, the means, and the worst one."""
    if not value:
        return ""
    before, after = (sum(each[when] for each in value.values()) / len(value) for when in ("before", "after"))
    worst = max(value, key=lambda name: value[name]["after"])
    return (
        f"{len(value)} layers, on average {before:.3f} before and {after:.3f} after; the largest, {printable(worst)}: "
        f"{value[worst]['before']:.3f} before, {value[worst]['after']:.3f} after"
    )


def _is_error(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"before", "after"} and all(map(_is_number, value.values()))


def _list(parts: Iterable[str], count: int) -> str:
    """Parts side by side; of very many, the first ones and how many more there are."""
    more = f", and {count - MOST:,} more" if count > MOST else ""
    return ", ".join(islice(parts, MOST)) + more


def _texts(show: Callable[[Any], str]) -> Callable[[Any], str]:
    return lambda value: _list(map(show, value), len(value))


def _pairs(show: Callable[[Any], str]) -> Callable[[Any], str]:
    return lambda value: _list((f"{printable(name)}: {show(each)}" for name, each in value.items()), len(value))


@dataclass(frozen=True)
class Kind:
    """What the value of a field is.

    Attributes:
        check: whether a value is of this kind.
        show: a value as a line of text.
    """

    check: Callable[[Any], bool]
    show: Callable[[Any], str] = printable


KINDS: dict[str, Kind] = {
    "text": Kind(_is_text),
    "digest": Kind(_is_digest),
    "whole number": Kind(_is_whole, _number),
    "number": Kind(_is_number, _number),
    "yes or no": Kind(lambda value: isinstance(value, bool), lambda value: "yes" if value else "no"),
    "texts": Kind(_each(_is_text), _texts(printable)),
    "numbers": Kind(_each(_is_number), _texts(_number)),
    "whole numbers": Kind(_each(_is_whole), _texts(str)),
    "counts": Kind(_named(_is_whole), _pairs(_number)),
    "metrics": Kind(_named(_named(_is_number)), _pairs(_pairs(_number))),
    "errors": Kind(_named(_is_error), _errors),
    "latency": Kind(_is_latency, lambda value: _pairs(_number)(value["milliseconds"])),
    "object": Kind(
        lambda value: isinstance(value, dict) and _is_json(value),
        _pairs(lambda value: "none" if value is None else printable(value)),
    ),
    "files": Kind(_named(_is_file), _pairs(lambda file: f"{file['bytes']:,} bytes, SHA-256 {file['sha256']}")),
}


@dataclass(frozen=True)
class Field:
    """One field of a schema. Its value may always be null, which says that it is unknown.

    Attributes:
        name: its key.
        kind: a key of `KINDS`.
        meaning: what its value says, with the unit.
        group: the part of the schema that it belongs to.
    """

    name: str
    kind: str
    meaning: str
    group: str = ""

    def text(self, value: Any) -> str:
        """A value as a line of text: "unknown" for null, "none" for an empty list or table."""
        if value is None:
            return "unknown"
        return KINDS[self.kind].show(value) or "none"


def problems(fields: Sequence[Field], values: Mapping[str, Any], *, complete: bool) -> list[str]:
    """What is wrong with values, as sentences; nothing if they fit the fields.

    Args:
        fields: of the schema.
        values: by the names of the fields.
        complete: whether every field must be there, if only as null.
    """
    known = {field.name: field for field in fields}
    found = [f"{name} is missing; say null if it is unknown" for name in known if complete and name not in values]
    found += [f"{printable(repr(name))} is no field" for name in values if name not in known]
    found += [
        f"{name} must be {known[name].kind} or null, not {printable(repr(value))}"
        for name, value in values.items()
        if name in known and value is not None and not KINDS[known[name].kind].check(value)
    ]
    return found


def line(text: str, most: int = LINE) -> str:
    """Text as a line of Markdown (GFM): no tag, link, image, code, formula or emphasis comes of a name.

    Args:
        text: of others.
        most: characters at most; see `foreign.printable`.
    """
    shown = printable(" ".join(text.split()), most)
    for pattern, escaped in _MARKDOWN:
        shown = re.sub(pattern, escaped, shown)
    return shown


def cell(text: str, most: int = LINE) -> str:
    """Text as a cell of a Markdown table; see `line`."""
    return _escape_bars(line(text, most))


def _escape_bars(text: str) -> str:
    return text.replace("|", r"\|")


def field_table(fields: Iterable[Field]) -> str:
    """The fields as a Markdown table: name, kind, meaning."""
    lines = ["| field | kind | meaning |", "|---|---|---|"]
    lines += [f"| `{field.name}` | {field.kind} | {_escape_bars(field.meaning)} |" for field in fields]
    return "\n".join(lines)
