"""A report of whatever runs are in some folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
        InputError: if a folder is none, or there is no result, or two results are of the same protocol, label and seed.
    """
    found: dict[tuple[str, str, int], dict[str, Any]] = {}
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{str(folder)!r} is no folder; expected one with results")
        for file in sorted(folder.rglob("*.json")):
            result = _read(file)
            if result is None:
                continue
            label = " ".join([result["method"], *(f"{k}={v}" for k, v in sorted(result["changed"].items()))])
            key = (result["protocol"], label, result["seed"])
            if key in found:
                raise InputError(
                    f"there are two results of {' '.join(map(str, key))} (of different code, data or versions?): give "
                    f"folders that hold one of them"
                )
            found[key] = {**result, "label": label}
    if not found:
        raise InputError(f"no result of format {FORMAT} is in {', '.join(str(folder) for folder in folders)}")
    command = " ".join(["python -m benchmarks report", *(str(folder) for folder in folders)])
    return Study(title, command, [found[key] for key in sorted(found, key=_order)])


def _read(file: Path) -> dict[str, Any] | None:
    """Read a result; None for other files."""
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) and result.get("format") == FORMAT and "changed" in result else None


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
