"""`proxbit pairs`: the family as a table."""

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


def pairs() -> None:
    """List the quantizer pairs: name, F and B, sound or not and why, source."""
    table = Table(show_lines=True)
    table.add_column("name", no_wrap=True)
    table.add_column("forward F, backward B", ratio=4)
    table.add_column("verdict of the theory", ratio=3)
    table.add_column("source", ratio=3)
    for row in summarize_pairs():
        table.add_row(*_cells(row))
    Console().print(table)
