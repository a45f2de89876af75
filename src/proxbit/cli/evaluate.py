"""`proxbit evaluate`: what a classifier gets right, and how fast."""

import json
from dataclasses import asdict
from functools import partial
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from proxbit.cli.checkpoints import load_model, load_processor
from proxbit.cli.images import read_split, tell_images
from proxbit.cli.progress import watch
from proxbit.errors import CheckpointError
from proxbit.foreign import printable
from proxbit.patching import state_of
from proxbit.training.evaluation import Evaluation, evaluate_images
from proxbit.training.image_folders import load_splits, pick_split

__all__ = ["evaluate"]

PREFERRED = ("test", "validation")


def evaluate(
    model: Annotated[str, typer.Argument(help="An image classifier in any state: a folder, or a name on the hub.")],
    data: Annotated[str, typer.Argument(help="A folder with a folder for each class, or a dataset on the hub.")],
    split: Annotated[
        str | None, typer.Option(help="The part of the data. [default: test, validation, or the only one]")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images in a forward pass.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure accuracy, latency and throughput on images.

    Images that cannot be read are left out, and listed. The names of the classes are labels of the model.

    Example: proxbit evaluate vit-1bit photos --batch 8
    """
    splits = load_splits(data)
    chosen = pick_split(splits, split, PREFERRED)
    loaded, processor = load_model(model), load_processor(model)
    if processor is None:
        raise CheckpointError(
            f"{model!r} has no preprocessor_config.json that can be read: it is not known how images are prepared."
        )
    images = read_split(data, chosen, splits[chosen])
    if not as_json:
        tell_images(Console(), splits, [chosen], {chosen: images})
    result = evaluate_images(
        loaded, processor, images, name=repr(model), batch=batch, watch=partial(watch, "Classifying")
    )
    facts = {"model": model, "state": state_of(loaded), "data": data, "split": chosen, "batch": batch}
    if as_json:
        found = asdict(result)
        found["left_out"] = [asdict(each) for each in (*splits.left_out, *result.left_out)]
        typer.echo(json.dumps({**facts, "classes": images.counts(), **found}, indent=1))
        return
    part = f", {chosen}" if len(splits) > 1 else ""  # datasets calls all of a folder "train"
    show(f"{model} ({facts['state']}) on {data}{part}", result, batch)


def show(title: str, result: Evaluation, batch: int) -> None:
    """The numbers."""
    console = Console()
    console.print(printable(title), highlight=False, markup=False, soft_wrap=True)
    table = Table(show_header=False)
    rows = {
        "images": f"{result.pictures:,}",
        "accuracy": f"{result.accuracy:.2%}",
        "balanced accuracy": f"{result.balanced_accuracy:.2%}",
        "latency": f"{result.latency_ms:.2f} ms: the model alone, one image",
        "throughput": f"{result.pictures_per_second:.1f} images/s: the whole pipeline, batch {batch}",
    }
    for row in rows.items():
        table.add_row(*row)
    console.print(table)
