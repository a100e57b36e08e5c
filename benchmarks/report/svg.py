"""Drawings as SVG to be put into a page: the same input gives the same text, and several can stand in one page."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager

from matplotlib import style
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

_SETTINGS = {
    "svg.fonttype": "none",  # text stays text: small, searchable, read aloud
    "svg.hashsalt": "figure",
    "text.parse_math": False,  # a label is never a formula
    "font.family": ["DejaVu Sans"],  # the measures of the file do not depend on the fonts of the machine
    "font.size": 9.0,
    "axes.labelsize": 9.0,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
}

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"

#: Characters that HTML puts up with and XML does not.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")

_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))


@contextmanager
def drawing() -> Iterator[None]:
    """Draw and save within this: matplotlib's defaults and ours, whatever the user's own settings are."""
    with style.context(["default", _SETTINGS]):
        yield


def canvas(width: float, height: float) -> Figure:
    """Return an empty figure that no window and no global list knows of.

    Args:
        width: inches.
        height: inches.
    """
    figure = Figure(figsize=(width, height), dpi=72)  # a pixel is a point, as in the file: what is measured is drawn
    FigureCanvasSVG(figure)
    return figure


def to_svg(figure: Figure, name: str, title: str) -> str:
    """Turn a figure into an element of a page.

    Args:
        figure: the figure, cut to what is drawn.
        name: what its ids begin with; each drawing of a page needs one of its own.
        title: what it shows, for those who do not see it.

    Returns:
        The `<svg>` element.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", pad_inches=0.08, metadata=_METADATA)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # A rule for all elements would hold for the whole page; the page has it for drawings alone.
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"<[^>]*>", lambda tag: _own_tag(tag[0], name), text)
    text = re.sub(r"[ \t]*\n\s*", "\n", text).strip()
    head, rest = text.split(">", 1)
    label = f'{head} role="img" aria-labelledby="{name}-title">'
    return f'{label}\n<title id="{name}-title">{html.escape(title)}</title>{rest}'


def standalone(element: str, description: str = "") -> str:
    """Turn a drawing of a page into one that is a file.

    Args:
        element: what `to_svg` returned.
        description: what else there is to say of it, kept in the file but not drawn.

    Returns:
        The text of the file: what the page says of all its drawings is in it, and fonts are asked for by name.
    """
    head, rest = element.split(">", 1)
    title, rest = rest.split("</title>", 1)
    # What is written in an element itself comes before these, as it does before the page's rules.
    head += f' xmlns="{_SVG}" xmlns:xlink="{_XLINK}" version="1.1" stroke-linejoin="round" stroke-linecap="butt">'
    # Not all programs for drawings know a link without its namespace, which HTML has no need of.
    rest = re.sub(r"<[^>]*>", lambda tag: tag[0].replace(' href="', ' xlink:href="'), rest)
    rest = re.sub(r'(<g id="[^"]*QuadMesh[^"]*")', r'\1 shape-rendering="crispEdges"', rest)
    note = f"\n<desc>{html.escape(description)}</desc>" if description else ""
    text = f'<?xml version="1.0" encoding="utf-8"?>\n{head}{title}</title>{note}{rest}\n'
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)


def _own_tag(tag: str, name: str) -> str:
    """Make a tag's ids, and what refers to them, the drawing's own; text between tags is left alone."""
    tag = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", tag)
    tag = tag.replace("xlink:href=", "href=").replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
    tag = re.sub(r'\bid="([^"]*)"', rf'id="{name}-\1"', tag)
    tag = re.sub(r'\bhref="#([^"]*)"', rf'href="#{name}-\1"', tag)
    return re.sub(r"url\(#([^)]*)\)", rf"url(#{name}-\1)", tag)
