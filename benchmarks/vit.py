"""How fast whole vision transformers are, float and packed: `python benchmarks/vit.py`.

ViTForImageClassification of transformers with random weights, 224 x 224, attention by torch (sdpa): fp32, bf16,
torch.ao int8 dynamic, and packed with float, int8 and sign activations. Every round times every variant once; numbers
are medians over the rounds, ratios medians of the ratios within a round. The shares of time are those of the profiler.

Loading: `from_pretrained` of a packed and a float ViT-B in this process, every tensor read afterwards; for "cold" the
files are taken out of the page cache before each load, where the system lets us.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from report import RESULTS, Goal, finish, goal_table, goals_data, table
from torch import nn
from transformers import ViTConfig, ViTForImageClassification
from transformers.utils import logging

from proxbit import BinarizationConfig
from proxbit.analysis.environment import environment
from proxbit.analysis.timing import Timings, operator_shares, time_rounds, torch_threads
from proxbit.analysis.variants import forward_calls, fused_copy, variants
from proxbit.kernels import FORMATS

SIZES = {"ViT-B": (768, 12), "ViT-S": (384, 6), "ViT-T": (192, 3)}
FLOAT, INT8 = "float", "int8 dynamic"
PATIENCE_SECONDS = 30.0
PAGE = 4096

# Variant, base and the goal: ViT-B, batch 1, 1 thread.
GOALS = {
    ("packed, sign", FLOAT): Goal("ViT-B end to end, packed W1A1 / fp32", 8, 9.5),
    ("packed, int8", FLOAT): Goal("ViT-B end to end, packed W1A8 / fp32", 5, 6),
    ("packed, float", FLOAT): Goal("ViT-B end to end, packed W1A32 / fp32", 2.7, 3),
    ("packed, int8", INT8): Goal("ViT-B end to end, packed W1A8 / torch.ao int8 dynamic", 1.5),
}
LOAD_GOAL = Goal("`from_pretrained` of packed ViT-B / float, cold", 8)


@dataclass(frozen=True)
class Result:
    """One model at one setting: timings and shares of every variant."""

    model: str
    batch: int
    threads: int
    timings: Timings
    shares: dict[str, dict[str, float]]

    def data(self) -> dict[str, Any]:
        """As JSON."""
        numbers = {
            name: {
                "median_ms": round(self.timings.median(name) * 1e3, 3),
                "spread": round(self.timings.spread(name), 3),
                "rounds": len(seconds),
                "ratio": round(self.timings.ratio(name, FLOAT), 3),
                "shares": {group: round(share, 4) for group, share in self.shares[name].items()},
            }
            for name, seconds in self.timings.seconds.items()
        }
        return {"model": self.model, "batch": self.batch, "threads": self.threads, "results": numbers}


def model_of(size: str) -> nn.Module:
    """A ViT with random weights: those of transformers, whose row scales are the mean |w| of a trained model's kind."""
    hidden, heads = SIZES[size]
    config = ViTConfig(hidden_size=hidden, num_attention_heads=heads, intermediate_size=4 * hidden, num_labels=1000)
    return ViTForImageClassification(config).eval()


def measure(size: str, batches: list[int], threads: list[int], rounds: int) -> list[Result]:
    """A model at every setting."""
    models = variants(model_of(size), [BinarizationConfig(activations=name) for name in FORMATS])
    results = []
    for count in threads:
        for batch in batches:
            with torch_threads(count):
                calls = forward_calls(models, batch)
                timings = time_rounds(calls, rounds, warmup=1, patience=PATIENCE_SECONDS)
                shares = {name: operator_shares(call, repeats=1) for name, call in calls.items()}
            results.append(Result(size, batch, count, timings, shares))
    return results


def forget(folder: Path) -> None:
    """Take the files of a folder out of the page cache, where the system has a call for it."""
    for path in folder.iterdir() if hasattr(os, "posix_fadvise") else ():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def load(folder: Path) -> None:
    """Load a model and read a byte of every page of its tensors, for the files are mapped and not read at first."""
    model = ViTForImageClassification.from_pretrained(folder)
    for tensor in model.state_dict().values():
        tensor.contiguous().flatten().view(torch.uint8)[::PAGE].sum()


