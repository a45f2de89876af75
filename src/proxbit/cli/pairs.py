"""`proxbit pairs`: the family as a table."""

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from proxbit.analysis.pairs import PairSummary, summarize_pairs

__all__ = ["pairs"]


def _cells(row: PairSummary) -> list[str]:
    """F and B below each other: the two are read together, and a terminal is narrow."""
    verdict = "[green]sound[/]" if row.sound else "[yellow]heuristic[/]"
    formulas = f"{row.forward}\n{row.backward}"
    return [f"[bold]{escape(row.name)}[/]", escape(formulas), f"{verdict}\n{escape(row.reason)}", escape(row.source)]


def pairs(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the quantizer pairs: F, B, sound or not and why, source.

    Example: proxbit pairs
    """
    rows = summarize_pairs()
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=1))
        return
    table = Table(show_lines=True)
    table.add_column("name", no_wrap=True)
    table.add_column("forward F, backward B", ratio=4)
    table.add_column("verdict of the theory", ratio=3)
    table.add_column("source", ratio=3, overflow="fold")
    for row in rows:
        table.add_row(*_cells(row))
    Console().print(table)
