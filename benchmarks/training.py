"""What training costs: `python benchmarks/training.py`.

One step (forward, backward, AdamW) of a DeiT with random weights on random pictures, float and latent with the recipes
of proxbit, without a teacher. Times: every round takes one step of each; ratios are medians of those within a round.
Memory: the highest resident set of a process of its own that takes three steps, less what it holds before the model is
made.
"""

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from report import RESULTS, finish, table
from transformers import DeiTConfig, DeiTForImageClassification

import proxbit
from proxbit.analysis.environment import environment
from proxbit.analysis.timing import time_rounds, torch_threads

SIZES = {"DeiT-T": (192, 3), "DeiT-S": (384, 6), "DeiT-B": (768, 12)}
FLOAT = "float"
RECIPES = ("w1a32", "w1a8", "w1a4", "w1a1")
# At most: time, memory, as multiples of the float step's.
LIMITS = {"w1a32": (1.15, 1.10), "w1a1": (1.60, 1.25)}
MEMORY_STEPS = 3


def make_step(name: str, size: str, batch: int) -> Callable[[], object]:
    """A function that takes one step of training."""
    torch.manual_seed(0)
    hidden, heads = SIZES[size]
    sizes = {"hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": 4 * hidden, "num_labels": 1000}
    model = DeiTForImageClassification(DeiTConfig(**sizes))
    pixels, labels = torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,))
    if name != FLOAT:
        proxbit.binarize(model, proxbit.get_recipe(name).binarization())
        proxbit.calibrate(model, [pixels[:2]])
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        model(pixels, labels=labels).loss.backward()
        optimizer.step()

    return step


def peak_memory() -> int:
    """Of this process so far, in bytes."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else 1024 * kilobytes


def own_memory(name: str, size: str, batch: int) -> int:
    """What the steps take, in bytes; for a process of its own."""
    before = peak_memory()
    step = make_step(name, size, batch)
    for _ in range(MEMORY_STEPS):
        step()
    return peak_memory() - before


def memory_of(name: str, size: str, batch: int, threads: int) -> int:
    command = [sys.executable, __file__, "--memory-of", name, "--size", size, "--batch", str(batch)]
    done = subprocess.run([*command, "--threads", str(threads)], check=True, stdout=subprocess.PIPE, text=True)
    return int(json.loads(done.stdout.splitlines()[-1]))


def verdict(name: str, time: float, memory: float) -> str:
    """Whether both are within their limits."""
    if name not in LIMITS:
        return ""
    within = [round(value, 2) <= limit for value, limit in zip((time, memory), LIMITS[name], strict=True)]
    said = ["met" if each else "**missed**" for each in within]
    limits = "at most {:.2f}, {:.2f}".format(*LIMITS[name])
    return f"{limits}: {said[0]}, {said[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="DeiT-S", choices=list(SIZES))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for training.md and training.json")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    with torch_threads(options.threads):
        if options.memory_of:
            print(json.dumps(own_memory(options.memory_of, options.size, options.batch)))
            return
        names = (FLOAT, *RECIPES)
        memory = {name: memory_of(name, options.size, options.batch, options.threads) for name in names}
        steps = {name: make_step(name, options.size, options.batch) for name in names}
        timings = time_rounds(steps, options.rounds)
    here, rows, data = environment(), [], {}
    for name in names:
        time, share = 1 / timings.ratio(name, FLOAT), memory[name] / memory[FLOAT]
        milliseconds, megabytes = timings.median(name) * 1e3, memory[name] / 2**20
        data[name] = {"ms": milliseconds, "time": time, "bytes": memory[name], "memory": share}
        cells = [f"{milliseconds:.0f}", f"{time:.2f}", f"{megabytes:.0f}", f"{share:.2f}", verdict(name, time, share)]
        rows.append([name, *cells])
    setting = f"{options.size}, batch {options.batch}, {options.threads} threads, {options.rounds} rounds"
    lines = [f"`python benchmarks/training.py`: {setting}. {here}.", ""]
    lines += table(["", "ms a step", "x float", "MB", "x float", "goals: time, memory"], rows)
    finish("training", lines, {"setting": setting, "results": data}, here, options.out)


if __name__ == "__main__":
    main()
