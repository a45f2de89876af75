"""What the page of a run shows, computed from its log: charts, facts, warnings, layers, images."""

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from proxbit.analysis.report.charts import Chart, Curve, heat_map, line_chart, outline, outline_ticks, short
from proxbit.analysis.run_log import RunLog

__all__ = ["bytes_text", "charts", "check_sizes", "facts", "images", "layers", "percent_text", "together", "warnings"]

MOST_BINS = 1000
# Styles of curves: hard and soft look alike wherever they are.
PLAIN, HARD, SOFT = 0, 1, 2


@dataclass(frozen=True)
class Panel:
    """A chart of what a log holds.

    Attributes:
        title: above it.
        keys: of the log, with name and style of their curves.
        note: below it.
        log: a logarithmic axis.
        percent: values are fractions.
    """

    title: str
    keys: dict[str, tuple[str, int]]
    note: str = ""
    log: bool = False
    percent: bool = False


LOSS = Panel(
    "Loss",
    {"loss": ("training", PLAIN), "eval_loss": ("test, hard", HARD), "eval_soft_loss": ("test, soft", SOFT)},
    "With a teacher, that of training is mixed with distillation.",
    log=True,
)
PANELS = (
    Panel("Sharpness mu", {"mu": ("mu", PLAIN)}, "How close F is to the sign: larger is sharper.", log=True),
    Panel(
        "Signs flipped",
        {"flip_ratio": ("since the log before", PLAIN)},
        "The share of 1-bit weights that changed sign. A run that settles ends near zero.",
        percent=True,
    ),
    Panel(
        "Hardening gap",
        {"hardening_gap": ("|soft − hard| / |hard|", PLAIN)},
        "How far the weights that train are from those that ship: zero once hard.",
    ),
    Panel("Learning rate", {"learning_rate": ("of the first group", PLAIN)}),
    Panel("Sums that overflow", {"overflow_share": ("share", PLAIN)}, "Of accumulators of few bits.", percent=True),
)


