"""Lines over the experiences."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.ticker import MaxNLocator

from benchmarks.report.look import REFERENCE, Style, styles
from benchmarks.report.matrices import Curve
from benchmarks.report.svg import canvas, drawing, to_svg

#: Lowest and highest percentage of what is drawn here: nothing lies beyond, so that a band ends there.
LOWEST, HIGHEST = 0.0, 100.0

#: More layers than these have no legend: their colours run from the first to the last.
NAMED = 12

#: The axis ends at what is possible: a marker there is drawn whole, and over the line of the axis.
_WHOLE: Mapping[str, Any] = {"clip_on": False, "zorder": 3}


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
            low, high = _plain(map(_possible, line.low)), _plain(map(_possible, line.high))
            if any(not math.isnan(value) for value in low):
                axes.fill_between(x, low, high, color=looks[label].colour, alpha=shade, linewidth=0)
            (handles[label],) = axes.plot(x, _plain(line.mean), **_WHOLE, **looks[label].line)
        for label, level in known.items():
            handles[label] = axes.axhline(level, **_WHOLE, **REFERENCE)
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
            (handles[layer],) = axes.plot(range(1, len(values) + 1), _plain(values), **_WHOLE, **look)
        _experiences(axes, max(map(len, shares.values())))
        axes.set_ylabel("free share (%)")
        axes.set_ylim(LOWEST, HIGHEST)
        if len(shares) <= NAMED:
            _legend(axes, handles)
        return to_svg(figure, name, title)


def beyond(line: Curve) -> bool:
    """Tell whether the band of a line reaches beyond what is possible, and is drawn up to there."""
    return any(value is not None and value != _possible(value) for value in (*line.low, *line.high))


def _possible(value: float | None) -> float | None:
    """Return the nearest value that is possible."""
    return None if value is None else min(HIGHEST, max(LOWEST, value))


def _plain(values: Iterable[float | None]) -> list[float]:
    """Numbers for matplotlib, which leaves a gap where one is NaN."""
    return [math.nan if value is None else value for value in values]


def _experiences(axes: Any, count: int) -> None:
    """Number the experiences."""
    axes.set_xlabel("after experience")
    axes.set_xlim(1 - 0.04 * max(1, count - 1), count + 0.04 * max(1, count - 1))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))


def _within(axes: Any, values: Sequence[float | None]) -> None:
    """Show all values, and no percentage that cannot be."""
    known = [value for value in map(_possible, values) if value is not None]
    low, high = min(known), max(known)
    room = max(0.5, 0.05 * (high - low))
    axes.set_ylim(max(LOWEST, low - room), min(HIGHEST, high + room))


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
