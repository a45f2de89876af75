"""Spoiled checkpoints: `python trials/fuzz.py` writes `trials/results/fuzz.md`.

Packed and latent checkpoints, whole, in shards and as releases, are changed at random and loaded. A case loads and is
right, or it is a clear error; nothing else may happen: no crash, no hang, no file written outside, no code run. Each
case runs in a child process with little memory and little time; the child watches itself through Python's audit events.
"""

import argparse
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from fuzz_mutations import KINDS, MARK, NEEDS, SPECIAL
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.utils import logging

import proxbit
from proxbit.analysis.card import QuantizationCard
from proxbit.analysis.environment import environment
from proxbit.checkpoint.files import CARD_NAME
from proxbit.errors import ProxbitError
from proxbit.hub.release import write_release

RESULTS = Path(__file__).parent / "results" / "fuzz.md"
CHECKPOINTS = 5
SECONDS = 10.0  # a case that takes longer hangs
MEMORY = 4 << 30  # bytes of address space beyond what the process starts with

EQUAL, OTHER, NEW = "loaded, equal", "loaded, other values", "loaded, new head"
OURS, THEIRS = "refused by proxbit", "refused by transformers"
OBSCURE, WRONG = "obscure error", "**loaded, wrong**"
CRASH, HANG, ESCAPE = "**crash**", "**hang**", "**wrote outside or ran code**"
COLUMNS = (EQUAL, OTHER, NEW, OURS, THEIRS, OBSCURE, WRONG, CRASH, HANG, ESCAPE)
# Errors of dependencies that say what is wrong: kinds that are always about a file or a field of the configuration, ...
CLEAR = (OSError, StrictDataclassError)
# ... and those of transformers that come with the report of every tensor that does not fit.
REPORTED = ("You set `ignore_mismatched_sizes` to `False`", "Error(s) in loading state_dict")


def originals(folder: Path) -> list[Path]:
    """The checkpoints that are spoiled. Widths that are no multiples of 8, so that bits are padded."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=20, intermediate_size=28, num_attention_heads=2, num_hidden_layers=1)
    config = ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes)
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})

    def make(activations: str = "float") -> ViTForImageClassification:
        model = proxbit.binarize(
            ViTForImageClassification(config), proxbit.BinarizationConfig(weights="pc", activations=activations)
        )
        return model.eval()

    def save(name: str, model: Any, **arguments: Any) -> None:
        model.save_pretrained(folder / name, **arguments)
        processor.save_pretrained(folder / name)

    save("packed", proxbit.pack(make("sign")))
    save("packed shards", proxbit.pack(make()), max_shard_size="4KB")
    save("latent", make("int8"))
    save("latent shards", make("sign"), max_shard_size="10KB")
    write_release(proxbit.pack(make("int8")), folder / "release", processing_class=processor)
    return sorted(folder.iterdir())


def contents(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(as_bytes(a), as_bytes(b))


class Watch:
    """What the process does that a loader of weights should not, as Python's audit events tell."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.seen: list[str] = []
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
            self.seen.append(f"open {arguments[0]!r} for writing")
        elif event in ("pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "os.mkdir", "os.remove"):
            self.seen.append(f"{event} {arguments!r}")
        elif event in ("os.rename", "os.link", "os.symlink", "shutil.rmtree", "socket.connect"):
            self.seen.append(f"{event} {arguments!r}")


def load(folder: Path, expected: dict[str, torch.Tensor], pixels: torch.Tensor) -> tuple[str, str]:
    """The outcome of one case, and what there is to say of it."""
    try:
        model, report = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
        with torch.inference_mode():
            logits = model.eval()(pixels).logits
        if (folder / CARD_NAME).exists():
            QuantizationCard.load(folder)
        AutoImageProcessor.from_pretrained(folder, backend="pil")
    except ProxbitError as error:
        return OURS, describe(error)
    except Exception as error:
        return THEIRS if is_clear(error) else OBSCURE, describe(error)
    found = contents(model)
    if set(found) == set(expected) and all(same(found[key], expected[key]) for key in found):
        return EQUAL, ""
    if report["missing_keys"] or report["mismatched_keys"]:
        return NEW, f"missing {sorted(report['missing_keys'])[:3]}, mismatched {sorted(report['mismatched_keys'])[:3]}"
    if logits.shape[0] != 1:
        return WRONG, f"logits {list(logits.shape)}"
    strange = [key for key, tensor in found.items() if not of_the_files(folder, tensor)]
    return (WRONG if strange else OTHER), ", ".join(strange[:3])


def is_clear(error: Exception) -> bool:
    """Whether an error of a dependency says what is wrong, and where."""
    if isinstance(error, UnicodeError | json.JSONDecodeError | RecursionError):
        return False
    if isinstance(error, ValueError):
        return not str(error).startswith(
            ("invalid literal", "Exceeds the limit", "not enough values", "too many values")
        )
    return isinstance(error, CLEAR) or str(error).startswith(REPORTED)


def of_the_files(folder: Path, tensor: torch.Tensor) -> bool:
    """Whether the bytes of a tensor are in one of the files."""
    data = as_bytes(tensor).numpy().tobytes()
    return any(data in file.read_bytes() for file in folder.glob("model*.safetensors"))


def describe(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = "/".join(Path(frame.filename).parts[-3:])
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]} ({where}:{frame.name})"


