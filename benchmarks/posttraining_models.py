"""What `proxbit.calibrate` is worth on models other than DINOv2: `python benchmarks/posttraining_models.py`.

The handwritten digits and the solar cells of benchmarks/accuracy.py, with its ViTs and its PVTv2 and, beside that, a
Swin; and the silhouettes of animals of benchmarks/dinov2.py, with a ResNet and a ConvNeXt, all trained from scratch.
Each float model is made 1-bit in three ways: the signs of its weights, with quantizers that have seen training images;
the closed form, from unlabelled training images; and ProxConnect++ with labels and distillation, as accuracy.py trains.
KL is that of the answers, KL(float || 1-bit). Finished runs are kept in benchmarks/posttraining/models.jsonl: the
script goes on where it stopped, and does what is missing of what it is asked for. A run is of one thread.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import accuracy
import dinov2
import numpy as np
import torch
from report import keep, table
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    set_seed,
)
from transformers.utils import logging

import proxbit
from posttraining import ALL, CLOSED, COLUMNS, IMAGES, SIGNS, compare, points
from proxbit.analysis.environment import environment

FOLDER = Path(__file__).parent / "posttraining"
TRAINED = "trained with labels"
SIDE = 40
# Points that the closed form, W1A32, is behind training at most.
GOAL = 2.0


def swin() -> nn.Module:
    """16 x 16 patches, in windows of 4 x 4."""
    sizes = {"image_size": 96, "patch_size": 6, "window_size": 4, "embed_dim": 32}
    return SwinForImageClassification(SwinConfig(**sizes, depths=[2, 2, 2], num_heads=[2, 4, 8], num_labels=2))


def resnet() -> nn.Module:
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [2, 2, 2]}
    return ResNetForImageClassification(ResNetConfig(**sizes, layer_type="basic", num_labels=10))


def convnext() -> nn.Module:
    """Its layer scale starts at 0.1: at the usual 1e-6 it is still small when so short a training ends."""
    sizes = {"hidden_sizes": [24, 48, 96], "depths": [2, 2, 2], "num_stages": 3, "image_size": SIDE}
    return ConvNextForImageClassification(ConvNextConfig(**sizes, layer_scale_init_value=0.1, num_labels=10))


def animals(fold: int) -> tuple[Dataset, Dataset]:
    """To train with, beside their mirror images, and to test with: `[n, 3, 40, 40]`, and labels."""
    task = dinov2.load_task("animals")
    (x, y), test = ((dinov2.pixels(task, part, SIDE), torch.from_numpy(task.labels[part])) for part in task.fold(fold))
    return accuracy.Images(torch.cat([x, x.flip(3)]), torch.cat([y, y])), accuracy.Images(*test)


CELLS, ANIMALS = accuracy.TASKS["solar"], accuracy.Task("", animals, resnet, 15, 12, 64, 1e-3)
MODELS = {
    "digits-32": replace(accuracy.TASKS["digits-32"], title="ViT, width 32, digits"),
    "digits-64": replace(accuracy.TASKS["digits-64"], title="ViT, width 64, digits"),
    "pvtv2": replace(CELLS, title="PVTv2, solar cells"),
    "swin": replace(CELLS, title="Swin, solar cells", model=swin),
    "resnet": replace(ANIMALS, title="ResNet, ten animals"),
    "convnext": replace(ANIMALS, title="ConvNeXt, ten animals", model=convnext),
}
# Convolutions multiply floats.
COLUMNS_OF = {name: ("W1A32",) if name == "resnet" else ("W1A32", "W1A8", "W1A1") for name in MODELS}


@dataclass(frozen=True)
class Run:
    """One 1-bit model.

    Attributes:
        model: a key of MODELS.
        fold: 0 to 4.
        column: one of COLUMNS_OF the model.
        method: SIGNS, CLOSED or TRAINED.
    """

    model: str
    fold: int
    column: str
    method: str


def wanted(models: list[str], folds: list[int], methods: list[str]) -> Iterator[Run]:
    """Fold by fold; what is trained last, as it takes longest."""
    for fold in folds:
        for several in ((SIGNS, CLOSED), (TRAINED,)):
            for model in models:
                for column in COLUMNS_OF[model]:
                    yield from (Run(model, fold, column, method) for method in several if method in methods)


def plain(pictures: Dataset) -> accuracy.Images:
    """All pictures of a part, as they are."""
    if isinstance(pictures, accuracy.Images):
        return pictures
    rows = pictures.with_transform(accuracy.solar.as_pixels)[:]
    return accuracy.Images(torch.stack(rows["pixel_values"]), torch.tensor(rows["labels"]))


def shown(run: Run, pixels: Tensor) -> Tensor:
    """The pictures that a run looks at."""
    count = IMAGES[run.column]
    drawn = np.random.default_rng(run.fold).permutation(len(pixels))
    return pixels[drawn if count == ALL else drawn[:count]]


def do(run: Run, cache: Path) -> dict[str, Any]:
    """Make one model 1-bit, and compare it with the float model, which is trained once."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    what = accuracy.Run(run.model, accuracy.FLOAT, accuracy.NONE, run.fold, 0)
    with patch.dict(accuracy.TASKS, MODELS):
        teacher = accuracy.float_model(what, cache)
    task = MODELS[run.model]
    pictures, test = task.pictures(run.fold)
    test = plain(test)
    found = dinov2.logits(teacher, test.pixels)
    set_seed(1000)
    model = task.model()
    model.load_state_dict(teacher.state_dict())
    row: dict[str, Any] = asdict(run) | {"start": accuracy.start_of(what, cache)}
    if run.method == TRAINED:
        recipe = accuracy.COLUMNS[run.column]
        proxbit.binarize(model, proxbit.get_recipe(recipe).binarization(weights=accuracy.BEST))
        start = time.perf_counter()
        accuracy.train(task, model, pictures, task.epochs, 1000, recipe=recipe, teacher=teacher)
    else:
        seen = shown(run, plain(pictures).pixels)
        proxbit.binarize(model, proxbit.BinarizationConfig(activations=COLUMNS[run.column]))
        start = time.perf_counter()
        fits = run.method == CLOSED
        proxbit.calibrate(model, seen, weights=fits, num_images=len(seen), progress=False)
        row["shown"] = len(seen)
    seconds = time.perf_counter() - start
    report = getattr(model, "calibration_report", None)
    errors = {} if report is None else {"before": report.before, "after": report.after}
    result = compare(proxbit.pack(model), found, test.pixels, test.labels.numpy())
    return row | result | errors | {"seconds": round(seconds, 1)}


