"""What a row says of its settings: what its label does not say, and what not all rows share."""

from __future__ import annotations

from benchmarks.report import tables
from benchmarks.report.formatting import shared_changes, unsaid_changes
from benchmarks.report.study import Study
from benchmarks.report.summary import summarise
from tests.benchmarks.report.examples import result

RUNS = {
    "naive": [result("naive", 0, changed={"epochs": "1"})],
    "gpm threshold=0.9": [result("gpm threshold=0.9", 0, changed={"epochs": "1", "threshold": "0.9"})],
    "ewc": [result("ewc", 0, changed={"epochs": "1", "ewc_lambda": "3"})],
}


def test_only_what_is_not_said_elsewhere():
    rows = summarise(RUNS)
    assert shared_changes(rows) == {"epochs": "1"}
    assert [unsaid_changes(row, rows) for row in rows] == ["", "", "ewc_lambda=3"]
    assert shared_changes(summarise({"a": RUNS["naive"], "b": [result("b", 0)]})) == {}
    assert shared_changes([]) == {}


def test_the_table_says_it_once():
    text = tables.markdown(Study("t", "c", [run for runs in RUNS.values() for run in runs]))
    assert "| naive | 1 |" in text
    assert "| gpm threshold=0.9 | 1 |" in text
    assert "| ewc (ewc_lambda=3) | 1 |" in text
    assert text.count("epochs=1") == 1
    assert "- Changed from the protocol in all rows: epochs=1." in text
