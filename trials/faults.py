"""What breaks, and what is lost: `python trials/faults.py` injects every fault and writes `docs/faults.md`.

A tiny ViT is trained for six steps on the CPU, with a checkpoint every two, in processes of its own. Something happens
to it; then it is resumed from the last complete checkpoint, and must end as a training to which nothing happened:
weights, state of the optimizer, mu, and every logged number, bit for bit. It mounts small file systems: run it as root.
"""

import argparse
import os
import shutil
import signal
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import fault_runs as runs
from fault_runs import FAULT_STEP, Ended, Job
from pages import table

from proxbit.checkpoint.files import CARD_NAME, check_files, sha256, weight_files
from proxbit.checkpoint.staging import staged
from proxbit.training.checkpoints import STAGING

PAGE = Path(__file__).parents[1] / "docs" / "faults.md"
SIGTERM = {"enable_jit_checkpoint": True}
Mend = Callable[[], None]


@dataclass(frozen=True)
class Fault:
    """A row of the table.

    Attributes:
        what: breaks.
        how: it is injected.
        inject: what does it, inside the process.
        done: steps that are done when it happens.
        rank, ranks, changes: as of `Job`.
        place: prepares the output folder, and returns what mends it before the training is resumed.
        after: what is done to the output folder when the process has ended.
    """

    what: str
    how: str
    inject: Callable[..., None] | None
    done: int = FAULT_STEP
    rank: int | None = None
    ranks: int = 1
    changes: dict[str, Any] = field(default_factory=dict)
    place: Callable[[Path], Mend] | None = None
    after: Callable[[Path], None] | None = None


@dataclass(frozen=True)
class Seen:
    """What came of a fault.

    Attributes:
        ended: how each process ended.
        left: names in the output folder afterwards.
        resumed: what was said of them when the training was resumed.
        began: the step from which it was resumed.
        same: whether it ended as without the fault, bit for bit.
    """

    ended: list[Ended]
    left: list[str]
    resumed: str
    began: int
    same: bool


def small_disk(folder: Path) -> Mend:
    """A file system that one checkpoint fits on, and not two; mended by making it larger."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=220k", "none", folder], check=True)
    return lambda: _remount(folder, "size=4m")


def read_only(folder: Path) -> Mend:
    """A file system on which nothing can be written."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,ro", "none", folder], check=True)
    return lambda: _remount(folder, "rw")


def becomes_read_only(folder: Path) -> Mend:
    """A file system that can be written to, for now; mended by taking away the one that covers it then."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", folder], check=True)
    return lambda: _unmount(folder)


def _remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


def _unmount(folder: Path) -> None:
    subprocess.run(["umount", folder], check=True)


def locked_at_the_save(trainer: Any, folder: Path) -> None:
    """The file system becomes read-only before a checkpoint: itself once more, for its lock is open for writing."""

    def cover(*_: Any) -> None:
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        _remount(folder, "bind,ro")

    runs.before(trainer, "_save_checkpoint", trainer, cover)


def a_file(folder: Path) -> Mend:
    """A file in the place of the folder."""
    folder.write_text("mine")
    return folder.unlink


def cut_short(folder: Path) -> None:
    """Half of the optimizer's file."""
    file = folder / f"checkpoint-{FAULT_STEP}" / "optimizer.pt"
    os.truncate(file, file.stat().st_size // 2)


def flipped_bit(folder: Path) -> None:
    """One bit of the weights."""
    file = folder / f"checkpoint-{FAULT_STEP}" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)


