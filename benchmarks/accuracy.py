"""What binarization costs in accuracy: `python benchmarks/accuracy.py`.

Handwritten digits (1,797 pictures of 8 x 8, scikit-learn) and a ViT of depth 3 with patches of 2 x 2, at widths that
are narrow enough to tell methods apart. Every row has the same folds and the same budget: a float model of 250 epochs,
from which 80 epochs of ProxConnect++ with distillation start, or, for the control row, 80 more of float training.
Post-training sign is the float model with its weights replaced, without training. Accuracies are those of the packed
model, by 5-fold cross-validation.

Finished runs are kept in benchmarks/accuracy/runs.jsonl: the script goes on where it stopped, and does what is missing
for the widths, methods, columns, folds and seeds that it is asked for.
"""

import argparse
import json
import os
import statistics
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import table
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, set_seed

import proxbit
from proxbit.analysis.environment import environment
from proxbit.nn import binary_activations, latent_layers
from proxbit.quantizers import MuSchedule
from proxbit.training import distillation_loss

FOLDER = Path(__file__).parent / "accuracy"
FLOAT_EPOCHS, EPOCHS, BATCH, RATE, HARD = 250, 80, 128, 3e-3, 0.1
FLOAT, LONGER, SIGN = "float", "float, as long", "post-training sign"
METHODS = ("bc", "bnn", "bnn+", "bnn++", "parq", "bireal++", "ede++", "fda++")
COLUMNS: dict[str, dict[str, Any]] = {
    "W1A32": {},
    "W1A8": {"activations": "int8"},
    "W1A4": {"activations": "int4"},
    "W1A1": {"activations": "sign", "residual": True},
}


@dataclass(frozen=True)
class Run:
    """One training: what, and on which part of the data."""

    width: int
    method: str
    column: str
    fold: int
    seed: int


def digits(fold: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pictures `[n, 1, 8, 8]` and labels to train with, then those to test with."""
    data = load_digits()
    x = torch.from_numpy(data.images.astype(np.float32))[:, None] / 8 - 1
    y = torch.from_numpy(data.target)
    train, test = list(StratifiedKFold(5, shuffle=True, random_state=0).split(x, y))[fold]
    return x[train], y[train], x[test], y[test]


def make_model(width: int) -> ViTForImageClassification:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 3, "num_attention_heads": 4}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **sizes))


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weights of float layers decay; latents, norms, biases and what activation quantizers learn do not."""
    latents = {id(layer.weight) for _, layer in latent_layers(model)}
    decaying = [p for n, p in model.named_parameters() if p.dim() > 1 and id(p) not in latents]
    kept = {id(p) for p in decaying}
    rest = [p for p in model.parameters() if id(p) not in kept]
    return [{"params": decaying, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int, seed: int, target: Tensor | None = None) -> None:
    """AdamW with a cosine and a warm-up; `target` are the logits of the teacher."""
    set_seed(seed)
    model.train()
    per_epoch = -(-len(x) // BATCH)
    steps = epochs * per_epoch
    optimizer = torch.optim.AdamW(groups(model), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=steps, pct_start=0.05, anneal_strategy="cos", cycle_momentum=False
    )
    layers = [layer for _, layer in latent_layers(model)]
    weights = MuSchedule(*layers[0].pair.schedule, steps=steps, hard_fraction=HARD) if layers else None
    activations = [
        (each, MuSchedule(*each.pair.schedule, steps=steps, hard_fraction=HARD))
        for _, each in binary_activations(model)
    ]
    step = 0
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(BATCH):
            if weights is not None:
                proxbit.set_mu(model, weights.mu(step), hard=weights.is_hard(step))
            for each, own in activations:
                each.mu.fill_(own.mu(step))
            logits = model(x[index]).logits
            loss = nn.functional.cross_entropy(logits, y[index])
            if target is not None:
                loss = (loss + distillation_loss(logits, target[index], 2.0)) / 2
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            proxbit.start_update(model)
            optimizer.step()
            schedule.step()
            step += 1


@torch.no_grad()
def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    return model.eval()(x).logits


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((logits_of(model, x).argmax(1) == y).double().mean())


def float_model(width: int, fold: int, seed: int, cache: Path) -> nn.Module:
    """The float start, trained once."""
    path = cache / f"digits-{width}-{fold}-{seed}.safetensors"
    set_seed(seed)
    model = make_model(width)
    if path.exists():
        model.load_state_dict(load_file(path))
        return model
    x, y, _, _ = digits(fold)
    train(model, x, y, FLOAT_EPOCHS, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, part)
    part.rename(path)
    return model


def run(what: Run, cache: Path) -> dict[str, Any]:
    """Train one model, and measure it as it ships."""
    torch.set_num_threads(1)
    model = float_model(what.width, what.fold, what.seed, cache)
    x, y, test_x, test_y = digits(what.fold)
    target = logits_of(model, x)
    result: dict[str, Any] = asdict(what)
    if what.method == LONGER:
        train(model, x, y, EPOCHS, what.seed + 1000, target)
    elif what.method != FLOAT:
        weights = "bc" if what.method == SIGN else what.method
        proxbit.binarize(model, proxbit.BinarizationConfig(weights=weights, **COLUMNS[what.column]))
        proxbit.calibrate(model, list(x.split(BATCH)))
        if what.method != SIGN:
            train(model, x, y, EPOCHS, what.seed + 1000, target)
        with proxbit.soft_evaluation(model):
            result["soft"] = accuracy(model, test_x, test_y)
        proxbit.pack(model)
    return result | {"accuracy": accuracy(model, test_x, test_y)}


def wanted(options: argparse.Namespace) -> Iterator[Run]:
    """In an order that gives whole rows early."""
    for width, seed, fold in product(options.widths, range(options.seeds), options.folds):
        for method in (FLOAT, LONGER):
            yield Run(width, method, "W32A32", fold, seed)
        for column, method in product(options.columns, (SIGN, *options.methods)):
            yield Run(width, method, column, fold, seed)


def known(path: Path) -> dict[Run, dict[str, Any]]:
    """The runs that are finished."""
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines]
    return {Run(*(row[name] for name in Run.__dataclass_fields__)): row for row in found}


def points(values: Iterable[float]) -> str:
    """Mean and standard error, in points."""
    values = [100 * value for value in values]
    if len(values) < 2:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) / len(values) ** 0.5:.1f}"


