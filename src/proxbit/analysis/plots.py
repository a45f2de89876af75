"""Pictures: the curves of a training run, and the F and B of quantizer pairs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from proxbit.quantizers import get_pair

__all__ = ["plot_pairs", "plot_training"]

COLORS = ("#2a5caa", "#d1495b", "#3a9d6e", "#8a5fb5")


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
        path: of the picture; the ending decides the format.

    Returns:
        The path.
    """
    panels: tuple[tuple[str, bool, tuple[tuple[str, str], ...]], ...] = (
        ("Loss", False, (("loss", "training"), ("eval_loss", "test, hard"))),
        (
            "Accuracy on the test pictures",
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
    """Draw F and B of some pairs, in row-normalised units, for a few values of mu.

    Args:
        names: of registered pairs, one column each.
        path: of the picture; the ending decides the format.
        sharpness: values of mu; those out of the range of a pair are left out.

    Returns:
        The path.
    """
    w = torch.linspace(-2.5, 2.5, 2001, dtype=torch.float64)
    figure = Figure(figsize=(2.3 * len(names), 4.4), layout="constrained")
    grid = figure.subplots(2, len(names), squeeze=False, sharex=True, sharey="row")
    for column, name in enumerate(names):
        pair = get_pair(name)
        low, high = pair.mu_range
        for mu, color in zip(sharpness, COLORS, strict=False):
            if not low <= mu <= high:
                continue
            for row, function in enumerate((pair.forward, pair.backward)):
                grid[row, column].plot(w, function(w, mu), color=color, linewidth=1.6, label=f"mu = {mu:g}")
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
