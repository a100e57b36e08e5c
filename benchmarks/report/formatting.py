"""Figures as people read them."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.report.summary import Figure, Metric, Row

#: What stands for a figure that does not exist.
MISSING = "-"


def decimal(value: float | None, digits: int | None) -> str:
    """Write a number.

    Args:
        value: the number; None is written as a dash.
        digits: decimal places; None takes two below 10, one below 1000 and none above.
    """
    if value is None:
        return MISSING
    if digits is None:
        digits = 2 if abs(value) < 10 else 1 if abs(value) < 1000 else 0
    text = f"{value:,.{digits}f}" if abs(value) >= 1e5 else f"{value:.{digits}f}"
    return text[1:] if text.startswith("-") and not text.strip("-0.,") else text  # no minus before zero


def scaled(value: float | None, metric: Metric) -> float | None:
    """Bring a number to the unit that people read."""
    return None if value is None else value * metric.factor


def places(figure: Figure, metric: Metric) -> int | None:
    """Decimal places of a figure: mean, deviation and interval have the same."""
    if metric.digits is not None or figure.mean is None:
        return metric.digits
    size = abs(figure.mean * metric.factor)
    return 2 if size < 10 else 1 if size < 1000 else 0


def with_spread(figure: Figure, metric: Metric) -> str:
    """Write mean and sample standard deviation."""
    digits = places(figure, metric)
    text = decimal(scaled(figure.mean, metric), digits)
    whole = metric.digits == 0 and figure.std == 0  # a count that is the same in all runs
    return text if figure.std is None or whole else f"{text} ± {decimal(scaled(figure.std, metric), digits)}"


def interval(low: float | None, high: float | None, digits: int | None) -> str:
    """Write an interval; empty without one."""
    if low is None or high is None:
        return ""
    return f"[{decimal(low, digits)}, {decimal(high, digits)}]"


def figure_interval(figure: Figure, metric: Metric) -> str:
    """Write the interval of a figure; empty without one, and where all runs have the same."""
    if not figure.std:
        return ""
    return interval(scaled(figure.low, metric), scaled(figure.high, metric), places(figure, metric))


def p_value(p: float | None) -> str:
    """Write a p-value; a dash without one."""
    if p is None:
        return MISSING
    return "< .001" if p < 0.001 else "1" if p >= 0.9995 else f"{p:.3f}".removeprefix("0")


def count_of(figure: Figure, row: Row) -> str:
    """Say how many runs have a figure, where not all have."""
    return f"{figure.count} of {len(row.seeds)}" if 0 < figure.count < len(row.seeds) else ""


def runs_of(row: Row) -> str:
    """Write how many runs a row has, and how many of them diverged."""
    return f"{len(row.seeds)} ({row.diverged} diverged)" if row.diverged else str(len(row.seeds))


def changes(row: Row) -> str:
    """Write what differs from the protocol's own settings; empty if nothing does."""
    return ", ".join(f"{key}={value}" for key, value in row.changed.items())


def shared_changes(rows: Sequence[Row]) -> dict[str, str]:
    """Return what was changed alike for all rows."""
    found = dict(rows[0].changed) if rows else {}
    return {key: value for key, value in found.items() if all(row.changed.get(key) == value for row in rows)}


def unsaid_changes(row: Row, rows: Sequence[Row]) -> str:
    """Write what was changed of a row that neither its label nor all rows say; empty if there is nothing."""
    said = {*row.label.split()[1:], *(f"{key}={value}" for key, value in shared_changes(rows).items())}
    return ", ".join(text for text in changes(row).split(", ") if text and text not in said)


def over(rows: Sequence[Row]) -> str:
    """Name the seeds of a table (`over seeds 0, 1`), row by row where they are not the same ones."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for row in rows:
        groups.setdefault(row.seeds, []).append(row.label)
    texts = [", ".join(map(str, seeds)) for seeds in groups]
    if len(groups) < 2:
        return f"over seed{'s' * (len(rows[0].seeds) > 1)} {texts[0]}" if rows else ""
    # The largest group needs no names.
    most = max(groups, key=lambda seeds: len(groups[seeds]))
    others = [f"{', '.join(groups[own])} {text}" for own, text in zip(groups, texts, strict=True) if own != most]
    return f"over seeds {', '.join(map(str, most))} (not the same for all: {'; '.join(others)})"
