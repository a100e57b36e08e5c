"""The paired tests of a protocol on the page: a matrix to look at, and a list with everything."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.report.formatting import decimal, interval, p_value
from benchmarks.report.markup import Cell, Markup, bullets, details, lines, table, tag
from benchmarks.report.statistics import ALPHA, NAMES, Comparison, Comparisons

#: With more labels than these there is no matrix: it would be wider than any page.
WIDEST = 16


def tests_part(labels: Sequence[str], found: Comparisons) -> Markup:
    """Write the tests.

    Args:
        labels: of the protocol, in order.
        found: their comparisons.

    Returns:
        Heading, notes, matrix and list; empty for fewer than two labels.
    """
    if not found.pairs:
        return Markup("")
    parts: list[object] = [tag("h3", "Paired tests on ACC"), bullets(found.notes)]
    if len(labels) <= WIDEST and found.tested:
        parts.append(_matrix(labels, found))
    parts.append(details(f"All {len(found.pairs)} pairs", _list(found)))
    return lines(parts)


def _matrix(labels: Sequence[str], found: Comparisons) -> Markup:
    """Differences, row minus column, with corrected p-values."""
    body = []
    for row in labels:
        cells: list[object] = [row]
        for column in labels:
            pair = found.between(row, column)
            cells.append(Cell(tag("td", "·", class_="self")) if pair is None else _cell(pair))
        body.append(cells)
    caption = (
        f"ACC of the row less that of the column, mean over common seeds, and p ({NAMES[found.test]}, corrected by "
        f"Holm's method for {found.tested} pairs). Told apart (p below {ALPHA}): bold on grey."
    )
    return table(caption, ["", *labels], body, "matrix")


def _cell(pair: Comparison) -> Cell:
    """Difference and corrected p."""
    text = decimal(pair.difference, 2)
    signed = f"+{text}" if pair.difference is not None and pair.difference > 0 else text
    below = tag("small", "no test" if pair.corrected is None else p_value(pair.corrected))
    return Cell(tag("td", signed, below, class_="differs" if pair.differs else None))


def _list(found: Comparisons) -> Markup:
    """Every pair with seeds, interval, p before and after the correction."""
    remarks = any(pair.note for pair in found.pairs)
    body = [
        [
            f"{pair.first} vs {pair.second}",
            str(len(pair.seeds)),
            decimal(pair.difference, 2),
            interval(pair.low, pair.high, 2) or "-",
            p_value(pair.p),
            p_value(pair.corrected),
            *([pair.note] if remarks else []),
        ]
        for pair in found.pairs
    ]
    caption = "ACC of the first less that of the second, with its 95 % t-interval, which is not corrected."
    headings = ["pair", "common seeds", "difference", "interval", "p", "corrected p"]
    return table(caption, [*headings, *(["remark"] if remarks else [])], body)
