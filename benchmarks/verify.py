"""Doing reference runs again: does this code, on this machine, still give their results?

A run agrees if its accuracy matrix is the same, or if its ACC, and its BWT, is not farther from the reference of the
same seed than two runs of different seeds are in 95 % of cases, as estimated from the reference's seeds (with few seeds
by Student's t: twice the deviation of three seeds is exceeded far more often). Another machine or version of torch sums
in another order, and training follows the last digits; but that does not move a result by more than another seed would.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from scipy import stats

from benchmarks.files import finite

#: Percent within which a run agrees, however small the spread: a few test samples.
FLOOR = 0.3

#: Settings that came later than some of the references, with the values that change nothing.
LATER = {"refresh_every": 1, "reset_optimizer": False, "eigenbasis": False}


@dataclass(frozen=True)
class Verdict:
    """How a run compares with its reference.

    Attributes:
        protocol: of the run.
        method: of the run.
        seed: of the run.
        acc: accuracy now and then, percent.
        bwt: backward transfer now and then, percent; None where there is none.
        allowed: how far ACC and BWT may be from the reference, percent.
        equal: whether every accuracy is the same.
        same_settings: whether the run has the settings of its reference.
        same_data: whether it has its images, where the reference says which they were.
    """

    protocol: str
    method: str
    seed: int
    acc: tuple[float, float]
    bwt: tuple[float, float] | None
    allowed: tuple[float, float]
    equal: bool
    same_settings: bool = True
    same_data: bool = True

    @property
    def agrees(self) -> bool:
        """Whether the run has the settings and images of its reference and is within its spread."""
        if not self.same_settings or not self.same_data:
            return False
        pairs = [(self.acc, self.allowed[0])] + ([(self.bwt, self.allowed[1])] if self.bwt is not None else [])
        return self.equal or all(abs(now - then) <= allowed for (now, then), allowed in pairs)


def judge(now: Mapping[str, Any], references: Sequence[Mapping[str, Any]]) -> Verdict:
    """Compare a run with the reference of its seed.

    Args:
        now: the run's result.
        references: those of its protocol and method, of all seeds.

    Returns:
        The verdict.
    """
    (then,) = [reference for reference in references if reference["seed"] == now["seed"]]
    has_transfer = now["bwt"] is not None and then["bwt"] is not None
    return Verdict(
        protocol=now["protocol"],
        method=now["method"],
        seed=now["seed"],
        acc=(now["acc"], then["acc"]),
        bwt=(now["bwt"], then["bwt"]) if has_transfer else None,
        allowed=(_allowed(references, "acc"), _allowed(references, "bwt")),
        equal=now["accuracy_matrix"] == then["accuracy_matrix"],
        same_settings=same_settings(now["hyper_parameters"], then["hyper_parameters"]),
        same_data=then.get("data") in (None, now.get("data")),
    )


def same_settings(now: Mapping[str, Any], then: Mapping[str, Any]) -> bool:
    """Tell whether a run has the settings of its reference.

    A setting that came later than some references (`LATER`) may be missing there: it has to be at the value that is
    what was done before.

    Args:
        now: the run's settings.
        then: those of the reference.
    """
    late = {key for key, before in LATER.items() if key not in then and now.get(key) == before}
    known = {key: value for key, value in now.items() if key not in late}
    return bool(finite(known) == finite(dict(then)))


def _allowed(references: Sequence[Mapping[str, Any]], key: str) -> float:
    """What two seeds differ by in 95 % of cases, from the sample standard deviation over seeds; at least `FLOOR`."""
    known = [reference[key] for reference in references if reference[key] is not None]
    if len(known) < 2:
        return FLOOR
    return max(FLOOR, float(stats.t.ppf(0.975, len(known) - 1)) * math.sqrt(2) * statistics.stdev(known))


def table(verdicts: Sequence[Verdict]) -> Table:
    """Make a table for the terminal."""
    result = Table(title="ACC and BWT %, now (reference ± allowed)", title_justify="left", padding=(0, 0))
    for name in ("run", "ACC", "BWT", "verdict"):
        result.add_column(name)
    for own in verdicts:
        cells = [_cell(own.acc, own.allowed[0]), "-" if own.bwt is None else _cell(own.bwt, own.allowed[1])]
        word = "equal" if own.equal else "agrees" if own.agrees else "DIFFERS"
        word = word if own.same_settings else "OTHER SETTINGS"
        word = word if own.same_data else "OTHER IMAGES"
        result.add_row(f"{own.protocol} {own.method} seed {own.seed}", *cells, word)
    return result


def _cell(pair: tuple[float, float], allowed: float) -> str:
    return f"{pair[0]:.2f} ({pair[1]:.2f} ± {allowed:.2f})"
