"""Paired tests between the methods of one protocol, over the seeds that both have.

A seed fixes weights, batches and stream for every method, so that the difference between two methods on the same
seed is free of much of what the seeds do to both.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal

from scipy import stats

from benchmarks.report.summary import half_width, is_joint, number

Test = Literal["t", "wilcoxon"]

#: Corrected p-values below this count as a difference.
ALPHA = 0.05

#: Decimal places of percent to which differences count.
_DIGITS = 9

_EQUAL = "equal on every common seed"

NAMES: Mapping[Test, str] = {"t": "paired t-test", "wilcoxon": "Wilcoxon signed-rank test (exact)"}


@dataclass(frozen=True)
class Comparison:
    """Two labels of one protocol.

    Attributes:
        first: a label.
        second: another one.
        seeds: seeds that both have.
        difference: mean of the first's ACC minus the second's on the same seed; None without a common seed.
        low: lower end of the 95 % t-interval of the difference, not corrected; None for fewer than two seeds.
        high: its upper end.
        p: two-sided p-value; None where there is no test.
        corrected: the same after Holm's correction over all pairs.
        smallest: the smallest p that this test can give with so many pairs; 0 for the t-test, 1 for pairs that are all
            equal.
        note: why there is no p, or why it cannot be small; empty if there is nothing to say.
    """

    first: str
    second: str
    seeds: tuple[int, ...]
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    corrected: float | None = None
    smallest: float = 0.0
    note: str = ""

    @property
    def differs(self) -> bool:
        """Whether the two can be told apart."""
        return self.corrected is not None and self.corrected < ALPHA


@dataclass(frozen=True)
class Comparisons:
    """All pairs of one protocol.

    Attributes:
        test: which test.
        pairs: the pairs, in the order of the labels.
        tested: how many of them have a p-value, which is what the correction is for.
        reachable: whether any corrected p can be below `ALPHA` with so many seeds and pairs.
        notes: what a reader has to know of all of them.
    """

    test: Test
    pairs: tuple[Comparison, ...]
    tested: int
    reachable: bool
    notes: tuple[str, ...]

    def between(self, one: str, other: str) -> Comparison | None:
        """Return the comparison of two labels, as first and second in the order asked for."""
        for pair in self.pairs:
            if (pair.first, pair.second) == (one, other):
                return pair
            if (pair.first, pair.second) == (other, one):
                return _reversed(pair)
        return None


def compare_pairs(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], *, test: Test = "t", metric: str = "acc"
) -> Comparisons:
    """Compare every two labels of one protocol; joint training, which has all data at once, takes no part.

    Args:
        runs: label to its runs, as `Study.of` returns them.
        test: paired t-test, or Wilcoxon's signed-rank test.
        metric: which figure.

    Returns:
        The comparisons, corrected by Holm's method over all that could be tested.
    """
    found = {label: _by_seed(own, metric) for label, own in runs.items() if not any(map(is_joint, own))}
    pairs = [_compare(one, other, found[one], found[other], test) for one, other in combinations(found, 2)]
    known = {index: pair.p for index, pair in enumerate(pairs) if pair.p is not None}
    for index, value in zip(known, holm(list(known.values())), strict=True):
        pairs[index] = replace(pairs[index], corrected=value)
    reachable = _lowest(pairs) * len(known) < ALPHA and bool(known)
    return Comparisons(test, tuple(pairs), len(known), reachable, tuple(_notes(pairs, len(known), test)))


def holm(values: Sequence[float]) -> list[float]:
    """Correct p-values for how many there are: the k-th smallest of m is multiplied by m - k + 1.

    Args:
        values: p-values.

    Returns:
        Corrected ones in the same order: at most 1, and never smaller than that of a smaller p.
    """
    result = [0.0] * len(values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        highest = max(highest, min(1.0, (len(values) - rank) * values[index]))
        result[index] = highest
    return result


def signed_rank_p(differences: Sequence[float]) -> float:
    """Exact two-sided p-value of Wilcoxon's signed-rank test.

    Differences of zero are left out; equal sizes share the mean of their ranks, and the distribution is that of just
    these ranks under random signs, so that it stays exact with ties.

    Args:
        differences: one for each pair.

    Returns:
        The p-value; 1 if all differences are zero.
    """
    kept = [value for value in differences if value]
    # Twice the ranks are whole numbers even where two share one.
    ranks = [round(2 * rank) for rank in stats.rankdata([abs(value) for value in kept])] if kept else []
    positive = sum(rank for rank, value in zip(ranks, kept, strict=True) if value > 0)
    ways = [1]
    for rank in ranks:
        longer = ways + [0] * rank
        for total, count in enumerate(ways):
            longer[total + rank] += count
        ways = longer
    lower, upper = sum(ways[: positive + 1]), sum(ways[positive:])
    return min(1.0, 2 * min(lower, upper) / 2 ** len(ranks))


def _by_seed(runs: Sequence[Mapping[str, Any]], metric: str) -> dict[int, float]:
    """Seed to figure, without those that are missing."""
    found = {run["seed"]: number(run.get(metric)) for run in runs}
    return {seed: value for seed, value in found.items() if value is not None}


def _compare(one: str, other: str, first: Mapping[int, float], second: Mapping[int, float], test: Test) -> Comparison:
    """Compare two labels, without the correction."""
    seeds = tuple(sorted(set(first) & set(second)))
    # Accuracies are counts over a few numbers: zeros and equal sizes are decided by more than the last bits.
    differences = [round(first[seed] - second[seed], _DIGITS) for seed in seeds]
    if len(differences) < 2:
        mean = differences[0] if differences else None
        return Comparison(one, other, seeds, mean, note="fewer than two common seeds: no test")
    mean = statistics.fmean(differences)
    std = statistics.stdev(differences)
    if len(set(differences)) == 1:
        mean, std = differences[0], 0.0
    half = half_width(std, len(differences))
    result = Comparison(one, other, seeds, mean, mean - half, mean + half)
    if not any(differences):
        return replace(result, difference=0.0, low=0.0, high=0.0, p=1.0, smallest=1.0, note=_EQUAL)
    if test == "wilcoxon":
        count = sum(1 for value in differences if value)
        smallest = 2.0 ** (1 - count)
        note = f"with {count} unequal pairs the smallest possible p is {smallest:.3g}" if smallest >= ALPHA else ""
        return replace(result, p=signed_rank_p(differences), smallest=min(1.0, smallest), note=note)
    if std == 0:
        return replace(result, low=None, high=None, note="the same difference on every seed: the t-test says nothing")
    p = 2 * float(stats.t.sf(abs(mean) / (std / math.sqrt(len(differences))), len(differences) - 1))
    return replace(result, p=p)


def _notes(pairs: Sequence[Comparison], tested: int, test: Test) -> list[str]:
    """Say what holds for all pairs."""
    if not pairs:
        return []
    if not tested:
        return ["No two labels have two common seeds: nothing was tested."]
    notes = []
    if test == "wilcoxon":
        lowest = _lowest(pairs)
        if lowest >= ALPHA:
            notes.append("This test cannot reach .05 with so few seeds: it needs six at least.")
        elif lowest * tested >= ALPHA:
            notes.append(
                f"After the correction for {tested} pairs this test cannot reach .05 with so few seeds: the smallest "
                f"corrected p is {min(1.0, lowest * tested):.3g}."
            )
    fewest = min(len(pair.seeds) for pair in pairs if pair.p is not None)
    if test == "t" and fewest < 5:
        notes.append(
            f"With {fewest} seeds, and corrected for {tested} pair{'s' * (tested > 1)}, only large differences that are"
            " much the same on every seed are found: not told apart does not mean equal. The test also rests on the "
            "differences being normally distributed, which so few cannot show."
        )
    return notes


def _lowest(pairs: Sequence[Comparison]) -> float:
    """Return the smallest p that a pair with a difference can have; 0 where all are equal, whatever the seeds."""
    return min((pair.smallest for pair in pairs if pair.p is not None and pair.note != _EQUAL), default=0.0)


def _reversed(pair: Comparison) -> Comparison:
    """The same comparison the other way round."""

    def negative(value: float | None) -> float | None:
        return None if value is None else 0.0 - value

    return replace(
        pair,
        first=pair.second,
        second=pair.first,
        difference=negative(pair.difference),
        low=negative(pair.high),
        high=negative(pair.low),
    )
