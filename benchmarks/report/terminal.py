"""Tables: one row a method, mean and sample standard deviation over the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

_COLUMNS = (
    ("ACC %", "acc", 2),
    ("BWT %", "bwt", 2),
    ("training s", "train_seconds", 2),
    ("memory MiB", "peak_memory_mb", 0),
)
_GROWTH = ("growth", "growth", 3)
_HELD = ("held kB", "bytes_held", 1)
_MEMORY = {
    "resident_during_run": "peak resident memory of the process during the run",
    "resident_since_start": "peak resident memory of the process since it began",
    "cuda_allocated": "peak memory allocated on the device",
    "unavailable": "not available on this system",
}


@dataclass(frozen=True)
class Cell:
    """Mean and spread of one figure.

    Attributes:
        mean: mean over the runs that have the figure; None if none has.
        deviation: sample standard deviation; None for fewer than two runs.
        digits: decimal places to show.
    """

    mean: float | None
    deviation: float | None
    digits: int

    def __str__(self) -> str:
        if self.mean is None:
            return "-"
        text = f"{self.mean:.{self.digits}f}"
        return text if self.deviation is None else f"{text} ± {self.deviation:.{self.digits}f}"


@dataclass(frozen=True)
class Row:
    """One method in a table.

    Attributes:
        method: its name.
        seeds: how many runs it rests on.
        cells: one for each column.
        memory: what the memory column means; empty without runs.
        growth: what the method added to the network, as a share of its numbers.
        held: kilobytes that it keeps of earlier experiences.
    """

    method: str
    seeds: int
    cells: tuple[Cell, ...]
    memory: str = ""
    growth: Cell = Cell(None, None, _GROWTH[2])
    held: Cell = Cell(None, None, _HELD[2])


def rows(results: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> list[Row]:
    """Summarise the runs of one protocol.

    Args:
        results: finished runs.
        methods: the order of the rows; methods without a finished run get a row of dashes.

    Returns:
        One row a method.
    """
    table = []
    for method in methods:
        chosen = [result for result in results if result["method"] == method]
        cells = tuple(cell([result[key] for result in chosen], digits) for _, key, digits in _COLUMNS)
        memory = _MEMORY[chosen[0]["peak_memory_kind"]] if chosen else ""
        growth = cell([result.get(_GROWTH[1]) for result in chosen], _GROWTH[2])
        held = cell([_kilobytes(result.get(_HELD[1])) for result in chosen], _HELD[2])
        table.append(Row(method, len(chosen), cells, memory, growth, held))
    return table


def _columns(table: Sequence[Row]) -> tuple[list[str], list[tuple[Cell, ...]]]:
    """Headers and cells of a table; growth and what is held have a column where a method has the figure."""
    headers, cells = [header for header, _, _ in _COLUMNS], [row.cells for row in table]
    for header, more in ((_GROWTH[0], [row.growth for row in table]), (_HELD[0], [row.held for row in table])):
        if any(own.mean is not None for own in more):
            headers.append(header)
            cells = [(*before, own) for before, own in zip(cells, more, strict=True)]
    return headers, cells


def _kilobytes(count: float | None) -> float | None:
    return None if count is None else count / 1000


def cell(numbers: Sequence[float | None], digits: int) -> Cell:
    """Mean and sample standard deviation of those that are numbers."""
    known = [number for number in numbers if number is not None]
    if not known:
        return Cell(None, None, digits)
    deviation = statistics.stdev(known) if len(known) > 1 else None
    return Cell(statistics.fmean(known), deviation, digits)


def one_line(result: Mapping[str, Any]) -> str:
    """Describe one run.

    Args:
        result: a finished run.

    Returns:
        Accuracy, backward transfer, growth and time.
    """
    transfer = "" if result["bwt"] is None else f", BWT {result['bwt']:+.2f}"
    growth = "" if result.get("growth") is None else f", growth {result['growth']:.3f}"
    if result.get("diverged"):
        return f"diverged (loss is no number; ACC {result['acc']:.2f}), training {result['train_seconds']:.1f} s"
    return f"ACC {result['acc']:.2f}{transfer}{growth}, training {result['train_seconds']:.1f} s"


def rich_table(name: str, table: Sequence[Row]) -> Table:
    """Make a table for the terminal.

    Args:
        name: the protocol.
        table: its rows.

    Returns:
        The table.
    """
    result = Table(title=name, padding=(0, 0))  # else a narrow terminal has no room for names
    result.add_column("method", min_width=max((len(row.method) for row in table), default=0))
    result.add_column("seeds", justify="right")
    headers, cells = _columns(table)
    for header in headers:
        result.add_column(header, justify="right")
    for row, own in zip(table, cells, strict=True):
        result.add_row(row.method, str(row.seeds), *map(str, own))
    return result
