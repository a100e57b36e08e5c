"""Hyper-parameters on the page: what all labels share, and what each has of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.report.markup import Markup, details, lines, table, tag


def settings_part(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Markup:
    """Write the hyper-parameters, closed until asked for.

    Args:
        runs: label to its runs.

    Returns:
        A table of what is the same for all, and one for each label of what is not; empty if nothing is known.
    """
    settings = {label: _of(own[0]) for label, own in runs.items() if own}
    if not any(settings.values()):
        return Markup("")
    shared = shared_settings(list(settings.values()))
    parts: list[object] = []
    if shared:
        caption = "The same for all methods" if len(settings) > 1 else "All settings"
        parts.append(table(caption, ("setting", "value"), sorted(shared.items()), "text"))
    each: list[object] = []
    for label, own in settings.items():
        rest = sorted((key, value) for key, value in own.items() if key not in shared)
        if rest:
            each.append(table(tag("strong", label), ("setting", "value"), rest, "text"))
        elif len(settings) > 1:
            each.append(tag("p", tag("strong", label), ": none of its own."))
    parts.append(tag("div", lines(each), class_="settings"))
    return details("Hyper-parameters", lines(parts))


def shared_settings(settings: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return what all have in common."""
    return {
        key: value
        for key, value in (settings[0] if settings else {}).items()
        if all(own.get(key) == value for own in settings)
    }


def _of(run: Mapping[str, Any]) -> dict[str, str]:
    """A run's hyper-parameters as text; those that do not apply are left out."""
    found = {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        for key, value in (run.get("hyper_parameters") or {}).items()
        if value is not None
    }
    if run.get("task_order") is not None:
        found["task_order"] = str(run["task_order"])
    if run.get("experience_groups") is not None:
        found["experience_groups"] = json.dumps(run["experience_groups"])
    return found
