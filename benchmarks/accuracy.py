"""What binarization costs in accuracy: `python benchmarks/accuracy.py`.

Handwritten digits (1,797 pictures of 8 x 8, scikit-learn) and a ViT of depth 3 with patches of 2 x 2, at widths that
are narrow enough to tell methods apart; and photographs of solar cells (2,223 of elpv-dataset, in 96 x 96) and the
PVTv2 of examples/finetune_solar_cells.py. Every row of a task has the same folds and the same budget: a float model of
250 epochs (solar cells: 20), from which 80 (16) epochs of ProxConnect++ with distillation start, or, for the control
row, as many more of float training. Post-training sign is the float model with its weights replaced, without training.
The row of torchao is its `QuantOptimizer` with `ProxPARQ`, on the layers that the others binarize. Accuracies are those
of the packed model, by 5-fold cross-validation.

Finished runs are kept in benchmarks/accuracy/runs.jsonl: the script goes on where it stopped, and does what is missing
for the tasks, methods, columns, folds and seeds that it is asked for. Runs are compared where they began at the very
same float model. Those are kept in a folder of their own, `--cache`; where one had to be trained anew, on another
machine to other numbers, the runs that began at the one before are done again.
"""

import argparse
import copy
import hashlib
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from report import table
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchao.prototype.parq.optim import ProxPARQ, QuantOptimizer
from torchao.prototype.parq.quant import LSBQuantizer
from transformers import ViTConfig, ViTForImageClassification, default_data_collator, set_seed
from transformers.utils import ModelOutput, logging

import proxbit
from proxbit.analysis.environment import environment
from proxbit.training import DistillationArguments, DistillationTrainer

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import finetune_solar_cells as solar

FOLDER = Path(__file__).parent / "accuracy"
TORCHAO, BEST = "parq of torchao", "bnn++"
FLOAT, LONGER, SIGN, NONE = "float", "float, as long", "post-training sign", "W32A32"
# Rows: the quantizer pair of the weights, and training arguments that differ from the recipe's.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    **{pair: (pair, {}) for pair in ("bc", "bnn", "bnn+", "bnn++", "parq", "bireal++", "ede++", "fda++")},
    TORCHAO: ("bc", {}),
    f"{BEST} without distillation": (BEST, {"distillation_weight": 0.0}),
    f"{BEST} hard from the start": (BEST, {"hard_fraction": 1.0}),
}
COLUMNS = {"W1A32": "w1a32", "W1A8": "w1a8", "W1A4": "w1a4", "W1A1": "w1a1"}
# At most that many points lost, by the packed models of BEST.
GOALS = {
    ("digits-16", "W1A32"): 2.5,
    ("digits-32", "W1A32"): 0.8,
    ("digits-32", "W1A8"): 1.0,
    ("digits-32", "W1A4"): 1.5,
    ("digits-32", "W1A1"): 2.5,
    ("digits-64", "W1A32"): 0.0,
    ("digits-64", "W1A1"): 1.0,
    ("solar", "W1A32"): 0.0,
    ("solar", "W1A8"): 0.5,
    ("solar", "W1A4"): 2.0,
    ("solar", "W1A1"): 5.0,
}


@dataclass(frozen=True)
class Run:
    """One training: what, and on which part of the data."""

    task: str
    method: str
    column: str
    fold: int
    seed: int


class TorchaoTrainer(DistillationTrainer):
    """Float layers, whose weights the optimizer of torchao quantizes: hard from nine tenths of the steps on."""

    def __init__(self, *, layers: list[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.layers = layers

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        base = super().create_optimizer(model)
        latents = [self.model.get_parameter(f"{name}.weight") for name in self.layers]
        moved = {id(latent) for latent in latents}
        for group in base.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in moved]
        base.add_param_group({"params": latents, "weight_decay": 0.0, "quant_bits": 1})
        soft = ProxPARQ(anneal_start=0, anneal_end=int(0.9 * self.state.max_steps), steepness=10)
        self.optimizer = QuantOptimizer(base, LSBQuantizer(), soft, quant_period=1, quant_per_channel=True)
        return self.optimizer


class Images(Dataset):
    """Pictures and labels in memory, handed out by the batch."""

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}

    __getitems__ = __getitem__


