"""A report of whatever runs are in some folders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.digest import code_digest
from benchmarks.folders import NEEDED
from benchmarks.report.study import Study
from benchmarks.settings import InputError
from benchmarks.trace import FORMAT


def study(folders: Sequence[Path], title: str) -> Study:
    """Gather finished runs; those of one method that differ in what was changed get labels that say so.

    Args:
        folders: every result below them is taken.
        title: of the report.

    Returns:
        What the report is made of.

    Raises:
        InputError: if a folder is none, or there is no result, or several results are of the same protocol, label and
            seed and not just one of them is of this code.
    """
    every: dict[tuple[str, str, int], dict[Path, dict[str, Any]]] = {}
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{str(folder)!r} is no folder; expected one with results")
        for file in sorted(folder.rglob("*.json")):
            result = _read(file)
            if result is None:
                continue
            label = " ".join([result["method"], *(f"{k}={v}" for k, v in sorted(result["changed"].items()))])
            same = every.setdefault((result["protocol"], label, result["seed"]), {})
            same[file.resolve()] = {**result, "label": label}  # folders may lie in one another
    found = {key: _one_of(key, same) for key, same in every.items()}
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for (protocol, label, _), result in found.items():
        rows.setdefault((protocol, label), []).append(result)
    for row in rows.values():
        check_alike(row)
    if not found:
        raise InputError(f"no result of format {FORMAT} is in {', '.join(str(folder) for folder in folders)}")
    command = " ".join(["python -m benchmarks report", *(str(folder) for folder in folders)])
    return Study(title, command, [found[key] for key in sorted(found, key=_order)])


def _one_of(key: tuple[str, str, int], results: Mapping[Path, dict[str, Any]]) -> dict[str, Any]:
    """Choose the result of this code, where a run was done again after a change."""
    own = [result for result in results.values() if len(results) == 1 or result.get("code") == code_digest()]
    if len(own) != 1:
        files = ", ".join(str(file) for file in results)
        which = f"{len(own)} of them are" if own else "none of them is"
        raise InputError(
            f"there are {len(results)} results of {' '.join(map(str, key))}, and {which} of the code as it is now: "
            f"give folders that hold one of {files}"
        )
    return own[0]


def check_alike(row: Sequence[Mapping[str, Any]]) -> None:
    """Refuse runs of one row that cannot be averaged.

    Args:
        row: runs of one protocol and method that should differ in their seeds alone.

    Raises:
        InputError: if they are of different code, data or versions.
    """
    for what in ("code", "origin", "data", "versions", "libraries"):
        known = [result[what] for result in row if result.get(what) is not None]
        for other in known[1:]:
            if other != known[0]:
                name = f"{row[0]['method']} on {row[0]['protocol']}"
                raise InputError(
                    f"the runs of {name} are of different {what} ({known[0]} and {other}): give folders with runs of "
                    f"one, or do them again"
                )


def _read(file: Path) -> dict[str, Any] | None:
    """Read a result; None for other files."""
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(result, dict) or result.get("format") != FORMAT or not result.keys() >= NEEDED:
        return None
    if not isinstance(result["method"], str) or not isinstance(result["changed"], dict):
        raise InputError(f"{str(file)!r} is no result, or damaged: remove it")
    return result


def _order(key: tuple[str, str, int]) -> tuple[Any, ...]:
    """Protocols and methods as their tables have them, others behind."""
    from benchmarks.methods import METHODS
    from benchmarks.protocols import PROTOCOLS

    protocols, methods = list(PROTOCOLS), list(METHODS)
    protocol, label, seed = key
    method = label.split()[0]
    return (
        protocols.index(protocol) if protocol in protocols else len(protocols),
        methods.index(method) if method in methods else len(methods),
        label,
        seed,
    )
