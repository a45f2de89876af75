"""`proxbit bench`: how fast a model of the user is, float and packed, and where the time goes."""

import json
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from proxbit.analysis.environment import environment
from proxbit.analysis.timing import Timings, operator_shares, time_rounds, torch_threads
from proxbit.analysis.variants import forward_calls, fused_copy, variants
from proxbit.cli.checkpoints import architecture, load_model
from proxbit.config import QUANT_METHOD, BinarizationConfig, stored_kind
from proxbit.errors import CheckpointError, ProxbitError
from proxbit.foreign import first_line
from proxbit.plugin.loading import UNREADABLE, make_model

__all__ = ["bench"]


def load(name: str, random: bool) -> nn.Module:
    """The model of a folder or of the hub, in fp32; with random weights if asked.

    Raises:
        CheckpointError: if there is no such model, or no weights and none were asked for at random.
    """
    config, model_class = architecture(name)
    if random:
        return _random(name, config, model_class)
    try:
        return load_model(name, torch.float32)
    except CheckpointError as error:
        raise CheckpointError(f"{error} (--random takes random weights, and needs a config.json only.)") from error


def _random(name: str, config: transformers.PreTrainedConfig, model_class: Any | None) -> nn.Module:
    """A model with random weights, packed where its configuration says that it is of proxbit."""
    stored = config.__dict__.pop("quantization_config", None)
    kind, _ = stored_kind(stored, name)
    try:
        model: nn.Module = make_model(config, model_class)
    except ProxbitError:
        raise
    except UNREADABLE as error:
        raise CheckpointError(f"No model can be made of the config.json of {name!r}: {first_line(error)}.") from error
    return fused_copy(model, BinarizationConfig(**stored)) if kind == QUANT_METHOD else model


def table_of(timings: Timings, shares: dict[str, dict[str, float]]) -> Table:
    """One row a variant: latency, ratio to float, shares of the time."""
    table = Table()
    table.add_column("variant", no_wrap=True)
    for column in ("ms", "spread", "x float", "linear", "attention", "rest"):
        table.add_column(column, justify="right", no_wrap=True)
    for name in timings.seconds:
        linear, attention = shares[name]["linear"], shares[name]["attention"]
        table.add_row(
            f"[bold]{escape(name)}[/]",
            f"{timings.median(name) * 1e3:.2f}",
            f"{timings.spread(name):.0%}",
            f"{timings.ratio(name, 'float'):.2f}",
            *(f"{share:.0%}" for share in (linear, attention, max(0.0, 1 - linear - attention))),
        )
    return table


def as_rows(model: nn.Module, timings: Timings, shares: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The table, unrounded."""
    return {
        "model": type(model).__name__,
        "variants": {
            name: {
                "ms": 1e3 * timings.median(name),
                "spread": timings.spread(name),
                "times_as_fast_as_float": timings.ratio(name, "float"),
                "shares": shares[name],
            }
            for name in timings.seconds
        },
    }


def bench(
    model: Annotated[str, typer.Argument(help="A folder, or a name on the hub.")],
    batch: Annotated[int, typer.Option(min=1, help="Images in a forward pass.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch. [default: what torch takes]")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Each variant is timed once in every round.")] = 11,
    random: Annotated[
        bool, typer.Option("--random", help="Random weights: the folder needs no more than a config.json.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time a model, float and packed, and show where its time goes.

    It is timed as float, bf16, int8 dynamic and packed. A packed model keeps its own activations; of a float model a
    packed copy with the default configuration is timed, untrained.

    Example: proxbit bench vit-1bit --batch 8
    """
    with torch_threads(threads):
        loaded = load(model, random)
        calls = forward_calls(variants(loaded), batch)
        timings = time_rounds(calls, rounds)
        shares = {name: operator_shares(call) for name, call in calls.items()}
        here = environment()
    if as_json:
        typer.echo(json.dumps(as_rows(loaded, timings, shares), indent=1))
        return
    console = Console()
    what = f"{type(loaded).__name__}, batch {batch}, threads {here.threads}"
    console.print(f"{what}; {here}", highlight=False, markup=False, soft_wrap=True)
    console.print(table_of(timings, shares))
    console.print(
        f"Medians of {rounds} rounds; spread: distance of the quartiles; the rest: shares of the time in operators.",
        highlight=False,
        soft_wrap=True,
    )
    if here.advice is not None:
        console.print(f"[yellow]{escape(here.advice)}[/]", highlight=False, soft_wrap=True)
