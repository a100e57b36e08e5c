"""The figures as files for other programs: Markdown for people, CSV for pandas."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from benchmarks.report import circumstances as around
from benchmarks.report.formatting import (
    changes,
    count_of,
    figure_interval,
    over,
    runs_of,
    shared_changes,
    unsaid_changes,
    with_spread,
)
from benchmarks.report.possible import beyond
from benchmarks.report.protocol_facts import beside, facts, named, published_text
from benchmarks.report.statistics import NAMES, Test, compare_pairs
from benchmarks.report.study import Study
from benchmarks.report.summary import METRICS, Metric, Row, shown, summarise

#: Columns of the CSV file.
COLUMNS = ("protocol", "label", "seeds", "metric", "mean", "std", "ci_low", "ci_high", "changed", "diverged", "failed")


def csv_table(study: Study) -> str:
    """Write one line for each protocol, label and metric, in the units of the results: always all metrics.

    Args:
        study: what there is to report.

    Returns:
        The text; what does not exist is an empty field, `seeds` counts the runs that have the figure, and numbers are
        written so that they read back as the same. `changed` says what was set otherwise than the protocol has it,
        `diverged` how many of the label's runs did (they count in its figures), `failed` how many have no result.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for name in study.protocols:
        for row in summarise(study.of(name)):
            failed = study.failed(name, row.label)
            for metric in METRICS:
                found = row.figures[metric.key]
                numbers = (found.mean, found.std, found.low, found.high)
                cells = ["" if value is None else repr(value) for value in numbers]
                writer.writerow([name, row.label, found.count, metric.key, *cells, changes(row), row.diverged, failed])
    return buffer.getvalue()


def markdown(study: Study, *, test: Test = "t", columns: Sequence[str] = ()) -> str:
    """Write all tables for a file that people read.

    Args:
        study: what there is to report.
        test: which paired test the last line of each table speaks of.
        columns: keys of the metrics that the tables have; none takes those that there are.

    Returns:
        GitHub's Markdown.
    """
    lines = [f"# {_text(study.title)}", ""]
    if study.command:
        lines += [*(f"    {line}" for line in study.command.splitlines()), ""]
    if study.unfinished:
        lines += [f"**Not complete**: {study.unfinished} run(s) not finished.", ""]
    if not study.results:
        lines += ["No run has finished.", ""]
    for name in named(study):
        lines += [*_section(study, name, test, columns), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def _section(study: Study, name: str, test: Test, columns: Sequence[str]) -> list[str]:
    """The part of one protocol."""
    known = facts(name)
    lines = [f"## {_text(name)}", ""]
    if known.summary:
        lines += [_text(known.summary), ""]
    runs = study.of(name)
    rows = summarise(runs)
    notes = []
    if rows:
        metrics = shown(rows, columns)
        lines += _table(
            ["method", "seeds", *(metric.heading for metric in metrics)],
            [
                [
                    " ".join([row.label, *(f"({text})" for text in [unsaid_changes(row, rows)] if text)]),
                    runs_of(row),
                    *(_figure(row, metric) for metric in metrics),
                ]
                for row in rows
            ],
        )
        notes.append(f"Mean ± sample standard deviation {over(rows)}; in brackets the 95 % t-interval of the mean.")
        shared = ", ".join(f"{key}={value}" for key, value in shared_changes(rows).items())
        notes += [f"Changed from the protocol in all rows: {shared}."] if shared else []
        remark = beyond(rows, metrics)
        notes += [remark] if remark else []
        found = compare_pairs(runs, test=test)
        if found.tested:
            alike = sum(not pair.differs for pair in found.pairs if pair.corrected is not None)
            notes.append(
                f"{NAMES[test][0].upper()}{NAMES[test][1:]} on ACC, Holm's correction: {found.tested - alike} of "
                f"{found.tested} pairs told apart."
            )
        notes += found.notes
    for each in beside(name, rows):
        if each.row is not None:
            verdict = "same protocol" if each.agrees else "not the same protocol"
            acc = published_text(each.record, "acc")
            bwt = "" if each.record.bwt is None else f", BWT {published_text(each.record, 'bwt')}"
            notes.append(
                f"Published for {each.row.label}: ACC {acc}{bwt} ({each.record.source}); {verdict}: {each.differences}."
            )
    for thing in around.circumstances(runs):
        if thing.mixed:
            values = "; ".join(f"{value} ({', '.join(labels)})" for value, labels in thing.values.items())
            notes.append(f"**Warning**: {thing.name} differs between runs: {values}.")
    notes += [f"Memory: {text}." for text in around.memory_notes(runs)]
    notes += [f"Note: {note}." for note in known.notes]
    notes += around.further_notes(runs)
    notes += [f"Left out: {method}: {reason}" for method, reason in study.left_out.get(name, {}).items()]
    notes += [f"Failed: {label}, seed {seed}: {text}" for where, label, seed, text in study.failures if where == name]
    return [*lines, *(f"- {_text(note)}" for note in notes)]


def _figure(row: Row, metric: Metric) -> str:
    """Mean, deviation and interval, and how many runs have the figure where not all have."""
    figure = row.figures[metric.key]
    count = count_of(figure, row)
    parts = (with_spread(figure, metric), figure_interval(figure, metric), f"({count})" if count else "")
    return " ".join(part for part in parts if part)


def _table(headings: list[str], rows: list[list[str]]) -> list[str]:
    """A table: names to the left, numbers to the right."""
    lines = [_line(headings), "|---" + "|---:" * (len(headings) - 1) + "|"]
    return [*lines, *map(_line, rows), ""]


def _line(cells: list[str]) -> str:
    """One line of a table."""
    return "| " + " | ".join(_text(cell).replace("|", "\\|") for cell in cells) + " |"


def _text(text: str) -> str:
    """Keep text on one line, and HTML from being taken for HTML."""
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
