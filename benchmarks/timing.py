"""Timing several variants in turn, A B A B ..., so that a change of the machine's speed meets all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from rich.table import Table


@dataclass(frozen=True)
class Timing:
    """Median seconds of one variant and its ratio to the first.

    Attributes:
        name: what was timed.
        seconds: median of all repetitions.
        ratio: median over repetitions of its time over that of the first variant, within the same turn.
    """

    name: str
    seconds: float
    ratio: float


#: The title of a table, and what measures it.
Measurement = tuple[str, Callable[[], list[Timing]]]


def in_turn(variants: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 2) -> list[Timing]:
    """Time several variants in turn.

    Args:
        variants: name -> what to run once.
        repeats: counted turns.
        warmup: turns that are not counted.

    Returns:
        One timing a variant, in order; the first has the ratio 1.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(warmup + repeats):
        for name, run in variants.items():
            _synchronize()
            start = time.perf_counter()
            run()
            _synchronize()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    first = next(iter(seconds.values()))
    return [
        Timing(name, statistics.median(own), statistics.median([a / b for a, b in zip(own, first, strict=True)]))
        for name, own in seconds.items()
    ]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table(title: str, timings: list[Timing]) -> Table:
    """Return a printable table of timings."""
    result = Table(title=title, title_justify="left")
    result.add_column("variant")
    result.add_column("median ms", justify="right")
    result.add_column("ratio", justify="right")
    for timing in timings:
        result.add_row(timing.name, f"{1000 * timing.seconds:.1f}", f"{timing.ratio:.2f}")
    return result
