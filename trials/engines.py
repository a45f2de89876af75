"""Every engine against one process: `python trials/engines.py` trains under each, and compares.

A tiny ViT is trained for 50 steps on CPUs (gloo), with the unchanged `ProxConnectTrainer` and the files of
`examples/accelerate_configs/`: in one process, and in several with as many pictures a step in all. Then each training
is resumed from its checkpoint of step 25, with a model of other weights. What the processes run is what the tests of
distributed training run, from `tests/`. DeepSpeed is run where it is installed.
"""

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from pages import RESULTS, finish, table

from proxbit.analysis.environment import environment

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from distributed_runs import apart, fit, other_bits
from processes import Processes
from tiny_models import SIDE

STEPS, SAVED, PICTURES, BATCH = 50, 25, 24, 8
# Of a compiler, on two slow cores.
PATIENCE = 1800


@dataclass(frozen=True)
class Row:
    """A training of the table.

    Attributes:
        what: in words.
        config: a file of `examples/accelerate_configs/`, or "one".
        processes: how many train together; a step has 8 pictures in all.
        changes: of the arguments.
        saved_by: how many processes wrote the checkpoint; as many as resume, unless it is said.
        like: the changes of the one process that it is compared with.
    """

    what: str
    config: str
    processes: int = 2
    changes: dict[str, Any] = field(default_factory=dict)
    saved_by: int | None = None
    like: dict[str, Any] = field(default_factory=dict)


BF16 = {"bf16": True}
COMPILED = {"torch_compile": True, "torch_compile_backend": "inductor"}
ACCUMULATED = {"gradient_accumulation_steps": 2}
ROWS = (
    Row("one process", "one", 1),
    Row("DDP", "ddp"),
    Row("DDP, saved by 2, resumed by 1", "ddp", 1, saved_by=2),
    Row("DDP, gradients accumulated twice", "ddp", changes=ACCUMULATED),
    Row("DDP, `torch.compile` (inductor)", "ddp", changes=COMPILED),
    Row("DDP, bf16; beside one process in bf16", "ddp_bf16", changes=BF16, like=BF16),
    Row(
        "DDP, bf16; beside one process that adds up the same halves", "ddp_bf16", changes=BF16, like=BF16 | ACCUMULATED
    ),
    Row("FSDP2", "fsdp2_full"),
    Row("FSDP2, saved by 2, resumed by 4", "fsdp2_full", 4, saved_by=2),
    Row("FSDP2, activation checkpointing", "fsdp2_activation_checkpointing"),
    Row("FSDP2, sharded checkpoints", "fsdp2_sharded_checkpoints"),
    Row("FSDP2, sharded checkpoints, saved by 2, resumed by 4", "fsdp2_sharded_checkpoints", 4, saved_by=2),
    Row("FSDP2, sharded checkpoints, saved by 4, resumed by 2", "fsdp2_sharded_checkpoints", 2, saved_by=4),
    Row("FSDP2, hybrid: two groups of two", "fsdp2_hybrid", 4),
    Row("DeepSpeed ZeRO-1", "deepspeed_zero1"),
    Row("DeepSpeed ZeRO-2", "deepspeed_zero2"),
    Row("DeepSpeed ZeRO-3", "deepspeed_zero3"),
    Row("DeepSpeed ZeRO-3, saved by 2, resumed by 4", "deepspeed_zero3", 4, saved_by=2),
)


@dataclass(frozen=True)
class Difference:
    """Between two trainings.

    Attributes:
        loss: the largest difference of a loss.
        flips: how many latent weights more or fewer changed their sign, added up over all steps.
        bits: of the packed model, how many differ.
        all_bits: how many there are.
        same: whether every weight and every logged number is the same to the last bit.
    """

    loss: float
    flips: int
    bits: int
    all_bits: int
    same: bool


def difference(first: dict[str, Any], second: dict[str, Any]) -> Difference:
    """Between what `fit` says of two trainings."""
    bits, all_bits = other_bits(first["packed"], second["packed"])
    pairs = zip(first["curve"], second["curve"], strict=True)
    latents = sum(value.numel() for name, value in first["weights"].items() if f"{name}_scale" in first["packed"])
    flips = sum(round(abs(one["flip_ratio"] - other["flip_ratio"]) * latents) for one, other in pairs)
    equal = all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
    same = equal and first["curve"] == second["curve"]
    return Difference(apart(first["curve"], second["curve"])["loss"], flips, bits, all_bits, same)


@dataclass(frozen=True)
class Found:
    """Of a row.

    Attributes:
        alone: the difference from one process.
        resumed: the difference of the resumed training from the one that was not stopped.
        failed: what was said instead.
        seconds: all of it took.
    """

    alone: Difference | None = None
    resumed: Difference | None = None
    failed: str = ""
    seconds: float = 0