def time_loads(rounds: int) -> dict[str, Timings]:
    """`from_pretrained` of float and packed ViT-B, cold and warm."""
    with tempfile.TemporaryDirectory() as temporary:
        folders = {name: Path(temporary, name) for name in (FLOAT, "packed")}
        model = model_of("ViT-B")
        model.save_pretrained(folders[FLOAT])
        fused_copy(model).save_pretrained(folders["packed"])
        del model
        warm: dict[str, Callable[[], object]] = {name: lambda f=f: load(f) for name, f in folders.items()}
        found = {"warm": time_rounds(warm, rounds)}
        seconds: dict[str, list[float]] = {name: [] for name in folders}
        for _ in range(rounds):
            for name, call in warm.items():
                forget(folders[name])
                seconds[name] += time_rounds({name: call}, 1, cold=True).seconds[name]
    return found | {"cold": Timings({name: tuple(values) for name, values in seconds.items()})}


def against_goals(results: list[Result], loads: dict[str, Timings]) -> dict[Goal, float | None]:
    """What was measured for each goal."""
    chosen = [r for r in results if (r.model, r.batch, r.threads) == ("ViT-B", 1, 1)]
    measured: dict[Goal, float | None] = {}
    for (name, base), goal in GOALS.items():
        known = chosen and {name, base} <= set(chosen[0].timings.seconds)
        measured[goal] = chosen[0].timings.ratio(name, base) if known else None
    return measured | {LOAD_GOAL: loads["cold"].ratio("packed", FLOAT)}


def time_table(results: list[Result]) -> list[str]:
    """Latency of every variant at every setting."""
    names = list(results[0].timings.seconds)
    rows = []
    for r in results:
        cells = [f"{r.timings.median(n) * 1e3:.1f} ({r.timings.ratio(n, FLOAT):.2f})" for n in names]
        rows.append([r.model, str(r.batch), str(r.threads), *cells])
    return ["## Median ms (ratio to fp32)", "", *table(["", "batch", "threads", *names], rows)]


def share_table(results: list[Result]) -> list[str]:
    """Shares of time, in percent."""
    groups = list(results[0].shares[FLOAT])
    rows = [
        [r.model, str(r.batch), str(r.threads), name, *(f"{100 * shares[group]:.1f}" for group in groups)]
        for r in results
        for name, shares in r.shares.items()
    ]
    return ["## Shares of the time in operators, %", "", *table(["", "batch", "threads", "variant", *groups], rows)]


def load_table(loads: dict[str, Timings]) -> list[str]:
    """Loading, cold and warm."""
    rows = [
        [kind, *(f"{t.median(name) * 1e3:.0f}" for name in t.seconds), f"{t.ratio('packed', FLOAT):.2f}"]
        for kind, t in loads.items()
    ]
    return ["## `from_pretrained` of ViT-B, ms", "", *table(["page cache", FLOAT, "packed", "ratio"], rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="ViT-S and ViT-T as well, and batches of 8")
    parser.add_argument("--quick", action="store_true", help="few rounds; prints, and writes no files")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--out", type=Path, default=None, help="folder for vit.md and vit.json")
    arguments = parser.parse_args()
    rounds = arguments.rounds or (2 if arguments.quick else 11)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    here, results = environment(), []
    loads = time_loads(rounds)
    for size in SIZES if arguments.all else ("ViT-B",):
        results += measure(size, [1, 8] if arguments.all else [1], arguments.threads, rounds)
    measured = against_goals(results, loads)
    command = "python benchmarks/vit.py --all" if arguments.all else "python benchmarks/vit.py"
    lines = [
        f"`{command}`: {rounds} rounds, medians, ratios within a round. {here}.",
        "",
        *goal_table(measured, here),
        *time_table(results),
        *share_table(results),
        *load_table(loads),
    ]
    medians = {kind: {name: t.median(name) for name in t.seconds} for kind, t in loads.items()}
    data = {"rounds": rounds, "goals": goals_data(measured), "results": [r.data() for r in results], "load_s": medians}
    finish("vit", lines, data, here, arguments.out or (None if arguments.quick else RESULTS))


if __name__ == "__main__":
    main()
