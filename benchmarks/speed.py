"""What the methods cost, as ratios measured within one run: `python -m benchmarks speed`.

Every pair is measured in turn, A B A B ..., so that a change of the machine's speed meets both; figures are
medians. Nothing here is a test: timings depend on the machine, their ratios less so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import speed_curvature, speed_gpm, speed_gradients, speed_halrp, speed_truncation
from benchmarks.settings import InputError
from benchmarks.timing import Timing, table


def tables(device: torch.device) -> dict[str, Callable[[], Table]]:
    """Return what measures each table, by its title."""
    found: dict[str, Callable[[], Table]] = {}
    for part in (speed_gpm, speed_gradients, speed_curvature, speed_halrp):
        for title, measure in part.measurements(device):
            found[title] = partial(_timed, title, measure)
    found[speed_truncation.TITLE] = partial(speed_truncation.truncation_table, device)
    return found


def _timed(title: str, measure: Callable[[], list[Timing]]) -> Table:
    return table(title, measure())


def choose(titles: Iterable[str], only: str) -> list[str]:
    """Return the titles that hold all words of a text, in whatever case.

    Args:
        titles: all of them.
        only: words; none takes all.

    Raises:
        InputError: if none does.
    """
    titles = list(titles)
    words = only.lower().split()
    found = [title for title in titles if all(word in title.lower() for word in words)]
    if not found:
        raise InputError(f"--only {only!r}: no table has these words in its title; there are: {'; '.join(titles)}")
    return found


def main(only: str = "") -> None:
    """Measure and print the tables.

    Args:
        only: words that the title of a table must hold to be measured.

    Raises:
        InputError: if no title holds them.
    """
    console = Console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = tables(device)
    chosen = choose(known, only)
    threads = torch.get_num_threads()
    console.print(f"device {device}, {threads} threads, torch {torch.__version__}; medians, measured in turn")
    for title in chosen:
        console.print(known[title]())
