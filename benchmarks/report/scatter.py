"""Accuracy against cost, a named point for each label."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.report.look import Style
from benchmarks.report.summary import BY_KEY, Figure, Row
from benchmarks.report.svg import canvas, drawing, to_svg

#: Where the middle of a name may stand, seen from its dot: near ones first, at these distances in points and angles.
_DISTANCES = (0.0, 8.0, 18.0, 30.0, 44.0, 60.0)
_ANGLES = (0, 180, 90, 270, 45, 315, 135, 225, 22, 338, 158, 202)

#: Room that a dot takes, and how far from it the nearest name begins.
_DOT = 4.5

#: Left, lower, right and upper edge, points: plain numbers, as thousands of places are tried.
Box = tuple[float, float, float, float]

#: From this ratio of the largest to the smallest cost on, the axis is logarithmic.
_WIDE = 15.0


def draw(name: str, title: str, axis: str, rows: Sequence[Row], key: str, looks: Mapping[str, Style]) -> str:
    """Draw the points.

    Args:
        name: what ids begin with.
        title: what it shows.
        axis: what the cost is.
        rows: one for each label.
        key: the metric that is the cost.
        looks: label to look.

    Returns:
        The `<svg>` element; empty if no label has both figures.
    """
    points = [row for row in rows if row.figures["acc"].count and row.figures[key].count]
    if not points:
        return ""
    costs = [row.figures[key].mean or 0.0 for row in points]
    with drawing():
        figure = canvas(5.6, 3.8)
        axes = figure.add_subplot()
        if min(costs) > 0 and max(costs) / min(costs) >= _WIDE:
            axes.set_xscale("log")
            steps = (1.0, 2.0, 5.0) if max(costs) / min(costs) < 100 else (1.0,)
            axes.xaxis.set_major_locator(LogLocator(subs=steps))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
            axes.xaxis.set_minor_locator(NullLocator())
        axes.margins(0.14, 0.12)
        places = []
        for row, cost in zip(points, costs, strict=True):
            look = looks[row.label]
            axes.errorbar(
                cost,
                row.figures["acc"].mean or 0.0,
                xerr=_bar(row.figures[key], key),
                yerr=_bar(row.figures["acc"], "acc"),
                clip_on=False,  # the axes end at what is possible: a dot there is drawn whole
                linestyle="none",
                ecolor=look.colour,
                elinewidth=0.7,
                zorder=3,
                **look.dots,
            )
            places.append((cost, row.figures["acc"].mean or 0.0))
        axes.set_xlabel(axis)
        axes.set_ylabel("ACC (%)")
        axes.set_ylim(*_within(axes.get_ylim(), [y for _, y in places], "acc"))
        if axes.get_xscale() == "linear":  # a logarithmic one never reaches zero
            axes.set_xlim(*_within(axes.get_xlim(), costs, key))
        _names(figure, axes, {row.label: looks[row.label].dark for row in points}, places)
        return to_svg(figure, name, title)


def whiskers(figure: Figure, key: str) -> tuple[float, float] | None:
    """Return how far the bar of a dot reaches below and above it.

    Args:
        figure: what the dot shows.
        key: of its metric.

    Returns:
        The sample standard deviation, or as much of it as is possible on that side; None where there is none.
    """
    if figure.std is None or figure.mean is None:
        return None
    lowest, highest = BY_KEY[key].lowest, BY_KEY[key].highest
    below = figure.std if lowest is None else max(0.0, min(figure.std, figure.mean - lowest))
    above = figure.std if highest is None else max(0.0, min(figure.std, highest - figure.mean))
    return below, above


def _bar(figure: Figure, key: str) -> list[list[float]] | None:
    """The same as matplotlib takes it."""
    found = whiskers(figure, key)
    return None if found is None else [[found[0]], [found[1]]]


def _within(ends: tuple[float, float], values: Sequence[float], key: str) -> tuple[float, float]:
    """Let an axis end at what is possible, and show whatever there is all the same."""
    low, high = ends
    lowest, highest = BY_KEY[key].lowest, BY_KEY[key].highest
    low = low if lowest is None else max(low, min(lowest, *values))
    return low, high if highest is None else min(high, max(highest, *values))


def _names(figure: Any, axes: Any, labels: Mapping[str, str], points: Sequence[tuple[float, float]]) -> None:
    """Write the names one by one, each where it covers least, with a thin line to its dot if that is far."""
    figure.draw_without_rendering()  # limits of the axes are known from here on
    area: Box = tuple(axes.get_window_extent().extents)
    dots = [tuple(map(float, axes.transData.transform(point))) for point in points]
    taken = [(x - _DOT, y - _DOT, x + _DOT, y + _DOT) for x, y in dots]
    taken += [bar for collection in axes.collections for bar in _bars(collection, axes)]
    for (label, colour), point, (x, y) in zip(labels.items(), points, dots, strict=True):
        text = axes.annotate(
            "\n".join(textwrap.wrap(label, 22)) or " ",
            point,
            (0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8.5,
            color=colour,
            zorder=4,
        )
        size = text.get_window_extent()
        box, far = _best(x, y, size.width, size.height, taken, area)
        text.set_position(((box[0] + box[2]) / 2 - x, (box[1] + box[3]) / 2 - y))
        if far:
            nearest = (min(max(x, box[0]), box[2]) - x, min(max(y, box[1]), box[3]) - y)
            line = {"arrowstyle": "-", "color": "#777777", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
            axes.annotate("", point, nearest, textcoords="offset points", arrowprops=line, zorder=2)
        taken.append(box)


def _best(x: float, y: float, width: float, height: float, taken: Sequence[Box], area: Box) -> tuple[Box, bool]:
    """Choose a name's box, and tell whether it is so far from its dot that a line is needed."""
    best: tuple[float, Box, bool] = (math.inf, area, False)
    for distance in _DISTANCES:
        for angle in _ANGLES:
            right, up = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            # The box touches the circle around the dot, whatever its width.
            reach = min(
                (width / 2 + _DOT + 1) / abs(right) if abs(right) > 1e-9 else math.inf,
                (height / 2 + _DOT + 1) / abs(up) if abs(up) > 1e-9 else math.inf,
            )
            middle_x, middle_y = x + right * (reach + distance), y + up * (reach + distance)
            box = (middle_x - width / 2, middle_y - height / 2, middle_x + width / 2, middle_y + height / 2)
            covered = sum(_overlap(box, other) for other in taken)
            cost = covered + 2 * (width * height - _overlap(box, area)) + 0.5 * distance
            if cost < best[0] - 1e-9:
                best = (cost, box, distance > 10)
    return best[1], best[2]


def _bars(collection: Any, axes: Any) -> list[Box]:
    """The boxes of error bars, a little wider than they are."""
    found = []
    for segment in collection.get_segments() if hasattr(collection, "get_segments") else ():
        ends = axes.transData.transform(segment)
        (left, lower), (right, upper) = ends.min(axis=0) - 0.7, ends.max(axis=0) + 0.7
        found.append((float(left), float(lower), float(right), float(upper)))
    return found


def _overlap(one: Box, other: Box) -> float:
    """Area that two boxes share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return width * height if width > 0 and height > 0 else 0.0
