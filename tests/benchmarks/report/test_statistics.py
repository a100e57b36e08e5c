from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest

from benchmarks.report.statistics import compare_pairs, holm, signed_rank_p


def runs(**accuracies: Sequence[float | None]) -> dict[str, list[dict[str, Any]]]:
    """Label to runs with these accuracies, for seeds 0, 1, ..."""
    return {
        label: [{"seed": seed, "acc": value} for seed, value in enumerate(values)]
        for label, values in accuracies.items()
    }


def slow_signed_rank(differences: Sequence[float]) -> float:
    """All signs one by one: how often is the sum of positive ranks as far from its middle as the one seen?"""
    kept = [value for value in differences if value != 0]
    sizes = sorted(abs(value) for value in kept)
    ranks = []
    for value in kept:
        places = [place for place, size in enumerate(sizes, 1) if size == abs(value)]
        ranks.append(sum(places) / len(places))
    middle = sum(ranks) / 2
    seen = abs(sum(rank for rank, value in zip(ranks, kept, strict=True) if value > 0) - middle)
    all_signs = list(product((0, 1), repeat=len(kept)))
    hits = sum(
        abs(sum(rank for rank, sign in zip(ranks, signs, strict=True) if sign) - middle) >= seen - 1e-9
        for signs in all_signs
    )
    return hits / len(all_signs)


@pytest.mark.parametrize("seed", range(30))
def test_signed_ranks_against_all_signs(seed: int) -> None:
    source = random.Random(seed)
    # Few different values make ties and zeros.
    values = [source.choice([-3, -2, -1, 0, 1, 2, 2.5, 4]) for _ in range(source.randint(1, 9))]
    assert signed_rank_p(values) == pytest.approx(slow_signed_rank(values))


def test_signed_ranks_of_a_known_case() -> None:
    assert signed_rank_p([1, 2, 3, 4, 5, 6]) == pytest.approx(2 / 64)
    assert signed_rank_p([0.0, 0.0]) == 1.0
    assert signed_rank_p([]) == 1.0


def test_holm_by_hand() -> None:
    # Sorted: .01 x 4 = .04, .02 x 3 = .06, .03 x 2 = .06, .5 x 1; .015 as the largest would not go below the others.
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.04, 0.01]) == pytest.approx([0.04, 0.02])
    # .026 alone would stay .026, below the .05 of the smaller .025.
    assert holm([0.026, 0.025]) == pytest.approx([0.05, 0.05])
    assert holm([0.7, 0.6, 0.9]) == [1.0, 1.0, 1.0]
    assert holm([]) == []


def test_t_test_by_hand() -> None:
    # Differences 1, 2, 3: mean 2, deviation 1, t = 2 / (1 / sqrt 3) = 3.4641 with 2 degrees of freedom, where
    # p = 1 - t / sqrt(t^2 + 2) = 1 - 3.4641 / sqrt 14. The interval: t(.975, 2) = 4.302653.
    found = compare_pairs(runs(a=[51, 62, 73], b=[50, 60, 70]))
    (pair,) = found.pairs
    assert (pair.first, pair.second, pair.seeds) == ("a", "b", (0, 1, 2))
    assert pair.difference == pytest.approx(2.0)
    assert pair.p == pytest.approx(1 - 12**0.5 / 14**0.5)
    assert pair.corrected == pair.p
    assert pair.low == pytest.approx(2 - 4.302653 / 3**0.5, abs=1e-5)
    assert pair.high == pytest.approx(2 + 4.302653 / 3**0.5, abs=1e-5)
    assert not pair.differs
    assert any("not told apart does not mean equal" in note for note in found.notes)


def test_the_correction_counts_all_pairs_of_the_protocol() -> None:
    found = compare_pairs(runs(a=[51, 62, 73, 80.5], b=[50, 60, 70, 80], c=[10, 21, 29, 40]))
    assert len(found.pairs) == found.tested == 3
    by_p = sorted(found.pairs, key=lambda pair: pair.p or 0)
    assert by_p[0].corrected == pytest.approx(3 * (by_p[0].p or 0))
    assert by_p[1].corrected == pytest.approx(max(2 * (by_p[1].p or 0), by_p[0].corrected or 0))
    assert by_p[0].differs
    assert found.reachable


