"""What `proxbit.calibrate`, one bit without training, costs in accuracy and time: `python benchmarks/posttraining.py`.

Float classifiers are fine-tuned for every fold (benchmarks/dinov2.py), made latent, fitted to unlabelled training
images, and compared with the float model on the test images of the fold. KL is that of the answers, KL(float || 1-bit),
the finest of these measures. Finished runs are kept in benchmarks/posttraining/runs.jsonl: the script goes on where it
stopped, and does what is missing of the parts that it is asked for. A run is of one thread.
"""

import argparse
import hashlib
import json
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import dinov2
import matplotlib
import numpy as np
import torch
from matplotlib import pyplot
from report import keep, table
from torch import Tensor, nn

import proxbit
from proxbit.analysis.environment import environment

FOLDER = Path(__file__).parent / "posttraining"
SIDE, ALL = 112, 0
COLUMNS = {"W1A32": "float", "W1A8": "int8", "W1A4": "int4", "W1A1": "sign"}
IMAGES = {"W1A32": 256, "W1A8": 256, "W1A4": 256, "W1A1": ALL}
TITLES = {"solar": "DINOv2-S, solar cells", "animals": "DINOv2-S, ten animals"}
# Points lost against float at most.
GOALS = {
    "solar": {"W1A32": 0.7, "W1A8": 0.7, "W1A4": 1.2, "W1A1": 1.5},
    "animals": {"W1A32": 2.5, "W1A8": 2.5, "W1A4": 3.0, "W1A1": 6.0},
}
FIT, WALK, FORM = "proxbit.posttraining.fit.", "proxbit.posttraining.walk.", "proxbit.posttraining.closed_form."
CLOSED, SIGNS = "closed form", "signs of the weights"
# What a variant changes; a ridge without end is no alignment.
VARIANTS: dict[str, dict[str, Any]] = {
    CLOSED: {},
    "without feedback": {f"{WALK}FEEDBACK": 0.0},
    "without flips": {f"{FORM}SWEEPS": 0},
    "without compensation": {f"{FORM}SWEEPS": 0, f"{FORM}PASSES": 0},
    "without alignment": {f"{FIT}RIDGE": 1e9, f"{FIT}RIDGE_OF_SIGNS": 1e9, f"{WALK}FEEDBACK": 0.0},
    "half of the feedback": {f"{WALK}FEEDBACK": 0.5},
    "ridge x 3": {f"{FIT}RIDGE": 0.1, f"{FIT}RIDGE_OF_SIGNS": 0.02},
    "half of the feedback, ridge x 3": {f"{WALK}FEEDBACK": 0.5, f"{FIT}RIDGE": 0.1, f"{FIT}RIDGE_OF_SIGNS": 0.02},
}
OTHERS = ("images of the other task", "noise")
# One epoch with labels and distillation from there, at a learning rate of 5e-5: what differs from the Trainer's
# defaults for a calibrated model, which are hard weights, and latents at a tenth of that.
TRAININGS: dict[str, dict[str, Any]] = {
    "then 1 epoch, as the Trainer does it": {},
    "then 1 epoch, latents x 1": {"latent_learning_rate_factor": 1.0},
    "then 1 epoch, latents x 0.01": {"latent_learning_rate_factor": 0.01},
    "then 1 epoch, soft to hard": {"hard_fraction": 0.1, "latent_learning_rate_factor": 1.0},
}
FROM_FLOAT = "1 epoch from float weights, soft to hard"


@dataclass(frozen=True)
class Run:
    """One calibration.

    Attributes:
        task: a key of TITLES.
        fold: 0 to 4.
        column: a key of COLUMNS.
        images: how many; 0 for all of the training part.
        variant: a key of VARIANTS, SIGNS, or one of OTHERS.
        seed: of the draw of images.
    """

    task: str
    fold: int
    column: str
    images: int
    variant: str = CLOSED
    seed: int = 0


