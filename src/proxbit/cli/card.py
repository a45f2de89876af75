"""`proxbit card`: the quantization card of a model, alone or beside another one."""

import json
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from proxbit.analysis.card import CARD_FIELDS, CARD_NAME, QuantizationCard, quantization_card
from proxbit.checkpoint.files import check_files, weight_files
from proxbit.cli.checkpoints import load_model
from proxbit.errors import CheckpointError
from proxbit.foreign import first_line, printable

__all__ = ["card", "card_of"]

WEIGHTS = ("config.json", "model*.safetensors", "model.safetensors.index.json")


def card_of(name: str) -> QuantizationCard:
    """The quantization card of a folder or of a repository on the Hub: its file, or computed where it has none.

    Raises:
        CheckpointError: if there is no such model, or its weights are not those that its card describes.
        CardError: if the card is not valid.
    """
    local = Path(name).is_dir()
    folder = Path(name) if local else _fetched(name, (CARD_NAME,))
    if (folder / CARD_NAME).is_file():
        found = QuantizationCard.load(folder)
        check_files(folder / CARD_NAME, weight_files(folder))
        return found
    if not local:
        folder = _fetched(name, WEIGHTS)
    model = load_model(str(folder))
    run = {"model_id": None if local else name, "base_model": None}
    return quantization_card(model, run=run, files=weight_files(folder))


def _fetched(name: str, patterns: tuple[str, ...]) -> Path:
    """The files of a repository that match, in the cache."""
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = first_line(error)
        raise CheckpointError(f"There is no model {name!r}, neither in a folder nor on the hub: {reason}") from error


def table_of(names: list[str], cards: list[QuantizationCard]) -> Table:
    """One row a field, one column a card; with two cards, a mark where they differ."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    table.add_column("field", no_wrap=True)
    for name in names:
        table.add_column(escape(printable(name)), overflow="fold")
    for group, fields in groupby(CARD_FIELDS, lambda field: field.group):
        table.add_row("", f"[bold]{group}[/]")
        for field in fields:
            values = [getattr(each, field.name) for each in cards]
            differ = any(value != values[0] for value in values)
            texts = [escape(field.text(value)) for value in values]
            table.add_row("≠" if differ else "", f"  {field.name}", *texts, style="bold" if differ else "")
    return table


def card(
    model: Annotated[str, typer.Argument(help="A folder, or a name on the hub.")],
    against: Annotated[str | None, typer.Option(help="Another model, to be shown beside it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the quantization card of a model, or compare two.

    It says every choice that changes what the model computes, its sizes, its accuracy. A model that has no
    quantization_card.json gets one computed.

    Example: proxbit card vit-base-1bit --against vit-base
    """
    names = [model] if against is None else [model, against]
    cards = [card_of(name) for name in names]
    if as_json:
        tables = [each.to_dict() for each in cards]
        typer.echo(json.dumps(tables[0] if against is None else dict(zip(("model", "against"), tables)), indent=1))
        return
    console = Console()
    console.print(table_of(names, cards))
    if against is not None:
        console.print("≠ where they differ.", highlight=False)
