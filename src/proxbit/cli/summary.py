"""`proxbit summary`: a model's layers in one table."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from torch import nn

from proxbit.analysis.card import CARD_NAME, QuantizationCard
from proxbit.analysis.summary import summary as summarize
from proxbit.cli.checkpoints import load_model
from proxbit.posttraining import CalibrationReport, LayerFit

__all__ = ["summary"]


def _recall(model: nn.Module, folder: Path) -> None:
    """Give a model that was read from a folder the errors of its layers that the card beside it tells."""
    if not (folder / CARD_NAME).is_file():
        return
    card = QuantizationCard.load(folder)
    errors = card.calibration_errors or {}
    layers = tuple(LayerFit(name, 0, 0, each["before"], each["after"]) for name, each in errors.items())
    if layers:
        CalibrationReport(card.calibration_samples or 0, layers, {}, 0.0).attach(model)


def summary(
    model: Annotated[str, typer.Argument(help="A folder, or a name on the hub; in any state.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a model is made of: states, bits, bytes, kernels.

    Example: proxbit summary vit-1bit
    """
    loaded = load_model(model)
    _recall(loaded, Path(model))
    found = summarize(loaded)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=1))
        return
    console = Console()
    console.print(found.to_text(console.width), highlight=False, markup=False, soft_wrap=True)