KILL, SAVE = "`kill -9`", "`kill -9` in a save"
DAMAGE = partial(Fault, inject=runs.killed_at_a_step, done=FAULT_STEP + 1)
FAULTS = (
    Fault(KILL, "as step 6 begins", runs.killed_at_a_step, FAULT_STEP + 1),
    Fault(SAVE, "by the kernel, half of the weights written (RLIMIT_FSIZE)", runs.killed_in_the_weights),
    Fault(SAVE, "after the weights", runs.killed_after_the_weights),
    Fault(SAVE, "before the manifest", runs.killed_before_the_manifest),
    Fault(SAVE, "after the manifest, before the rename", runs.killed_before_the_rename),
    Fault(SAVE, "after the rename, before old ones are deleted", runs.killed_in_the_rotation),
    Fault(f"{KILL} of one of two ranks", "rank 1, as step 6 begins", runs.killed_at_a_step, FAULT_STEP + 1, 1, 2),
    Fault(f"{KILL} of one of two ranks", "rank 0, as step 6 begins", runs.killed_at_a_step, FAULT_STEP + 1, 0, 2),
    Fault(f"{SAVE} of one of two ranks", "rank 1, at its own files", runs.killed_after_the_weights, rank=1, ranks=2),
    Fault(
        f"{SAVE} of one of two ranks", "rank 0, before the manifest", runs.killed_before_the_manifest, rank=0, ranks=2
    ),
    Fault("disk full", "a tmpfs of 220 kB, as root", None, FAULT_STEP, place=small_disk),
    Fault("disk full", "the optimizer's file is /dev/full", runs.full_disk),
    Fault("disk full, two ranks", "likewise, in rank 0", runs.full_disk, rank=0, ranks=2),
    Fault("read-only output", "a tmpfs mounted `ro`, as root", None, 0, place=read_only),
    Fault("read-only output", "remounted `ro` at a save, as root", locked_at_the_save, place=becomes_read_only),
    Fault("no folder to write to", "a file in its place", None, 0, place=a_file),
    Fault("SIGTERM", "in step 5, no save due", runs.sigterm_at_a_step, FAULT_STEP + 1, changes=SIGTERM),
    Fault("SIGTERM, two ranks", "to rank 1, in step 5", runs.sigterm_at_a_step, FAULT_STEP + 1, 1, 2, SIGTERM),
    Fault("NaN loss", "at step 4", runs.nan_loss),
    Fault("NaN loss in one of two ranks", "rank 1, at step 4", runs.nan_loss, rank=1, ranks=2),
    DAMAGE("a file cut short", "half of the last optimizer.pt, after a kill", after=cut_short),
    DAMAGE("a bit flipped", "in the last model.safetensors, after a kill", after=flipped_bit),
)


@cache
def whole(base: Path, ranks: int) -> dict[str, Any]:
    """The outcome of a training to which nothing happens."""
    folder = base / f"whole-{ranks}"
    ended = runs.run(Job(folder, ranks=ranks))
    assert all(each.status == 0 for each in ended), ended
    return runs.result(folder).outcome


def examine(fault: Fault, base: Path, name: str) -> Seen:
    """Inject a fault, look at what is left, and resume."""
    folder = base / name
    mend = fault.place(folder) if fault.place else None
    try:
        ended = runs.run(Job(folder, fault.inject, fault.rank, ranks=fault.ranks, changes=fault.changes))
        if mend is not None:
            mend()
        if fault.after is not None:
            fault.after(folder)
        left = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        anything = any(each.startswith("checkpoint-") or each == STAGING for each in left)
        resumed = runs.run(Job(folder, ranks=fault.ranks, resume=anything))
        if any(each.status != 0 for each in resumed):
            raise RuntimeError(f"{fault.what}, {fault.how}: cannot be resumed.\n{resumed[0].said}")
        found = runs.result(folder)
        said = "; ".join(line for line in resumed[0].said.splitlines() if line.startswith(("Passed", "Put", "Removed")))
        return Seen(ended, left, said, found.began, found.outcome == whole(base, fault.ranks))
    finally:
        if folder.is_mount():
            _unmount(folder)


def status(ended: Ended) -> str:
    """How a process ended, in words."""
    if ended.status is None:
        return "**hung**"
    return signal.Signals(-ended.status).name if ended.status < 0 else f"exit {ended.status}"


def row(fault: Fault, seen: Seen, folder: Path) -> list[str]:
    """Of the table."""

    def plain(text: str) -> str:
        return text.replace(f"{folder}/", "").replace(str(folder), "out").replace("|", "/")

    said = [f"{status(each)}: {plain(explanation(each))}".rstrip(": ") for each in seen.ended]
    if seen.resumed:
        said.append(f"on resuming: {plain(seen.resumed)}")
    again = fault.done - seen.began
    lost = "nothing" if seen.same else "**the result is another one**"
    steps = f"{again} step{'s' * (again != 1)} done again" if again else "no step"
    return [fault.what, fault.how, "<br>".join(said), f"{lost}; {steps}"]