def run(folder: Path, case: int, seed: int, originals: list[Path], expected: Any, watch: Watch) -> tuple[str, ...]:
    """One case: a copy is spoiled and loaded."""
    original = originals[case % len(originals)]
    rng, kind = choose(case, seed, original)
    mutate = KINDS.get(kind) or SPECIAL[kind]
    place = folder / "case" / "checkpoint"
    shutil.copytree(original, place)
    mutate(place, rng)
    before = listing(folder)
    watch.seen.clear()
    watch.folder = place
    outcome, why = load(place, expected[original.name], torch.zeros(1, 3, 8, 8))
    watch.folder = None
    if watch.seen or listing(folder) != before or (place / MARK).exists():
        outcome, why = ESCAPE, "; ".join(watch.seen) or "other files than before"
    shutil.rmtree(folder / "case")
    return kind, original.name, outcome, why


def choose(case: int, seed: int, original: Path) -> tuple[random.Random, str]:
    """The numbers of a case, and what it changes. The first cases are the special ones, with every checkpoint."""
    rng, specials = random.Random(f"{seed}-{case}"), list(SPECIAL)
    if case < CHECKPOINTS * len(specials):
        return rng, specials[case // CHECKPOINTS]
    return rng, rng.choice([kind for kind in KINDS if kind not in NEEDS or (original / NEEDS[kind]).is_file()])


def listing(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.lstat().st_size) for path in folder.rglob("*"))


def child(pipe: Connection, folder: Path, seed: int, first: int, last: int) -> None:
    """Cases first..last, one message before and one after each."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.set_verbosity(logging.CRITICAL + 1)
    sandbox = folder / f"run-{first}"
    sandbox.mkdir()
    (folder / "elsewhere").mkdir(exist_ok=True)
    os.chdir(folder / "elsewhere")
    known = sorted((folder / "originals").iterdir())
    expected = {each.name: contents(AutoModelForImageClassification.from_pretrained(each)) for each in known}
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    watch = Watch()
    for case in range(first, last):
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = math.ceil(used.ru_utime + used.ru_stime + SECONDS)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        pipe.send(case)
        pipe.send(run(sandbox, case, seed, known, expected, watch))
    pipe.send(None)


def fuzz(folder: Path, first: int, last: int, seed: int, log: Path | None) -> list[tuple[str, ...]]:
    """The results of cases first..last."""
    known = sorted((folder / "originals").iterdir())
    results: list[tuple[str, ...]] = []
    context = multiprocessing.get_context("fork")

    def keep(result: tuple[str, ...]) -> None:
        if log is not None:
            with open(log, "a") as stream:
                print(json.dumps([first + len(results), *result]), file=stream)
        results.append(result)

    def fail(outcome: str, why: str) -> None:
        case = first + len(results)
        original = known[case % len(known)]
        keep((choose(case, seed, original)[1], original.name, outcome, why))

    while len(results) < last - first:
        here, there = context.Pipe()
        process = context.Process(target=child, args=(there, folder, seed, first + len(results), last))
        process.start()
        there.close()
        try:
            while True:
                # The machine may be busy with something else, and a case that is in line sleeps.
                if not here.poll(6 * SECONDS):
                    fail(HANG, f"more than {SECONDS:.0f} s")
                    break
                message = here.recv()
                if message is None:
                    break
                if isinstance(message, tuple):
                    keep(message)
        except EOFError:
            process.join()
            slow = process.exitcode == -signal.SIGXCPU
            fail(HANG if slow else CRASH, f"exit code {process.exitcode}")
        process.kill()
        process.join()
    return results


TEXT = """\
# Spoiled checkpoints

