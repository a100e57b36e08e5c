"""The choice of columns: in the tables that people read, never in the one for programs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.report.columns import check
from benchmarks.report.study import Study
from benchmarks.report.summary import METRICS
from benchmarks.report.tables import csv_table
from benchmarks.report.writing import write
from benchmarks.settings import InputError
from tests.benchmarks.report.examples import joint, result, small


def test_chosen_columns_and_their_order(tmp_path: Path) -> None:
    write(tmp_path, small(), columns=check(["train_seconds", "acc"]))
    markdown, latex = ((tmp_path / f"table.{kind}").read_text() for kind in ("md", "tex"))
    assert (
        re.findall(r"^\| method .*", markdown, flags=re.MULTILINE)
        == ["| method | seeds | training (s) | ACC (%) |"] * 2
    )
    assert re.findall(r"^method .*", latex, flags=re.MULTILINE) == [r"method & seeds & training (s) & ACC (\%) \\"] * 2
    assert re.findall(r"\\begin\{tabular\}\{(\w+)\}", latex) == ["lrrr"] * 2
    assert "| naive | 3 | 3.10 ± 0.10 [2.85, 3.35] | 89.33 ± 0.33 [88.51, 90.16] |" in markdown
    assert r"naive & 3 & $3.10 \pm 0.10$ & $89.33 \pm 0.33$ \\" in latex


def test_the_page_and_the_table_for_programs_have_all(tmp_path: Path) -> None:
    write(tmp_path / "all", small())
    write(tmp_path / "some", small(), columns=("acc",))
    for name in ("report.html", "table.csv"):
        assert (tmp_path / "all" / name).read_bytes() == (tmp_path / "some" / name).read_bytes()
    assert "forgetting" in (tmp_path / "all" / "table.md").read_text()
    assert "forgetting" not in (tmp_path / "some" / "table.md").read_text()


def test_a_column_that_was_asked_for_is_there_without_figures(tmp_path: Path) -> None:
    write(tmp_path, Study("x", "", [joint(0)]), columns=("bwt", "growth"))
    assert "| joint | 1 | - | - |" in (tmp_path / "table.md").read_text()
    assert r"joint & 1 & -- & -- \\" in (tmp_path / "table.tex").read_text()


def test_names_are_those_of_the_table_for_programs() -> None:
    names = dict.fromkeys(line.split(",")[3] for line in csv_table(Study("x", "", [result("a", 0)])).splitlines()[1:])
    assert check(list(names)) == tuple(names) == tuple(metric.key for metric in METRICS)
    assert check(None) == ()
    documentation = (Path(__file__).parents[3] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in documentation for name in names)


@pytest.mark.parametrize(
    ("names", "fragments"),
    [
        (["acc", "forgeting"], ["--columns", "'forgeting'", "did you mean 'forgetting'", "train_seconds"]),
        (["acc", "bwt", "acc"], ["--columns", "'acc' twice"]),
        ([""], ["--columns is empty", "acc, bwt, forgetting"]),
        ([], ["--columns is empty"]),
        (["acc", ""], ["--columns: unknown column ''"]),
        (["ACC"], ["'ACC'"]),
    ],
)
def test_what_is_no_column_is_refused(names: list[str], fragments: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        check(names)
    for fragment in fragments:
        assert fragment in str(caught.value)
