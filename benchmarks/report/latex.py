"""The figures as LaTeX tables (with the package booktabs)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from benchmarks.report.formatting import (
    decimal,
    figure_interval,
    over,
    places,
    runs_of,
    scaled,
    shared_changes,
    unsaid_changes,
)
from benchmarks.report.markup import slug
from benchmarks.report.protocol_facts import facts
from benchmarks.report.study import Study
from benchmarks.report.summary import Figure, Metric, Row, shown, summarise

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    '"': "''",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    **{mark: f"\\{mark}" for mark in "&%$#_{}"},
}


def escape(text: str) -> str:
    """Make text that LaTeX prints as it is.

    Args:
        text: any text; line breaks become spaces.
    """
    return "".join(_SPECIAL.get(mark, mark) for mark in " ".join(text.split()))


def latex(study: Study, *, columns: Sequence[str] = ()) -> str:
    r"""Write one table for each protocol with a finished run.

    Args:
        study: what there is to report.
        columns: keys of the metrics that the tables have; none takes those that there are.

    Returns:
        The text, to be read in by `\input`.
    """
    parts = ["% \\usepackage{booktabs}"]
    parts += [f"% {line}" for line in study.command.splitlines()]
    if study.unfinished:
        parts.append(f"% Not complete: {study.unfinished} run(s) not finished.")
    for name in study.protocols:
        parts += ["", *_table(study, name, columns)]
    return "\n".join(parts) + "\n"


def _table(study: Study, name: str, columns: Sequence[str]) -> list[str]:
    """One table."""
    rows = summarise(study.of(name))
    metrics = shown(rows, columns)
    headings = ["method", "seeds", *(metric.heading for metric in metrics)]
    return [
        r"\begin{table}[tbp]",
        r"\centering",
        f"\\caption{{{' '.join(_caption(study, name, rows))}}}",
        f"\\label{{tab:{slug(name)}}}",
        f"\\begin{{tabular}}{{l{'r' * (len(headings) - 1)}}}",
        r"\toprule",
        " & ".join(map(escape, headings)) + r" \\",
        r"\midrule",
        *(line for row in rows for line in _lines(row, rows, metrics)),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]


def _caption(study: Study, name: str, rows: list[Row]) -> list[str]:
    """What the table is of, sentence by sentence, with all that a reader has to know before believing it."""
    summary = facts(name).summary
    found = [f"{escape(name)}: {escape(summary)}." if summary else f"{escape(name)}."]
    shared = ", ".join(f"{key}={value}" for key, value in shared_changes(rows).items())
    if shared:
        found.append(escape(f"Changed from the protocol: {shared}."))
    if any(len(row.seeds) > 1 for row in rows):
        seeds = escape(over(rows))
        found.append(f"Mean $\\pm$ sample standard deviation {seeds}; below, the 95\\,\\% t-interval of the mean.")
    else:
        each = " each" if len(rows) > 1 else ""
        found.append(escape(f"One run{each}, {over(rows).removeprefix('over ')}."))
    broken = [f"{row.diverged} of {row.label}" for row in rows if row.diverged]
    if broken:
        found.append(escape(f"Diverged, but in the figures: {', '.join(broken)}."))
    labels = dict.fromkeys(label for where, label, _, _ in study.failures if where == name)
    if labels:
        texts = ", ".join(f"{study.failed(name, label)} of {label}" for label in labels)
        found.append(escape(f"Runs that failed and are left out: {texts}."))
    return found


def _lines(row: Row, rows: list[Row], metrics: list[Metric]) -> list[str]:
    """A row of the table; below it, small, the intervals."""
    changed = unsaid_changes(row, rows)
    label = escape(f"{row.label} ({changed})" if changed else row.label)
    figures = [(row.figures[metric.key], metric) for metric in metrics]
    lines = [" & ".join([label, runs_of(row), *(_cell(figure, metric) for figure, metric in figures)]) + r" \\"]
    below = [figure_interval(figure, metric) for figure, metric in figures]
    if any(below):
        small = [f"{{\\scriptsize ${_number(text)}$}}" if text else "" for text in below]
        lines.append(" & ".join(["", "", *small]) + r" \\")
    return lines


def _cell(figure: Figure, metric: Metric) -> str:
    """Mean and deviation in mathematics, where a minus is a minus; two hyphens for what does not exist."""
    if figure.mean is None:
        return "--"
    digits = places(figure, metric)
    whole = metric.digits == 0 and figure.std == 0  # a count that is the same in all runs
    values = (figure.mean, None if whole else figure.std)
    texts = [decimal(scaled(value, metric), digits) for value in values if value is not None]
    return "$" + _number(r" \pm ".join(texts)) + "$"


def _number(text: str) -> str:
    """Keep the commas of thousands from being taken for those of a list."""
    return re.sub(r",(?=\d)", "{,}", text)