def main_runs() -> Iterator[Run]:
    """Five folds, all columns, and the control."""
    for columns in (("W1A32", "W1A8", "W1A4"), ("W1A1",)):
        for fold in range(dinov2.FOLDS):
            for task in TITLES:
                for column in columns:
                    yield Run(task, fold, column, IMAGES[column], SIGNS)
                    yield Run(task, fold, column, IMAGES[column])


def curve_runs() -> Iterator[Run]:
    """By the number of images, and of draws."""
    for images in (16, 64, 256, 1024, ALL):
        for column in ("W1A32", "W1A1"):
            for task in TITLES:
                for seed in (0, 1, 2) if images in (16, 64, 256) else (0,):
                    yield Run(task, 0, column, images, seed=seed)


def ablation_runs() -> Iterator[Run]:
    """Each step left out."""
    for variant in VARIANTS:
        for task in TITLES:
            for column, images in (("W1A32", 256), ("W1A1", 512)):
                yield Run(task, 0, column, images, variant)


def domain_runs() -> Iterator[Run]:
    """Calibrated on what the model is not for."""
    for variant in OTHERS:
        for task in TITLES:
            for column in ("W1A32", "W1A1"):
                yield Run(task, 0, column, 256, variant)


def training_runs() -> Iterator[Run]:
    """Trained from there."""
    for task in ("animals", "solar"):
        for column, images in (("W1A32", 256),):
            for variant in (*TRAININGS, FROM_FLOAT):
                yield Run(task, 0, column, images, variant)


PARTS: dict[str, Callable[[], Iterator[Run]]] = {
    "main": main_runs,
    "ablation": ablation_runs,
    "curve": curve_runs,
    "domain": domain_runs,
    "training": training_runs,
}


def shown(run: Run, task: dinov2.Task, train: np.ndarray) -> Tensor:
    """The images that a run looks at."""
    draw = np.random.default_rng(run.seed)
    if run.variant == "noise":
        return torch.from_numpy(draw.standard_normal((run.images, 3, SIDE, SIDE), np.float32))
    if run.variant in OTHERS:
        task = dinov2.load_task(next(name for name in TITLES if name != run.task))
        train = np.arange(len(task.images))
    count = len(train) if run.images == ALL else run.images
    return dinov2.pixels(task, draw.permutation(train)[:count], SIDE)


@contextmanager
def variant(name: str) -> Iterator[None]:
    """Within the context, the closed form is changed."""
    patches = [patch(target, value) for target, value in VARIANTS.get(name, {}).items()]
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()


def balanced(answers: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean([(answers[labels == each] == each).mean() for each in np.unique(labels)]))


def compare(model: nn.Module, teacher: Tensor, images: Tensor, labels: np.ndarray) -> dict[str, float]:
    """A model beside the answers of its float form."""
    found = dinov2.logits(model, images)
    divergence = (teacher.softmax(-1) * (teacher.log_softmax(-1) - found.log_softmax(-1))).sum(-1)
    answers, before = found.argmax(-1).numpy(), teacher.argmax(-1).numpy()
    return {
        "float_accuracy": float((before == labels).mean()),
        "float_balanced": balanced(before, labels),
        "accuracy": float((answers == labels).mean()),
        "balanced": balanced(answers, labels),
        "kl": float(divergence.mean()),
        "agreement": float((answers == before).mean()),
    }


def do(run: Run, cache: Path) -> dict[str, Any]:
    """Calibrate, pack and compare."""
    task = dinov2.load_task(run.task)
    train, test = task.fold(run.fold)
    model = dinov2.finetune(task, run.fold, SIDE, cache)
    start_of = hashlib.sha256(dinov2.file_of(task, run.fold, SIDE, cache).read_bytes()).hexdigest()[:16]
    images, labels = dinov2.pixels(task, test, SIDE), task.labels[test]
    teacher = dinov2.logits(model, images)
    seen = shown(run, task, train)
    proxbit.binarize(model, proxbit.BinarizationConfig(activations=COLUMNS[run.column]))
    start = time.perf_counter()
    with variant(run.variant):
        fits = run.variant not in (SIGNS, FROM_FLOAT)
        proxbit.calibrate(model, seen, weights=fits, num_images=len(seen), progress=False)
    if run.variant in (*TRAININGS, FROM_FLOAT):
        train_on(model, task, train, TRAININGS.get(run.variant, {}), cache, run.fold)
    seconds = time.perf_counter() - start
    report = getattr(model, "calibration_report", None)
    errors = {} if report is None else {"before": report.before, "after": report.after}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    result = compare(proxbit.pack(model), teacher, images, labels)
    return (
        asdict(run)
        | {"start": start_of, "shown": len(seen)}
        | result
        | errors
        | {"seconds": round(seconds, 1), "peak_gib": round(peak, 2)}
    )


