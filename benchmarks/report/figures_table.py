"""The main table of a protocol on the page."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.report.formatting import (
    count_of,
    figure_interval,
    over,
    runs_of,
    shared_changes,
    unsaid_changes,
    with_spread,
)
from benchmarks.report.markup import Markup, join, lines, table, tag
from benchmarks.report.possible import beyond
from benchmarks.report.statistics import ALPHA, Comparisons
from benchmarks.report.summary import Figure, Metric, Row, shown


def figures_table(rows: Sequence[Row], found: Comparisons) -> Markup:
    """Write the table.

    Args:
        rows: one for each label.
        found: what the tests say, for the marks beside the highest ACC.

    Returns:
        The table, and below it what the marks mean, and which intervals reach beyond what is possible.
    """
    metrics = shown(rows)
    marks, explanation = _marks(rows, found)
    body = [
        [
            _name(row, rows),
            runs_of(row),
            *(_cell(row, row.figures[metric.key], metric, marks if metric.key == "acc" else {}) for metric in metrics),
        ]
        for row in rows
    ]
    caption = f"Mean ± sample standard deviation {over(rows)}; below, the 95 % t-interval."
    made = table(caption, ["method", "seeds", *(metric.heading for metric in metrics)], body, "main")
    shared = ", ".join(f"{key}={value}" for key, value in shared_changes(rows).items())
    note = tag("p", f"Changed from the protocol in all rows: {shared}.") if shared else ""
    remark = beyond(rows, metrics)
    return lines([made, note, tag("p", explanation) if explanation else "", tag("p", remark) if remark else ""])


def _name(row: Row, rows: Sequence[Row]) -> Markup:
    """Label, with what was changed where the label does not say so."""
    changed = unsaid_changes(row, rows)
    return join([row.label, tag("span", f" ({changed})", class_="mark") if changed else ""])


def _cell(row: Row, figure: Figure, metric: Metric, marks: dict[str, str]) -> Markup:
    """One figure with its interval."""
    mark = marks.get(row.label)
    below = figure_interval(figure, metric)
    return join(
        [
            with_spread(figure, metric),
            tag("span", f" {mark}", class_="mark") if mark else "",
            tag("small", below) if below else "",
            tag("small", f"{count_of(figure, row)} runs") if count_of(figure, row) else "",
        ]
    )


def _marks(rows: Sequence[Row], found: Comparisons) -> tuple[dict[str, str], str]:
    """Mark the highest ACC, and those that the tests cannot tell apart from it.

    Joint training sees all data at once: it is a reference, and takes no part.
    """
    ranked = [row for row in rows if not row.joint and row.figures["acc"].mean is not None]
    if len(ranked) < 2:
        return {}, ""
    best = max(ranked, key=lambda row: row.figures["acc"].mean or 0.0)
    marks = {best.label: "▲"}
    pairs = {row.label: found.between(best.label, row.label) for row in ranked if row is not best}
    known = {label: pair for label, pair in pairs.items() if pair is not None and pair.corrected is not None}
    joint = " Joint training, which has all data at once, takes no part." if any(row.joint for row in rows) else ""
    ahead = {label: "△" for label, pair in known.items() if pair.differs and (pair.difference or 0.0) < 0}
    if ahead:
        joint = f" △ ahead of it on the seeds that both have.{joint}"
    if not known or not found.reachable:
        return marks, f"▲ highest mean ACC; with so few seeds the tests cannot tell whether it is any better.{joint}"
    # By the same p as in the list of pairs: the best is only known once all have been looked at.
    marks |= {label: "≈" for label, pair in known.items() if not pair.differs} | ahead
    text = "▲ highest mean ACC; ≈ not told apart from it, which does not mean equal "
    text += f"(p not below {ALPHA}, corrected for all {found.tested} pairs)."
    if len(known) < len(pairs):
        text += " Methods without a mark may not have been tested: see below."
    return marks, text + joint
