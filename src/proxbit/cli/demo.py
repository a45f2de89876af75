"""`proxbit demo`: a 1-bit model at work, on a machine with nothing but proxbit and no network."""

import copy
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from rich.color import Color
from rich.console import Console, Group
from rich.style import Style
from rich.table import Table
from rich.text import Text
from torch import nn
from transformers.utils import logging

from proxbit.analysis.card import QuantizationCard
from proxbit.analysis.timing import Timings, time_rounds, torch_threads
from proxbit.analysis.variants import forward_calls
from proxbit.cli.checkpoints import load_model, load_processor
from proxbit.hub import dequantize, fuse

__all__ = ["Reading", "demo", "half_blocks"]

SIDE, PICTURES_A_ROW, ROUNDS = 12, 5, 21
INK = {(False, False): " ", (True, False): "▀", (False, True): "▄", (True, True): "█"}


@dataclass(frozen=True)
class Reading:
    """What the model says of one picture, how sure it is (0 to 1), and what is true."""

    picture: str
    prediction: str
    certainty: float
    truth: str


def half_blocks(picture: Image.Image, colors: bool) -> Text:
    """A grey picture as text, two pixels a character: in its colors, or where there are none as ink on paper."""
    width, height = picture.size
    grey = np.asarray(picture.convert("L")).tolist()
    text = Text()
    for y in range(0, height - 1, 2):
        for x in range(width):
            upper, lower = grey[y][x], grey[y + 1][x]
            if colors:
                text.append("▀", Style(color=Color.from_rgb(*[upper] * 3), bgcolor=Color.from_rgb(*[lower] * 3)))
            else:
                text.append(INK[upper < 128, lower < 128])
        text.append("\n")
    return text


def read(model: Any, processor: Any, samples: list[Path]) -> Iterator[Reading]:
    """The model's answer for each picture, whose name is the truth."""
    for path in samples:
        with Image.open(path) as picture:
            inputs = processor(picture.convert("RGB"), return_tensors="pt")
        with torch.inference_mode():
            certainty, answer = model(**inputs).logits[0].softmax(0).max(0)
        yield Reading(path.name, model.config.id2label[int(answer)], float(certainty), path.stem)


def compare(model: nn.Module) -> Timings:
    """The packed model against plain float layers with the same output, one picture at a time."""
    plain = dequantize(copy.deepcopy(model)).eval()
    with torch_threads(1):
        return time_rounds(forward_calls({"float": plain, "packed": fuse(copy.deepcopy(model))}, batch=1), ROUNDS)


def demo(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Classify ten pictures with a small 1-bit model.

    Handwritten digits, none of which the model was trained with. Model and pictures come with proxbit: it takes seconds
    and no network.

    Example: proxbit demo
    """
    logging.disable_progress_bar()
    with as_file(files("proxbit") / "demo" / "digits") as folder:
        model, processor = load_model(str(folder)), load_processor(str(folder))
        samples = sorted((folder / "samples").glob("*.png"))
        readings = list(read(model, processor, samples))
        card = QuantizationCard.load(folder)
        pictures = {path.name: Image.open(path).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for path in samples}
    tested = {"float": card["baseline_top1"], "packed": card["quantized_top1"]}
    timings = compare(model)
    numbers = {
        form: {"bytes": size, "latency_ms": round(1e3 * timings.median(form), 3)}
        for form, size in (("float", card["float32_bytes"]), ("packed", card["model_bytes"]))
    }
    if as_json:
        found = {"readings": [asdict(reading) for reading in readings], **numbers, "tested": tested}
        typer.echo(json.dumps(found, indent=1))
        return
    show(readings, pictures, numbers, tested)


def show(
    readings: list[Reading],
    pictures: dict[str, Image.Image],
    numbers: dict[str, dict[str, Any]],
    tested: dict[str, float],
) -> None:
    """Pictures with answers, and the two forms of the model."""
    console = Console()
    grid = Table.grid(padding=(0, 2, 1, 0))
    cells = []
    for reading in readings:
        right = reading.prediction == reading.truth
        verdict = "[green]right[/]" if right else f"[red]wrong, is {reading.truth}[/]"
        words = Text.from_markup(f"[bold]{reading.prediction}[/] {reading.certainty:.0%}, {verdict}")
        cells.append(Group(half_blocks(pictures[reading.picture], console.color_system is not None), words))
    for start in range(0, len(cells), PICTURES_A_ROW):
        grid.add_row(*cells[start : start + PICTURES_A_ROW])
    console.print(grid)
    table = Table()
    table.add_column("the same model")
    for column in ("bytes", "", "ms a picture", ""):
        table.add_column(column, justify="right")
    base, packed = numbers["float"], numbers["packed"]
    table.add_row("float, dequantized", f"{base['bytes']:,}", "", f"{base['latency_ms']:.2f}", "")
    table.add_row(
        "packed, 1 bit",
        f"{packed['bytes']:,}",
        f"{base['bytes'] / packed['bytes']:.1f}x smaller",
        f"{packed['latency_ms']:.2f}",
        f"{base['latency_ms'] / packed['latency_ms']:.1f}x as fast",
    )
    console.print(table)
    count = sum(reading.prediction == reading.truth for reading in readings)
    console.print(
        f"{count} of these {len(readings)} are right, and {tested['packed']:.1%} of all test pictures; "
        f"of the float model {tested['float']:.1%}.\n"
        "Times of a model this small say little: `proxbit bench` times larger ones.",
        highlight=False,
    )
