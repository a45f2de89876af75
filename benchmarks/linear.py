"""How fast packed linear layers are, beside their peers: `python benchmarks/linear.py`.

The shapes of ViT-T, -S and -B (hidden to hidden, hidden to 4 hidden and back) at M = 1, 16, 197, 1576 rows, everything
included: fp32 in, fp32 out (torch bf16: bf16 in and out), activations packed or quantized, scales and bias. Peers are
those that are installed: torch, torch.ao, onnxruntime (pip install onnxruntime onnx), BitLinear of transformers.

Every round takes one sample of every candidate; numbers are medians over the rounds, ratios medians of the ratios
within a round. Hot: one layer, again and again. Cold: the 72 linear layers of ViT-B, 340 MB in fp32, one after the
other, either that again and again ("in turn"), or one pass right after one of every other candidate ("after others"),
so that even 1-bit weights have left the caches.
"""

import argparse
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peers import FP32, INT8_PEERS, OURS, PEERS, Call, linear_peers
from report import RESULTS, Goal, finish, goal_table, goals_data, table

from proxbit.analysis.environment import environment
from proxbit.analysis.timing import Timings, in_turn, time_rounds, torch_threads
from proxbit.kernels import pack_signs

MODELS = {"ViT-T": 192, "ViT-S": 384, "ViT-B": 768}
ROWS = (1, 16, 197, 1576)
COLD_ROWS = (1, 16)
BLOCKS = 12
SAMPLE_SECONDS = 0.005
PATIENCE_SECONDS = 10.0
BEST_INT8 = "the best int8 peer"
IN_TURN, AFTER_OTHERS = "{} of ViT-B in turn", "{} of ViT-B after others"
COLD = IN_TURN.format(6 * BLOCKS)

# What is measured: candidate, base, model, rows; with the goal for 1 thread.
GOALS = {
    ("linear_w1a1", FP32, "ViT-B", 197): Goal("`linear_w1a1` / torch fp32, ViT-B, M=197", 22, 26),
    ("linear_w1a1", FP32, "ViT-S", 197): Goal("`linear_w1a1` / torch fp32, ViT-S, M=197", 19),
    ("linear_w1a1", FP32, "ViT-T", 197): Goal("`linear_w1a1` / torch fp32, ViT-T, M=197", 15),
    ("linear_w1a8", FP32, "ViT-B", 197): Goal("`linear_w1a8` / torch fp32, ViT-B, M=197", 7.5, 9),
    ("linear_w1a8", BEST_INT8, "ViT-B", 197): Goal(f"`linear_w1a8` / {BEST_INT8}, ViT-B, M=197", 1.7),
    ("linear_w1", FP32, "ViT-B", 197): Goal("`linear_w1` / torch fp32, ViT-B, M=197", 3, 4),
    ("linear_w1a1", FP32, COLD, 1): Goal("`linear_w1a1` / torch fp32, all 72 of ViT-B cold, M=1", 80),
    ("linear_w1a8", FP32, COLD, 1): Goal("`linear_w1a8` / torch fp32, all 72 of ViT-B cold, M=1", 50),
}
PACK_GOAL = Goal("`pack_signs`", 5, unit="G weights/s")


@dataclass(frozen=True)
class Result:
    """The timings of one setting.

    Attributes:
        model: whose shapes; IN_TURN or AFTER_OTHERS for all layers of a model.
        shape: inputs and outputs of the layer; None for all.
        rows: M.
        threads: of torch.
        timings: of the candidates.
    """

    model: str
    shape: tuple[int, int] | None
    rows: int
    threads: int
    timings: Timings

    def ratio(self, name: str, base: str) -> float:
        """How many times faster than `base`; than the fastest of them for the best int8 peer."""
        peers = [peer for peer in INT8_PEERS if peer in self.timings.seconds] if base == BEST_INT8 else [base]
        return min(self.timings.ratio(name, peer) for peer in peers)

    def data(self) -> dict[str, Any]:
        """As JSON."""
        numbers = {
            name: {
                "median_us": round(self.timings.median(name) * 1e6, 2),
                "spread": round(self.timings.spread(name), 3),
                "rounds": len(seconds),
                "ratio": round(self.timings.ratio(name, FP32), 3),
            }
            for name, seconds in self.timings.seconds.items()
        }
        return {"model": self.model, "shape": self.shape, "M": self.rows, "threads": self.threads, "results": numbers}


def shapes(hidden: int) -> list[tuple[int, int]]:
    """Inputs and outputs of the linear layers of a block: q, k, v and output are alike."""
    return [(hidden, hidden), (hidden, 4 * hidden), (4 * hidden, hidden)]


def calls_for(shape: tuple[int, int], rows: int) -> dict[str, Call]:
    """Everyone on a layer with random weights of the size that vision transformers have."""
    inputs, outputs = shape
    return linear_peers(torch.randn(rows, inputs), torch.randn(outputs, inputs) * 0.02, torch.randn(outputs))


