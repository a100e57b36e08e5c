"""Under what circumstances runs were made, and whether they were the same for all that stand in one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: What the number for memory is.
MEMORY: Mapping[str, str] = {
    "resident_during_run": "peak resident memory of the process during the run: interpreter, libraries and data are in "
    "it, the same for every method, so that ratios say little; and differences of "
    "some MiB are noise, since a process that does several runs keeps what the libraries loaded for earlier ones",
    "resident_since_start": "peak resident memory of the process since it began: where several runs share a process, a "
    "later one never shows less than an earlier one, so that methods cannot be compared",
    "cuda_allocated": "peak memory that PyTorch had allocated on the device during the run, without what its allocator "
    "and the device's libraries keep besides",
    "unavailable": "not available on this system",
}


@dataclass(frozen=True)
class Circumstance:
    """One thing that was the same for all runs or not.

    Attributes:
        name: what it is.
        values: what was found, each with the labels of its runs.
        matters: whether figures of runs that differ in it should not be compared at all.
    """

    name: str
    values: Mapping[str, tuple[str, ...]]
    matters: bool

    @property
    def mixed(self) -> bool:
        """Whether the runs differ in it."""
        return len(self.values) > 1


def circumstances(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Circumstance]:
    """Collect what is known of how the runs of one protocol were made.

    Args:
        runs: label to its runs.

    Returns:
        Code, versions, device, threads and the kind of memory, where results tell them.
    """
    packages = dict.fromkeys(package for own in runs.values() for run in own for package in _versions(run))
    found = [("code", "code", True), ("data", "data", True)]
    result = [_collect(runs, name, lambda run, key=key: run.get(key), matters) for name, key, matters in found]
    for package in packages:
        result.append(_collect(runs, package, lambda run, key=package: _versions(run).get(key), True))
    for name, key in (("device", "device"), ("threads", "threads"), ("memory", "peak_memory_kind")):
        result.append(_collect(runs, name, lambda run, key=key: run.get(key), False))
    return [each for each in result if each.values]


def memory_notes(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Say what the numbers for memory are."""
    kinds = dict.fromkeys(run.get("peak_memory_kind") for own in runs.values() for run in own)
    notes = [MEMORY.get(str(kind), str(kind)) for kind in kinds if kind is not None]
    if len(notes) > 1:
        notes.append("the runs measured it in different ways: their numbers cannot be compared")
    return notes


def further_notes(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Say which runs were interrupted or diverged, whose methods they are, and what was not deterministic."""
    notes = []
    again = [
        f"{label} (seed {run.get('seed')})"
        for label, own in runs.items()
        for run in own
        if isinstance(run.get("sessions"), int) and run["sessions"] > 1
    ]
    if again:
        notes.append(f"Interrupted and continued, which costs time: {', '.join(again)}.")
    broken = [f"{label} (seed {run.get('seed')})" for label, own in runs.items() for run in own if run.get("diverged")]
    if broken:
        notes.append(
            f"Diverged, the loss on test images is no number: {', '.join(broken)}. What such a network "
            "answers is arbitrary; it counts in means, spread and tests all the same: without it the method would look "
            "better than it is."
        )
    for label, own in runs.items():
        origins = dict.fromkeys(str(run["origin"]) for run in own if run.get("origin") is not None)
        notes += [f"{label} is of another package: {', '.join(origins)}."] if origins else []
    operations = {name for own in runs.values() for run in own for name in run.get("nondeterministic") or ()}
    if operations:
        notes.append(
            f"Without a deterministic version on the device: {', '.join(sorted(map(str, operations)))}. The same run "
            "again may differ."
        )
    return notes


def _versions(run: Mapping[str, Any]) -> dict[str, str]:
    """Versions of all packages that a result names; a library that is not there takes no part."""
    libraries = {name: text for name, text in (run.get("libraries") or {}).items() if text != "not installed"}
    return {**(run.get("versions") or {}), **libraries}


def _collect(runs: Mapping[str, Sequence[Mapping[str, Any]]], name: str, read: Any, matters: bool) -> Circumstance:
    """Sort labels by what their runs say."""
    values: dict[str, dict[str, None]] = {}
    for label, own in runs.items():
        for run in own:
            value = read(run)
            if value is not None:
                values.setdefault(str(value), {})[label] = None
    return Circumstance(name, {value: tuple(labels) for value, labels in values.items()}, matters)