class Trainings:
    """Trains in any number of processes, each training once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: dict[int, Processes] = {}
        self.made: dict[str, dict[str, Any]] = {}
        generator = torch.Generator().manual_seed(0)
        self.pictures = torch.randn(PICTURES, 3, SIDE, SIDE, generator=generator)

    def __call__(self, config: str, processes: int, changes: dict[str, Any], saved_by: int = 0) -> dict[str, Any]:
        """What came of a training; with `saved_by`, resumed from the checkpoint of one with so many processes."""
        name = f"{config}-{processes}-{'-'.join(changes)}"
        if saved_by:
            start = self.folder / f"{config}-{saved_by}-{'-'.join(changes)}" / f"checkpoint-{SAVED}"
            return self._train(config, processes, changes, "resumed", {"resume": str(start), "model": {"seed": 2}})
        if name not in self.made:
            self.made[name] = self._train(config, processes, changes, name, {})
        return self.made[name]

    def _train(self, config: str, processes: int, changes: dict[str, Any], name: str, more: dict[str, Any]) -> Any:
        batch = BATCH // processes // changes.get("gradient_accumulation_steps", 1)
        fixed = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": SAVED, "save_total_limit": None}
        sizes = {"per_device_train_batch_size": batch, "per_device_eval_batch_size": BATCH // processes}
        if processes not in self.started:
            self.started[processes] = Processes(processes, PATIENCE)
        kind = config if processes > 1 else "one"
        call = self.started[processes]
        return call(fit, kind, self.folder / name, self.pictures, **fixed, **sizes, **changes, **more)[0]

    def end(self) -> None:
        """End all processes."""
        for each in self.started.values():
            each.end()


@contextmanager
def trainings() -> Iterator[Trainings]:
    """Trainings in a folder that is removed."""
    with tempfile.TemporaryDirectory() as folder:
        made = Trainings(Path(folder).resolve())
        try:
            yield made
        finally:
            made.end()


def examine(row: Row, train: Trainings) -> Found:
    """Train, resume, and compare with one process."""
    if row.config.startswith("deepspeed") and find_spec("deepspeed") is None:
        return Found(failed="deepspeed is not installed")
    begun = time.perf_counter()
    try:
        saved_by = row.saved_by or row.processes
        whole = train(row.config, saved_by, row.changes)
        resumed = train(row.config, row.processes, row.changes, saved_by)
    except AssertionError as error:
        said = explanation(str(error)).replace(f"{train.folder}/", "")
        return Found(failed=said, seconds=time.perf_counter() - begun)
    alone = train("one", 1, row.like)
    reached = resumed if row.saved_by else whole
    return Found(difference(alone, reached), difference(whole, resumed), seconds=time.perf_counter() - begun)


def explanation(traceback: str) -> str:
    """The error that came first."""
    lines = traceback.strip().splitlines()
    return next((line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)), lines[-1])


def cells(row: Row, found: Found) -> list[str]:
    """A line of the table."""
    if found.alone is None or found.resumed is None:
        return [row.what, str(row.processes), found.failed.replace("|", "/"), "", "", ""]
    alone, resumed = found.alone, found.resumed
    share = f"{alone.bits} of {alone.all_bits:,} ({alone.bits / alone.all_bits:.3%})"
    again = "yes" if resumed.same else f"no: losses {resumed.loss:.1e} apart, {resumed.bits} bits"
    return [row.what, str(row.processes), f"{alone.loss:.1e}", str(alone.flips), share, again]


HEADER = (
    "engine",
    "processes",
    "largest difference of a loss",
    "flips that differ",
    "packed bits that differ",
    "resumed: the same, bit for bit",
)


def page(found: list[tuple[Row, Found]]) -> list[str]:
    """All lines."""
    versions = ["torch", "transformers", "accelerate"] + ["deepspeed"] * (find_spec("deepspeed") is not None)
    return [
        "# Engines beside one process",
        "",
        f"`python trials/engines.py`: a tiny ViT, {STEPS} steps of {BATCH} pictures in all, on CPUs with gloo; the "
        f"first {SAVED} steps resumed with a model of other weights. Columns 3 to 5 compare with one process and "
        f"{BATCH} pictures, the last one with the same training, not stopped. Packed bits are those of "
        "`proxbit.packed_copy`.",
        "",
        ", ".join(f"{name} {version(name)}" for name in versions) + ".",
        "",
        *table(HEADER, [cells(*each) for each in found]),
    ]


def main() -> None:
    """Run all rows, and write the page and its numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", help="rows whose name holds this; nothing is written")
    options = parser.parse_args()
    found = []
    with trainings() as train:
        for row in (each for each in ROWS if options.only in each.what):
            found.append((row, examine(row, train)))
            print(" | ".join(cells(*found[-1])), f"({found[-1][1].seconds:.0f} s)", flush=True)
    data = {"rows": [asdict(row) | asdict(each) for row, each in found]}
    finish("engines", page(found), data, environment(), None if options.only else RESULTS)


if __name__ == "__main__":
    main()
