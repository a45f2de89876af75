"""Whether it lasts: `python trials/stress.py` runs all parts, `python trials/stress.py threads` one of them.

training: a tiny model takes 200,000 steps in ProxConnectTrainer, with logs and checkpoints. Resident memory, open files
    and threads of the process are read all along.
threads: eight threads run four packed models at once for five minutes. Every output must be that of one thread.
loaders: data loaders with two processes each, forked and spawned, feed ProxConnectTrainer. Every loss must be the one
    without them.

Each part writes its numbers into `results/stress.json`, and the page is made from what is there.
"""

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from pages import RESULTS, finish, table
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainerCallback

import proxbit
from proxbit.analysis.environment import Environment, environment
from proxbit.training import ProxConnectArguments, ProxConnectTrainer

LABELS = 3
SIDE = 8
SIZES = {"image_size": SIDE, "patch_size": 4, "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
ROWS = 10
THREADS = 8


class Images(Dataset):
    """Random pictures, each made from its number when it is asked for, as a data set that reads files does."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, SIDE, SIDE, generator=generator), "labels": index % LABELS}


@dataclass(frozen=True)
class Reading:
    """What a process takes, after a number of steps: bytes, open files, threads."""

    step: int
    seconds: float
    resident: int
    files: int
    threads: int


class Readings(TrainerCallback):
    """Reads it every so many steps."""

    def __init__(self, every: int) -> None:
        self.every, self.found, self.begin = every, list[Reading](), time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From /proc."""
        if state.global_step % self.every == 0:
            self.found.append(read(state.global_step, time.perf_counter() - self.begin))


def read(step: int, seconds: float) -> Reading:
    """What this process takes now."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    files, threads = (len(os.listdir(f"/proc/self/{name}")) for name in ("fd", "task"))
    return Reading(step, seconds, resident, files, threads)


class Small(nn.Module):
    """One layer of 1-bit weights between two of floats: the least that a step can be."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings, self.middle = nn.Linear(3 * SIDE * SIDE, 12), nn.Linear(12, 12)
        self.classifier = nn.Linear(12, LABELS)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Loss and logits, as models of transformers return them."""
        logits = self.classifier(torch.relu(self.middle(self.embeddings(pixel_values.flatten(1)))))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def make_vit() -> nn.Module:
    """A ViT of one layer."""
    return hf.ViTForImageClassification(hf.ViTConfig(**SIZES, intermediate_size=20, num_labels=LABELS))


def make_trainer(
    folder: Path, steps: int, make: Callable[[], nn.Module], *callbacks: TrainerCallback, **changes: Any
) -> ProxConnectTrainer:
    """With the same weights and pictures each time."""
    torch.manual_seed(0)
    args = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "per_device_train_batch_size": 4}
    return ProxConnectTrainer(
        model=proxbit.binarize(make()),
        args=ProxConnectArguments(str(folder), max_steps=steps, **args | changes),
        train_dataset=Images(),
        callbacks=[*callbacks],
    )


def long_training(folder: Path, steps: int, make: Callable[[], nn.Module] = Small) -> list[Reading]:
    """Train for many steps; readings at equal distances."""
    every = max(1, steps // 100)
    readings = Readings(every)
    changes = {"logging_steps": every, "save_steps": max(1, steps // 20), "save_total_limit": 2}
    trainer = make_trainer(folder, steps, make, readings, **changes)
    trainer.train()
    return readings.found


def packed_models() -> dict[str, tuple[nn.Module, list[Tensor]]]:
    """Four packed models with weights of every kind of activation, and pictures for each."""
    torch.manual_seed(0)
    sizes = SIZES | {"image_size": 32, "patch_size": 8, "hidden_size": 36, "intermediate_size": 50}
    windows = {"image_size": 32, "patch_size": 4, "embed_dim": 12, "depths": [1, 1], "num_heads": [2, 2]}
    made = {
        "ViT, w1a32": (hf.ViTForImageClassification(hf.ViTConfig(**sizes)), "w1a32"),
        "DeiT, w1a8": (hf.DeiTForImageClassification(hf.DeiTConfig(**sizes)), "w1a8"),
        "BEiT, w1a1": (hf.BeitForImageClassification(hf.BeitConfig(**sizes)), "w1a1"),
        "Swin, w1a4": (hf.SwinForImageClassification(hf.SwinConfig(**windows, window_size=4)), "w1a4"),
    }
    found = {}
    for name, (model, recipe) in made.items():
        latent = proxbit.binarize(model, proxbit.get_recipe(recipe).binarization())
        proxbit.calibrate(latent, [torch.randn(4, 3, 32, 32)], weights=False)
        pictures = [torch.randn(batch, 3, 32, 32) for batch in (1, 2, 3, 5)]
        found[name] = (proxbit.pack(latent).eval(), pictures)
    return found


def threads(seconds: float) -> dict[str, Any]:
    """Run the models in threads; count the forwards, and the outputs that differ from those of one thread."""
    torch.set_num_threads(1)
    models = packed_models()
    with torch.inference_mode():
        alone = {name: [model(each).logits for each in pictures] for name, (model, pictures) in models.items()}
    end = time.perf_counter() + seconds
    forwards, different = [0] * THREADS, [0] * THREADS

    def work(thread: int) -> None:
        order = random.Random(thread)
        with torch.inference_mode():
            while time.perf_counter() < end:
                name = order.choice(list(models))
                model, pictures = models[name]
                number = order.randrange(len(pictures))
                forwards[thread] += 1
                different[thread] += not torch.equal(model(pictures[number]).logits, alone[name][number])

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, range(THREADS)))
    return {"seconds": seconds, "models": list(models), "forwards": sum(forwards), "different": sum(different)}


def loaders(steps: int, processes: int = 2) -> dict[str, Any]:
    """Train with processes that load the data; compare every loss with that of a training without."""
    found = {}
    for context in ("none", "fork", "spawn"):
        workers = {"dataloader_num_workers": processes, "dataloader_multiprocessing_context": context}
        with tempfile.TemporaryDirectory() as folder:
            changes = {"logging_steps": 1, "save_steps": steps} | ({} if context == "none" else workers)
            trainer = make_trainer(Path(folder), steps, make_vit, **changes)
            begin = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - begin
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found[context] = {"steps": steps, "seconds": seconds, "losses": losses}
    return {
        context: {"steps": steps, "seconds": each["seconds"], "same losses": each["losses"] == found["none"]["losses"]}
        for context, each in found.items()
    }


def training(steps: int) -> list[dict[str, Any]]:
    """The readings of a long training."""
    with tempfile.TemporaryDirectory() as folder:
        return [asdict(reading) for reading in long_training(Path(folder), steps)]


def page(data: dict[str, Any], here: Environment) -> list[str]:
    """What was found, in Markdown."""
    lines = ["# Stress", "", f"`python trials/stress.py` on {here.cpu}.", ""]
    if "training" in data:
        lines += _training_lines(data["training"])
    if "threads" in data:
        found = data["threads"]
        lines += [
            "## Threads",
            "",
            f"{THREADS} threads, {found['seconds']:g} s, packed: {'; '.join(found['models'])}.",
            "",
        ]
        lines += table(
            ["forwards", "outputs that differ from those of one thread"],
            [[f"{found['forwards']:,}", f"{found['different']:,}"]],
        )
    if "loaders" in data:
        rows = [
            [context, f"{each['steps']}", f"{each['seconds']:.1f}", "yes" if each["same losses"] else "**no**"]
            for context, each in data["loaders"].items()
        ]
        what = "Two processes each, a ViT of one layer, 16 steps an epoch. Spawned processes import everything anew at "
        lines += ["## Data loaders", "", f"{what}each epoch; `dataloader_persistent_workers=True` keeps them.", ""]
        lines += table(["start of processes", "steps", "s", "every loss as without"], rows)
    return lines


def _training_lines(readings: list[dict[str, Any]]) -> list[str]:
    last = readings[-1]
    # The first tenth makes what stays: caches, threads, the pages of libraries.
    settled = readings[len(readings) // ROWS :]
    grown = (settled[-1]["resident"] - settled[0]["resident"]) / 1e6
    rows = [
        [
            f"{each['step']:,}",
            f"{each['seconds']:,.0f}",
            f"{each['resident'] / 1e6:.1f}",
            each["files"],
            each["threads"],
        ]
        for each in [readings[0], *readings[len(readings) // ROWS - 1 :: len(readings) // ROWS]]
    ]
    return [
        "## A long training",
        "",
        f"{last['step']:,} steps of a model with one 1-bit layer in ProxConnectTrainer, 100 logs and 20 checkpoints. "
        f"From a tenth of it on, resident memory grew by {grown:.1f} MB.",
        "",
        *table(["step", "s", "resident MB", "open files", "threads"], [list(map(str, row)) for row in rows]),
    ]


def main() -> None:
    """Run the parts that are asked for, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("parts", nargs="*", default=["training", "threads", "loaders"])
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--loader-steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    hf.utils.logging.disable_progress_bar()
    run = {
        "training": lambda: training(options.steps),
        "threads": lambda: threads(options.seconds),
        "loaders": lambda: loaders(options.loader_steps),
    }
    file, here = options.out / "stress.json", environment()
    data = json.loads(file.read_text()) if file.exists() else {}
    data |= {part: run[part]() for part in options.parts}
    data.pop("environment", None)
    finish("stress", page(data, here), data, here, options.out)


if __name__ == "__main__":
    main()
