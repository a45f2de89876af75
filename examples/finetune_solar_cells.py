# /// script
# requires-python = ">=3.11"
# dependencies = ["proxbit[examples]"]
# ///
"""Find defects in photographs of solar cells with a 1-bit vision transformer.

    python examples/finetune_solar_cells.py                    # one split, 6 to 8 minutes on 2 CPU cores
    python examples/finetune_solar_cells.py --folds 5          # cross-validation over all pictures
    python examples/finetune_solar_cells.py --recipe w1a8      # int8 activations too; others: proxbit recipes
    python examples/finetune_solar_cells.py --model google/vit-base-patch16-224     # start from a pretrained model

Trains a float vision transformer, makes it latent, trains it with ProxConnect++ and distillation from the float model,
packs it, saves it, reloads it in a new process, and prints one table. The pictures are those of the package
elpv-dataset (2,624 electroluminescence images of solar cells, CC BY-NC-SA 4.0): defective is a defect probability of 1,
functional is 0. model_cards/solar-cells-pvtv2-1bit.md is the model card that the first of these commands writes.
"""

import argparse
import copy
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, median, stdev

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Value, load_from_disk
from elpv_dataset.utils import load_dataset
from rich.console import Console
from rich.table import Table
from sklearn.model_selection import StratifiedKFold
from torch.utils.data import DataLoader
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PvtV2Config,
    PvtV2ForImageClassification,
    ViTImageProcessorPil,
    set_seed,
)

import proxbit
from proxbit.analysis.latency import measure_latency
from proxbit.analysis.plots import plot_training
from proxbit.errors import ProxbitError
from proxbit.training import DistillationArguments, DistillationTrainer
from proxbit.training.metrics import classification_metrics

LABELS = ["functional", "defective"]
FLOAT_EPOCHS, BINARY_EPOCHS, BATCH = 20, 16, 64
SOFT, HARD = "latent, soft (simulated)", "latent, hard (simulated)"


def load_cells(uncertain: bool, limit: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Grey pictures `[n, 300, 300]` uint8, and labels: 1 is defective."""
    images, probability, _ = load_dataset()
    keep = np.ones(len(images), bool) if uncertain else (probability < 0.1) | (probability > 0.9)
    images, labels = images[keep], (probability[keep] > 0.5).astype(np.int64)
    chosen = np.random.default_rng(0).permutation(len(images))[:limit]
    return images[chosen], labels[chosen]


def make_dataset(images: np.ndarray, labels: np.ndarray, processor) -> Dataset:
    """A `datasets.Dataset` of pictures as the model's own processor makes them, kept as float32 bytes."""
    pixels = [np.asarray(processor(np.stack([image] * 3, axis=-1))["pixel_values"][0], np.float32) for image in images]
    features = Features({"pixels": Value("binary"), "labels": ClassLabel(names=LABELS)})
    return Dataset.from_dict({"pixels": [p.tobytes() for p in pixels], "labels": labels}, features=features)


def as_pixels(batch: dict) -> dict:
    """Bytes to `[3, side, side]` tensors."""
    pixels = [torch.frombuffer(bytearray(row), dtype=torch.float32) for row in batch["pixels"]]
    side = round((len(pixels[0]) / 3) ** 0.5)
    return {"pixel_values": [p.view(3, side, side) for p in pixels], "labels": batch["labels"]}


def augment(batch: dict) -> dict:
    """Flips, quarter turns, and a jitter of contrast and brightness: a cell has no up and no fixed exposure."""
    batch = as_pixels(batch)
    for i, pixels in enumerate(batch["pixel_values"]):
        pixels = torch.rot90(pixels, int(torch.randint(4, ())), dims=(1, 2))
        if torch.rand(()) < 0.5:
            pixels = pixels.flip(2)
        contrast, brightness = 1 + 0.2 * (2 * torch.rand(2) - 1)
        batch["pixel_values"][i] = pixels * contrast + (brightness - 1)
    return batch


def make_model(name: str | None) -> tuple[torch.nn.Module, object]:
    """A small pyramid transformer (PVTv2) with random weights, or a pretrained model; and its image processor."""
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}
    if name is not None:
        processor = AutoImageProcessor.from_pretrained(name)
        return AutoModelForImageClassification.from_pretrained(name, ignore_mismatched_sizes=True, **names), processor
    sizes = {"hidden_sizes": [16, 32, 80, 128], "depths": [1, 1, 2, 1], "num_attention_heads": [1, 2, 5, 4]}
    model = PvtV2ForImageClassification(PvtV2Config(image_size=96, **sizes, **names))
    return model, ViTImageProcessorPil(size={"height": 96, "width": 96})


def arguments(kind, folder: Path, epochs: int, seed: int, smoke: bool, **more):
    """The training arguments that all runs share."""
    return kind(
        str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=128,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0 if smoke else 30,
        weight_decay=0.05,
        logging_steps=1 if smoke else 14,
        save_strategy="no",
        report_to="none",
        seed=seed,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        **more,
    )


