"""Which methods stand beside the best one, and what takes no part: joint training, transfer to untrained heads."""

from __future__ import annotations

from benchmarks.report.figures_table import figures_table
from benchmarks.report.statistics import compare_pairs
from benchmarks.report.summary import summarise
from tests.benchmarks.report.examples import result

#: Six seeds: the best, one like it, and five that are clearly worse, so that there are many pairs.
RUNS = {
    "best": [result("best", seed, acc=90.0 + 0.1 * seed) for seed in range(6)],
    "alike": [result("alike", seed, acc=90.0 + 0.1 * (5 - seed)) for seed in range(6)],
    **{
        name: [result(name, seed, acc=70.0 + 0.1 * seed + 2.0 * ((seed + shift) % 3)) for seed in range(6)]
        for shift, name in enumerate("abcde")
    },
}


def joint(seed):
    return {**result("joint", seed, acc=99.0), "accuracy_matrix": [[99.0, 99.0, 99.0]], "bwt": None}


def test_marks_are_corrected_for_the_comparisons_with_the_best_alone():
    page = str(figures_table(summarise(RUNS), compare_pairs(RUNS)))
    assert page.count("▲") == 2  # the mark and its explanation
    assert page.count("≈") == 2
    assert "corrected for the 6 comparisons with it" in page
    row = next(part for part in page.split("<tr>") if ">alike<" in part)
    assert "≈" in row


def test_joint_training_is_in_no_pair():
    runs = {**RUNS, "joint": [joint(seed) for seed in range(6)]}
    found = compare_pairs(runs)
    assert len(found.pairs) == 7 * 6 // 2
    assert all("joint" not in (pair.first, pair.second) for pair in found.pairs)
    page = str(figures_table(summarise(runs), found))
    assert "Joint training, which has all data at once, takes no part." in page


def test_no_forward_transfer_to_heads_that_are_not_trained():
    shared, heads = (
        {**result("m", 0), "forward_transfer": 3.0, "hyper_parameters": {"outputs": outputs}}
        for outputs in (None, "heads")
    )
    assert summarise({"m": [shared]})[0].figures["forward_transfer"].mean == 3.0
    assert summarise({"m": [heads]})[0].figures["forward_transfer"].mean is None
