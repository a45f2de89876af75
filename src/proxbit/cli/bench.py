"""`proxbit bench`: how fast a model of the user is, float and packed, and where the time goes."""

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
from proxbit.analysis.variants import forward_calls, packed_copy, variants
from proxbit.cli.checkpoints import architecture, load_model
from proxbit.config import QUANT_METHOD, BinarizationConfig
from proxbit.errors import CheckpointError

__all__ = ["bench"]


def load(name: str, random: bool) -> nn.Module:
    """The model of a folder or of the hub, in fp32; with random weights if asked.

    Raises:
        CheckpointError: if there is no such model, or no weights and none were asked for at random.
    """
    config, model_class = architecture(name)
    if random:
        return _random(config, model_class)
    try:
        return load_model(name, torch.float32)
    except CheckpointError as error:
        raise CheckpointError(f"{error} (--random takes random weights, and needs a config.json only.)") from error


def _random(config: transformers.PreTrainedConfig, model_class: Any | None) -> nn.Module:
    """A model with random weights, packed where its configuration says that it is of proxbit."""
    stored = config.__dict__.pop("quantization_config", None)
    make = model_class or transformers.AutoModelForImageClassification.from_config
    model: nn.Module = make(config)
    if stored is None or stored.get("quant_method") != QUANT_METHOD:
        return model
    return packed_copy(model, BinarizationConfig(**stored))


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


def bench(
    model: Annotated[str, typer.Argument(help="A folder, or a name on the hub.")],
    batch: Annotated[int, typer.Option(min=1, help="Pictures in a forward pass.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch. [default: what torch takes]")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Each variant is timed once in every round.")] = 11,
    random: Annotated[
        bool, typer.Option("--random", help="Random weights: the folder needs no more than a config.json.")
    ] = False,
) -> None:
    """Time a model as float, bf16, int8 dynamic and packed, and show what its time goes into.

    A packed model is timed with its own activations; of a float model a packed copy with the default configuration is
    timed, untrained.
    """
    with torch_threads(threads):
        loaded = load(model, random)
        calls = forward_calls(variants(loaded), batch)
        timings = time_rounds(calls, rounds)
        shares = {name: operator_shares(call) for name, call in calls.items()}
        here = environment()
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
