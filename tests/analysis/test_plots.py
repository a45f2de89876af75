"""Pictures: they are drawn, of the right things."""

import matplotlib.image
import pytest
from matplotlib.figure import Figure

from proxbit.analysis.plots import default_sharpness, plot_pair, plot_pairs, plot_training
from proxbit.errors import ConfigError, MuRangeError, UnknownNameError
from proxbit.quantizers import compose, get_pair
from proxbit.quantizers.functions import TANH

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


def words_of(path):
    return path.read_text()


def test_a_sound_pair_shows_its_map_its_transform_and_what_it_penalises(tmp_path):
    text = words_of(plot_pair("bnn++", tmp_path / "pair.svg", [0.5, 2.0]))
    assert all(words in text for words in ("bnn++", "(sound)", "mu = 0.5", "mu = 2", "what P penalises"))
    assert "no transform" not in text


def test_the_map_that_the_steps_start_from_is_the_one_that_is_shown(tmp_path, monkeypatch):
    """F of `rpc` is the identity; what pulls its weights, and what r belongs to, is the map of the update."""
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.extend(self.axes))
    plot_pair("rpc", tmp_path / "pair.png", [0.4])
    plot_pair("proxquant", tmp_path / "pair.png", [0.4])
    curves = [axes.lines[0].get_xydata() for axes in drawn]
    titles = [axes.get_title(loc="left") for axes in drawn]
    assert all((curves[panel] == curves[5 + panel]).all() for panel in (2, 4))
    assert (curves[0][:, 0] == curves[0][:, 1]).all()
    assert titles[2] == "P: each step starts from P(w)" and "T(P(w))" not in titles[3]
    assert titles[7] == "P: proximal map" and "T(P(w))" in titles[8]


def test_a_heuristic_pair_says_why_it_has_none(tmp_path):
    text = words_of(plot_pair("bnn+", tmp_path / "pair.svg"))
    assert all(words in text for words in ("(heuristic)", "no transform", "no regularizer", "B changes while P stands"))


def test_an_svg_is_the_same_byte_for_byte(tmp_path):
    one, two = (plot_pair("parq", tmp_path / name) for name in ("one.svg", "two.SVG"))
    assert one.read_bytes() == two.read_bytes()
    assert "<dc:date>" not in words_of(two)


def test_only_an_svg_is_written_with_metadata(tmp_path, monkeypatch):
    """PGF, which LaTeX has to be there for, takes none."""
    given = {}
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **options: given.update({path.suffix: options}))
    for name in ("x.pgf", "x.png", "x.SVG"):
        plot_pair("bc", tmp_path / name)
    assert {ending for ending, options in given.items() if "metadata" in options} == {".SVG"}


def test_a_pair_without_a_name_gets_the_title_that_is_given(tmp_path):
    text = words_of(plot_pair(compose(TANH, schedule=("log", 0.5, 8.0)), tmp_path / "pair.svg", title="mine"))
    assert "mine" in text and "mu = 0.5" in text and "mu = 8" in text


@pytest.mark.parametrize("name", ["folder", "folder.png"])
def test_a_folder_is_no_picture(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    with pytest.raises(ConfigError, match=rf"{name} is a folder; name the file in it, such as .*pair\.png"):
        plot_pair("bnn++", folder)
    assert list(tmp_path.rglob("*")) == [folder]


def test_default_sharpness_follows_the_schedule():
    assert default_sharpness(get_pair("bnn++")) == pytest.approx([0.3, 3.0, 30.0])
    assert default_sharpness(get_pair("bc")) == [1.0]


def test_a_mu_out_of_range_draws_nothing(tmp_path):
    with pytest.raises(MuRangeError, match="out of range"):
        plot_pair("parq", tmp_path / "none.png", [0.5])
    assert not (tmp_path / "none.png").exists()


REFUSED = [
    ("x.foo", None, "a plot is a file that ends in one of .*png"),
    ("x", None, "a plot is a file that ends in one of"),
    ("nowhere/x.png", None, "there is no folder"),
    ("x.png", [1, 2, 3, 4, 5], "shows 1 to 4 values of mu, not 5"),
    ("x.png", [], "not 0"),
]


def test_what_cannot_be_drawn_leaves_nothing(tmp_path):
    for path, sharpness, words in REFUSED:
        with pytest.raises(ConfigError, match=words):
            plot_pair("bnn++", tmp_path / path, sharpness)
        assert list(tmp_path.iterdir()) == []
