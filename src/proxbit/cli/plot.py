"""`proxbit plot`: the figure of one quantizer pair."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from proxbit.analysis.plots import plot_pair
from proxbit.errors import ConfigError
from proxbit.quantizers import get_pair

__all__ = ["plot"]


def plot(
    name: Annotated[str, typer.Argument(help="A quantizer pair, see `proxbit pairs`.")],
    out: Annotated[
        Path | None, typer.Option(help="The figure; its ending decides the format. [default: NAME.png]")
    ] = None,
    mu: Annotated[
        list[float] | None,
        typer.Option(help="Sharpness, up to four times. [default: start, middle and end of the pair's schedule]"),
    ] = None,
    parameters: Annotated[
        str, typer.Option(help="Parameters of the pair as JSON, such as '{\"levels\": [-1, 0, 1]}'.")
    ] = "{}",
) -> None:
    """Draw F, B, P, T and the regularizer of a quantizer pair.

    P is its proximal map, T its transform: F is T of P.

    Example: proxbit plot bnn++ --mu 1 --mu 10 --out bnn++.svg
    """
    try:
        values = json.loads(parameters)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--parameters must be JSON, such as '{{\"levels\": [-1, 0, 1]}}': {error}.") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"--parameters must be a JSON object, such as '{{\"levels\": [-1, 0, 1]}}', not {parameters}."
        )
    pair = get_pair(name, values)
    title = f"{name} {json.dumps(values)}" if values else name
    path = plot_pair(pair, out or Path(f"{name}.png"), mu or None, title)
    Console().print(f"Wrote {path}", highlight=False, soft_wrap=True)
