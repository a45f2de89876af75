"""Plots: the curves of a training run, and the F and B of quantizer pairs."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from proxbit.errors import ConfigError
from proxbit.quantizers import MuSchedule, QuantizerPair, decompose, get_pair, regularizer

__all__ = ["default_sharpness", "plot_pair", "plot_pairs", "plot_training"]

COLORS = ("#2a5caa", "#d1495b", "#3a9d6e", "#8a5fb5")
W = torch.linspace(-2.5, 2.5, 1001, dtype=torch.float64)
PANELS = {
    "F": "F: the weight that is seen",
    "B": "B: multiplies the gradient",
    "P": "P: proximal map",
    "T": "T: transform, F = T(P(w))",
    "r": "r: what P penalises",
}
# F is not made of this P.
STEPWISE = {"P": "P: each step starts from P(w)", "T": "T: transform in F"}


def _style(axes: Axes, title: str, xlabel: str = "") -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(xlabel)
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _series(history: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    points = [(row["epoch"], row[key]) for row in history if key in row and "epoch" in row]
    return [x for x, _ in points], [y for _, y in points]


def plot_training(history: Sequence[dict[str, Any]], path: str | Path) -> Path:
    """Draw loss, accuracy, mu, flip ratio and hardening gap of a run over its epochs.

    Args:
        history: `trainer.state.log_history`.
        path: of the file; the ending decides the format.

    Returns:
        The path.
    """
    panels: tuple[tuple[str, bool, tuple[tuple[str, str], ...]], ...] = (
        ("Loss", False, (("loss", "training"), ("eval_loss", "test, hard"))),
        (
            "Accuracy on the test images",
            False,
            (
                ("eval_accuracy", "hard (ships)"),
                ("eval_soft_accuracy", "soft"),
                ("eval_balanced_accuracy", "hard, balanced"),
            ),
        ),
        ("Sharpness mu", True, (("mu", "mu"),)),
        ("Signs flipped since the log before", True, (("flip_ratio", "flip ratio"),)),
        ("Hardening gap |soft - hard| / |hard|", False, (("hardening_gap", "gap"),)),
    )
    drawn = [panel for panel in panels if any(_series(history, key)[0] for key, _ in panel[2])]
    figure = Figure(figsize=(3.6 * len(drawn), 3.3), layout="constrained")
    for axes, (title, logarithmic, lines) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        for (key, label), color in zip(lines, COLORS, strict=False):
            x, y = _series(history, key)
            if x:
                axes.plot(x, y, label=label, color=color, linewidth=1.8, marker="o", markersize=2.5)
        if logarithmic and all(value > 0 for key, _ in lines for value in _series(history, key)[1]):
            axes.set_yscale("log")
        _style(axes, title, "epoch")
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=140)
    return Path(path)


def plot_pairs(names: Sequence[str], path: str | Path, sharpness: Sequence[float] = (1.0, 3.0, 10.0)) -> Path:
    """Draw F and B of some pairs, in row units, for a few values of mu.

    Args:
        names: of registered pairs, one column each.
        path: of the file; the ending decides the format.
        sharpness: values of mu; those out of the range of a pair are left out.

    Returns:
        The path.
    """
    figure = Figure(figsize=(2.3 * len(names), 4.4), layout="constrained")
    grid = figure.subplots(2, len(names), squeeze=False, sharex=True, sharey="row")
    for column, name in enumerate(names):
        pair = get_pair(name)
        low, high = pair.mu_range
        for mu, color in zip(sharpness, COLORS, strict=False):
            if low <= mu <= high:
                for row, function in enumerate((pair.forward, pair.backward)):
                    grid[row, column].plot(W, function(W, mu), color=color, linewidth=1.6, label=f"mu = {mu:g}")
        _style(grid[0, column], f"{name}\n{'sound' if pair.sound else 'heuristic'}")
        _style(grid[1, column], "", "latent weight / row mean")
    grid[0, 0].set_ylabel("forward F")
    grid[1, 0].set_ylabel("backward B")
    grid[0, 0].set_ylim(-1.6, 1.6)
    grid[1, 0].set_ylim(-1.2, 10.5)
    handles, labels = grid[0, -1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=140)
    return Path(path)


def default_sharpness(pair: QuantizerPair, count: int = 3) -> list[float]:
    """Values of mu along the default schedule of a pair: its start, its end, and those between at equal steps."""
    schedule = MuSchedule(*pair.schedule, steps=count)
    return list(dict.fromkeys(schedule.mu(step) for step in range(count)))


def _check_path(figure: Figure, path: Path) -> None:
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name the file in it, such as {path / 'pair.png'}.")
    formats = figure.canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise ConfigError(f"{path}: a plot is a file that ends in one of {', '.join(sorted(formats))}.")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.parent}.")


def _curves(pair: QuantizerPair, mu: float) -> dict[str, tuple[Tensor, Tensor]]:
    """What there is to draw of a pair at one mu, by panel: the points along, and across."""
    curves = {"F": (W, pair.forward(W, mu)), "B": (W, pair.backward(W, mu).expand_as(W))}
    if pair.proximal is not None and pair.transform is not None:
        p = pair.proximal(W, mu)
        reached = torch.linspace(float(p.min()), float(p.max()), len(W), dtype=W.dtype)
        used = pair.update_from or pair.proximal
        curves |= {"P": (W, used(W, mu)), "T": (reached, pair.transform(reached, mu))}
        curves["r"] = regularizer(used, mu, float(W[-1]))
    else:
        numerical = decompose(pair, mu, float(W[-1]))
        curves["P"] = (numerical.w, numerical.p)
    return curves


def plot_pair(
    pair: str | QuantizerPair, path: str | Path, sharpness: Sequence[float] | None = None, title: str = ""
) -> Path:
    """Draw one pair for a few values of mu: F, B, the proximal map P, the transform T, and the regularizer r of P.

    Of a pair that is not sound there is no T and no r; its P is the one that dP = dF / B gives, where it can, and the
    reason is written beside it. Of a pair whose steps start from another map than that of F, such as `rpc`, that map is
    the P that is shown.

    Args:
        pair: a pair, or the name of one.
        path: of the file; the ending decides the format. An SVG is the same, byte for byte, for the same pair.
        sharpness: values of mu, up to four. None: start, middle and end of the default schedule.
        title: what to write over it, beside the verdict; the name of the pair if it is empty.

    Returns:
        The path.

    Raises:
        ConfigError: for more values of mu than it can show, or a path that cannot hold a plot.
        MuRangeError: for a mu out of the range of the pair.
        UnknownNameError: for an unknown name.
    """
    title = title or (pair if isinstance(pair, str) else "quantizer pair")
    pair = get_pair(pair)
    values = [pair.check_mu(mu) for mu in (default_sharpness(pair) if sharpness is None else sharpness)]
    if not 1 <= len(values) <= len(COLORS):
        raise ConfigError(f"A plot shows 1 to {len(COLORS)} values of mu, not {len(values)}.")
    figure = Figure(figsize=(15, 3.4))
    _check_path(figure, Path(path))
    panels = dict(zip(PANELS, figure.subplots(1, len(PANELS)), strict=True))
    figure.subplots_adjust(left=0.03, right=0.995, top=0.8, bottom=0.16, wspace=0.2)
    for mu, color in zip(values, COLORS, strict=False):
        for name, (x, y) in _curves(pair, mu).items():
            panels[name].plot(x, y, color=color, linewidth=1.7, label=f"mu = {mu:.3g}")
    titles = PANELS if pair.update_from in (None, pair.proximal) else PANELS | STEPWISE
    for name, axes in panels.items():
        _style(axes, titles[name], "p" if name in "Tr" else "w")
        low, high = axes.get_ylim()
        if high - low < 0.25:
            axes.set_ylim((low + high) / 2 - 0.5, (low + high) / 2 + 0.5)
    panels["F"].legend(frameon=False, fontsize=9)
    verdict = "sound" if pair.sound else "heuristic"
    figure.suptitle(f"{title}   ({verdict})", x=0.03, ha="left", fontsize=13, fontweight="bold")
    if not pair.sound:
        for name, text in (("T", "no transform:"), ("r", "no regularizer:")):
            reason = fill(decompose(pair, values[0]).reason, 30)
            panels[name].text(0.5, 0.5, f"{text}\n{reason}", ha="center", va="center", fontsize=10, color="#666666")
            panels[name].set_axis_off()
    # Not every format takes metadata; in an SVG the date would differ each time.
    undated: dict[str, Any] = {"metadata": {"Date": None}} if Path(path).suffix.lower() == ".svg" else {}
    with rc_context({"svg.hashsalt": "proxbit", "svg.fonttype": "none"}):
        figure.savefig(path, dpi=140, **undated)
    return Path(path)
