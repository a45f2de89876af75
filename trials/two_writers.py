"""Two processes that write into one folder: `python trials/two_writers.py` writes `results/two_writers.md`.

A hundred times two trainings begin in one output folder, some time apart; they differ in their learning rate, so that a
mixture of both would show. The first one is killed at some moment. What is left is resumed, unless one of them has
come to its end, and must end as a training that was alone: weights, state of the optimizer, mu, and logged numbers, bit
for bit. A hundred times two processes write different releases into one folder at the same moment.
"""

import argparse
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import fault_runs as runs
from fault_runs import CONTEXT, Ended, Job, Started
from pages import RESULTS, table

from proxbit.analysis.run_log import read_log
from proxbit.checkpoint.files import CARD_NAME, check_files, sha256, weight_files
from proxbit.errors import CheckpointError
from proxbit.training.checkpoints import check_checkpoint

CASES = 100
# Seconds after a checkpoint; in as many there are about two steps, or one with a save.
LATEST = 0.1
RATES = {"first": 1e-2, "second": 2e-2}


@dataclass(frozen=True)
class Case:
    """What came of two trainings in one folder.

    Attributes:
        ends: how the first and the second one ended: "killed", "refused" or "finished".
        began: the step from which what was left has been resumed; None: one of them had come to its end.
        same: whether it ended as a training that was alone, bit for bit, and logged nothing else.
    """

    ends: tuple[str, str]
    began: int | None
    same: bool


def how(ended: Ended) -> str:
    """How a process ended, in a word; anything else than the three is an error."""
    if ended.status == 0:
        return "finished"
    if ended.status == -9:
        return "killed"
    if ended.status == 1 and ended.last_line.startswith("proxbit.errors.") and "is being written by" in ended.last_line:
        return "refused"
    raise RuntimeError(f"status {ended.status}: {ended.said}")


@cache
def alone(base: Path, which: str) -> dict[str, Any]:
    """The outcome of one of the trainings without the other."""
    folder = base / f"alone-{which}"
    (ended,) = runs.run(Job(folder, changes={"learning_rate": RATES[which]}))
    assert ended.status == 0, ended.said
    return runs.result(folder).outcome


def two_trainings(base: Path, number: int) -> Case:
    """Begin two in one folder, kill the first one, and resume what is left; when, the number of the case decides."""
    folder, chance, ready = base / f"training-{number}", random.Random(number), CONTEXT.Barrier(3)
    told = {which: CONTEXT.Event() for which in RATES}
    started = {
        which: runs.start(
            Job(folder, partial(runs.begin_when_told, ready, told[which]), changes={"learning_rate": rate}), which
        )
        for which, rate in RATES.items()
    }
    whole = {which: alone(base, which) for which in RATES}
    ready.wait(runs.HANGS)
    told["first"].set()
    first = started["first"].process
    do_at({told["second"].set: moment(chance, folder), first.kill: moment(chance, folder)}, first)
    ends = how(runs.wait([started["first"]])[0]), how(runs.wait([started["second"]])[0])
    for checkpoint in folder.glob("checkpoint-*"):
        check_checkpoint(checkpoint)
    if "finished" in ends:
        return Case(ends, None, is_one(folder, whole["second" if ends[1] == "finished" else "first"]))
    left = any(map(is_whole, folder.rglob("checkpoint-*")))  # one that was not renamed yet is put in its place
    (resumed,) = runs.run(Job(folder, resume=left, changes={"learning_rate": RATES["first"]}))
    assert resumed.status == 0, resumed.said
    return Case(ends, runs.result(folder).began, is_one(folder, whole["first"]))


def moment(chance: random.Random, folder: Path) -> tuple[Path, float]:
    """When something is done: so many seconds after a folder is there, which the first training makes."""
    return folder / chance.choice(["", *(f"checkpoint-{step}" for step in (2, 4))]), chance.uniform(0, LATEST)


