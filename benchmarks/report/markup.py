"""HTML in small pieces: whatever is not said to be HTML is escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


class Cell(Markup):
    """A whole `<td>` element."""

    __slots__ = ()


def escape(text: object) -> Markup:
    """Make text harmless; what is HTML already stays."""
    return text if isinstance(text, Markup) else Markup(html.escape(str(text)))


def tag(name: str, *content: object, **attributes: str | None) -> Markup:
    """Make an element.

    Args:
        name: of the element.
        content: what is in it, escaped unless it is HTML.
        attributes: `class_` for `class`; those that are None are left out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{written}>{join(content)}</{name}>")


def join(parts: Iterable[object], between: str = "") -> Markup:
    """Put pieces together."""
    return Markup(between.join(escape(part) for part in parts))


def lines(parts: Iterable[object]) -> Markup:
    """Put pieces together, each on a line of its own; empty ones are left out."""
    return Markup("\n".join(text for text in map(escape, parts) if text))


def bullets(items: Iterable[object]) -> Markup:
    """Make a list; empty without items."""
    made = [tag("li", item) for item in items]
    return tag("ul", lines(made)) if made else Markup("")


def table(caption: object, headings: Sequence[object], rows: Iterable[Sequence[object]], kind: str = "") -> Markup:
    """Make a table whose first column names its rows, in a frame that scrolls when the page is narrow.

    Args:
        caption: what it shows.
        headings: one for each column.
        rows: cells, the first of them the row's heading; a `Cell` is taken as it is.
        kind: its class; cells of `text` are aligned to the left.
    """
    head = tag("tr", *(tag("th", heading, scope="col") for heading in headings))
    body = [
        tag(
            "tr",
            tag("th", row[0], scope="row"),
            *(cell if isinstance(cell, Cell) else tag("td", cell) for cell in row[1:]),
        )
        for row in rows
    ]
    made = tag(
        "table", lines([tag("caption", caption), tag("thead", head), tag("tbody", lines(body))]), class_=kind or None
    )
    return tag("div", made, class_="scroll")


def details(summary: object, *content: object) -> Markup:
    """Make a part that opens on demand."""
    return tag("details", tag("summary", summary), lines(content))


def slug(text: str) -> str:
    """Make an id: letters, digits and hyphens."""
    return re.sub(r"[^a-zA-Z0-9]+", "-", text).strip("-").lower() or "x"
