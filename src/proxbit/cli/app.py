"""The program `proxbit`: its commands, and how it ends when one of them refuses."""

import sys

import typer
from rich.console import Console
from rich.markup import escape

from proxbit.cli.bench import bench
from proxbit.cli.env import env
from proxbit.cli.pairs import pairs
from proxbit.cli.plot import plot
from proxbit.cli.recipes import recipes
from proxbit.cli.report import report
from proxbit.errors import ProxbitError

__all__ = ["app", "main"]

app = typer.Typer(
    name="proxbit",
    help="1-bit vision transformers with ProxConnect++.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(bench)
app.command()(env)
app.command()(pairs)
app.command()(plot)
app.command()(recipes)
app.command()(report)


def main() -> None:
    """Run the program. What proxbit refuses is one line on standard error, and exit status 2."""
    try:
        app()
    except ProxbitError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False)
        sys.exit(2)
