"""What training costs: `python benchmarks/training.py`.

One step (forward, backward, clipping, AdamW, learning rate, callbacks) of a DeiT with random weights on random
pictures: the float model with the Trainer of transformers, and latent ones with ProxConnectTrainer and the recipes of
proxbit, without a teacher. With two processes, DistributedDataParallel. Times: every round takes some steps of each, of
which the first is not counted; ratios are medians of those within a round. Memory: the highest resident set of a
process of its own that takes three steps, less what it holds before the model is made; tensors that it frees go back to
the system at once (glibc), so that all that is counted is in use. Where torch finds an accelerator that is what trains,
a step ends when it has nothing left to do, and memory is what torch has allocated on it.

    python benchmarks/training.py --size DeiT-B --batch 8 --recipes w1a32 --processes 2
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from report import RESULTS, finish, table
from torch import Tensor
from torch.utils.data import Dataset
from transformers import DeiTConfig, DeiTForImageClassification, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

import proxbit
from proxbit.analysis.environment import environment
from proxbit.analysis.timing import Timings, torch_threads

SIZES = {"DeiT-T": (192, 3), "DeiT-S": (384, 6), "DeiT-B": (768, 12)}
FLOAT = "float"
RECIPES = ("w1a32", "w1a8", "w1a4", "w1a1")
# At most, as multiples of the float step: time, memory. DeiT-B has goals of its own, and the only ones on accelerators.
LIMITS = {"w1a32": (1.15, 1.10), "w1a1": (1.60, 1.25)}
LIMITS_OF_B = {"w1a32": (1.10, 1.05)}
LIMITS_OF_B_ON_ACCELERATORS = {"w1a32": (1.05, 1.05)}
STEPS = 3
ACCELERATOR = torch.accelerator.current_accelerator(check_available=True)


class Pictures(Dataset):
    """As many as there are asked for, all alike."""

    def __init__(self, count: int) -> None:
        self.count, self.pixels = count, torch.randn(3, 224, 224)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        return {"pixel_values": self.pixels, "labels": index % 1000}


class StepTimes(TrainerCallback):
    """Seconds of every step."""

    def __init__(self) -> None:
        self.begin, self.seconds = 0.0, list[float]()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begin = now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(now() - self.begin)


def now() -> float:
    """Seconds, when everything that was asked for is done."""
    if ACCELERATOR:
        torch.accelerator.synchronize()
    return time.perf_counter()


def make_trainer(name: str, size: str, batch: int, folder: str) -> Trainer:
    """Of a float model, or of a latent one with the recipe of that name."""
    torch.manual_seed(0)
    hidden, heads = SIZES[size]
    sizes = {"hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": 4 * hidden, "num_labels": 1000}
    model = DeiTForImageClassification(DeiTConfig(**sizes))
    fixed: dict[str, Any] = {
        "report_to": "none",
        "use_cpu": not ACCELERATOR,
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    fixed |= {"save_strategy": "no", "max_steps": STEPS, "per_device_train_batch_size": batch}
    processes = int(os.environ.get("WORLD_SIZE", 1))
    pictures = Pictures(STEPS * batch * processes)
    if name == FLOAT:
        return Trainer(model, TrainingArguments(folder, **fixed), train_dataset=pictures)
    recipe = proxbit.get_recipe(name)
    proxbit.calibrate(proxbit.binarize(model, recipe.binarization()), [torch.randn(2, 3, 224, 224)], weights=False)
    arguments = proxbit.ProxConnectArguments(folder, hard_fraction=0.0, **fixed)
    return proxbit.ProxConnectTrainer(model, arguments, train_dataset=pictures)


def step_seconds(trainer: Trainer) -> float:
    """The mean of all steps but the first."""
    times = StepTimes()
    trainer.add_callback(times)
    trainer.train()
    trainer.remove_callback(times)
    return statistics.mean(times.seconds[1:])


def peak_memory() -> int:
    """Of this process so far, in bytes."""
    if ACCELERATOR:
        return torch.accelerator.max_memory_allocated()
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else 1024 * kilobytes


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """In this process, one of `options.processes`: seconds by name and round; or the memory of one."""
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        if options.memory_of:
            before = peak_memory()
            step_seconds(make_trainer(options.memory_of, options.size, options.batch, folder))
            return {"bytes": peak_memory() - before}
        names = (FLOAT, *options.recipes)
        trainers = {name: make_trainer(name, options.size, options.batch, folder) for name in names}
        found: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(options.rounds):
            for name, trainer in trainers.items():
                found[name].append(step_seconds(trainer))
    return {"seconds": found}


def in_processes(options: argparse.Namespace, memory_of: str = "") -> dict[str, Any]:
    """What the first of the processes measures."""
    command = [sys.executable, __file__, "--worker", "--memory-of", memory_of, "--size", options.size]
    command += ["--batch", str(options.batch), "--threads", str(options.threads), "--rounds", str(options.rounds)]
    command += ["--recipes", *options.recipes]
    # Without the first, accelerate gives every process as many threads as there are cores.
    shared = {"OMP_NUM_THREADS": str(options.threads)}
    if memory_of:
        shared["MALLOC_MMAP_THRESHOLD_"] = "262144"
    ranks: list[dict[str, str]] = [{}]
    if options.processes > 1:
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"}
        shared |= {"WORLD_SIZE": str(options.processes), "LOCAL_WORLD_SIZE": str(options.processes)}
        ranks = [{"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(options.processes)]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | shared | rank) for rank in ranks
    ]
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"A process of {' '.join(command)} failed.")
    found: dict[str, Any] = json.loads(outputs[0].splitlines()[-1])
    return found


def verdict(name: str, size: str, time: float, memory: float, on_accelerator: bool = bool(ACCELERATOR)) -> str:
    """Whether both are within their limits."""
    of_b = LIMITS_OF_B_ON_ACCELERATORS if on_accelerator else LIMITS_OF_B
    limits = of_b if size == "DeiT-B" else {} if on_accelerator else LIMITS
    if name not in limits:
        return ""
    within = [round(value, 2) <= limit for value, limit in zip((time, memory), limits[name], strict=True)]
    said = ["met" if each else "**missed**" for each in within]
    return "at most {:.2f}, {:.2f}: ".format(*limits[name]) + ", ".join(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="DeiT-S", choices=list(SIZES))
    parser.add_argument("--batch", type=int, default=32, help="pictures a step and process")
    parser.add_argument("--threads", type=int, default=2, help="of a process")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=1, choices=(1, 2))
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for training_*.md and training_*.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
        print(json.dumps(measure(options)))
        return
    names = (FLOAT, *options.recipes)
    memory = {name: in_processes(options, name)["bytes"] for name in names}
    timings = Timings({name: tuple(times) for name, times in in_processes(options)["seconds"].items()})
    with torch_threads(options.threads):
        here = environment()
    rows, data = [], {}
    for name in names:
        time, share = 1 / timings.ratio(name, FLOAT), memory[name] / memory[FLOAT]
        milliseconds, megabytes = timings.median(name) * 1e3, memory[name] / 2**20
        data[name] = {"ms": milliseconds, "time": time, "bytes": memory[name], "memory": share}
        cells = [f"{milliseconds:.0f}", f"{time:.2f}", f"{megabytes:.0f}", f"{share:.2f}"]
        rows.append([name, *cells, verdict(name, options.size, time, share)])
    setting = (
        f"{options.size}, batch {options.batch}, processes: {options.processes}, threads of each: {options.threads}, "
        f"{options.rounds} rounds"
    )
    kind = ""
    if ACCELERATOR:
        kind, setting = f"_{ACCELERATOR.type}", f"{setting}, on {torch.get_device_module().get_device_name()}"
    lines = [f"`python benchmarks/training.py`: {setting}. {here}.", ""]
    lines += table(["", "ms a step", "x float", "MB", "x float", "goals: time, memory"], rows)
    name = f"training_{options.size.lower()}_{options.processes}{kind}"
    finish(name, lines, {"setting": setting, "results": data}, here, options.out)


if __name__ == "__main__":
    main()