def digits(fold: int) -> tuple[Dataset, Dataset]:
    """To train with, and to test with: `[n, 1, 8, 8]` from -1 to 1, and labels."""
    data = load_digits()
    x = torch.from_numpy(data.images.astype(np.float32))[:, None] / 8 - 1
    y = torch.from_numpy(data.target)
    train, test = solar.split(data.target, fold)
    return Images(x[train], y[train]), Images(x[test], y[test])


def digits_model(width: int) -> nn.Module:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 3, "num_attention_heads": 4}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **sizes))


@cache
def all_cells() -> tuple[np.ndarray, Any]:
    """Labels, and the photographs as the model sees them."""
    images, labels = solar.load_cells(uncertain=False, limit=None)
    return labels, solar.make_dataset(images, labels, solar.make_model(None)[1])


def cells(fold: int) -> tuple[Dataset, Dataset]:
    """To train with, turned and mirrored at random, and to test with: `[n, 3, 96, 96]`, and labels."""
    labels, pictures = all_cells()
    train, test = solar.split(labels, fold)
    return pictures.select(train).with_transform(solar.augment), pictures.select(test).with_transform(solar.as_pixels)


def cells_model() -> nn.Module:
    return solar.make_model(None)[0]


@dataclass(frozen=True)
class Task:
    """What is learned, by what, and for how long."""

    title: str
    pictures: Callable[[int], tuple[Dataset, Dataset]]
    model: Callable[[], nn.Module]
    float_epochs: int
    epochs: int
    batch: int
    rate: float


TASKS = {
    **{
        f"digits-{width}": Task(f"Digits, width {width}", digits, partial(digits_model, width), 250, 80, 128, 3e-3)
        for width in (16, 32, 64)
    },
    "solar": Task("Solar cells", cells, cells_model, solar.FLOAT_EPOCHS, solar.BINARY_EPOCHS, solar.BATCH, 1e-3),
}


def collate(batch: Any) -> dict[str, Tensor]:
    """A batch, of pictures one by one or all at once."""
    return batch if isinstance(batch, dict) else default_data_collator(batch)


def train(task: Task, model: nn.Module, pictures: Dataset, epochs: int, seed: int, **more: Any) -> nn.Module:
    """The same for every row: AdamW, a warm-up and a cosine."""
    recipe = more.pop("recipe", None)
    kinds = (proxbit.ProxConnectTrainer, proxbit.ProxConnectArguments) if recipe else ()
    trainer, arguments = kinds or (DistillationTrainer, DistillationArguments)
    given = {"teacher": more.pop("teacher", None)}
    if "layers" in more:
        trainer, given["layers"] = TorchaoTrainer, more.pop("layers")
    with TemporaryDirectory() as folder:
        settings = arguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=task.batch,
            learning_rate=task.rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            weight_decay=0.05,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            **({"recipe": recipe} if recipe else {}),
            **more,
        )
        made = trainer(model=model, args=settings, train_dataset=pictures, data_collator=collate, **given)
        made.train()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, pictures: Dataset) -> float:
    model.eval()
    batches = DataLoader(pictures, 128, collate_fn=collate)
    right = [model(batch["pixel_values"]).logits.argmax(1) == batch["labels"] for batch in batches]
    return float(torch.cat(right).double().mean())


def start_file(what: Run, cache: Path) -> Path:
    """Where the float model is that a run begins at."""
    return cache / f"{what.task}-{what.fold}-{what.seed}.safetensors"


def start_of(what: Run, cache: Path) -> str | None:
    """A digest of the float model that a run begins at; None where it is not in the cache."""
    path = start_file(what, cache)
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.exists() else None


def float_model(what: Run, cache: Path) -> nn.Module:
    """The float start, trained once."""
    path, task = start_file(what, cache), TASKS[what.task]
    set_seed(what.seed)
    model = task.model()
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    train(task, model, task.pictures(what.fold)[0], task.float_epochs, what.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, part)
    part.rename(path)
    return model


@lru_cache(maxsize=1)
def answers(start: str) -> dict[str, ModelOutput]:
    """What the float model with that digest answered, by a digest of the pictures."""
    return {}


def asked_once(teacher: nn.Module, start: str) -> nn.Module:
    """The teacher, which is asked once for each batch: the runs of a fold and seed see the very same ones."""
    ask, known = teacher.forward, answers(start)

    def forward(pixel_values: Tensor) -> ModelOutput:
        key = hashlib.sha256(pixel_values.contiguous().numpy()).hexdigest()
        if key not in known:
            known[key] = ask(pixel_values)
        return known[key]

    teacher.forward = forward
    return teacher


