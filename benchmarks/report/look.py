"""How lines look: told apart by colour, by marker and by dashes, for grey print and every kind of colour vision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

#: Okabe and Ito's colours for every kind of colour vision; their yellow is left out, too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

#: Shapes that are told apart at five points, and whether they are white inside: fifteen, so that none comes twice where
#: fifteen lines are in one plot.
MARKERS = tuple((shape, False) for shape in "os^DvPX*") + tuple((shape, True) for shape in "os^Dv<>")

#: Lengths of ink and gap in line widths; empty is solid.
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2), (8, 2, 1.5, 1.5, 1.5, 2))

#: Reference lines (joint training) look like nothing else.
REFERENCE: dict[str, Any] = {"color": "#444444", "linewidth": 1.2, "dashes": (2.0, 3.0)}


@dataclass(frozen=True)
class Style:
    """Look of one label in every plot.

    Attributes:
        colour: of line and marker.
        marker: its shape.
        dashes: of the line.
        hollow: whether the marker is white inside.
    """

    colour: str
    marker: str
    dashes: tuple[float, ...]
    hollow: bool

    @property
    def line(self) -> dict[str, Any]:
        """Arguments for a line."""
        return {"color": self.colour, "linewidth": 1.5, **self.dots} | (
            {"dashes": self.dashes} if self.dashes else {"linestyle": "solid"}
        )

    @property
    def dark(self) -> str:
        """The colour as one that text can have on white."""
        parts = (int(self.colour[place : place + 2], 16) for place in (1, 3, 5))
        return "#" + "".join(f"{round(0.62 * part):02x}" for part in parts)

    @property
    def dots(self) -> dict[str, Any]:
        """Arguments for markers alone."""
        return {
            "marker": self.marker,
            "markersize": 6.5 if self.marker == "*" else 5,
            "markerfacecolor": "white" if self.hollow else self.colour,
            "markeredgecolor": self.colour,
            "markeredgewidth": 1.1,
        }


def styles(labels: Sequence[str]) -> dict[str, Style]:
    """Give each label a look of its own.

    Args:
        labels: in the order in which looks are handed out.

    Returns:
        Label to look; the first 15 differ in their markers alone, and the first 105 in something.
    """
    return {
        label: Style(
            COLOURS[index % len(COLOURS)],
            MARKERS[index % len(MARKERS)][0],
            DASHES[index % len(DASHES)],
            MARKERS[index % len(MARKERS)][1],
        )
        for index, label in enumerate(dict.fromkeys(labels))
    }
