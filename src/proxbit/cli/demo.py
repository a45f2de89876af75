"""`proxbit demo`: a model made 1-bit and at work, on a machine with nothing but proxbit and no network."""

import copy
import json
import time
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
from torch import Tensor, nn
from transformers.utils import logging

from proxbit.analysis.timing import time_rounds, torch_threads
from proxbit.analysis.variants import forward_calls
from proxbit.cli.checkpoints import load_model, load_processor
from proxbit.plugin import binarize, fuse, pack
from proxbit.training.calibration import calibrate
from proxbit.training.pixels import read_image

__all__ = ["Reading", "demo", "half_blocks"]

SIDE, IMAGES_A_ROW, ROUNDS = 12, 5, 21
FLOAT, FITTED, TRAINED = "float", "1 bit, fitted now", "1 bit, trained"
INK = {(False, False): " ", (True, False): "▀", (False, True): "▄", (True, True): "█"}


@dataclass(frozen=True)
class Reading:
    """What the model says of one image, how sure it is (0 to 1), and what is true."""

    image: str
    prediction: str
    certainty: float
    truth: str


def half_blocks(image: Image.Image, colors: bool) -> Text:
    """A grey image as text, two pixels a character: in its colors, or where there are none as ink on paper."""
    width, height = image.size
    grey = np.asarray(image.convert("L")).tolist()
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
    """The model's answer for each image, whose name is the truth."""
    for path in samples:
        inputs = processor(read_image(path), return_tensors="pt")
        with torch.inference_mode():
            certainty, answer = model(**inputs).logits[0].softmax(0).max(0)
        yield Reading(path.name, model.config.id2label[int(answer)], float(certainty), path.stem)


@dataclass(frozen=True)
class Form:
    """One form of the model: the share of the test images that it gets right, bytes of its weights, milliseconds for
    an image."""

    accuracy: float
    bytes: int
    latency_ms: float


def images_of(sheet: Path, side: int) -> list[Image.Image]:
    """The images that lie side by side on a sheet."""
    grey = read_image(sheet)
    columns, rows = grey.width // side, grey.height // side
    return [
        grey.crop((side * x, side * y, side * (x + 1), side * (y + 1))) for y in range(rows) for x in range(columns)
    ]


def accuracy(model: nn.Module, pixels: Tensor, labels: list[int]) -> float:
    """The share of right answers."""
    with torch.inference_mode():
        answers = model.eval()(pixel_values=pixels).logits.argmax(-1)
    return float((answers == torch.tensor(labels)).float().mean())


def fit(plain: Any, processor: Any, folder: Path) -> tuple[Any, int, float]:
    """A packed model of a float one, from images without labels; how many there were, and the seconds it took."""
    shown = images_of(folder / "unlabelled.png", plain.config.image_size)
    start = time.perf_counter()
    model = binarize(copy.deepcopy(plain))
    calibrate(model, shown, processor=processor, progress=False)
    return pack(model), len(shown), time.perf_counter() - start


def tensor_bytes(model: nn.Module) -> int:
    """Of all tensors that are saved."""
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def compare(forms: dict[str, Any], pixels: Tensor, labels: list[int]) -> dict[str, Form]:
    """The forms beside each other: on all test images, and one image at a time on one thread."""
    fused = {name: model if name == FLOAT else fuse(copy.deepcopy(model)) for name, model in forms.items()}
    with torch_threads(1):
        timings = time_rounds(forward_calls(fused, batch=1), ROUNDS)
    return {
        name: Form(accuracy(model, pixels, labels), tensor_bytes(model), round(1e3 * timings.median(name), 3))
        for name, model in forms.items()
    }


def demo(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Make a small model 1-bit, and classify images with it.

    Handwritten digits. A float model becomes a 1-bit one in a second or two, from images without labels; beside it
    stands one that was trained. Both come with proxbit: it takes seconds and no network.

    Example: proxbit demo
    """
    logging.disable_progress_bar()
    with as_file(files("proxbit") / "demo") as folder:
        plain: Any = load_model(str(folder / "digits-float"), dtype=torch.float32)
        trained = load_model(str(folder / "digits"))
        processor: Any = load_processor(str(folder / "digits"))
        fitted, shown, seconds = fit(plain, processor, folder / "digits-float")
        labels = [int(each) for each in (folder / "digits-float" / "test.txt").read_text().strip()]
        test = images_of(folder / "digits-float" / "test.png", plain.config.image_size)[: len(labels)]
        samples = sorted((folder / "digits" / "samples").glob("*.png"))
        readings = list(read(fitted, processor, samples))
        images = {path.name: Image.open(path).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for path in samples}
    pixels = processor(test, return_tensors="pt")["pixel_values"]
    forms = compare({FLOAT: plain, FITTED: fitted, TRAINED: trained}, pixels, labels)
    if as_json:
        told: dict[str, Any] = {"unlabelled": shown, "seconds": round(seconds, 2), "test": len(labels)}
        told |= {"readings": [asdict(each) for each in readings]}
        typer.echo(json.dumps(told | {"forms": {name: asdict(form) for name, form in forms.items()}}, indent=1))
        return
    show(readings, images, forms)
    Console().print(
        f"The float model became a 1-bit one in {seconds:.1f} s, from {shown} images without labels. Accuracies are "
        f"of {len(labels)} other images.\nYour own model: proxbit binarize MODEL --images FOLDER --output_dir OUT",
        highlight=False,
    )


def show(readings: list[Reading], images: dict[str, Image.Image], forms: dict[str, Form]) -> None:
    """Images with the answers of the model that was fitted, and the forms of the model."""
    console = Console()
    grid = Table.grid(padding=(0, 2, 1, 0))
    cells = []
    for reading in readings:
        right = reading.prediction == reading.truth
        verdict = "[green]right[/]" if right else f"[red]wrong, is {reading.truth}[/]"
        words = Text.from_markup(f"[bold]{reading.prediction}[/] {reading.certainty:.0%}, {verdict}")
        cells.append(Group(half_blocks(images[reading.image], console.color_system is not None), words))
    for start in range(0, len(cells), IMAGES_A_ROW):
        grid.add_row(*cells[start : start + IMAGES_A_ROW])
    console.print(grid)
    table = Table()
    table.add_column("the same model")
    for column in ("accuracy", "bytes", "", "ms an image"):
        table.add_column(column, justify="right")
    base = forms[FLOAT]
    for name, form in forms.items():
        smaller = f"{base.bytes / form.bytes:.1f}x smaller" if form is not base else ""
        table.add_row(name, f"{form.accuracy:.1%}", f"{form.bytes:,}", smaller, f"{form.latency_ms:.2f}")
    console.print(table)
