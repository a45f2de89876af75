"""Writes the page of all fields, `configuration.md`, from their help texts: `python docs/fields.py [FOLDER]`."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from proxbit import BinarizationConfig, ProxConnectArguments

HEAD = """# Configuration

Written by `python docs/fields.py` from the code; a test fails when it is stale.

"""


def table(title: str, fields: list[dataclasses.Field[Any]]) -> str:
    """A section with one row a field."""
    rows = []
    for item in fields:
        default = "" if item.default is dataclasses.MISSING else f"`{item.default!r}`"
        text = item.metadata["help"].replace("|", "\\|").replace("*", "\\*")
        rows.append(f"| `{item.name}` | {default} | {text} |\n")
    return f"## {title}\n\n| field | default | |\n|---|---|---|\n{''.join(rows)}\n"


def write(folder: Path) -> None:
    """Write the page into a folder."""
    inherited = {item.name for item in dataclasses.fields(TrainingArguments)}
    own = [item for item in dataclasses.fields(ProxConnectArguments) if item.name not in inherited]
    arguments = table("ProxConnectArguments: what TrainingArguments does not have", own)
    page = HEAD + table("BinarizationConfig", list(dataclasses.fields(BinarizationConfig))) + arguments
    (folder / "configuration.md").write_text(page.rstrip("\n") + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
