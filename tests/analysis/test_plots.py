"""Pictures: they are drawn, of the right things."""

import matplotlib.image
import pytest

from proxbit.analysis.plots import plot_pairs, plot_training
from proxbit.errors import UnknownNameError

HISTORY = [
    {"loss": 1.0, "mu": 0.3, "flip_ratio": 0.02, "hardening_gap": 0.6, "epoch": 0.5, "step": 1},
    {"loss": 0.5, "mu": 3.0, "flip_ratio": 0.01, "hardening_gap": 0.2, "epoch": 1.0, "step": 2},
    {"eval_loss": 0.6, "eval_accuracy": 0.8, "eval_soft_accuracy": 0.81, "epoch": 1.0, "step": 2},
]


def test_training_curves_have_one_panel_for_each_thing_logged(tmp_path):
    full = matplotlib.image.imread(plot_training(HISTORY, tmp_path / "full.png"))
    short = matplotlib.image.imread(plot_training([{"loss": 1.0, "epoch": 1}], tmp_path / "short.png"))
    assert full.shape[1] == 5 * short.shape[1]
    assert full[..., :3].min() < 0.5 < full[..., :3].max()


def test_mu_of_zero_is_drawn_on_a_linear_axis(tmp_path):
    """A logarithmic axis would lose the point."""
    assert plot_training([{"mu": 0.0, "epoch": 0}, {"mu": 1.0, "epoch": 1}], tmp_path / "mu.png").exists()


def test_pairs_get_a_column_each(tmp_path):
    one = matplotlib.image.imread(plot_pairs(["bnn++"], tmp_path / "one.png"))
    three = matplotlib.image.imread(plot_pairs(["bc", "parq", "bnn++"], tmp_path / "three.png"))
    assert three.shape[1] == pytest.approx(3 * one.shape[1], abs=3)


def test_unknown_pair(tmp_path):
    with pytest.raises(UnknownNameError, match="Valid: "):
        plot_pairs(["bnn+++"], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