def train_on(
    model: nn.Module, task: dinov2.Task, train: np.ndarray, changes: dict[str, Any], cache: Path, fold: int
) -> None:
    """One epoch of ProxConnect++ with labels, and with the float model as the teacher."""
    pixels, labels = dinov2.pixels(task, train, SIDE), task.labels[train]
    rows = [{"pixel_values": image, "labels": int(label)} for image, label in zip(pixels, labels, strict=True)]
    with TemporaryDirectory() as folder:
        fixed = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "bf16": True, "use_cpu": True}
        sizes = {"num_train_epochs": 1, "per_device_train_batch_size": 32, "warmup_steps": 8}
        args = proxbit.ProxConnectArguments(folder, **fixed, **sizes, **changes)
        teacher = dinov2.finetune(task, fold, SIDE, cache)
        proxbit.ProxConnectTrainer(model=model, args=args, teacher=teacher, train_dataset=rows).train()


def known(path: Path) -> dict[Run, dict[str, Any]]:
    """The runs that are finished."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return {Run(**{name: row[name] for name in Run.__dataclass_fields__}): row for row in rows}


def points(values: Sequence[float], digits: int = 1) -> str:
    """Mean and standard error of fractions, in points."""
    values = [100 * value for value in values]
    mean = f"{round(statistics.mean(values), digits) + 0.0:.{digits}f}"
    return f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else mean


def main_table(found: dict[Run, dict[str, Any]]) -> list[str]:
    lines = []
    for task, title in TITLES.items():
        rows = []
        for column, goal in GOALS[task].items():
            for kind in (SIGNS, CLOSED):
                runs = [r for run, r in found.items() if (run.task, run.column, run.variant) == (task, column, kind)]
                runs = [row for row in runs if row["images"] == IMAGES[column] and row["seed"] == 0]
                if not runs:
                    continue
                lost = [row["float_accuracy"] - row["accuracy"] for row in runs]
                verdict = "" if kind == SIGNS else "met" if 100 * statistics.mean(lost) <= goal else "**missed**"
                rows.append(
                    [
                        column,
                        kind,
                        points([row["float_accuracy"] for row in runs]),
                        points([row["accuracy"] for row in runs]),
                        points([row["balanced"] for row in runs]),
                        points(lost),
                        "" if kind == SIGNS else f"{goal:g}",
                        verdict,
                        f"{statistics.mean(row['kl'] for row in runs):.3f}",
                        points([row["agreement"] for row in runs]),
                        f"{statistics.median(row['seconds'] for row in runs):.0f}",
                        str(len(runs)),
                    ]
                )
        header = ["", "", "float %", "1 bit %", "balanced %", "points lost", "goal", "", "KL", "agrees %", "s", "folds"]
        lines += [f"## {title}", "", *table(header, rows)] if rows else []
    return lines


def rows_of(found: dict[Run, dict[str, Any]], runs: Iterator[Run], label: Callable[[Run], str]) -> list[list[str]]:
    """A row for every run that is finished."""
    rows = []
    for run in runs:
        if run in found:
            row = found[run]
            lost = row["float_accuracy"] - row["accuracy"]
            numbers = [points([row["accuracy"]]), points([lost]), f"{row['kl']:.4f}"]
            rows.append([TITLES[run.task], run.column, label(run), str(row["shown"]), *numbers])
    return rows


def draw(found: dict[Run, dict[str, Any]]) -> None:
    """Accuracy and KL over the number of images."""
    matplotlib.use("agg")
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    for task, marker in zip(TITLES, "os", strict=True):
        for column, color in (("W1A32", "C0"), ("W1A1", "C3")):
            points_of: dict[int, list[dict[str, Any]]] = {}
            for run in curve_runs():
                if run in found and (run.task, run.column) == (task, column):
                    points_of.setdefault(found[run]["shown"], []).append(found[run])
            if not points_of:
                continue
            x = sorted(points_of)
            lost = [[100 * (r["float_accuracy"] - r["accuracy"]) for r in points_of[n]] for n in x]
            divergence = [[r["kl"] for r in points_of[n]] for n in x]
            style = {"color": color, "marker": marker, "label": f"{TITLES[task]}, {column}"}
            style["linestyle"] = "-" if task == "solar" else "--"
            for axis, values in zip(axes, (lost, divergence), strict=True):
                axis.plot(x, [statistics.mean(v) for v in values], **style)
                axis.vlines(x, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.4)
    for axis, title in zip(axes, ("points of accuracy lost against float", "KL(float || 1 bit)"), strict=True):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("unlabelled images")
        axis.set_title(title)
        axis.grid(alpha=0.3)
    axes[1].set_yscale("log")
    axes[0].legend(fontsize=8)
    figure.savefig(FOLDER / "images.svg")
    pyplot.close(figure)


def write(found: dict[Run, dict[str, Any]]) -> str:
    lines = [
        f"`python benchmarks/posttraining.py`. Runs are of several machines; the last: {environment()}.",
        "",
        "Accuracy of the packed model, mean ± standard error over folds. W1A32, W1A8 and W1A4 are fitted to 256 "
        f"training images, W1A1 to all of them, without labels, {SIDE} x {SIDE} pixels, one thread.",
        "",
        *main_table(found),
    ]
    header = ["", "", "", "images", "1 bit %", "points lost", "KL"]
    for title, part, label in (
        ("## What each step is worth (fold 0)", "ablation", lambda run: run.variant),
        ("## Over the number of images (fold 0; draws)", "curve", lambda run: f"draw {run.seed}"),
        ("## Calibrated on something else (fold 0)", "domain", lambda run: run.variant),
        ("## Trained from there (fold 0)", "training", lambda run: run.variant),
    ):
        rows = rows_of(found, PARTS[part](), label)
        if part == "curve" and len({row[3] for row in rows}) < 2:
            continue  # One point is no curve.
        if rows and part == "curve":
            draw(found)
            lines += [
                title,
                "",
                "![points lost and KL over the number of images](images.svg)",
                "",
                *table(header, rows),
            ]
        elif rows:
            lines += [title, "", *table(header, rows)]
    text = "\n".join(lines).rstrip() + "\n"
    (FOLDER / "posttraining.md").write_text(text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--tasks", nargs="+", choices=list(TITLES), default=list(TITLES))
    parser.add_argument("--folds", nargs="+", type=int, default=list(range(dinov2.FOLDS)))
    parser.add_argument("--columns", nargs="+", choices=list(COLUMNS), default=list(COLUMNS))
    parser.add_argument("--cache", type=Path, default=Path("runs/dinov2"), help="Where the float models are kept.")
    parser.add_argument("--only-cached", action="store_true", help="Leave out folds whose float model is not there.")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for folder in (FOLDER, given.cache):
        folder.mkdir(parents=True, exist_ok=True)
    path = FOLDER / "runs.jsonl"
    for part in given.parts:
        for run in PARTS[part]():
            wanted = run.task in given.tasks and run.fold in given.folds and run.column in given.columns
            task = dinov2.load_task(run.task)
            there = dinov2.file_of(task, run.fold, SIDE, given.cache).is_file() or not given.only_cached
            if wanted and there and run not in known(path):
                keep(do(run, given.cache), path)
    print(write(known(path)))


if __name__ == "__main__":
    main()
