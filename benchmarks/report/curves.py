"""Lines over the experiences."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.ticker import MaxNLocator

from benchmarks.report.look import REFERENCE, Style, styles
from benchmarks.report.matrices import Curve
from benchmarks.report.svg import canvas, drawing, to_svg

#: More layers than these have no legend: their colours run from the first to the last.
NAMED = 12


def draw(
    name: str,
    title: str,
    axis: str,
    lines: Mapping[str, Curve],
    levels: Mapping[str, float | None],
    looks: Mapping[str, Style],
) -> str:
    """Draw a line with its band for each label, and a horizontal one for each level.

    Args:
        name: what ids begin with.
        title: what it shows.
        axis: what the numbers are.
        lines: label to line.
        levels: label to the one number of a reference.
        looks: label to look.

    Returns:
        The `<svg>` element; empty if there is no number to draw.
    """
    drawn = {label: line for label, line in lines.items() if any(value is not None for value in line.mean)}
    known = {label: level for label, level in levels.items() if level is not None}
    if not drawn and not known:
        return ""
    with drawing():
        figure = canvas(5.0, 3.5)
        axes = figure.add_subplot()
        handles = {}
        shade = 0.14 if len(drawn) <= 6 else 0.08  # many bands lie on each other
        for label, line in drawn.items():
            x = range(1, len(line.mean) + 1)
            low, high = _plain(line.low), _plain(line.high)
            if any(not math.isnan(value) for value in low):
                axes.fill_between(x, low, high, color=looks[label].colour, alpha=shade, linewidth=0)
            (handles[label],) = axes.plot(x, _plain(line.mean), **looks[label].line)
        for label, level in known.items():
            handles[label] = axes.axhline(level, **REFERENCE)
        longest = max((len(line.mean) for line in drawn.values()), default=1)
        _experiences(axes, longest)
        axes.set_ylabel(axis)
        _within(axes, [*(value for line in drawn.values() for value in (*line.mean, *line.low, *line.high)),
                       *known.values()])  # fmt: skip
        # As the lines lie at the end, from above: the eye goes straight across.
        order = sorted(drawn, key=lambda label: -next((v for v in reversed(drawn[label].mean) if v is not None), 0.0))
        _legend(axes, {label: handles[label] for label in [*known, *order]})
        return to_svg(figure, name, title)


def draw_layers(name: str, title: str, shares: Mapping[str, Sequence[float | None]]) -> str:
    """Draw the free share of each layer.

    Args:
        name: what ids begin with.
        title: what it shows.
        shares: layer to percent after each experience.

    Returns:
        The `<svg>` element.
    """
    looks = styles(list(shares))
    colours = matplotlib.colormaps["cividis"]
    with drawing():
        figure = canvas(4.2, 2.8)
        axes = figure.add_subplot()
        handles = {}
        for index, (layer, values) in enumerate(shares.items()):
            look = looks[layer].line if len(shares) <= NAMED else {"color": colours(index / (len(shares) - 1))}
            (handles[layer],) = axes.plot(range(1, len(values) + 1), _plain(values), **look)
        _experiences(axes, max(map(len, shares.values())))
        axes.set_ylabel("free share (%)")
        axes.set_ylim(-3, 103)
        if len(shares) <= NAMED:
            _legend(axes, handles)
        return to_svg(figure, name, title)


def _plain(values: Sequence[float | None]) -> list[float]:
    """Numbers for matplotlib, which leaves a gap where one is NaN."""
    return [math.nan if value is None else value for value in values]


def _experiences(axes: Any, count: int) -> None:
    """Number the experiences."""
    axes.set_xlabel("after experience")
    axes.set_xlim(1 - 0.04 * max(1, count - 1), count + 0.04 * max(1, count - 1))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))


def _within(axes: Any, values: Sequence[float | None]) -> None:
    """Show all values, and no percentage that cannot be but by a little room for markers."""
    known = [value for value in values if value is not None]
    low, high = min(known), max(known)
    room = max(0.5, 0.05 * (high - low))
    axes.set_ylim(max(-2.0, low - room), min(102.0, high + room) if low >= 0 else high + room)


def _legend(axes: Any, handles: Mapping[str, Any]) -> None:
    """Put the names beside the plot."""
    names = ["\n".join(textwrap.wrap(label, 22)) or " " for label in handles]
    axes.legend(
        list(handles.values()),
        names,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.03),
        handlelength=3.6,
        labelspacing=0.45,
    )
