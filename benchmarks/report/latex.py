"""The figures as LaTeX tables (with the package booktabs)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from benchmarks.report.formatting import decimal, places, scaled
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
        parts += ["", *_table(name, summarise(study.of(name)), columns)]
    return "\n".join(parts) + "\n"


def _table(name: str, rows: list[Row], columns: Sequence[str]) -> list[str]:
    """One table."""
    metrics = shown(rows, columns)
    seeds = sorted({seed for row in rows for seed in row.seeds})
    summary = facts(name).summary
    about = f"{escape(name)}: {escape(summary)}. " if summary else f"{escape(name)}. "
    over = f"over seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}"
    spread = "Mean $\\pm$ sample standard deviation " if len(seeds) > 1 else "One run, "
    headings = ["method", "seeds", *(metric.heading for metric in metrics)]
    return [
        r"\begin{table}[tbp]",
        r"\centering",
        f"\\caption{{{about}{spread}{over}.}}",
        f"\\label{{tab:{slug(name)}}}",
        f"\\begin{{tabular}}{{l{'r' * (len(headings) - 1)}}}",
        r"\toprule",
        " & ".join(map(escape, headings)) + r" \\",
        r"\midrule",
        *(_line(row, metrics) for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]


def _line(row: Row, metrics: list[Metric]) -> str:
    """One line of a table."""
    cells = [escape(row.label), str(len(row.seeds)), *(_cell(row.figures[metric.key], metric) for metric in metrics)]
    return " & ".join(cells) + r" \\"


def _cell(figure: Figure, metric: Metric) -> str:
    """Mean and deviation in mathematics, where a minus is a minus; two hyphens for what does not exist."""
    if figure.mean is None:
        return "--"
    digits = places(figure, metric)
    texts = [decimal(scaled(value, metric), digits) for value in (figure.mean, figure.std) if value is not None]
    return "$" + re.sub(",", "{,}", r" \pm ".join(texts)) + "$"
