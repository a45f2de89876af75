"""`proxbit report`: a page about a training run."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from proxbit.analysis.report import write_report

__all__ = ["report"]


def report(
    run: Annotated[Path, typer.Argument(help="The output folder of a ProxConnectTrainer.")],
    out: Annotated[Path | None, typer.Option(help="The page. [default: RUN/report.html]")] = None,
) -> None:
    """Write one HTML file about a run: curves, latent weights, flips, layers, pictures, the quantization card.

    It opens from disk, without a network; of a run that still trains it shows what there is so far. For example:
    proxbit report out
    """
    path = write_report(run, out)
    Console().print(f"Wrote {path}", highlight=False, soft_wrap=True)