def bytes_text(count: int) -> str:
    """Bytes with a unit and three digits."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{short(round(size, 1 if size < 100 else 0))} {unit}"
        size /= 1000
    return f"{short(size)} GB"


def percent_text(value: float) -> str:
    """A fraction in percent, with two or three digits."""
    return f"{short(100 * value, 2 if value < 0.1 else 3)} %"


def _points(log: RunLog, key: str) -> tuple[tuple[float, float], ...]:
    found = ((row.get("epoch"), row.get(key)) for row in log.logs)
    return tuple((float(x), float(y)) for x, y in found if x is not None and y is not None)


def _metrics(log: RunLog) -> list[str]:
    """The metrics of evaluations that have a soft value beside the hard one, but for the loss."""
    keys = {key: None for row in log.logs for key in row}
    hard = [key.replace("_soft_", "_", 1) for key in keys if key.startswith("eval") and "_soft_" in key]
    return [key for key in hard if key in keys and not key.endswith("_loss")]


def _title(key: str) -> str:
    """`eval_balanced_accuracy` -> Balanced accuracy"""
    return key.removeprefix("eval_").replace("_", " ").capitalize()


def _soft_key(log: RunLog, hard: str) -> str:
    return next(k for row in log.logs for k in row if "_soft_" in k and k.replace("_soft_", "_", 1) == hard)


def check_sizes(log: RunLog) -> None:
    """Check the numbers of a log that say how large something is made.

    Raises:
        ValueError: naming the number.
    """
    low, high, bins = log.run["edges"]
    if not (isinstance(bins, int) and 1 <= bins <= MOST_BINS and -MOST_BINS <= low < high <= MOST_BINS):
        raise ValueError(f"edges is {log.run['edges']}")
    for snapshot in log.layers:
        if any(len(counts) != bins + 2 for counts in snapshot["latents"]):
            raise ValueError(f"latents of step {snapshot['step']} have other edges")


def charts(log: RunLog) -> list[Chart]:
    """The curves that the run has points of: loss, metrics of evaluations, and what `PANELS` names."""
    end = max([float(row["epoch"]) for row in log.logs if row.get("epoch") is not None], default=1.0)
    hard_from = next((float(row["epoch"]) for row in log.logs if row.get("hard")), None)
    metrics = []
    for key in _metrics(log):
        fraction = all(0 <= y <= 1 for _, y in _points(log, key))
        keys = {key: ("hard, what ships", HARD), _soft_key(log, key): ("soft", SOFT)}
        metrics.append(Panel(f"{_title(key)} on test data", keys, percent=fraction))
    found = []
    for panel in (LOSS, *metrics, *PANELS):
        curves = [Curve(name, _points(log, key), style) for key, (name, style) in panel.keys.items()]
        curves = [curve for curve in curves if curve.points]
        if curves:
            chart = line_chart(
                panel.title,
                curves,
                end=end,
                log=panel.log,
                percent=panel.percent,
                hard_from=hard_from,
                note=panel.note,
            )
            found.append(chart)
    return found


def _last(log: RunLog, key: str) -> float | None:
    points = _points(log, key)
    return points[-1][1] if points else None


def facts(log: RunLog) -> list[tuple[str, str, str]]:
    """The numbers at the top: name, value, what it means."""
    run, found = log.run, []
    for key in _metrics(log)[:2]:
        hard, soft = _last(log, key), _last(log, _soft_key(log, key))
        if hard is not None and soft is not None:
            fraction = 0 <= hard <= 1
            shown = [f"{100 * value:.1f} %" if fraction else short(value) for value in (hard, soft)]
            found.append((_title(key), shown[0], f"hard, what ships; soft {shown[1]}"))
    binary, others = run["binary_parameters"], run["float_parameters"]
    share = binary / max(1, binary + others)
    found.append(
        ("Size once packed", bytes_text(run["packed_bytes"]), f"latent checkpoint: {bytes_text(run['latent_bytes'])}")
    )
    found.append(("1-bit weights", f"{binary:,}", f"{share:.0%} of all parameters, in {len(run['layers'])} layers"))
    gap, flips = _last(log, "hardening_gap"), _last(log, "flip_ratio")
    if gap is not None:
        found.append(("Hardening gap", short(gap), "at the last log: soft against hard weights"))
    if flips is not None:
        found.append(("Signs flipped", percent_text(flips), "between the last two logs"))
    return found


def warnings(log: RunLog) -> list[str]:
    """What a reader must know before the numbers are believed."""
    found = []
    steps = max((row["step"] for row in log.logs), default=0)
    if steps < log.run["steps"]:
        found.append(f"This run has done {steps:,} of {log.run['steps']:,} steps: it goes on, or was stopped early.")
    gap = _last(log, "hardening_gap")
    if gap is not None and gap > 0.01 and steps >= log.run["steps"]:
        found.append(
            f"The training ended soft (gap {short(gap)}): the packed model is not quite the one that was trained."
        )
    if any("loss" in row and row["loss"] is None for row in log.logs):
        found.append("Some losses were NaN or infinite; they are left out of the curves.")
    return found


def _density(counts: np.ndarray) -> np.ndarray:
    """Snapshots as columns, the largest latents on top, each column brightest where most weights are."""
    inside = counts[:, 1:-1]
    density: np.ndarray = inside / inside.max(axis=1, keepdims=True).clip(1)
    return density.T[::-1]


def layers(log: RunLog) -> list[dict[str, Any]]:
    """By layer: what it is, how its latents moved, when it flipped."""
    if not log.layers:
        return []
    latents = np.array([snapshot["latents"] for snapshot in log.layers])
    counted = [snapshot["flip_ratio"] for snapshot in log.layers if snapshot["flip_ratio"] is not None]
    flips = np.array(counted).reshape(len(counted), len(log.run["layers"]))
    top = max(float(flips.max(initial=0.0)), 1e-9)
    bins = np.arange(log.run["edges"][2])
    # The middle bin, and one on each side.
    near, rows = np.abs(bins - bins.mean()) < 2, []
    for place, layer in enumerate(log.run["layers"]):
        counts = latents[:, place]
        total = counts.sum(axis=1).clip(1)
        undecided = counts[:, 1:-1][:, near].sum(axis=1) / total
        own = flips[:, place]
        row = {
            **layer,
            "weights": int(np.prod(layer["shape"])),
            "heat": heat_map(_density(counts)),
            "flips": heat_map(np.sqrt(own / top)[None]) if len(own) else None,
            "mean": float(own.mean()) if len(own) else None,
            "final": float(own[-1]) if len(own) else None,
            "first_near": float(undecided[0]),
            "last_near": float(undecided[-1]),
            "beyond": float((counts[-1, 0] + counts[-1, -1]) / total[-1]),
        }
        rows.append(row)
    return rows


def images(log: RunLog) -> dict[str, Any] | None:
    """The images, and whether they are so small that a screen should show their pixels."""
    if log.predictions is None:
        return None
    found = []
    for one in log.predictions["pictures"]:
        with Image.open(io.BytesIO(base64.b64decode(one["png"], validate=True)), formats=["PNG"]) as image:
            found.append({**one, "small": max(image.size) <= 32})
    return log.predictions | {"pictures": found}


def together(log: RunLog) -> dict[str, Any] | None:
    """The latents of all layers: over time, and at the beginning and the end."""
    if not log.layers:
        return None
    counts = np.array([np.array(snapshot["latents"]).sum(axis=0) for snapshot in log.layers])
    shares = counts / counts.sum(axis=1, keepdims=True).clip(1)
    top = float(shares[[0, -1]].max())
    low, high, bins = log.run["edges"]
    return {
        "heat": heat_map(_density(counts)),
        "first": outline(shares[0], top),
        "last": outline(shares[-1], top),
        "xticks": outline_ticks(low, high, bins),
        "near": 1.5 * (high - low) / bins,
        "begin": log.layers[0].get("epoch") or 0,
        "end": log.layers[-1].get("epoch") or 0,
    }
