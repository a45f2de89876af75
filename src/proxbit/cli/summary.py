"""`proxbit summary`: a model's layers in one table."""

import json
from typing import Annotated

import typer
from rich.console import Console

from proxbit.analysis.summary import summary as summarize
from proxbit.cli.checkpoints import load_model

__all__ = ["summary"]


def summary(
    model: Annotated[str, typer.Argument(help="A folder, or a name on the hub; in any state.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a model is made of: states, bits, bytes, kernels.

    Example: proxbit summary vit-1bit
    """
    found = summarize(load_model(model))
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=1))
        return
    console = Console()
    console.print(found.to_text(console.width), highlight=False, markup=False, soft_wrap=True)
