"""`proxbit recipes`: what each of them makes, and what it sets."""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from proxbit.training.recipes import RECIPES, Recipe

__all__ = ["recipes"]


def recipes(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the recipes: what each makes, and what it sets.

    Use one by name: `proxbit binarize MODEL OUT --recipe w1a8`, or ProxConnectArguments("out", recipe="w1a8").

    Example: proxbit recipes
    """
    found = {name: RECIPES.get(name) for name in RECIPES}
    if as_json:
        rows = {
            name: {
                "summary": each.summary,
                "config": dict(each.config),
                "training": dict(each.training),
                "source": each.source,
            }
            for name, each in found.items()
        }
        typer.echo(json.dumps(rows, indent=1))
        return
    table = Table(show_lines=True)
    table.add_column("name", no_wrap=True)
    table.add_column("what it makes, and what it sets")
    for name, each in found.items():
        table.add_row(f"[bold]{escape(name)}[/]", _described(each))
    Console().print(table)


def _described(recipe: Recipe) -> str:
    """The summary, both sets of fields where they are not zero or nothing, and the source."""
    parts = {"config": recipe.config, "training": recipe.training}
    lines = [
        f"[dim]{title}:[/] " + escape(", ".join(f"{key}={value!r}" for key, value in fields.items() if value))
        for title, fields in parts.items()
    ]
    return "\n".join([escape(recipe.summary), *lines, f"[dim]source:[/] {escape(recipe.source)}"])