def known(path: Path) -> dict[Run, dict[str, Any]]:
    """The runs that are finished."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {Run(*(row[name] for name in Run.__dataclass_fields__)): row for row in rows}


ByFold = dict[tuple[int, str], dict[str, Any]]


def by_fold(found: dict[Run, dict[str, Any]], model: str, column: str, method: str) -> ByFold:
    """The runs of a row, by fold and float start."""
    chosen = {run: row for run, row in found.items() if (run.model, run.column, run.method) == (model, column, method)}
    return {(run.fold, row["start"]): row for run, row in chosen.items()}


def less(left: ByFold, right: ByFold) -> list[float]:
    """Accuracies of one row less those of another, where both began at the same float model."""
    return [row["accuracy"] - right[key]["accuracy"] for key, row in left.items() if key in right]


def accuracy_rows(found: dict[Run, dict[str, Any]]) -> Iterator[list[str]]:
    for model, task in MODELS.items():
        for column in COLUMNS_OF[model]:
            signs, closed, trained = (by_fold(found, model, column, method) for method in (SIGNS, CLOSED, TRAINED))
            if not closed:
                continue
            more, behind = less(closed, signs), less(trained, closed)
            verdict = ""
            if column == "W1A32" and behind:
                verdict = "met" if 100 * statistics.mean(behind) <= GOAL else "**missed**"
            yield [
                task.title,
                column,
                points([row["float_accuracy"] for row in closed.values()]),
                *(
                    points([row["accuracy"] for row in rows.values()]) if rows else ""
                    for rows in (signs, closed, trained)
                ),
                *(f"{points(gaps)} ({len(gaps)})" if gaps else "" for gaps in (more, behind)),
                verdict,
            ]


def other_rows(found: dict[Run, dict[str, Any]]) -> Iterator[list[str]]:
    """KL, agreement with the float model, and seconds."""
    for model, task in MODELS.items():
        for column in COLUMNS_OF[model]:
            parts = [list(by_fold(found, model, column, method).values()) for method in (SIGNS, CLOSED, TRAINED)]
            if not parts[1]:
                continue
            yield [
                task.title,
                column,
                *(f"{statistics.mean(row['kl'] for row in rows):.4f}" if rows else "" for rows in parts),
                *(points([row["agreement"] for row in rows]) if rows else "" for rows in parts),
                *(f"{statistics.median(row['seconds'] for row in rows):.0f}" if rows else "" for rows in parts[1:]),
            ]


def write(found: dict[Run, dict[str, Any]]) -> str:
    kinds = ["signs", "closed form", "trained"]
    lines = [
        f"`python benchmarks/posttraining_models.py`. Runs are of several machines; the last: {environment()}.",
        "",
        "Accuracy of the packed model in %, mean ± standard error over folds; differences in points, paired by fold "
        "and float start, in brackets the number of pairs. *Signs* are those of the float weights, with quantizers "
        "that have seen training images; the closed form has seen 256 training images without labels, for W1A1 all of "
        f"them; *trained* is `{accuracy.BEST}` from float weights, with labels and distillation, for as long as "
        "`benchmarks/accuracy.py` does it.",
        "",
        f"The goal, for W1A32: the closed form is at most {GOAL:g} points behind training.",
        "",
        *table(["", "", "float", *kinds, "closed form less signs", "behind training", "goal"], accuracy_rows(found)),
        "KL(float || 1-bit) of the answers, answers that are those of the float model in %, and seconds of one thread "
        "on a shared machine.",
        "",
    ]
    header = [
        *(f"KL, {kind}" for kind in kinds),
        *(f"agrees, {kind}" for kind in kinds),
        *(f"s, {k}" for k in kinds[1:]),
    ]
    lines += table(["", "", *header], other_rows(found))
    text = "\n".join(lines).rstrip() + "\n"
    (FOLDER / "models.md").write_text(text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--folds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=[SIGNS, CLOSED, TRAINED], default=[SIGNS, CLOSED, TRAINED])
    parser.add_argument("--columns", nargs="+", choices=list(COLUMNS), default=list(COLUMNS))
    parser.add_argument("--cache", type=Path, default=Path("runs/models"), help="Where the float models are kept.")
    given = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / "models.jsonl"
    for run in wanted(given.models, given.folds, given.methods):
        if run.column in given.columns and run not in known(path):
            keep(do(run, given.cache), path)
    print(write(known(path)))


if __name__ == "__main__":
    main()