def hot(models: Iterable[str], rows: int, threads: int, rounds: int) -> list[Result]:
    """Each shape for itself."""
    results = []
    for model in models:
        for shape in shapes(MODELS[model]):
            calls = calls_for(shape, rows)
            with torch.inference_mode():
                timings = time_rounds(calls, rounds, sample_seconds=SAMPLE_SECONDS, patience=PATIENCE_SECONDS)
            results.append(Result(model, shape, rows, threads, timings))
    return results


def cold(rows: int, threads: int, rounds: int, blocks: int) -> list[Result]:
    """All layers of ViT-B in turn."""
    square, wide, narrow = shapes(MODELS["ViT-B"])
    layers = [calls_for(shape, rows) for shape in (*[square] * 4, wide, narrow) * blocks]
    calls = {name: in_turn([layer[name] for layer in layers]) for name in layers[0]}
    with torch.inference_mode():
        steady = time_rounds(calls, rounds, sample_seconds=10 * SAMPLE_SECONDS, patience=PATIENCE_SECONDS)
        evicted = time_rounds(calls, rounds, cold=True, patience=PATIENCE_SECONDS)
    found = ((IN_TURN, steady), (AFTER_OTHERS, evicted))
    return [Result(title.format(len(layers)), None, rows, threads, timings) for title, timings in found]


def pack_rate(rounds: int) -> float:
    """Weights a second that `pack_signs` takes from memory, 1 thread."""
    weight = torch.randn(24576, 768)
    with torch_threads(1):
        timings = time_rounds({"pack": lambda: pack_signs(weight)}, rounds)
    return weight.numel() / timings.median("pack")


def geomean(results: list[Result], name: str, base: str, **setting: Any) -> float | None:
    """The geometric mean of the ratio over the shapes of a setting; None if it was not measured."""
    chosen = [r for r in results if all(getattr(r, key) == value for key, value in setting.items())]
    known = {BEST_INT8, *(chosen[0].timings.seconds if chosen else ())}
    if not chosen or not {name, base} <= known:
        return None
    return statistics.geometric_mean(r.ratio(name, base) for r in chosen)


def against_goals(results: list[Result], rate: float | None) -> dict[Goal, float | None]:
    """What was measured for each goal."""
    measured = {
        goal: geomean(results, name, base, model=model, rows=rows, threads=1)
        for (name, base, model, rows), goal in GOALS.items()
    }
    return measured | {PACK_GOAL: None if rate is None else rate / 1e9}


def ratio_tables(results: list[Result], threads: int) -> list[str]:
    """Geometric means by model and rows, with the cold passes after them."""
    here = [r for r in results if r.threads == threads]
    columns = list(dict.fromkeys((r.model, r.rows) for r in here))
    rows = []
    for name in here[0].timings.seconds:
        values = [geomean(here, name, FP32, model=model, rows=m) for model, m in columns]
        cells = ["" if value is None else f"{value:.2f}" for value in values]
        label = f"**`{name}`**" if name in OURS else name
        rows.append([label, *cells])
    header = ["", *(f"{model}, M={m}" for model, m in columns)]
    return [f"## Ratio to torch fp32, threads: {threads}, geometric means", "", *table(header, rows)]


def time_tables(results: list[Result], threads: int) -> list[str]:
    """Medians of every setting."""
    here = [r for r in results if r.threads == threads]
    rows = []
    for r in here:
        where = "all" if r.shape is None else f"{r.shape[0]} -> {r.shape[1]}"
        cells = [f"{r.timings.median(n) * 1e6:.4g} ({r.timings.ratio(n, FP32):.2f})" for n in here[0].timings.seconds]
        rows.append([r.model, where, str(r.rows), *cells])
    header = ["", "layer", "M", *here[0].timings.seconds]
    return [f"## Median us (ratio to torch fp32), threads: {threads}", "", *table(header, rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rounds; prints, and writes no files")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--out", type=Path, default=None, help="folder for linear.md and linear.json")
    arguments = parser.parse_args()
    quick = arguments.quick
    rounds = arguments.rounds or (3 if quick else 15)
    torch.manual_seed(0)
    here, results = environment(), []
    for threads in arguments.threads:
        with torch_threads(threads):
            for rows in (1, 197) if quick else ROWS:
                results += hot(("ViT-B",) if quick else MODELS, rows, threads, rounds)
            for rows in COLD_ROWS[:1] if quick else COLD_ROWS:
                results += cold(rows, threads, rounds, 2 if quick else BLOCKS)
    measured = against_goals(results, pack_rate(rounds))
    lines = [f"`python benchmarks/linear.py`: {rounds} rounds, medians, ratios within a round. {here}.", ""]
    absent = [peer for peer in PEERS if peer not in results[0].timings.seconds]
    lines += ["fp32 in and fp32 out, everything included; torch bf16: bf16 in and out.", ""]
    lines += [f"Not installed here, left out: {', '.join(absent)}.", ""] if absent else []
    lines += goal_table(measured, here)
    for make in (ratio_tables, time_tables):
        for threads in arguments.threads:
            lines += make(results, threads)
    data = {"rounds": rounds, "goals": goals_data(measured), "results": [r.data() for r in results]}
    finish("linear", lines, data, here, arguments.out or (None if quick else RESULTS))


if __name__ == "__main__":
    main()
