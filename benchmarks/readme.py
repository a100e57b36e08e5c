"""Tables of documents that are made from the reference results, never typed.

A document marks their place with two comments: `<!-- reference: PROTOCOL -->`, or `<!-- reference: PROTOCOL methods=a,b
-->` for some methods, and `<!-- end of reference -->`. What stands between them is replaced.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.files import write_text
from benchmarks.report.terminal import Cell, cell
from benchmarks.settings import InputError

#: Documents with such places.
DOCUMENTS = ("README.md",)

#: Methods that keep something of the past, where results of earlier versions do not say how much: Avalanche's own.
_COUNTED_LATER = ("ewc", "replay", "gem", "agem")
_END = "<!-- end of reference -->"
_PLACE = re.compile(r"(<!-- reference: (\S+)(?: methods=(\S+))? -->\n)(.*?)(<!-- end of reference -->)", re.DOTALL)


def fill(text: str, results: Sequence[Mapping[str, Any]]) -> str:
    """Replace what stands in the places for tables.

    Args:
        text: of a document.
        results: the reference results.

    Returns:
        The text with the tables of these results.

    Raises:
        InputError: if a place names a protocol or a method without results, or has no end.
    """

    def replace(found: re.Match[str]) -> str:
        begin, protocol, methods, _, end = found.groups()
        return f"{begin}\n{_table(protocol, methods.split(',') if methods else None, results)}\n{end}"

    places = _PLACE.findall(text)
    if len(places) != text.count("<!-- reference:") or any("<!-- reference:" in place[3] for place in places):
        raise InputError(f"a document has a place for reference results without {_END!r}")
    return _PLACE.sub(replace, text)


def update(root: Path, results: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Bring the tables of all documents up to date.

    Args:
        root: the top folder.
        results: the reference results.

    Returns:
        The documents that changed.

    Raises:
        InputError: as `fill`.
    """
    changed = []
    for name in DOCUMENTS:
        before = (root / name).read_text(encoding="utf-8")
        after = fill(before, results)
        if after != before:
            write_text(root / name, after)
            changed.append(root / name)
    return changed


def _table(protocol: str, methods: Sequence[str] | None, results: Sequence[Mapping[str, Any]]) -> str:
    """Write the table of one protocol."""
    own = [result for result in results if result["protocol"] == protocol]
    if not own:
        raise InputError(f"a document asks for the reference results of {protocol!r}: there are none")
    names = list(dict.fromkeys(result["method"] for result in own))
    for name in methods or ():
        if name not in names:
            raise InputError(f"a document asks for the reference results of {name!r} on {protocol!r}: there are none")
    chosen = [result for result in own if result["method"] in (methods or names)]
    grows = any(result["growth"] is not None for result in chosen)
    titles = ["method", "seeds", "ACC %", "BWT %", "FWT %", *(["growth %"] if grows else [])]
    titles += ["training s", "kept of the past, kB"]
    rows = ["| " + " | ".join(titles) + " |", "|---" + "|---:" * (len(titles) - 1) + "|"]
    heads = own[0]["hyper_parameters"].get("outputs") == "heads"
    for name in methods or names:
        runs = [result for result in own if result["method"] == name]
        seconds = _cell(runs, "train_seconds", 0 if runs[0]["train_seconds"] >= 100 else 1)
        transfer = "-" if heads else _cell(runs, "forward_transfer", 2)
        cells = [name, len(runs), _cell(runs, "acc", 2), _cell(runs, "bwt", 2), transfer]
        cells += [_cell(runs, "growth", 1, 0.01)] if grows else []
        uncounted = name in _COUNTED_LATER and all(run["bytes_held"] is None for run in runs)
        cells += [seconds, "not counted" if uncounted else _cell(runs, "bytes_held", 0, 1000)]
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows)


def _cell(runs: Sequence[Mapping[str, Any]], key: str, digits: int, divisor: float = 1) -> Cell:
    """Mean and sample standard deviation of one figure."""
    return cell([None if run[key] is None else run[key] / divisor for run in runs], digits)
