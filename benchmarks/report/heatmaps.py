"""Accuracy matrices as heat maps."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import Normalize

from benchmarks.report.matrices import Matrix
from benchmarks.report.svg import canvas, drawing, to_svg

#: Up to so many experiences each cell has its number.
NUMBERED = 12

#: Grey print keeps their order. In so few steps a colour bar is drawn as shapes, not as an image.
_COLOURS = matplotlib.colormaps["cividis"].resampled(48)


def lower_end(found: Iterable[Matrix]) -> float:
    """Return where the colours begin.

    Args:
        found: all matrices that are to be compared.

    Returns:
        The ten at or below the lowest accuracy on anything learned, so that the colours tell these apart.
    """
    learned = [
        value
        for matrix in found
        for i, row in enumerate(matrix)
        for j, value in enumerate(row)
        if value is not None and (j <= i or len(matrix) < len(row))
    ]
    return min(90.0, max(0.0, 10.0 * (min(learned, default=0.0) // 10)))


def draw(name: str, title: str, label: str, matrix: Matrix, low: float) -> str:
    """Draw one matrix.

    Args:
        name: what ids begin with.
        title: what it shows.
        label: what stands above it.
        matrix: row = after this experience, column = test experience, percent; None leaves a cell empty.
        low: accuracy at the dark end of the colours, and below it; 100 is at the light end.

    Returns:
        The `<svg>` element.
    """
    columns = max(map(len, matrix))
    numbered = columns <= NUMBERED
    cell = 0.44 if columns <= 6 else 0.345 if numbered else max(0.07, 2.9 / columns)
    with drawing():
        figure = canvas(columns * cell + 1.2, max(len(matrix) * cell, 0.5) + 0.9)
        # Axes of the size asked for, whatever stands around them: cells are the same in all heat maps.
        width, height = figure.get_size_inches()
        axes = figure.add_axes((0.6 / width, 0.5 / height, columns * cell / width, len(matrix) * cell / height))
        axes.grid(False)
        for side in axes.spines.values():
            side.set_visible(False)
        values = np.array([[np.nan if value is None else value for value in row] for row in matrix], dtype=float)
        scale = Normalize(low, 100.0)
        mesh = axes.pcolormesh(values, cmap=_COLOURS, norm=scale, edgecolors="face", linewidth=0.2)
        axes.invert_yaxis()
        if numbered:
            _numbers(axes, matrix, scale)
        else:
            bar = figure.colorbar(
                mesh, ax=axes, fraction=0.05, pad=0.03, label="accuracy (%)", extend="min" if low > 0 else "neither"
            )
            bar.outline.set_visible(False)
        _ticks(axes, len(matrix), columns)
        axes.set_title("\n".join(textwrap.wrap(label, 34)), loc="left")
        return to_svg(figure, name, title)


def _numbers(axes: Any, matrix: Matrix, scale: Normalize) -> None:
    """Write each accuracy into its cell, in black or white, whichever is easier to read there."""
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            if value is None:
                axes.text(j + 0.5, i + 0.5, "-", ha="center", va="center", fontsize=8)
                continue
            colour = ink(_COLOURS(scale(value)))
            text = "100" if value >= 99.95 else f"{value:.1f}"
            # What is not yet learned is smaller: the eye goes to what is.
            size = (8.5 if j <= i or len(matrix) < len(row) else 7.5) - (len(row) > 6)
            axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=size, color=colour)


def ink(colour: Sequence[float]) -> str:
    """Return the colour that text has on another one: whichever of black and white has the higher contrast."""
    return "white" if luminance(colour) < 0.179 else "black"


def luminance(colour: Sequence[float]) -> float:
    """Relative luminance of a colour as WCAG defines it; at .179 black and white have the same contrast to it."""
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _ticks(axes: Any, rows: int, columns: int) -> None:
    """Number the experiences, and divide what is learned from what is not."""
    step = 1 if columns <= NUMBERED else 5 if columns <= 40 else 10
    shown = sorted({1, *range(step, columns + 1, step)})
    axes.set_xticks([k - 0.5 for k in shown], [str(k) for k in shown])
    axes.set_xlabel("accuracy on experience")
    axes.tick_params(length=0)
    if rows < columns:
        axes.set_yticks([0.5], ["all"])
        return
    axes.set_yticks([k - 0.5 for k in shown], [str(k) for k in shown])
    axes.set_ylabel("after experience")
    if columns > 1:
        steps = [(k, k) for k in range(1, columns)]
        x = [value for k, _ in steps for value in (k, k)]
        y = [value for k, _ in steps for value in (k - 1, k)]
        axes.plot([*x, columns], [*y, columns - 1], color="white", linewidth=2.6, solid_capstyle="butt")
        axes.plot([*x, columns], [*y, columns - 1], color="black", linewidth=1.0, solid_capstyle="butt")