def explanation(ended: Ended) -> str:
    """What a process says of its end: the error and its note, or the line of SIGTERM."""
    lines = [line.strip() for line in ended.said.splitlines()]
    for number, line in enumerate(lines):
        if line.startswith("proxbit.errors."):
            return " ".join(lines[number:][:2]).removeprefix("proxbit.errors.")
    return next((line for line in lines if line.startswith("SIGTERM:")), ended.last_line if ended.status == 1 else "")


def at_every_operation(base: Path, step: int = 1) -> tuple[int, int, int]:
    """`kill -9` at the n-th file operation of a save, for each n until there are no more.

    Returns:
        How many operations there are; how often the checkpoint was there when the training was resumed; how often the
        result was another one.
    """
    there = different = number = 0
    while True:
        number += step
        folder = base / f"operation-{number}"
        killed = runs.run(Job(folder, partial(runs.killed_at_an_operation, number)))[0].status
        if killed == 0:
            return number - step, there, different
        assert killed == -signal.SIGKILL, killed
        resumed = runs.run(Job(folder, resume=True))[0]
        assert resumed.status == 0, resumed.said
        found = runs.result(folder)
        there += found.began == FAULT_STEP
        different += found.outcome != whole(base, 1)
        shutil.rmtree(folder)


def release_at_every_operation(base: Path) -> Counter[str]:
    """`kill -9` at the n-th file operation of `write_release` over an older release, for each n.

    Returns:
        How often the folder held the old release, the new one, or there was none; in all of them the files are those
        of their card.
    """
    found: Counter[str] = Counter()
    runs.write_a_release(base / "old" / "vit", 0)
    known = {_checksums(base / "old" / "vit"): "old"}
    while True:
        folder = base / f"release-{found.total()}" / "vit"
        shutil.copytree(base / "old", folder.parent)
        process = runs.CONTEXT.Process(target=runs.write_a_release, args=(folder, 1, found.total() + 1))
        process.start()
        process.join()
        if process.exitcode == 0:
            return found
        runs.write_a_release(base / "new" / "vit", 1)
        known[_checksums(base / "new" / "vit")] = "new"
        found[known[_checksums(folder)] if folder.exists() else "none"] += 1
        with suppress(KeyboardInterrupt), staged(folder):
            raise KeyboardInterrupt  # a write that does not succeed
        assert known[_checksums(folder)] and [path.name for path in folder.parent.iterdir()] == ["vit"]


def _checksums(folder: Path) -> tuple[str, ...]:
    """Of a release whose weights are those of its card."""
    check_files(folder / CARD_NAME, weight_files(folder))
    return tuple(f"{file.name} {sha256(file)}" for file in sorted(folder.iterdir()) if file.suffix != ".md")


def page(rows: list[list[str]], operations: tuple[int, int, int], releases: Counter[str]) -> str:
    """The whole page."""
    count, there, different = operations
    return "\n".join(
        [
            INTRODUCTION,
            *table(["fault", "injected how", "what was seen", "what was lost"], rows),
            f"And `kill -9` at each of the {count} file operations of Python in the save of checkpoint-{FAULT_STEP}: "
            f"resumed from it {there} times, from the one before it {count - there} times; the result was another one "
            f"{different} times.",
            "",
            f"`kill -9` at each of the {releases.total()} file operations of Python in a `write_release` over an older "
            f"release: the folder held the old one {releases['old']} times, the new one {releases['new']} times, each "
            f"with the checksums of its card; and was not there {releases['none']} times, between the two renames. The "
            "next write, even one that fails, puts the old one back first.",
            "",
        ]
    )


INTRODUCTION = (Path(__file__).parent / "faults_introduction.md").read_text(encoding="utf-8").strip() + "\n"


@contextmanager
def working_folder() -> Iterator[Path]:
    """Somewhere to train."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder).resolve()


def main() -> None:
    """Inject all of them, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=PAGE)
    options = parser.parse_args()
    with working_folder() as base:
        rows = []
        for number, fault in enumerate(FAULTS):
            seen = examine(fault, base, f"fault-{number}")
            rows.append(row(fault, seen, base / f"fault-{number}"))
            print(" | ".join(rows[-1]), flush=True)
        options.out.write_text(page(rows, at_every_operation(base), release_at_every_operation(base)), encoding="utf-8")


if __name__ == "__main__":
    main()