def test_only_common_seeds_with_a_figure_count() -> None:
    mine = runs(a=[51, 62, None, 73, 99], b=[50, 60, 0, 70])
    mine["b"].append({"seed": 9, "acc": 1.0})
    mine["b"][2]["acc"] = float("nan")
    (pair,) = compare_pairs(mine).pairs
    assert pair.seeds == (0, 1, 3)
    assert pair.difference == pytest.approx(2.0)


def test_pairs_are_by_seed_whatever_the_order_of_the_runs() -> None:
    mine = runs(a=[51, 62, 73], b=[50, 60, 70])
    mine["b"].reverse()
    assert compare_pairs(mine).pairs[0].difference == pytest.approx(2.0)
    assert compare_pairs(mine).pairs[0].p == pytest.approx(1 - 12**0.5 / 14**0.5)


@pytest.mark.parametrize("test", ["t", "wilcoxon"])
def test_fewer_than_two_common_seeds(test: Any) -> None:
    found = compare_pairs(runs(a=[51], b=[50], c=[]), test=test)
    assert [pair.p for pair in found.pairs] == [None] * 3
    assert found.pairs[0].difference == 1.0
    assert found.pairs[1].difference is None
    assert "fewer than two" in found.pairs[0].note
    assert not found.reachable
    assert "nothing was tested" in found.notes[0]
    assert compare_pairs({}, test=test).pairs == ()


@pytest.mark.parametrize("test", ["t", "wilcoxon"])
def test_equal_on_every_seed(test: Any) -> None:
    (pair,) = compare_pairs(runs(a=[51.5, 62, 73], b=[51.5, 62, 73]), test=test).pairs
    assert (pair.p, pair.corrected, pair.difference, pair.low, pair.high) == (1.0, 1.0, 0.0, 0.0, 0.0)
    assert "equal" in pair.note


def test_the_last_bits_are_no_difference() -> None:
    """The mean of the same accuracies in another order is another number; one real difference proves nothing."""
    parts = [(91.37, 88.2, 90.01), (77.7, 80.9, 99.1), (63.3, 59.9, 71.17), (88.8, 12.7, 45.4), (50.3, 61.1, 7.7)]
    one = [sum(own) / 3 for own in parts] + [50.0]
    other = [min((sum(own[k:] + own[:k]) / 3 for k in range(3)), key=lambda v: v) for own in parts] + [49.0]
    assert any(a != b for a, b in zip(one[:-1], other[:-1], strict=True))
    (pair,) = compare_pairs(runs(a=one, b=other), test="wilcoxon").pairs
    assert pair.p == 1.0
    assert "with 1 unequal pairs" in pair.note


def test_the_same_difference_on_every_seed_is_no_proof() -> None:
    (pair,) = compare_pairs(runs(a=[51.1, 61.1, 71.1], b=[50, 60, 70])).pairs
    assert pair.p is None
    assert "same difference" in pair.note
    (pair,) = compare_pairs(runs(a=[51.1, 61.1, 71.1], b=[50, 60, 70]), test="wilcoxon").pairs
    assert pair.p == pytest.approx(2 / 8)


@pytest.mark.parametrize(("count", "able"), [(5, False), (6, True)])
def test_signed_ranks_need_six_pairs(count: int, able: bool) -> None:
    mine = runs(a=[50.0 + k * 1.5 for k in range(count)], b=[40.0 + k for k in range(count)])
    found = compare_pairs(mine, test="wilcoxon")
    assert found.reachable is able
    assert found.pairs[0].differs is able
    assert any("cannot reach .05" in note for note in found.notes) is not able


def test_signed_ranks_may_be_out_of_reach_only_after_the_correction() -> None:
    mine = runs(**{label: [10.0 * k + (7 * k + 3) % 5 + seed for seed in range(6)] for k, label in enumerate("abc")})
    mine["c"][0]["acc"] = 90.0
    found = compare_pairs(mine, test="wilcoxon")
    assert not found.reachable
    assert any("After the correction" in note for note in found.notes)


def test_a_pair_can_be_asked_for_the_other_way_round() -> None:
    found = compare_pairs(runs(a=[51, 62, 73], b=[50, 60, 70]))
    pair = found.between("b", "a")
    assert pair is not None
    assert pair.difference == pytest.approx(-2.0)
    assert pair.low == pytest.approx(-(found.pairs[0].high or 0))
    assert found.between("a", "a") is None
