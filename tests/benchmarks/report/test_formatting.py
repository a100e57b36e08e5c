from __future__ import annotations

import pytest

from benchmarks.report.formatting import decimal, figure_interval, interval, p_value, with_spread
from benchmarks.report.markup import Markup, bullets, slug, table, tag
from benchmarks.report.summary import METRICS, figure

_BY_KEY = {metric.key: metric for metric in METRICS}


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0.0, 2, "0.00"),
        (-0.001, 2, "0.00"),
        (-0.01, 2, "-0.01"),
        (1234.5, 1, "1234.5"),
        (1234567.0, 0, "1,234,567"),
        (3.14159, None, "3.14"),
        (31.4159, None, "31.4"),
        (3141.59, None, "3142"),
        (None, 2, "-"),
    ],
)
def test_numbers(value: float | None, digits: int | None, text: str) -> None:
    assert decimal(value, digits) == text


@pytest.mark.parametrize(("p", "text"), [(0.0004, "< .001"), (0.04, ".040"), (1.0, "1"), (None, "-")])
def test_p_values(p: float | None, text: str) -> None:
    assert p_value(p) == text


def test_figures_have_the_same_places_throughout_and_the_units_of_people() -> None:
    assert with_spread(figure([9.0, 11.0]), _BY_KEY["train_seconds"]) == "10.0 ± 1.4"
    assert with_spread(figure([2048]), _BY_KEY["bytes_held"]) == "2.05"
    assert with_spread(figure([0.25]), _BY_KEY["growth"]) == "25.0"
    assert figure_interval(figure([9.0, 11.0]), _BY_KEY["acc"]) == "[-2.71, 22.71]"  # 10 ± 12.7062
    assert interval(None, 1.0, 2) == ""


def test_a_figure_without_spread_has_no_interval_and_a_count_no_spread() -> None:
    assert figure_interval(figure([5.0, 5.0]), _BY_KEY["acc"]) == ""
    assert with_spread(figure([5.0, 5.0]), _BY_KEY["acc"]) == "5.00 ± 0.00"
    assert with_spread(figure([5, 5]), _BY_KEY["added_parameters"]) == "5"


def test_elements() -> None:
    assert tag("a", '<"&', href='"<x>', class_="y", id=None) == (
        '<a href="&quot;&lt;x&gt;" class="y">&lt;&quot;&amp;</a>'
    )
    assert tag("p", Markup("<b>x</b>"), " & y") == "<p><b>x</b> &amp; y</p>"
    assert bullets([]) == ""
    assert slug('A "b" & ü') == "a-b"
    assert slug("&") == "x"
    assert '<th scope="row">&lt;r&gt;</th><td>1</td>' in table("c", ["h", "i"], [["<r>", 1]])
