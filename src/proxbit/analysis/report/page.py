"""`write_report`: the page of a run, in one HTML file that needs nothing else."""

import base64
import hashlib
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from proxbit.analysis.report import contents
from proxbit.analysis.report.charts import short
from proxbit.analysis.run_log import RUN_LOG, RunLog, read_log
from proxbit.checkpoint.files import read_json
from proxbit.errors import CheckpointError, ConfigError
from proxbit.foreign import printable

__all__ = ["write_report"]

# Of a release into the folder of the run, and of that which `proxbit train` leaves in it.
CARDS = ("quantization_card.json", "packed/quantization_card.json")
TEMPLATES = Path(__file__).parent / "templates"


def write_report(run: str | Path, path: str | Path | None = None) -> Path:
    """Write a page about a run: curves, latents and flips by layer, images, the quantization card.

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
    card = _card([folder / name for name in CARDS])
    target = folder / "report.html" if path is None else Path(path)
    if target.is_dir():
        raise ConfigError(f"{target} is a folder; name the page in it, such as {target / 'report.html'}.")
    if not target.parent.is_dir():
        raise ConfigError(f"{target.parent} is not a folder: {target} cannot be written.")
    try:
        text = _render(folder.resolve().name, log, card)
    except Exception as error:  # A file of others may hold anything.
        shown = printable(repr(error))
        raise CheckpointError(f"{folder / RUN_LOG} lacks what a report needs, or is damaged ({shown}).") from error
    part = target.with_name(f"{target.name}.part")
    part.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(part, target)
    return target


def _card(paths: list[Path]) -> dict[str, Any] | None:
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return None
    try:
        card = read_json(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is not JSON ({error}).") from error
    if not isinstance(card, dict):
        raise CheckpointError(f"{path} must hold a JSON object.")
    return card


def _render(name: str, log: RunLog, card: dict[str, Any] | None) -> str:
    contents.check_sizes(log)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"short": short, "bytes": contents.bytes_text, "percent": contents.percent_text}
    environment.filters["cell"] = _cell
    # No script but this one may run in the page, whatever the names in it are.
    script = environment.get_template("script.js").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html").render(
        name=name,
        run=log.run,
        charts=contents.charts(log),
        facts=contents.facts(log),
        warnings=contents.warnings(log),
        layers=contents.layers(log),
        together=contents.together(log),
        predictions=contents.images(log),
        card=card,
        last=log.logs[-1] if log.logs else None,
        version=version("proxbit"),
        style=Markup(environment.get_template("style.css").render()),
        script=Markup(script),
        digest=digest,
    )


def _cell(value: Any) -> str:
    """A leaf of the card as text."""
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return short(value) if isinstance(value, float) else str(value)