def do_at(actions: dict[Callable[[], None], tuple[Path, float]], process: BaseProcess) -> None:
    """Do everything at its moment; once a process has ended, all that is left."""
    since: dict[Path, float] = {}
    while actions:
        ended, now = not process.is_alive(), time.perf_counter()
        for action, (place, delay) in list(actions.items()):
            if ended or place.exists() and now - since.setdefault(place, now) >= delay:
                action()
                del actions[action]
        time.sleep(0.001)


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint fits its manifest."""
    try:
        check_checkpoint(checkpoint)
    except CheckpointError:
        return False
    return True


def is_one(folder: Path, whole: dict[str, Any]) -> bool:
    """Whether the last training in a folder ended as `whole`, and the log of the run has its lines and no others."""
    lines = [(row["step"], row["loss"]) for row in read_log(folder).logs if "loss" in row]
    return runs.result(folder).outcome == whole and lines == [(row["step"], row["loss"]) for row in whole["logs"]]


def two_releases(base: Path, number: int) -> tuple[str, str]:
    """Write two at once, every other time over an older one; how both processes ended.

    Raises:
        RuntimeError: if the folder holds neither of the two, whole, or there is something beside it.
    """
    folder = base / f"release-{number}" / "vit"
    if number % 2:
        runs.write_a_release(folder, 0)
    barrier, started = CONTEXT.Barrier(2), []
    for seed in (1, 2):
        said = folder.parent.with_name(f"{folder.parent.name}.{seed}.txt")
        process = CONTEXT.Process(target=runs.race_to_a_release, args=(folder, seed, barrier, said))
        started.append(Started(process, said))
    for each in started:
        each.process.start()
    ends = [how(each) for each in runs.wait(started)]
    check_files(folder / CARD_NAME, weight_files(folder))
    whole = [weights(base, seed) for seed in (1, 2)]
    beside = [path.name for path in folder.parent.iterdir()]
    if sha256(folder / "model.safetensors") not in whole or beside != ["vit"]:
        raise RuntimeError(f"{folder} is neither of the two, or not alone: {beside}.")
    return ends[0], ends[1]


@cache
def weights(base: Path, seed: int) -> str:
    """The checksum of the weights of one of the releases."""
    folder = base / f"alone-{seed}" / "vit"
    runs.write_a_release(folder, seed)
    return sha256(folder / "model.safetensors")


def page(cases: Iterable[Case], races: Iterable[tuple[str, str]]) -> str:
    """What came of all of them."""
    cases, races = list(cases), list(races)
    rows = []
    for ends in sorted({case.ends for case in cases}):
        same = [case for case in cases if case.ends == ends]
        began = Counter(case.began for case in same if case.began is not None)
        resumed = ", ".join(f"{count} from step {step}" for step, count in sorted(began.items())) or "no need"
        rows.append([*ends, str(len(same)), resumed, str(sum(not case.same for case in same))])
    ended = Counter(end for race in races for end in race)
    trainings = (
        f"`python trials/two_writers.py`: {len(cases)} times two trainings of six steps began in one output folder,"
        " the second one at some moment of the first, which was killed at another. Every checkpoint that was there then"
        " fitted its manifest. What was left was resumed, and compared with a training that was alone: weights,"
        " optimizer, mu and logged numbers, bit for bit, and the lines of `proxbit_run.jsonl`."
    )
    releases = (
        f"{len(races)} times two processes wrote different releases into one folder at the same moment, every other"
        f" time over an older one. Of the {ended.total()} processes {ended['finished']} wrote theirs, one after the"
        f" other, and {ended['refused']} were refused. Each time the folder was one of the two, with the checksums of"
        " its card, and nothing was left beside it."
    )
    header = ["the first one", "the second one", "times", "resumed", "the result was another one"]
    return "\n".join(["# Two writers of one folder", "", trainings, "", *table(header, rows), releases, ""])


def main() -> None:
    """All of them, and the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", type=int, default=CASES, help="of each kind")
    parser.add_argument("--out", type=Path, default=RESULTS / "two_writers.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base, cases, races = Path(folder).resolve(), [], []
        for number in range(options.cases):
            cases.append(two_trainings(base, number))
            print(number, cases[-1], flush=True)
        for number in range(options.cases):
            races.append(two_releases(base, number))
            print(number, *races[-1], flush=True)
    options.out.write_text(page(cases, races), encoding="utf-8")


if __name__ == "__main__":
    main()