`python trials/fuzz.py --count {count} --seed {seed}`, {versions}, {minutes:.0f} minutes on {machine},
{jobs} at a time.

Five small checkpoints, packed and latent, whole, in shards and as a release, are spoiled and loaded: the model, which
then runs, the quantization card where there is one, and the processor. A case that computes for more than
{seconds:.0f} s, or waits for six times as long, hangs. "Loaded, equal" is the original, tensor for tensor; "other
values": every tensor of the model is in the files, byte for byte; "new head": transformers reports which tensors it
made anew.

{table}

{rest}
"""


OF_DEPENDENCIES = """\
The hangs are `config.json` with a billion labels, for each of which transformers makes a name before proxbit is asked.
Obscure errors come from transformers too, as it reads `config.json` or `preprocessor_config.json`, or builds a model of
what they say: `tests/hub/test_bad_files.py` allows none for the other files."""


def page(results: list[tuple[str, ...]], seed: int, minutes: float, jobs: int) -> str:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for kind, _, outcome, _ in results:
        counts[kind][outcome] += 1
    total = sum(counts.values(), Counter())
    lines = ["| what is changed | cases | " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * (len(COLUMNS) + 1)]
    for kind in [*KINDS, *SPECIAL]:
        cells = [str(counts[kind][column] or "") for column in COLUMNS]
        lines.append(f"| {kind} | {counts[kind].total()} | {' | '.join(cells)} |")
    lines.append(f"| **all** | {total.total()} | {' | '.join(str(total[column]) for column in COLUMNS)} |")
    rest = Counter(
        (why.split(":")[0], why.rpartition("(")[2].rstrip(")")) for _, _, kind, why in results if kind == OBSCURE
    )
    listed = [f"- {error} in `{where}`: {number}" for (error, where), number in rest.most_common()]
    obscure = "\n".join([OF_DEPENDENCIES, "", *listed])
    here = environment()
    return TEXT.format(
        count=len(results),
        seed=seed,
        minutes=minutes,
        jobs=jobs,
        seconds=SECONDS,
        machine=here.cpu,
        versions=f"torch {torch.__version__}, transformers {transformers.__version__}",
        table="\n".join(lines),
        rest=obscure if listed else "No obscure errors.",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="how many cases run at once")
    parser.add_argument("--log", type=Path, help="a file that gets one line of JSON a case")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    start = time.monotonic()
    cuts = [arguments.count * part // arguments.jobs for part in range(arguments.jobs + 1)]
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as place, ProcessPoolExecutor(arguments.jobs, context) as pool:
        (Path(place) / "originals").mkdir()
        originals(Path(place) / "originals")
        parts = [
            pool.submit(fuzz, Path(place), first, last, arguments.seed, arguments.log) for first, last in pairwise(cuts)
        ]
        results = [result for part in parts for result in part.result()]
    arguments.out.write_text(page(results, arguments.seed, (time.monotonic() - start) / 60, arguments.jobs))
    print(arguments.out.read_text())


if __name__ == "__main__":
    main()