def run(what: Run, cache: Path) -> dict[str, Any]:
    """Train one model, and measure it as it ships."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    task, seed = TASKS[what.task], what.seed + 1000
    teacher = float_model(what, cache)
    pictures, test = task.pictures(what.fold)
    result: dict[str, Any] = asdict(what) | {"start": start_of(what, cache)}
    set_seed(seed)
    model = task.model()
    model.load_state_dict(teacher.state_dict())
    teacher = asked_once(teacher, result["start"])
    if what.method == LONGER:
        train(task, model, pictures, task.epochs, seed, teacher=teacher)
    elif what.method == SIGN:
        recipe = proxbit.get_recipe(COLUMNS[what.column])
        # A residual around a layer that was not trained with one would only destroy it.
        proxbit.binarize(model, recipe.binarization(weights="bc", residual=False, rprelu=False))
        proxbit.pack(proxbit.calibrate(model, DataLoader(pictures, task.batch, collate_fn=collate), weights=False))
    elif what.method != FLOAT:
        recipe = COLUMNS[what.column]
        weights, changes = METHODS[what.method]
        config = proxbit.get_recipe(recipe).binarization(weights=weights)
        if what.method == TORCHAO:
            layers = list(proxbit.binarize(copy.deepcopy(model), config).binarization_report.converted)
            train(task, model, pictures, task.epochs, seed, teacher=teacher, layers=layers)
            proxbit.binarize(model, config)
        else:
            proxbit.binarize(model, config)
            train(task, model, pictures, task.epochs, seed, recipe=recipe, teacher=teacher, **changes)
            with proxbit.soft_evaluation(model):
                result["soft"] = accuracy(model, test)
        proxbit.pack(model)
    return result | {"accuracy": accuracy(model, test)}


def wanted(options: argparse.Namespace) -> Iterator[Run]:
    """Fold by fold, the float start first: everything else begins there."""
    for task in options.tasks:
        for seed in range(options.seeds):
            for fold in options.folds:
                yield Run(task, FLOAT, NONE, fold, seed)
    for seed in range(options.seeds):
        for fold in options.folds:
            for task in options.tasks:
                yield Run(task, LONGER, NONE, fold, seed)
                for column in options.columns:
                    for method in (SIGN, *options.methods):
                        if method == TORCHAO and column != "W1A32":
                            continue
                        yield Run(task, method, column, fold, seed)


def known(path: Path) -> dict[Run, dict[str, Any]]:
    """The runs that are finished."""
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines]
    return {Run(*(row[name] for name in Run.__dataclass_fields__)): row for row in found}


def missing(options: argparse.Namespace, path: Path) -> list[Run]:
    """Runs that are not finished, or began at another float model than the one that is in the cache now."""
    done, starts = known(path), cache(partial(start_of, cache=options.cache))
    found = []
    for each in wanted(options):
        start = starts(replace(each, method=FLOAT, column=NONE))
        if each not in done or start not in (None, done[each]["start"]):
            found.append(each)
    return found


def points(values: list[float]) -> str:
    """Mean and standard error, in points."""
    values = [100 * value for value in values]
    mean = round(statistics.mean(values), 1) + 0.0  # of -0.0 makes 0.0
    if len(values) < 2:
        return f"{mean:.1f}"
    return f"{mean:.1f} ± {statistics.stdev(values) / len(values) ** 0.5:.1f}"


# By fold, seed and float start.
ByStart = dict[tuple[int, int, str], float]
Accuracies = dict[tuple[str, str], ByStart]


def by_row(results: dict[Run, dict[str, Any]], task: str, value: str = "accuracy") -> Accuracies:
    """Of a task: by method and column, the accuracies. What has no column is in all of them."""
    found: Accuracies = {}
    for each, row in results.items():
        for column in COLUMNS if each.column == NONE else (each.column,):
            if each.task == task and value in row:
                found.setdefault((each.method, column), {})[each.fold, each.seed, row["start"]] = row[value]
    return found


def differences(left: ByStart, right: ByStart) -> list[float]:
    """Left less right, where both have the fold, the seed and the start."""
    return [value - right[key] for key, value in left.items() if key in right]


def lost(found: Accuracies, method: str, column: str) -> str:
    """Accuracy, and points lost against float training of the same length."""
    here, base = found.get((method, column), {}), found.get((LONGER, column), {})
    shared = [accuracy for key, accuracy in here.items() if key in base]
    return f"{points(shared)} ({points(differences(base, here))}; {len(shared)})" if shared else ""


def ahead(found: Accuracies, method: str, column: str) -> str:
    """Points of accuracy more than BEST."""
    gap = differences(found.get((method, column), {}), found.get((BEST, column), {}))
    return f"{points(gap)} ({len(gap)})" if gap and method != BEST else ""


def hardening(found: Accuracies, soft: Accuracies, method: str, column: str) -> str:
    """Points of accuracy that the packed model has less than the soft one."""
    cost = differences(soft.get((method, column), {}), found.get((method, column), {}))
    return f"{points(cost)} ({len(cost)})" if cost else ""


def tables(results: dict[Run, dict[str, Any]]) -> list[str]:
    """Of every task, a table of each of the above."""
    lines: list[str] = []
    for key, task in TASKS.items():
        found, soft = by_row(results, key), by_row(results, key, "soft")
        # Pairs that are hard all along have nothing to tell of hardening.
        softened = [method for method in METHODS if any(found[row] != soft[row] for row in soft if row[0] == method)]
        columns = [c for c in COLUMNS if any(e.column == c and e.task == key for e in results)]
        for title, methods, text in (
            (f"## {task.title}", [FLOAT, LONGER, SIGN, *METHODS], partial(lost, found)),
            (f"Points of accuracy more than `{BEST}`, paired:", METHODS, partial(ahead, found)),
            (
                "Points that the model as it trained, with soft F, has more than as it ships, paired:",
                softened,
                partial(hardening, found, soft),
            ),
        ):
            rows = [[f"`{m}`" if m in METHODS else m, *(text(m, column) for column in columns)] for m in methods]
            rows = [row for row in rows if any(row[1:])]
            lines += [title, "", *table(["", *columns], rows)] if rows else []
    return lines


def goal_lines(results: dict[Run, dict[str, Any]]) -> list[str]:
    """What BEST was to lose at most, and what it lost."""
    rows = []
    for (key, column), limit in GOALS.items():
        found = by_row(results, key)
        gap = differences(found.get((LONGER, column), {}), found.get((BEST, column), {}))
        if gap:
            verdict = "met" if round(100 * statistics.mean(gap), 2) <= limit else "**missed**"
            rows.append([f"{TASKS[key].title}, {column}", f"{limit:.1f}", f"{points(gap)} ({len(gap)})", verdict])
    title = f"Goals: points that `{BEST}` loses at most against float training of the same length."
    return [title, "", *table(["", "at most", "lost", ""], rows)] if rows else []


def write(results: dict[Run, dict[str, Any]]) -> str:
    lines = [
        f"`python benchmarks/accuracy.py`. Runs are of several machines; the last: {environment()}.",
        "",
        "Accuracy of the packed model in %, mean ± standard error; in brackets the points lost against float training "
        "of the same length, paired by fold, seed and float start, and the number of pairs.",
        "",
        *goal_lines(results),
        *tables(results),
    ]
    text = "\n".join(lines) + "\n"
    (FOLDER / "accuracy.md").write_text(text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--columns", nargs="+", default=list(COLUMNS), choices=list(COLUMNS))
    parser.add_argument("--folds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes, of one thread each")
    parser.add_argument("--cache", type=Path, default=Path("runs/accuracy"), help="folder for the float models")
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / "runs.jsonl"
    todo = missing(options, path)
    print(f"{len(known(path))} runs are finished, {len(todo)} to go", flush=True)
    # The float starts before what begins with them, so that no two processes train the same one.
    starts = {replace(each, method=FLOAT, column=NONE) for each in todo if start_of(each, options.cache) is None}
    work(sorted(starts, key=str), options, path)
    work(missing(options, path), options, path)
    print(write(known(path)))


def work(runs: list[Run], options: argparse.Namespace, path: Path) -> None:
    """Do the runs, and note each as it ends."""
    with ProcessPoolExecutor(options.jobs, mp_context=torch.multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(run, each, options.cache): each for each in runs}
        for future in as_completed(futures):
            row = future.result()
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print({**row, "accuracy": round(row["accuracy"], 4)}, flush=True)


if __name__ == "__main__":
    main()
