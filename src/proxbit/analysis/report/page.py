"""`write_report`: the page of a run, in one HTML file that needs nothing else."""

import base64
import hashlib
import io
import json
import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from proxbit.analysis.report.charts import Chart, Curve, heat_map, line_chart, outline, outline_ticks, short
from proxbit.analysis.run_log import RUN_LOG, RunLog, read_log
from proxbit.errors import CheckpointError, ConfigError

__all__ = ["write_report"]

CARD = "quantization_card.json"
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


def write_report(run: str | Path, path: str | Path | None = None) -> Path:
    """Write a page about a run: curves, latents and flips by layer, pictures, the quantization card.

    Args:
        run: output folder of a `ProxConnectTrainer`, which may still be training.
        path: of the page. None: `report.html` in the folder of the run.

    Returns:
        The path. The page needs no other file and no network.

    Raises:
        CheckpointError: if the folder is none of a run, or its files are damaged.
        ConfigError: if `path` is a folder, or lies in none.
    """
    folder = Path(run)
    log = read_log(folder)
    card = _card(folder / CARD)
    target = folder / "report.html" if path is None else Path(path)
    if target.is_dir():
        raise ConfigError(f"{target} is a folder; name the page in it, such as {target / 'report.html'}.")
    if not target.parent.is_dir():
        raise ConfigError(f"{target.parent} is not a folder: {target} cannot be written.")
    try:
        text = _render(folder.resolve().name, log, card)
    except (OSError, KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{folder / RUN_LOG} lacks what a report needs ({error!r}).") from error
    part = target.with_name(f"{target.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, target)
    return target


def _card(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}).") from error
    if not isinstance(card, dict):
        raise CheckpointError(f"{path} must hold a JSON object.")
    return card


def _render(name: str, log: RunLog, card: dict[str, Any] | None) -> str:
    environment = Environment(
        loader=PackageLoader("proxbit.analysis.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"short": short, "bytes": _bytes, "percent": _percent}
    environment.filters["cell"] = _cell
    # No script but this one may run in the page, whatever the names in it are.
    script = environment.get_template("script.js").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html").render(
        name=name,
        run=log.run,
        charts=_charts(log),
        facts=_facts(log),
        warnings=_warnings(log),
        layers=_layers(log),
        together=_together(log),
        predictions=_pictures(log),
        card=card,
        last=log.logs[-1] if log.logs else None,
        version=version("proxbit"),
        style=Markup(environment.get_template("style.css").render()),
        script=Markup(script),
        digest=digest,
    )


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{short(round(size, 1 if size < 100 else 0))} {unit}"
        size /= 1000
    return f"{short(size)} GB"


def _percent(value: float) -> str:
    return f"{short(100 * value, 2 if value < 0.1 else 3)} %"


def _cell(value: Any) -> str:
    """A leaf of the card as text."""
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return short(value) if isinstance(value, float) else str(value)


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


def _charts(log: RunLog) -> list[Chart]:
    end = max([float(row["epoch"]) for row in log.logs if row.get("epoch") is not None], default=1.0)
    hard_from = next((float(row["epoch"]) for row in log.logs if row.get("hard")), None)
    metrics = []
    for key in _metrics(log):
        fraction = all(0 <= y <= 1 for _, y in _points(log, key))
        keys = {key: ("hard, what ships", HARD), _soft_key(log, key): ("soft", SOFT)}
        metrics.append(Panel(f"{_title(key)} on test data", keys, percent=fraction))
    charts = []
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
            charts.append(chart)
    return charts


def _last(log: RunLog, key: str) -> float | None:
    points = _points(log, key)
    return points[-1][1] if points else None


def _facts(log: RunLog) -> list[tuple[str, str, str]]:
    """The numbers at the top: name, value, what it means."""
    run, facts = log.run, []
    for key in _metrics(log)[:2]:
        hard, soft = _last(log, key), _last(log, _soft_key(log, key))
        if hard is not None and soft is not None:
            fraction = 0 <= hard <= 1
            shown = [f"{100 * value:.1f} %" if fraction else short(value) for value in (hard, soft)]
            facts.append((_title(key), shown[0], f"hard, what ships; soft {shown[1]}"))
    binary, others = run["binary_parameters"], run["float_parameters"]
    share = binary / max(1, binary + others)
    facts.append(("Size once packed", _bytes(run["packed_bytes"]), f"latent checkpoint: {_bytes(run['latent_bytes'])}"))
    facts.append(("1-bit weights", f"{binary:,}", f"{share:.0%} of all parameters, in {len(run['layers'])} layers"))
    gap, flips = _last(log, "hardening_gap"), _last(log, "flip_ratio")
    if gap is not None:
        facts.append(("Hardening gap", short(gap), "at the last log: soft against hard weights"))
    if flips is not None:
        facts.append(("Signs flipped", _percent(flips), "between the last two logs"))
    return facts


def _warnings(log: RunLog) -> list[str]:
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


def _layers(log: RunLog) -> list[dict[str, Any]]:
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


def _pictures(log: RunLog) -> dict[str, Any] | None:
    """The pictures, and whether they are so small that a screen should show their pixels."""
    if log.predictions is None:
        return None
    pictures = []
    for one in log.predictions["pictures"]:
        with Image.open(io.BytesIO(base64.b64decode(one["png"], validate=True)), formats=["PNG"]) as picture:
            pictures.append({**one, "small": max(picture.size) <= 32})
    return log.predictions | {"pictures": pictures}


def _together(log: RunLog) -> dict[str, Any] | None:
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