@torch.no_grad()
def measure(model: torch.nn.Module, test: Dataset) -> dict:
    """Logits for all test pictures, and milliseconds for one picture (median of 20)."""
    pixels = torch.stack(test[:]["pixel_values"])
    logits = torch.cat([model(pixel_values=part).logits for part in pixels.split(128)])
    times = []
    for i in range(25):
        start = time.perf_counter()
        model(pixel_values=pixels[i % len(pixels)][None])
        times.append(1000 * (time.perf_counter() - start))
    return {"logits": logits.tolist(), "ms": median(times[5:])}


def row(measured: dict, labels: list[int], folder: Path | None) -> dict:
    """One line of the table."""
    prediction = type("Prediction", (), {"predictions": np.array(measured["logits"]), "label_ids": np.array(labels)})
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder else None
    return {**classification_metrics(prediction), "bytes": size, "ms": measured["ms"], "logits": measured["logits"]}


def save(model, processor, folder: Path) -> Path:
    """Save model and processor, as a checkpoint that pipelines can load."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def run(options: argparse.Namespace, fold: int, seed: int, out: Path, images: np.ndarray, labels: np.ndarray) -> dict:
    """One split with one seed: all rows of the table."""
    set_seed(seed)
    model, processor = make_model(options.model)
    train_index, test_index = split(labels, fold)
    train = make_dataset(images[train_index], labels[train_index], processor).with_transform(augment)
    test = make_dataset(images[test_index], labels[test_index], processor).with_transform(as_pixels)
    truth = labels[test_index].tolist()
    common = {"train_dataset": train, "eval_dataset": test, "compute_metrics": classification_metrics}
    float_epochs, binary_epochs = (1, 1) if options.smoke else (FLOAT_EPOCHS, BINARY_EPOCHS)
    rows = {}

    args = arguments(DistillationArguments, out / "float", float_epochs, seed, options.smoke)
    DistillationTrainer(model=model, args=args, **common).train()
    teacher = copy.deepcopy(model).eval()
    rows[f"float, {float_epochs} epochs"] = row(measure(teacher, test), truth, save(teacher, processor, out / "float"))

    control = copy.deepcopy(model)
    args = arguments(DistillationArguments, out / "float-longer", binary_epochs, seed, options.smoke)
    DistillationTrainer(model=control, args=args, teacher=teacher, **common).train()
    folder = save(control.eval(), processor, out / "float-longer")
    rows[f"float, {float_epochs + binary_epochs} epochs"] = row(measure(control, test), truth, folder)

    signs = proxbit.get_recipe(options.recipe).binarization(residual=False, rprelu=False)
    untrained = proxbit.binarize(copy.deepcopy(control), signs)
    proxbit.pack(proxbit.calibrate(untrained, DataLoader(train, BATCH), weights=False))
    rows["post-training sign, packed"] = row(measure(untrained.eval(), test), truth, None)
    fitted = proxbit.calibrate(proxbit.binarize(copy.deepcopy(control), signs), train)
    rows["fitted without labels, packed"] = row(measure(proxbit.pack(fitted).eval(), test), truth, None)

    proxbit.binarize(model, configuration(options))
    extra = {"eval_strategy": "epoch", "recipe": options.recipe}
    args = arguments(proxbit.ProxConnectArguments, out / "latent", binary_epochs, seed, options.smoke, **extra)
    trainer = proxbit.ProxConnectTrainer(model=model, args=args, teacher=teacher, **common)
    trainer.train()
    plot_training(trainer.state.log_history, out / "training.png")
    folder = save(model.eval(), processor, out / "latent")
    with proxbit.soft_evaluation(model):
        rows[SOFT] = row(measure(model, test), truth, folder)
    rows[HARD] = row(measure(model, test), truth, folder)

    shown = {"float": f"float, {float_epochs} epochs", "soft": SOFT, "hard": HARD}
    packed = row(measure(proxbit.pack(model), test), truth, None)
    measured = {variant: rows[name] for variant, name in shown.items()} | {"packed": packed}
    run_facts = trainer.run_record() | facts_of(options, fold, model, measured)
    folder = proxbit.write_release(model, out / run_facts["model_id"], processing_class=processor, run=run_facts)
    test.with_format(None).save_to_disk(out / "test")
    command = [sys.executable, __file__, "--evaluate", str(folder)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    rows["packed, reloaded"] = row(json.loads(output.splitlines()[-1]), truth, folder)
    difference = np.abs(np.subtract(rows["packed, reloaded"]["logits"], rows[HARD]["logits"]))
    if difference.max() > 1e-4:
        raise SystemExit(f"The reloaded model differs from the trained one: logits by {difference.max():.2g}.")
    return rows


def facts_of(options: argparse.Namespace, fold: int, model: torch.nn.Module, measured: dict[str, dict]) -> dict:
    """What the Trainer does not know, for the cards; `measured` has a row for each variant of the model."""
    return {
        "model_id": f"solar-cells-{model.config.model_type.replace('_', '')}-1bit",
        "dataset": "elpv-dataset, photographs of solar cells" + ("" if options.uncertain else ", certain labels"),
        "split": f"fold {fold} of 5",
        "teacher": f"itself in float, after {1 if options.smoke else FLOAT_EPOCHS} epochs",
        "metrics": {one: {name: measured[one][name] for name in ("accuracy", "balanced_accuracy")} for one in measured},
        "latency": measure_latency(model),
    }


def split(labels: np.ndarray, fold: int) -> tuple[np.ndarray, np.ndarray]:
    """Stratified, always the same: four fifths to train, one fifth to test."""
    return list(StratifiedKFold(5, shuffle=True, random_state=0).split(labels, labels))[fold]


def evaluate_reloaded(folder: Path) -> None:
    """What the new process does: load the packed model with `from_pretrained`, and print its logits as JSON."""
    test = load_from_disk(folder.parent / "test").with_transform(as_pixels)
    print(json.dumps(measure(AutoModelForImageClassification.from_pretrained(folder), test)))


def configuration(options: argparse.Namespace) -> proxbit.BinarizationConfig:
    """What the recipe binarizes and how, with the pair that was asked for."""
    config = proxbit.get_recipe(options.recipe).binarization()
    return config if options.weights is None else config.replace(weights=options.weights)


def check(options: argparse.Namespace) -> str | None:
    """What is wrong with the command line, before hours of training are spent."""
    if options.evaluate and not (options.evaluate / "config.json").is_file():
        return f"--evaluate: {options.evaluate} holds no model of an earlier run"
    if options.seeds < 1:
        return f"--seeds must be at least 1, not {options.seeds}"
    try:
        binary = configuration(options).quantizer_pair().binary
    except ProxbitError as error:
        return str(error)
    return None if binary else f"--weights: the levels of {options.weights} are not -1 and +1, so it cannot be packed"


def show(runs: list[dict]) -> None:
    """The table, with mean and spread where there is more than one run."""

    def points(rows: list[dict], key: str) -> str:
        values = [100 * r[key] for r in rows]
        return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")

    table = Table(title=f"Solar cells, {len(runs)} run{'s' if len(runs) > 1 else ''} (mean ± standard deviation)")
    table.add_column("model")
    for column in ("accuracy %", "balanced %", "bytes on disk", "ms / image"):
        table.add_column(column, justify="right")
    for name in runs[0]:
        rows = [one[name] for one in runs]
        size = f"{rows[0]['bytes']:,}" if rows[0]["bytes"] else ""
        speed = f"{median(r['ms'] for r in rows):.2f}"
        table.add_row(name, points(rows, "accuracy"), points(rows, "balanced_accuracy"), size, speed)
    Console(width=100).print(table)
    same = all(
        np.array_equal(np.argmax(one[a]["logits"], 1), np.argmax(one[b]["logits"], 1))
        for one in runs
        for a, b in [("packed, reloaded", HARD)]
    )
    print(f"Predictions of the reloaded packed model and of the trained one: {'the same' if same else 'DIFFERENT'}.")


def main() -> None:
    """Read the command line, run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a pretrained model to start from, a path or a Hub id (default: from scratch)")
    parser.add_argument("--recipe", default="w1a32", help="what is binarized and how it is trained (default: w1a32)")
    parser.add_argument("--weights", help="the quantizer pair, in the place of the recipe's")
    parser.add_argument("--uncertain", action="store_true", help="keep the two uncertain levels of defect probability")
    parser.add_argument("--folds", type=int, default=1, choices=range(1, 6), help="splits of the cross-validation")
    parser.add_argument("--seeds", type=int, default=1, help="repetitions of each split")
    parser.add_argument("--smoke", action="store_true", help="one epoch on few pictures: does it run?")
    parser.add_argument("--out", type=Path, default=Path("runs/solar-cells"), help="folder for models and pictures")
    parser.add_argument("--evaluate", type=Path, help="evaluate a packed model of an earlier run, and print JSON")
    options = parser.parse_args()
    if wrong := check(options):
        parser.error(wrong)
    if options.evaluate:
        return evaluate_reloaded(options.evaluate)
    options.out.mkdir(parents=True, exist_ok=True)
    images, labels = load_cells(options.uncertain, 160 if options.smoke else None)
    print(f"{len(images)} pictures, {labels.mean():.0%} defective", flush=True)
    runs = []
    for seed in range(options.seeds):
        for fold in range(options.folds):
            out = options.out / f"fold{fold}-seed{seed}"
            runs.append(run(options, fold, seed, out, images, labels))
            results = [{name: {**r, "logits": None} for name, r in one.items()} for one in runs]
            (options.out / "results.json").write_text(json.dumps(results, indent=1))
            if len(runs) < options.seeds * options.folds:
                show(runs)
    show(runs)
    print(f"Models, curves (training.png) and results.json are in {options.out}")


if __name__ == "__main__":
    main()
