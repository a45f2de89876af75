"""Charts: places of points and ticks, against the arithmetic of axes."""

import base64
import io
import json
import math

import numpy as np
import pytest
from PIL import Image

from proxbit.analysis.report.charts import Curve, heat_map, line_chart, outline, outline_ticks, short

# The frame of every chart, in the units of its drawing.
LEFT, RIGHT, TOP, BOTTOM = 44, 350, 10, 184


def points_of(chart, curve=0):
    return json.loads(chart.data)[curve]["points"]


def between(value, low, high):
    return low - 1e-6 <= value <= high + 1e-6


SHORT = [
    (0, "0"),
    (0.0, "0"),
    (1.0, "1"),
    (0.12345, "0.1235"),
    (-2.5, "-2.5"),
    (12345.6, "12346"),
    (3e-5, "3e-5"),
    (1.25e7, "1.2e7"),
]


def test_numbers_are_short():
    for value, text in SHORT:
        assert short(value) == text


def test_points_lie_where_their_values_are():
    chart = line_chart("Loss", [Curve("a", ((0.0, 0.0), (5.0, 0.5), (10.0, 1.0)))], end=10.0)
    (x0, y0, *_), (x1, y1, *_), (x2, y2, *_) = points_of(chart)
    assert (x0, x2) == (LEFT, RIGHT)
    assert x1 == pytest.approx((LEFT + RIGHT) / 2, abs=0.1)
    assert y0 > y1 > y2
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.2)
    ticks = {label: place for place, label in chart.yticks}
    assert ticks["0"] == y0 and ticks["1"] == y2


def test_everything_lies_in_the_frame():
    rng = np.random.default_rng(0)
    for scale in (1e-9, 1.0, 1e9):
        curve = Curve("a", tuple((float(x), float(y)) for x, y in enumerate(scale * rng.normal(size=30))))
        chart = line_chart("x", [curve], end=29.0)
        assert all(between(x, LEFT, RIGHT) and between(y, TOP, BOTTOM) for x, y, *_ in points_of(chart))
        assert all(between(place, TOP, BOTTOM) for place, _ in chart.yticks)
        assert all(between(place, LEFT, RIGHT) for place, _ in chart.xticks)
        assert len(chart.yticks) >= 2


def test_one_value_is_seen_and_no_share_is_beyond_all():
    chart = line_chart("Accuracy", [Curve("hard", ((5.0, 0.97),))], end=5.0, percent=True)
    assert {label for _, label in chart.yticks} <= {f"{share} %" for share in range(0, 101)}
    assert chart.curves[0][0] == "hard 97 %"
    assert chart.text == "Accuracy over the epochs. hard: 97 %."


def test_a_logarithmic_axis_takes_equal_steps_for_equal_ratios():
    chart = line_chart("mu", [Curve("mu", ((0.0, 0.3), (1.0, 3.0), (2.0, 30.0)))], end=2.0, log=True)
    heights = [y for _, y, *_ in points_of(chart)]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)
    assert [label for _, label in chart.yticks] == ["0.1", "1", "10", "100"]


NARROW = [(0.0, 100.0), (1.0, 2.0)]


def test_a_logarithmic_axis_is_linear_where_it_says_nothing():
    for values in NARROW:
        curve = Curve("a", ((0.0, values[0]), (1.0, values[1])))
        assert line_chart("x", [curve], end=1.0, log=True) == line_chart("x", [curve], end=1.0)


CONSTANTS = [0.0, 5.0, -3.0]


def test_a_single_point_and_a_constant_are_drawn():
    for value in CONSTANTS:
        chart = line_chart("x", [Curve("a", ((1.0, value),)), Curve("b", ((0.0, value), (1.0, value)))], end=1.0)
        assert chart.curves[0][2].endswith("m-4 0h8")
        assert all(between(y, TOP, BOTTOM) for curve in (0, 1) for _, y, *_ in points_of(chart, curve))


def test_percent_and_words():
    chart = line_chart("Accuracy", [Curve("hard", ((0.0, 0.25), (2.0, 0.75)))], end=2.0, percent=True)
    assert chart.text == "Accuracy over the epochs. hard: from 25 % to 75 %."
    assert all(label.endswith(" %") for _, label in chart.yticks)


def test_long_curves_are_thinned_and_keep_their_ends():
    points = tuple((float(x), float(x % 7)) for x in range(10_007))
    found = points_of(line_chart("x", [Curve("a", points)], end=10_006.0))
    assert 200 <= len(found) <= 401
    assert (found[0][2], found[-1][2]) == (0, 10_006)


def test_the_hard_part_is_shaded_to_the_end():
    curve = Curve("a", ((0.0, 0.0), (10.0, 1.0)))
    assert line_chart("x", [curve], end=10.0).shaded is None
    assert line_chart("x", [curve], end=10.0, hard_from=5.0).shaded == ((LEFT + RIGHT) / 2, RIGHT)


def test_a_histogram_has_a_bar_for_each_share():
    path = outline([0.0, 0.5, 1.0], 1.0)
    heights = [float(part.split("h")[0]) for part in path.split("V")[1:-1]]
    assert heights == [BOTTOM, (TOP + BOTTOM) / 2, TOP]
    assert path.startswith(f"M{LEFT} {BOTTOM}") and path.endswith("Z")
    (left, first), *_, (right, last) = outline_ticks(-3.0, 3.0, 41)
    step = (RIGHT - LEFT) / 43
    assert (first, last) == ("−3", "3")
    assert (left, right) == (pytest.approx(LEFT + step, abs=0.1), pytest.approx(RIGHT - step, abs=0.1))


def test_a_heat_map_is_a_mask():
    values = np.array([[0.0, 0.5, 1.0], [2.0, -1.0, 0.25]])
    picture = Image.open(io.BytesIO(base64.b64decode(heat_map(values))))
    assert (picture.mode, picture.size) == ("LA", (3, 2))
    opacity = np.asarray(picture)[..., 1] / 255
    np.testing.assert_allclose(opacity, np.clip(values, 0, 1), atol=0.5 / 255)
    assert math.isclose(opacity.max(), 1)
