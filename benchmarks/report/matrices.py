"""What the plots show, as plain numbers: means over seeds of accuracy matrices, curves and free shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.report.summary import figure, number

#: From so many runs on a band is the t-interval of the mean; below, it spans the runs.
ENOUGH = 5

Matrix = list[list[float | None]]


@dataclass(frozen=True)
class Curve:
    """One line of a plot, a point after each experience.

    Attributes:
        mean: mean over the runs; None where no run has a number.
        low: lower edge of the band; None where fewer than two have one.
        high: its upper edge.
        runs: how many runs.
    """

    mean: list[float | None]
    low: list[float | None]
    high: list[float | None]
    runs: int


def matrix_of(run: Mapping[str, Any]) -> Matrix:
    """Return a run's accuracy matrix, without what is not a number; empty if it has none."""
    return [[number(value) for value in row or []] for row in run.get("accuracy_matrix") or []]


def mean_matrix(runs: Sequence[Mapping[str, Any]]) -> Matrix:
    """Average the accuracy matrices of one label.

    Args:
        runs: its runs.

    Returns:
        Row = after this experience, column = test experience; matrices of another shape than the first are left out.
    """
    found = [matrix for matrix in map(matrix_of, runs) if matrix and matrix[0]]
    if not found:
        return []
    shape = [len(row) for row in found[0]]
    alike = [matrix for matrix in found if [len(row) for row in matrix] == shape]
    return [[figure(matrix[i][j] for matrix in alike).mean for j in range(length)] for i, length in enumerate(shape)]


def seen_so_far(matrix: Matrix) -> list[float | None]:
    """Average, after each experience, the accuracies on those learned up to then."""
    return [_whole_mean(row[: i + 1]) for i, row in enumerate(matrix)]


def first_experience(matrix: Matrix) -> list[float | None]:
    """Return the accuracy on the first experience after each one."""
    return [row[0] if row else None for row in matrix]


def at_the_end(matrix: Matrix) -> list[float | None]:
    """Return what `seen_so_far` and `first_experience` are for joint training: all experiences, and the first."""
    return [_whole_mean(matrix[-1]), matrix[-1][0]] if matrix and matrix[-1] else [None, None]


def curve(lines: Sequence[Sequence[float | None]]) -> Curve:
    """Average lines.

    Args:
        lines: one of each run.

    Returns:
        Mean and band; the band is the 95 % t-interval of the mean with `ENOUGH` runs or more, else from the lowest
        to the highest run.
    """
    mean: list[float | None] = []
    low: list[float | None] = []
    high: list[float | None] = []
    for position in range(max(map(len, lines), default=0)):
        values = [line[position] for line in lines if position < len(line)]
        known = [value for value in values if value is not None]
        found = figure(known)
        mean.append(found.mean)
        if len(known) < 2:
            low.append(None)
            high.append(None)
        elif len(known) < ENOUGH:
            low.append(min(known))
            high.append(max(known))
        else:
            low.append(found.low)
            high.append(found.high)
    return Curve(mean, low, high, len(lines))


def free_shares(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """Average, layer by layer, how much of the input space is free after each experience.

    Args:
        runs: those of one label.

    Returns:
        Layer to percent after each experience; empty for methods without bases.
    """
    lines: dict[str, list[list[float | None]]] = {}
    for run in runs:
        shares = [(experience or {}).get("free_share") or {} for experience in run.get("experiences") or []]
        for layer in dict.fromkeys(layer for each in shares for layer in each):
            lines.setdefault(layer, []).append([number(each.get(layer)) for each in shares])
    return {
        layer: [None if value is None else 100 * value for value in curve(own).mean] for layer, own in lines.items()
    }


def _whole_mean(values: Sequence[float | None]) -> float | None:
    """Mean; None if one is missing, as the mean of the rest would be of other experiences."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
