"""The part of the page that one protocol has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.report import circumstances as around
from benchmarks.report.figures_table import figures_table
from benchmarks.report.formatting import with_spread
from benchmarks.report.markup import Cell, Markup, bullets, details, join, lines, table, tag
from benchmarks.report.plots import Plot
from benchmarks.report.protocol_facts import beside, facts, published_text
from benchmarks.report.settings_part import settings_part
from benchmarks.report.statistics import Test, compare_pairs
from benchmarks.report.study import Study
from benchmarks.report.summary import METRICS, Row, summarise
from benchmarks.report.tests_part import tests_part

Runs = Mapping[str, Sequence[Mapping[str, Any]]]


def protocol(study: Study, name: str, prefix: str, drawn: Sequence[Plot], test: Test) -> Markup:
    """Write the section of one protocol.

    Args:
        study: what there is to report.
        name: the protocol.
        prefix: its id.
        drawn: its plots.
        test: which paired test.

    Returns:
        The section; what there is no data for is left out.
    """
    known = facts(name)
    runs = study.of(name)
    rows = summarise(runs)
    parts: list[object] = [tag("h2", name), tag("p", known.summary) if known.summary else ""]
    if not known.summary:
        parts.append(tag("p", "This version of the benchmarks has no protocol of that name."))
    if runs:
        found = compare_pairs(runs, test=test)
        parts += [
            _warnings(runs),
            tag("h3", "Figures"),
            figures_table(rows, found),
            _published(name, rows),
            tests_part(list(runs), found),
            _drawings(drawn),
        ]
    else:
        parts.append(tag("p", "No run of this protocol has finished."))
    parts += [_incomplete(study, name), _notes(known.notes, runs)]
    if runs:
        parts += [settings_part(runs), _circumstances(runs)]
    return tag("section", lines(parts), id=prefix)


def _warnings(runs: Runs) -> Markup:
    """Say loudly that runs of different code, versions or devices stand in one table."""
    mixed = [each for each in around.circumstances(runs) if each.mixed]
    if not mixed:
        return Markup("")
    texts = []
    for each in mixed:
        values = "; ".join(f"{value} ({', '.join(labels)})" for value, labels in each.values.items())
        texts.append(join([tag("strong", f"{each.name}: "), values]))
    heavy = any(each.matters for each in mixed)
    text = (
        "These runs are not of one code and one set of versions. Differences between methods may be differences "
        "between versions."
        if heavy
        else "These runs were not made under the same circumstances: times and memory cannot be compared."
    )
    return tag("div", tag("p", tag("strong", text)), bullets(texts), class_="warning", role="note")


def _published(name: str, rows: list[Row]) -> Markup:
    """Published figures beside ours."""
    found = beside(name, rows)
    if not found:
        return Markup("")
    metric = {each.key: each for each in METRICS}
    body = []
    for each in found:
        theirs = [published_text(each.record, key) for key in ("acc", "bwt")]
        ours = [with_spread(each.row.figures[key], metric[key]) if each.row else "-" for key in ("acc", "bwt")]
        body.append(
            [
                each.record.method if each.row is None else each.row.label,
                *(Cell(tag("td", text, class_="figure")) for text in (*theirs, *ours)),
                str(len(each.row.seeds)) if each.row else "not run",
                "yes" if each.agrees else "no",
                join([each.differences, tag("small", f"Source: {each.record.source}")]),
            ]
        )
    headings = (
        "method", "their ACC (%)", "their BWT (%)", "ACC here (%)", "BWT here (%)", "seeds here",
        "same protocol",
        "what differs, and the source",
    )  # fmt: skip
    caption = "Figures of papers, and of the authors' code, beside ours. "
    caption += "Where the protocols are not the same, the numbers are not comparable."
    return lines([tag("h3", "Figures from elsewhere"), table(caption, headings, body, "text")])


def _drawings(drawn: Sequence[Plot]) -> Markup:
    """All plots, heat maps after the others."""
    if not drawn:
        return Markup("")
    matrices = [plot for plot in drawn if plot.kind == "matrix"]
    parts: list[object] = [tag("h3", "Plots"), _figures([plot for plot in drawn if plot.kind != "matrix"], "figures")]
    if matrices:
        text = (
            "Accuracy in percent on each experience (columns) after each one (rows), on one scale of colours. Left of "
            "and below the stepped line: what is learned; beyond it: what is still to come."
        )
        parts += [tag("h3", "Accuracy matrices"), tag("p", text), _figures(matrices, "figures matrices")]
    return lines(parts)


def _figures(drawn: Sequence[Plot], kind: str) -> Markup:
    """Drawings with their captions."""
    made = [tag("figure", Markup(plot.svg), tag("figcaption", plot.caption)) for plot in drawn]
    return tag("div", lines(made), class_=kind) if made else Markup("")


def _incomplete(study: Study, name: str) -> Markup:
    """Runs that failed and methods that were left out."""
    failed = [
        join([tag("strong", f"{label}, seed {seed}: "), text])
        for where, label, seed, text in study.failures
        if where == name
    ]
    left_out = [join([tag("strong", f"{method}: "), reason]) for method, reason in study.left_out.get(name, {}).items()]
    return lines(
        [
            tag("h3", "Failed runs") if failed else "",
            bullets(failed),
            tag("h3", "Methods left out") if left_out else "",
            bullets(left_out),
        ]
    )


def _notes(notes: Sequence[str], runs: Runs) -> Markup:
    """What a reader has to know."""
    memory = [f"Memory: {text}." for text in around.memory_notes(runs)]
    items = [*(f"{note[:1].upper()}{note[1:]}." for note in notes), *memory, *around.further_notes(runs)]
    return lines([tag("h3", "Notes"), bullets(items)]) if items else Markup("")


def _circumstances(runs: Runs) -> Markup:
    """How the runs were made."""
    rows = [
        [each.name, lines(tag("div", value if not each.mixed else f"{value}: {', '.join(labels)}")
                          for value, labels in each.values.items())]
        for each in around.circumstances(runs)
    ]  # fmt: skip
    made = table("Code is a digest of everything that a result may depend on.", ("what", "found"), rows, "text")
    return details("Code, versions, device", made)
