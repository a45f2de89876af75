"""`proxbit env`: what runs here, for bug reports and for whoever wonders why it is slow."""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from proxbit.analysis.environment import environment
from proxbit.foreign import printable

__all__ = ["env"]


def env(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, the processor, and which kernels run.

    Example: proxbit env
    """
    here = environment()
    rows = {
        **here.versions,
        "CPU": here.cpu,
        "cores": str(here.cores),
        "threads": str(here.threads),
        "kernel library": here.library or "none",
        "kernel level": here.level,
        "levels available": ", ".join((*here.levels, "reference")),
        "PROXBIT_ISA": here.isa or "not set",
    }
    if as_json:
        typer.echo(json.dumps({**rows, "advice": here.advice}, indent=1))
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, escape(printable(value)))
    console = Console()
    console.print(table)
    if here.advice is not None:
        console.print(f"[yellow]{escape(here.advice)}[/]", highlight=False, soft_wrap=True)