def tables(results: dict[Run, dict[str, Any]]) -> list[str]:
    """One table a width: accuracy, and points lost against the float model of the same fold, seed and budget."""
    lines: list[str] = []
    for width in sorted({each.width for each in results}):
        here = {each: row["accuracy"] for each, row in results.items() if each.width == width}
        columns = [c for c in COLUMNS if any(each.column == c for each in here)]
        methods = dict.fromkeys(each.method for each in here)
        rows = []
        for method in (m for m in (FLOAT, LONGER, SIGN, *METHODS) if m in methods):
            cells = []
            for column in columns:
                found = {
                    (e.fold, e.seed): v
                    for e, v in here.items()
                    if e.method == method and e.column in (column, "W32A32")
                }
                base = {(e.fold, e.seed): v for e, v in here.items() if e.method == LONGER}
                pairs = [(value, base[key]) for key, value in found.items() if key in base]
                if not pairs:
                    cells.append("")
                    continue
                lost = points(b - value for value, b in pairs)
                cells.append(f"{points(value for value, _ in pairs)} ({lost}; {len(pairs)})")
            rows.append([f"`{method}`" if method in METHODS else method, *cells])
        lines += [f"## Width {width}", "", *table(["", *columns], rows)]
    return lines


def write(results: dict[Run, dict[str, Any]]) -> str:
    lines = [
        f"`python benchmarks/accuracy.py`. {environment()}.",
        "",
        "Accuracy of the packed model in %, mean ± standard error; in brackets the points lost against float training "
        "of the same length, paired by fold and seed, and the number of pairs.",
        "",
        *tables(results),
    ]
    text = "\n".join(lines) + "\n"
    (FOLDER / "digits.md").write_text(text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--columns", nargs="+", default=list(COLUMNS), choices=list(COLUMNS))
    parser.add_argument("--folds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes, of one thread each")
    parser.add_argument("--cache", type=Path, default=Path("runs/accuracy"), help="folder for the float models")
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / "runs.jsonl"
    done = known(path)
    missing = [each for each in wanted(options) if each not in done]
    print(f"{len(done)} runs are finished, {len(missing)} to go", flush=True)
    with ProcessPoolExecutor(options.jobs, mp_context=torch.multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(run, each, options.cache): each for each in missing}
        for future in as_completed(futures):
            row = future.result()
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print({**row, "accuracy": round(row["accuracy"], 4)}, flush=True)
    print(write(known(path)))


if __name__ == "__main__":
    main()
