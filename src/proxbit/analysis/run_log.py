"""The log of a training run: JSON lines beside its checkpoints. Trainers write it, reports read it."""

import errno
import json
import math
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxbit.errors import CheckpointError
from proxbit.foreign import printable

__all__ = ["RUN_LOG", "RunLog", "append_event", "read_log", "replace_event", "start_log"]

RUN_LOG = "proxbit_run.jsonl"
FORMAT = 1


@dataclass(frozen=True)
class RunLog:
    """What is known of a run.

    Attributes:
        run: its first line: the model, its latent layers, the settings.
        logs: what the Trainer logged, in order: losses, mu, flip ratio, hardening gap, metrics; `step` and `epoch`.
        layers: snapshots of the latent layers, in order: `step`, `epoch`, and by layer `flip_ratio` and `latents`.
        predictions: the images of the last evaluation that were kept; None without one.
    """

    run: dict[str, Any]
    logs: tuple[dict[str, Any], ...]
    layers: tuple[dict[str, Any], ...]
    predictions: dict[str, Any] | None


def start_log(folder: str | Path, run: dict[str, Any], step: int = 0) -> None:
    """Begin a file; of an earlier one, keep what happened up to `step`, where the training resumes.

    Args:
        folder: output folder of the run; made if it is not there.
        run: what `RunLog.run` is to hold, JSON types.
        step: optimizer steps that are done.
    """
    path = Path(folder) / RUN_LOG
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [event for event in _events(path) if event["step"] <= step] if step and path.exists() else []
    events = [{"event": "run", "format": FORMAT, "step": 0, **run}, *(e for e in kept if e["event"] != "run")]
    _write(path, events)


def append_event(folder: str | Path, event: dict[str, Any]) -> None:
    """Add one line: `event` ("log", "layers" or "predictions"), `step`, and what belongs to it. NaN becomes null.

    Raises:
        OSError: if it cannot be written; then no part of it is.
    """
    line = _line(event).encode()
    with (Path(folder) / RUN_LOG).open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with suppress(OSError):
                file.truncate(end)
            raise


def replace_event(folder: str | Path, event: dict[str, Any]) -> None:
    """Add one line, in the place of all earlier ones of its kind."""
    path = Path(folder) / RUN_LOG
    _write(path, [*(each for each in _events(path) if each["event"] != event["event"]), event])


def _write(path: Path, events: list[dict[str, Any]]) -> None:
    """Put a new file in the place of the old one, at once."""
    part = path.with_suffix(".part")
    try:
        part.write_text("".join(map(_line, events)), encoding="utf-8")
        os.replace(part, path)
    except OSError:
        with suppress(OSError):
            part.unlink()
        raise


def read_log(folder: str | Path) -> RunLog:
    """Read the file of a run that has ended, or goes on.

    Raises:
        CheckpointError: if the folder holds no such file, or one that is damaged or newer.
    """
    path = Path(folder) / RUN_LOG
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is not the output folder of a run: it holds no {RUN_LOG}. ProxConnectTrainer writes it into "
            "its output_dir, unless logging_strategy is 'no'."
        )
    events = _events(path)
    if not events or events[0]["event"] != "run":
        raise CheckpointError(f"{path} does not begin with the line of a run.")
    if events[0].get("format") != FORMAT:
        found = printable(repr(events[0].get("format")))
        raise CheckpointError(f"{path} has format {found}; this version of proxbit reads {FORMAT}.")
    kinds: dict[str, list[dict[str, Any]]] = {"log": [], "layers": [], "predictions": []}
    for event in events[1:]:
        kinds.setdefault(event["event"], []).append(event)
    last = kinds["predictions"][-1:]
    return RunLog(events[0], tuple(kinds["log"]), tuple(kinds["layers"]), last[0] if last else None)


def _line(event: dict[str, Any]) -> str:
    return json.dumps(_finite(event), allow_nan=False, separators=(",", ":"), default=float) + "\n"


def _finite(value: Any) -> Any:
    """A value with None for what JSON has no number for, and lists for arrays."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _events(path: Path) -> list[dict[str, Any]]:
    """The lines of the file. A last one without its end is what a killed process leaves behind: it is passed over."""
    try:
        *lines, _ = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is damaged: it is no text ({error}).") from error
    events = []
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}, line {number}: not JSON ({error}).") from error
        if not isinstance(event, dict) or "event" not in event or not isinstance(event.get("step"), int):
            raise CheckpointError(f"{path}, line {number}: an event has an `event` and a `step`.")
        if not isinstance(event["event"], str) or not 0 <= event["step"] < 2**63:
            raise CheckpointError(f"{path}, line {number}: `event` is a word, and `step` a whole number.")
        events.append(event)
    return events
