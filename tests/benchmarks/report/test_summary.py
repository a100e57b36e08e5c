from __future__ import annotations

import math

import pytest

from benchmarks.report.summary import figure, is_joint, shown, summarise
from tests.benchmarks.report.examples import joint, result, small


def test_mean_deviation_and_interval_of_four_numbers_against_a_table_of_t() -> None:
    # 2, 4, 4, 6: mean 4, squares of the deviations 4 + 0 + 0 + 4 = 8, over 3; t(.975, 3) is 3.182446 in tables.
    found = figure([2.0, 4.0, 4.0, 6.0])
    std = math.sqrt(8 / 3)
    assert found.count == 4
    assert found.mean == pytest.approx(4.0)
    assert found.std == pytest.approx(std)
    assert found.low == pytest.approx(4.0 - 3.182446 * std / 2, abs=1e-5)
    assert found.high == pytest.approx(4.0 + 3.182446 * std / 2, abs=1e-5)


@pytest.mark.parametrize(("count", "t"), [(2, 12.706205), (3, 4.302653), (5, 2.776445), (10, 2.262157)])
def test_interval_widths_against_a_table_of_t(count: int, t: float) -> None:
    values = [float(k) for k in range(count)]
    mean = sum(values) / count
    std = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    found = figure(values)
    assert found.high is not None
    assert found.high - mean == pytest.approx(t * std / math.sqrt(count), rel=1e-6)


def test_what_is_missing_or_not_finite_is_left_out() -> None:
    found = figure([1.0, None, float("nan"), float("inf"), 3.0, True, "7"])
    assert (found.count, found.mean) == (2, 2.0)
    assert figure([None, float("nan")]).mean is None
    one = figure([5])
    assert (one.count, one.mean, one.std, one.low, one.high) == (1, 5.0, None, None, None)


def test_rows_keep_the_order_of_labels_and_what_was_changed() -> None:
    rows = summarise(small().of("digits-split"))
    assert [row.label for row in rows] == ["naive", "gpm threshold=0.9", "joint"]
    assert [row.method for row in rows] == ["naive", "gpm", "joint"]
    assert rows[1].changed == {"threshold": "0.9"}
    assert [row.joint for row in rows] == [False, False, True]
    assert rows[0].seeds == (0, 1, 2)
    assert rows[0].figures["acc"].mean == pytest.approx((80 + 81 + 82) / 9 + 187 / 3)
    assert rows[2].figures["bwt"].count == 0


def test_metrics_that_no_row_has_are_not_shown() -> None:
    keys = [metric.key for metric in shown(summarise({"naive": [result("naive", 0)]}))]
    assert "acc" in keys
    assert "bytes_held" not in keys
    assert "growth" not in keys


def test_joint_training_is_known_by_its_one_row() -> None:
    assert is_joint(joint(0))
    assert not is_joint(result("naive", 0))
    assert not is_joint(result("naive", 0, accuracy_matrix=[[99.0]]))
    assert not is_joint(result("naive", 0, accuracy_matrix=None))


def test_runs_without_any_of_the_figures() -> None:
    row = summarise({"bare": [{"protocol": "p", "label": "bare", "seed": 0}]})[0]
    assert row.method == "bare"
    assert all(found.count == 0 for found in row.figures.values())
