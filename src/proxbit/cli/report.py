"""`proxbit report`: a page about a training run."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from proxbit.analysis.report import write_report
from proxbit.foreign import printable

__all__ = ["report"]


def report(
    run: Annotated[Path, typer.Argument(help="The output folder of a ProxConnectTrainer.")],
    out: Annotated[Path | None, typer.Option(help="The page. [default: RUN/report.html]")] = None,
) -> None:
    """Write a page about a training run.

    It shows curves, latent weights, flips, layers, images and the quantization card, in one HTML file that opens from
    disk, without a network. Of a run that still trains it shows what there is so far.

    Example: proxbit report out
    """
    path = write_report(run, out)
    Console().print(f"Wrote {printable(path, 5000)}", highlight=False, markup=False, soft_wrap=True)
