"""What a method is to the comparisons, and what most of them have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.record import Protocol


def fits_all(settings: Any, smallest: int, experiences: int) -> str | None:
    """Refuse nothing."""
    del settings, smallest, experiences
    return None


def suits_all(settings: Any, protocol: Protocol) -> str | None:
    """Refuse no protocol."""
    del settings, protocol
    return None


def no_epochs(settings: Any) -> int:
    """Train no epochs besides those of the strategy."""
    del settings
    return 0


@dataclass(frozen=True)
class Method:
    """One way to train on a stream.

    Attributes:
        name: what the command line calls it.
        summary: one line for people.
        settings: the type of its hyper-parameters.
        plugins: makes the Avalanche plugins from the settings and the run's seed.
        joint: train once on all experiences together, as an upper bound.
        refuse: says what of the settings does not fit a stream, given the samples of its smallest experience and the
            number of experiences; for plugins that do not find out themselves before training.
        unsuited: says why a protocol cannot be run with the settings, whatever the data; None where it can.
        own_epochs: epochs that the plugin itself trains at the start of each experience after the first; they count
            among the experience's epochs, so that the strategy trains as many fewer.
    """

    name: str
    summary: str
    settings: type
    plugins: Callable[[Any, int], list[Any]]
    joint: bool = False
    refuse: Callable[[Any, int, int], str | None] = fits_all
    unsuited: Callable[[Any, Protocol], str | None] = suits_all
    own_epochs: Callable[[Any], int] = no_epochs
