"""Results of complete runs that are kept with the code: what a change of the code is held against.

They are files of `benchmarks/reference/`, one a run, in the format of the results; only settings of the protocols
themselves are taken.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.files import finite, write_text
from benchmarks.gather import check_alike
from benchmarks.methods import METHODS
from benchmarks.protocols import PROTOCOLS
from benchmarks.settings import InputError, unknown
from benchmarks.trace import FORMAT

#: Where they are.
FOLDER = Path(__file__).parent / "reference"

_EXACT = ("accuracy_matrix", "initial_accuracies", "acc", "bwt", "forgetting", "forward_transfer", "hyper_parameters")


def read(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """Read all reference results.

    Args:
        folder: where they are.

    Returns:
        The results, protocols and methods in the order of their tables, seeds ascending.

    Raises:
        InputError: if a file is damaged, or of another format.
    """
    found = []
    for file in sorted(folder.glob("*/*.json")):
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"the reference {file.name} cannot be read: {error}") from error
        if not isinstance(result, dict) or result.get("format") != FORMAT:
            raise InputError(f"the reference {file.parent.name}/{file.name} is not of format {FORMAT}: make it anew")
        found.append(result)
    protocols, methods = list(PROTOCOLS), list(METHODS)
    return sorted(found, key=lambda r: (protocols.index(r["protocol"]), methods.index(r["method"]), r["seed"]))


def choose(
    results: Sequence[dict[str, Any]], protocols: Sequence[str], methods: Sequence[str], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """Choose some reference results.

    Args:
        results: what there is.
        protocols: names; none takes all, and so below.
        methods: names.
        seeds: numbers.

    Returns:
        Those that fit.

    Raises:
        InputError: if something that was named is not there.
    """
    for what, names, key in (
        ("protocol", protocols, "protocol"),
        ("method", methods, "method"),
        ("seed", seeds, "seed"),
    ):
        known = {result[key] for result in results}
        for name in names:
            if name not in known:
                raise unknown(f"{what} (among the reference results)", str(name), map(str, known))
    return [
        result
        for result in results
        if (not protocols or result["protocol"] in protocols)
        and (not methods or result["method"] in methods)
        and (not seeds or result["seed"] in seeds)
    ]


def collect(folders: Sequence[Path], target: Path = FOLDER) -> list[Path]:
    """Take finished runs over as reference results.

    Args:
        folders: folders of results; every finished run of unchanged settings below them is taken.
        target: where to.

    Returns:
        The files written.

    Raises:
        InputError: if a folder holds no such run, two of them are of the same protocol, method and seed and differ in
            their accuracies, those of a protocol and method are of different code, data or versions, or those of a
            protocol are of other images than the references that are there.
    """
    chosen: dict[Path, dict[str, Any]] = {}
    for folder in folders:
        before = len(chosen)
        for file in sorted(folder.rglob("*.json")):
            result = _finished(file)
            if result is None:
                continue
            path = target / result["protocol"] / f"{result['method']}-seed{result['seed']}.json"
            other = chosen.get(path)
            if other is not None and other["accuracy_matrix"] != result["accuracy_matrix"]:
                raise InputError(f"two runs of {path.stem} on {result['protocol']} differ: give one folder of results")
            chosen[path] = result
        if len(chosen) == before:
            raise InputError(f"{str(folder)!r} holds no finished run of unchanged settings of format {FORMAT}")
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in chosen.values():
        rows.setdefault((result["protocol"], result["method"]), []).append(result)
    for row in rows.values():
        check_alike(row)
    _check_images(chosen.values(), target)
    for path, result in chosen.items():
        write_text(path, as_text(result))
    return sorted(chosen)


def _check_images(results: Iterable[Mapping[str, Any]], target: Path) -> None:
    """Refuse results of other images than the other methods of their protocol have."""
    known = {result["protocol"]: result["data"] for result in read(target) if result.get("data") is not None}
    for result in results:
        images = result.get("data")
        if images is not None and known.setdefault(result["protocol"], images) != images:
            raise InputError(
                f"the run of {result['method']} on {result['protocol']} is of other images ({images}) than the "
                f"references there ({known[result['protocol']]}): run it on theirs"
            )


def _finished(file: Path) -> dict[str, Any] | None:
    """Read a file if it is a result that can be a reference."""
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    fits = isinstance(result, dict) and result.get("format") == FORMAT and "accuracy_matrix" in result
    return result if fits and not result["changed"] and result["method"] in METHODS else None


def as_text(result: Mapping[str, Any]) -> str:
    """Write a result with a line for each entry; what is no accuracy or setting keeps six digits."""
    lines = [
        f" {json.dumps(key)}: {json.dumps(finite(value if key in _EXACT else _shortened(value)), allow_nan=False)}"
        for key, value in result.items()
        if key != "key"  # of the machine and the code that made it; nothing is looked up by it here
    ]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _shortened(value: Any) -> Any:
    """Round every number to six digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, list):
        return [_shortened(part) for part in value]
    return {key: _shortened(part) for key, part in value.items()} if isinstance(value, dict) else value
