"""Every plot of a report as a file of its own, for papers and slides."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.files import write_text
from benchmarks.report.markup import slug
from benchmarks.report.plots import Plot
from benchmarks.report.svg import standalone

#: The folder beside the page.
FOLDER = "plots"

#: What files of each kind are called; a kind with a drawing for each label has the label behind it.
_NAMES = {
    "seen": "accuracy-curve",
    "first": "first-experience-curve",
    "time": "accuracy-against-time",
    "memory": "accuracy-against-memory",
    "free": "free-share",
    "matrix": "accuracy-matrix",
}

#: Labels of large grids are longer than names of files may be.
_LONGEST = 120

#: The last line of each file. By its digest of name and content a later report knows what it may remove: neither files
#: of other origin, nor copies under another name, nor what somebody has edited.
_MARK = re.compile(rb"<!-- python -m benchmarks, ([0-9a-f]{16}) -->\n\Z")


def plot_files(drawn: Mapping[str, Sequence[Plot]]) -> dict[str, str]:
    """Name all plots and make them stand alone.

    Args:
        drawn: protocol to its plots.

    Returns:
        Name to text of each file.
    """
    files: dict[str, str] = {}
    for protocol, plots in drawn.items():
        for plot in plots:
            stem = "-".join(slug(part) for part in (protocol, _NAMES[plot.kind], plot.label) if part)[:_LONGEST]
            name, count = f"{stem}.svg", 1
            while name in files:  # labels may differ in signs alone
                count += 1
                name = f"{stem}-{count}.svg"
            text = standalone(plot.svg, plot.caption)
            files[name] = f"{text}<!-- python -m benchmarks, {_digest(name, text.encode())} -->\n"
    return files


def write_plots(folder: Path, drawn: Mapping[str, Sequence[Plot]]) -> list[Path]:
    """Write all plots, and remove those of an earlier report that are not among them.

    Args:
        folder: where; made if there is a plot.
        drawn: protocol to its plots.

    Returns:
        The files.

    Raises:
        OSError: if one cannot be written or removed.
    """
    files = plot_files(drawn)
    for name, text in files.items():
        write_text(folder / name, text)
    for path in sorted(folder.glob("*.svg")):
        if path.name not in files and _is_ours(path):
            path.unlink(missing_ok=True)
    return [folder / name for name in files]


def _is_ours(path: Path) -> bool:
    """Tell whether a report wrote a file, under this name and with just this content."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        content = path.read_bytes()
    except OSError:  # somebody else's, who keeps it to themselves
        return False
    found = _MARK.search(content)
    return found is not None and found[1].decode() == _digest(path.name, content[: found.start()])


def _digest(name: str, content: bytes) -> str:
    """Digest a file's name and its content but for the last line: 16 hexadecimal digits."""
    return hashlib.sha256(name.encode() + b"\0" + content).hexdigest()[:16]
