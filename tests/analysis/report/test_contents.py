"""What the page shows, against the numbers of the log."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from proxbit.analysis.report import contents
from proxbit.analysis.run_log import read_log
from run_folder import write_run


@pytest.fixture
def log(tmp_path):
    return read_log(write_run(tmp_path))


def opacity(png):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))))[..., 1] / 255


BYTES = [
    (0, "0 B"),
    (999, "999 B"),
    (1000, "1 kB"),
    (13_260, "13.3 kB"),
    (343_000_000, "343 MB"),
    (2_500_000_000, "2.5 GB"),
]


def test_bytes():
    for count, text in BYTES:
        assert contents.bytes_text(count) == text


PERCENTAGES = [(0.0, "0 %"), (0.000325, "0.033 %"), (0.0217, "2.2 %"), (0.9639, "96.4 %")]


def test_percentages():
    for value, text in PERCENTAGES:
        assert contents.percent_text(value) == text


def test_layers_are_those_of_the_snapshots(log):
    first, second = contents.layers(log)
    latents = np.array([row["latents"] for row in log.layers])
    assert (first["weights"], second["weights"]) == (50 * 36, 12 * 3 * 4 * 4)
    assert first["mean"] == pytest.approx(np.mean([1 / 10, 1 / 20, 1 / 30, 1 / 40]))
    assert (first["final"], second["mean"], second["final"]) == (1 / 40, 0, 0)
    for place, layer in enumerate((first, second)):
        middle = latents[:, place, 20:23].sum(1) / latents[:, place].sum(1)
        assert (layer["first_near"], layer["last_near"]) == (pytest.approx(middle[0]), pytest.approx(middle[-1]))
        outside = latents[-1, place, [0, -1]].sum() / latents[-1, place].sum()
        assert layer["beyond"] == pytest.approx(outside)


def test_heat_maps_have_a_column_a_snapshot_and_the_largest_latents_on_top(log):
    first, second = contents.layers(log)
    counts = np.array([row["latents"][0] for row in log.layers])[:, 1:-1]
    expected = (counts / counts.max(1, keepdims=True)).T[::-1]
    np.testing.assert_allclose(opacity(first["heat"]), expected, atol=0.003)
    flips = np.sqrt(np.array([1 / 10, 1 / 20, 1 / 30, 1 / 40]) * 10)
    np.testing.assert_allclose(opacity(first["flips"]), flips[None], atol=0.003)
    assert not opacity(second["flips"]).any()


def test_all_layers_together(log):
    found = contents.together(log)
    counts = np.array([np.sum(row["latents"], axis=0) for row in log.layers])[:, 1:-1]
    np.testing.assert_allclose(opacity(found["heat"]), (counts / counts.max(1, keepdims=True)).T[::-1], atol=0.003)
    assert (found["begin"], found["end"]) == (0, 4)
    assert found["near"] == pytest.approx(1.5 * 6 / 41)
    assert found["first"] != found["last"]


def test_the_hard_part_begins_at_the_first_hard_log(log):
    charts = {chart.title: chart for chart in contents.charts(log)}
    assert {chart.shaded for chart in charts.values()} == {(350.0, 350.0)}
    assert [name for name, *_ in charts["Loss"].curves] == ["training", "test, hard", "test, soft"]
    styles = {title: [style for _, style, _ in chart.curves] for title, chart in charts.items()}
    assert styles["Loss"][1:] == styles["Accuracy on test data"]


def test_small_pictures_show_their_pixels(log):
    assert [one["small"] for one in contents.images(log)["pictures"]] == [True, False]
