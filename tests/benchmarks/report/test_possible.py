"""What cannot be: intervals that reach there are remarked on, bands, bars and axes end before it."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from typing import Any

import pytest

from benchmarks.report.figures_table import figures_table
from benchmarks.report.look import styles
from benchmarks.report.plots import Plot, plots
from benchmarks.report.possible import beyond
from benchmarks.report.statistics import compare_pairs
from benchmarks.report.study import Study
from benchmarks.report.summary import BY_KEY, METRICS, Row, summarise
from benchmarks.report.tables import markdown
from tests.benchmarks.report.examples import result

#: Mean 99, deviation 1; with t(.975, 2) = 4.302653 the interval ends at 99 + 4.302653 / sqrt 3 = 101.484.
NEAR = (98.0, 99.0, 100.0)


def runs(label: str, key: str, values: Sequence[float]) -> list[dict[str, Any]]:
    return [result(label, seed, **{key: value}) for seed, value in enumerate(values)]


def rows(**values: Sequence[float]) -> list[Row]:
    """Rows whose ACC is given."""
    return summarise({label: runs(label, "acc", own) for label, own in values.items()})


def test_an_interval_beyond_what_is_possible_is_remarked_on() -> None:
    found = rows(a=NEAR, b=(50.0, 51.0, 52.0), c=NEAR)
    assert beyond(found, METRICS).startswith(
        "The t-interval of 3 seeds reaches beyond what is possible: ACC (0 to 100 %) of a [96.52, 101.48], "
        "c [96.52, 101.48]. "
    )
    assert beyond(found[1:2], METRICS) == ""
    assert beyond(found, [BY_KEY["bwt"]]) == ""  # not a column of the table
    assert "of 3 to 4 seeds" in beyond(rows(a=NEAR, b=(*NEAR, 97.0)), METRICS)


@pytest.mark.parametrize(
    ("key", "values", "text"),
    [
        ("acc", (0.0, 1.0, 2.0), "ACC (0 to 100 %) of a [-1.48, 3.48]"),
        ("bwt", (-100.0, -99.0, -98.0), "BWT (-100 to 100 %) of a [-101.48, -96.52]"),
        ("bwt", (98.0, 99.0, 100.0), "BWT (-100 to 100 %) of a [96.52, 101.48]"),
        ("bwt", (-1.0, 0.0, 1.0), ""),
        ("forgetting", (-1.0, 0.0, 1.0), ""),
        ("forgetting", NEAR, "forgetting (-100 to 100 %) of a [96.52, 101.48]"),
        ("forward_transfer", (-100.0, -99.0, -98.0), "FWT (-100 to 100 %) of a"),
        ("train_seconds", (1.0, 2.0, 3.0), "training (from 0 s on) of a [-0.48, 4.48]"),
        ("train_seconds", (10.0, 11.0, 12.0), ""),
        ("peak_memory_mb", (1.0, 2.0, 9.0), "peak memory (from 0 MiB on) of a"),
        ("growth", (0.1, 0.2, 0.3), "growth (from 0 % on) of a [-4.8, 44.8]"),
        ("acc", (100.0, 100.0, 100.0), ""),
        ("acc", (99.99, 99.99, 99.993), ""),  # 99.9954 as it is written does not reach beyond
    ],
)
def test_every_figure_has_its_range(key: str, values: Sequence[float], text: str) -> None:
    found = beyond(summarise({"a": runs("a", key, values)}), [BY_KEY[key]])
    assert text in found
    assert bool(found) is bool(text)


def test_the_remark_is_below_the_tables() -> None:
    study = Study("x", "", runs("a", "acc", NEAR))
    text = markdown(study)
    assert text.index("| a |") < text.index("- The t-interval of 3 seeds reaches beyond")
    assert "[96.52, 101.48]" in text
    assert "reaches beyond" not in markdown(study, columns=("bwt",))
    found = study.of("digits-split")
    page = figures_table(summarise(found), compare_pairs(found))
    assert page.index("</table>") < page.index("The t-interval of 3 seeds reaches beyond")


def drawn(kind: str, own: dict[str, Any]) -> Plot:
    """One plot of some runs."""
    (found,) = (plot for plot in plots("p1", own, styles(list(own))) if plot.kind == kind)
    return found


def box(element: ElementTree.Element | None) -> tuple[float, float, float, float]:
    """Left, upper, right and lower edge of what is in an element."""
    assert element is not None
    text = " ".join(path.get("d", "") for path in element.iter("path"))
    pairs = [(float(x), float(y)) for x, y in re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", text)]
    use = element.find(".//use")  # a band is drawn elsewhere and put in its place
    right, below = (0.0, 0.0) if use is None else (float(use.get("x", 0)), float(use.get("y", 0)))
    across, down = [x + right for x, _ in pairs], [y + below for _, y in pairs]
    return min(across), min(down), max(across), max(down)


def part(svg: str, name: str) -> ElementTree.Element | None:
    """The first part of a drawing that matplotlib calls so."""
    return next((own for own in ElementTree.fromstring(svg).iter("g") if name in own.get("id", "")), None)


def ticks(svg: str, axis: int) -> list[float]:
    """Numbers at an axis: 1 across, 2 up."""
    element = part(svg, f"matplotlib.axis_{axis}")
    assert element is not None
    texts = ["".join(text.itertext()).replace("\N{MINUS SIGN}", "-") for text in element.iter("text")]
    return [float(text) for text in texts if re.fullmatch(r"-?[\d.]+", text)]


def matrix(last: float) -> list[list[float]]:
    return [[last, 0.0], [last, last]]


@pytest.mark.parametrize(("values", "top"), [((100.0, 100.0, 100.0, 100.0, 97.0), True), ((0, 0, 0, 0, 2.0), False)])
def test_bands_end_at_what_is_possible(values: Sequence[float], top: bool) -> None:
    # Five runs: the band is an interval, 99.4 ± 1.67 and .4 ± 1.11.
    own = {"a": [result("a", seed, accuracy_matrix=matrix(value)) for seed, value in enumerate(values)]}
    plot = drawn("seen", own)
    inside, band = box(part(plot.svg, "patch_2")), box(part(plot.svg, "PolyCollection"))
    assert inside[1] - 0.01 <= band[1] < band[3] <= inside[3] + 0.01
    # The axis ends just there: the band touches its end on that side.
    assert (abs(band[1] - inside[1]) < 0.01) is top
    assert (abs(band[3] - inside[3]) < 0.01) is not top
    assert all(0 <= tick <= 100 for tick in ticks(plot.svg, 2))
    assert (100 if top else 0) in ticks(plot.svg, 2)
    assert "Cut off at 0 and 100 %." in plot.caption


def test_bands_that_are_possible_are_not_said_to_be_cut() -> None:
    own = {"a": [result("a", seed, accuracy_matrix=matrix(50.0 + seed)) for seed in range(5)]}
    plot = drawn("seen", own)
    inside, band = box(part(plot.svg, "patch_2")), box(part(plot.svg, "PolyCollection"))
    assert inside[1] + 1 < band[1] < band[3] < inside[3] - 1
    assert "Cut off" not in plot.caption


def test_markers_at_the_end_of_an_axis_are_drawn_whole() -> None:
    own = {"a": [result("a", 0, accuracy_matrix=matrix(100.0))]}
    svg = drawn("seen", own).svg
    line = ElementTree.fromstring(svg)
    uses = [use for use in line.iter("use") if "#0072b2" in use.get("style", "")]
    assert uses
    clipped = [group for group in line.iter("g") if group.get("clip-path") and list(group.iter("use"))]
    assert not any("#0072b2" in use.get("style", "") for group in clipped for use in group.iter("use"))


@pytest.mark.parametrize("kind", ["time", "memory"])
def test_bars_and_axes_of_costs_end_at_what_is_possible(kind: str) -> None:
    key = {"time": "train_seconds", "memory": "peak_memory_mb"}[kind]
    # Mean 2, deviation 2.65: the bar would reach below 0; ACC 99 ± 1.73 would reach above 100.
    own = {
        "a": [result("a", s, acc=acc, **{key: cost}) for s, (acc, cost) in enumerate([(100, 1), (100, 0), (97, 5)])],
        "b": [result("b", s, acc=90.0 + s, **{key: 6.0 + s}) for s in range(3)],
    }
    plot = drawn(kind, own)
    assert min(ticks(plot.svg, 1)) == 0
    assert max(ticks(plot.svg, 2)) == 100
    inside, across, up = (box(part(plot.svg, name)) for name in ("patch_2", "LineCollection_1", "LineCollection_2"))
    assert across[0] == pytest.approx(inside[0], abs=0.01)
    assert up[1] == pytest.approx(inside[1], abs=0.01)
    assert "as far as it is possible" in plot.caption
    assert "as far as" not in drawn(kind, {"b": own["b"]}).caption


def test_a_bar_down_to_zero_leaves_a_logarithmic_axis_readable() -> None:
    own = {
        "a": [result("a", seed, train_seconds=value) for seed, value in enumerate((0.5, 0.5, 5.0))],
        "b": [result("b", seed, train_seconds=900.0 + seed) for seed in range(3)],
    }
    found = ticks(drawn("time", own).svg, 1)
    assert 0.001 < min(found) <= 1
    assert max(found) >= 1000
