"""Line charts as data for an SVG, and tables of numbers as images: what the template of the report draws."""

import base64
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.ticker import MaxNLocator
from PIL import Image

__all__ = ["Chart", "Curve", "heat_map", "line_chart", "outline", "outline_ticks", "short"]

# Of the drawing, in its own units; a screen shows one unit as about one pixel.
WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 44, 350, 10, 184
POINTS = 400
Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
        name: in the legend.
        points: x and y, x growing.
        style: of the line, the number of a class `c0`, `c1`, ... of the page.
    """

    name: str
    points: tuple[Point, ...]
    style: int = 0


@dataclass(frozen=True)
class Chart:
    """A line chart, laid out: places are those of the drawing.

    Attributes:
        title: above it.
        text: what it shows, in words.
        curves: name (of a single point with its value), style and path.
        data: names and points, as JSON for the script.
        xticks: place and label.
        yticks: place and label.
        shaded: from where to where the background is shaded; None without it.
        note: below it.
        percent: values of y are fractions.
    """

    title: str
    text: str
    curves: tuple[tuple[str, int, str], ...]
    data: str
    xticks: tuple[tuple[float, str], ...]
    yticks: tuple[tuple[float, str], ...]
    shaded: tuple[float, float] | None
    note: str
    percent: bool


def short(value: float, digits: int = 4) -> str:
    """A number with up to four digits, as a person would write it."""
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def line_chart(
    title: str,
    curves: Sequence[Curve],
    *,
    end: float,
    log: bool = False,
    percent: bool = False,
    hard_from: float | None = None,
    note: str = "",
) -> Chart:
    """Lay out a chart of some curves over the epochs.

    Args:
        title: above it.
        curves: at least one, with at least one point each; longer ones than 400 points are thinned.
        end: the last x.
        log: a logarithmic y axis, if all y are positive and differ tenfold.
        percent: y are fractions, to be shown in percent.
        hard_from: x from which on the weights are hard; it is shaded.
        note: below it.
    """
    thinned = [replace(curve, points=_thin(curve.points)) for curve in curves]
    values = [y for curve in thinned for _, y in curve.points]
    low, high = min(values), max(values)
    log = log and low > 0 and high > 10 * low
    scale = math.log10 if log else float
    if low == high:
        half = (abs(low) or 1) / 2
        low, high = (max(0.0, low - half), min(1.0, high + half)) if percent else (low - half, high + half)
    ticks = _log_ticks(low, high) if log else _ticks(low, high)
    bottom, top = scale(min(low, *ticks)), scale(max(high, *ticks))
    end = end or 1.0

    def x_place(x: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * min(1.0, x / end), 1)

    def y_place(y: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * (scale(y) - bottom) / (top - bottom), 1)

    drawn, data, words = [], [], []
    for curve in thinned:
        places = [[x_place(x), y_place(y), round(x, 4), float(f"{y:.5g}")] for x, y in curve.points]
        path = "M" + "L".join(f"{x} {y}" for x, y, *_ in places)
        first, last = _label(curve.points[0][1], percent), _label(curve.points[-1][1], percent)
        single = len(places) == 1  # Its mark says little, so that its value stands in the legend.
        drawn.append((f"{curve.name} {first}" if single else curve.name, curve.style, path + "m-4 0h8" * single))
        words.append(f"{curve.name}: {first if single else f'from {first} to {last}'}")
        data.append({"name": curve.name, "points": places})
    return Chart(
        title=title,
        text=f"{title} over the epochs. {'; '.join(words)}.",
        curves=tuple(drawn),
        data=json.dumps(data, separators=(",", ":")),
        xticks=tuple((x_place(x), short(x)) for x in _ticks(0.0, end) if x <= end),
        yticks=tuple((y_place(y), _label(y, percent)) for y in ticks),
        shaded=None if hard_from is None else (x_place(hard_from), float(RIGHT)),
        note=note,
        percent=percent,
    )


def _label(y: float, percent: bool) -> str:
    return f"{short(100 * y)} %" if percent else short(y)


def _thin(points: Sequence[Point]) -> tuple[Point, ...]:
    """At most 400 of them, the last one included."""
    step = -(-len(points) // POINTS)
    return tuple(points[: len(points) - 1 : step]) + (points[-1],)


def _ticks(low: float, high: float) -> list[float]:
    return [float(tick) for tick in MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [10.0**power for power in range(first, last + 1, max(1, (last - first) // 4))]


def outline(shares: Sequence[float], top: float) -> str:
    """The path of a histogram, closed at the bottom, as wide and high as a chart.

    Args:
        shares: heights of the bars.
        top: height of the drawing.
    """
    step = (RIGHT - LEFT) / len(shares)
    heights = [round(BOTTOM - (BOTTOM - TOP) * min(1.0, share / top), 1) for share in shares]
    bars = "".join(f"V{height}h{step:.3f}" for height in heights)
    return f"M{LEFT} {BOTTOM}{bars}V{BOTTOM}Z"


def outline_ticks(low: float, high: float, bins: int) -> list[tuple[float, str]]:
    """Place and label of the whole numbers below an `outline` of bins from low to high, and one more at each end."""
    step = (RIGHT - LEFT) / (bins + 2)
    whole = range(math.ceil(low), math.floor(high) + 1)
    return [(round(LEFT + step * (1 + (x - low) / (high - low) * bins), 1), str(x).replace("-", "−")) for x in whole]


def heat_map(values: np.ndarray) -> str:
    """A table of numbers in [0, 1] as the opacity of a colour, one pixel each: base64 of a PNG.

    Args:
        values: `[rows, columns]`; the first row is the top one.
    """
    opacity = (np.clip(values, 0, 1) * 255).round().astype(np.uint8)
    # The page gives the colour: the image is a mask.
    image = Image.merge("LA", (Image.new("L", opacity.shape[::-1], 0), Image.fromarray(opacity)))
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()
