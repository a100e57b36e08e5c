"""Intervals that reach beyond what a figure can be."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.report.formatting import decimal, figure_interval, places, scaled
from benchmarks.report.summary import Figure, Metric, Row


def beyond(rows: Sequence[Row], metrics: Sequence[Metric]) -> str:
    """Say which intervals of a table reach beyond what is possible.

    Args:
        rows: of the table.
        metrics: its columns.

    Returns:
        One sentence; empty if there is no such interval.
    """
    parts, counts = [], set()
    for metric in metrics:
        found = [row for row in rows if _reaches_beyond(row.figures[metric.key], metric)]
        if found:
            counts |= {row.figures[metric.key].count for row in found}
            texts = [f"{row.label} {figure_interval(row.figures[metric.key], metric)}" for row in found]
            parts.append(f"{metric.name} ({_range(metric)}) of {', '.join(texts)}")
    if not parts:
        return ""
    seeds = " to ".join(str(count) for count in sorted({min(counts), max(counts)}))
    return (
        f"The t-interval of {seeds} seeds reaches beyond what is possible: {'; '.join(parts)}. It takes figures to be "
        "normally distributed, which so near to a bound they are not."
    )


def _reaches_beyond(figure: Figure, metric: Metric) -> bool:
    """Whether an interval, as it is written, has an end that is not possible."""
    if not figure.std or figure.low is None or figure.high is None:
        return False
    digits = places(figure, metric)
    low, high = (float(decimal(scaled(end, metric), digits).replace(",", "")) for end in (figure.low, figure.high))
    lowest, highest = scaled(metric.lowest, metric), scaled(metric.highest, metric)
    return (lowest is not None and low < lowest) or (highest is not None and high > highest)


def _range(metric: Metric) -> str:
    """Write what is possible."""
    lowest, highest = (decimal(scaled(end, metric), 0) for end in (metric.lowest, metric.highest))
    unit = f" {metric.unit}" if metric.unit else ""
    return f"from {lowest}{unit} on" if metric.highest is None else f"{lowest} to {highest}{unit}"
