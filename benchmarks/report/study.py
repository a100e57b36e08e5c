"""What a report is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Study:
    """Finished runs and what has to be said about those that are not.

    Attributes:
        title: its name.
        command: the command line that makes these results.
        results: as `run.run` returns them, each with a `label` besides: the method, and what of it a grid varies
            (`gpm threshold=0.9`). Runs of one protocol and one label differ in their seeds alone. In the order in which
            protocols, labels and seeds were asked for.
        failures: protocol, label, seed and one line about what went wrong, for each run that failed.
        left_out: protocol to method to the reason why it was not run.
        unfinished: how many runs have neither finished nor failed.
    """

    title: str
    command: str
    results: Sequence[Mapping[str, Any]]
    failures: Sequence[tuple[str, str, int, str]] = ()
    left_out: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    unfinished: int = 0

    @property
    def protocols(self) -> tuple[str, ...]:
        """The protocols with a finished run, in order."""
        return tuple(dict.fromkeys(result["protocol"] for result in self.results))

    def of(self, protocol: str) -> dict[str, list[Mapping[str, Any]]]:
        """Return the runs of one protocol, label by label, in order."""
        found: dict[str, list[Mapping[str, Any]]] = {}
        for result in self.results:
            if result["protocol"] == protocol:
                found.setdefault(result["label"], []).append(result)
        return found

    def failed(self, protocol: str, label: str) -> int:
        """Count the runs of a label that failed."""
        return sum((where, which) == (protocol, label) for where, which, _, _ in self.failures)
