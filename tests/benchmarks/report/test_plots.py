from __future__ import annotations

import re
import sys
from itertools import combinations, pairwise
from typing import Any

import pytest

from benchmarks.report import matrices
from benchmarks.report.heatmaps import ink, lower_end, luminance
from benchmarks.report.look import COLOURS, DASHES, MARKERS, styles
from benchmarks.report.plots import Plot, plots
from benchmarks.report.svg import canvas, drawing, to_svg
from tests.benchmarks.report.examples import joint, large, result, small, with_bases
from tests.processes import run_to_end


def drawn(runs: dict[str, Any]) -> dict[str, list[Plot]]:
    """Plots by kind."""
    found: dict[str, list[Plot]] = {}
    for plot in plots("p1", runs, styles(list(runs))):
        found.setdefault(plot.kind, []).append(plot)
    return found


def texts(svg: str) -> list[str]:
    """What a drawing has in words."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_looks_differ_without_colour() -> None:
    looks = list(styles([f"method{k}" for k in range(15)]).values())
    for one, other in combinations(looks, 2):
        assert (one.marker, one.hollow) != (other.marker, other.hollow)
    for one, other in combinations(looks[:12], 2):
        assert (one.marker, one.hollow, one.dashes) != (other.marker, other.hollow, other.dashes)
    # Neighbours differ in their dashes too, wherever markers are too dense to see.
    assert all(one.dashes != other.dashes for one, other in pairwise(looks))
    assert len(set(MARKERS)) == 15
    assert len(set(DASHES)) == len(DASHES)


def test_colours_are_dark_enough_on_white_and_all_of_one_palette() -> None:
    okabe_ito = {"#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442"}
    assert set(COLOURS) <= okabe_ito
    for look in styles([str(k) for k in range(7)]).values():
        parts = [int(look.dark[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        assert 1.05 / (luminance(parts) + 0.05) >= 4.5  # what WCAG asks for of text


def test_a_label_looks_the_same_wherever_it_comes() -> None:
    assert styles(["a", "b", "a", "c"])["c"] == styles(["a", "b", "c"])["c"]


def test_mean_matrix_and_curves_by_hand() -> None:
    runs = [
        result("a", 0, accuracy_matrix=[[90, 10], [80, 60]]),
        result("a", 1, accuracy_matrix=[[100, 20], [60, 100]]),
    ]
    assert matrices.mean_matrix(runs) == [[95, 15], [70, 80]]
    lines = [matrices.seen_so_far(matrices.matrix_of(run)) for run in runs]
    assert lines == [[90, 70], [100, 80]]  # the 10 and 20 are of what was not seen yet
    assert [matrices.first_experience(matrices.matrix_of(run)) for run in runs] == [[90, 80], [100, 60]]
    found = matrices.curve(lines)
    assert (found.mean, found.low, found.high) == ([95, 75], [90, 70], [100, 80])


def test_bands_are_intervals_from_five_runs_on() -> None:
    four = matrices.curve([[float(k)] for k in range(4)])
    assert (four.low, four.high) == ([0.0], [3.0])
    five = matrices.curve([[float(k)] for k in range(5)])
    assert five.low[0] == pytest.approx(2 - 2.776445 * 2.5**0.5 / 5**0.5, abs=1e-5)
    one = matrices.curve([[1.0]])
    assert (one.low, one.high) == ([None], [None])


def test_what_is_missing_makes_gaps_not_other_means() -> None:
    matrix = matrices.matrix_of(result("a", 0, accuracy_matrix=[[90, None], [None, 60]]))
    assert matrices.seen_so_far(matrix) == [90, None]
    runs = [result("a", 0, accuracy_matrix=[[90, float("nan")], [80, 70]]), result("a", 1, accuracy_matrix=[[1.0]])]
    assert matrices.mean_matrix(runs) == [[90, None], [80, 70]]


def test_free_shares_are_means_in_percent() -> None:
    found = matrices.free_shares([with_bases("gpm", 0), with_bases("gpm", 1)])
    assert found == {"conv": pytest.approx([90, 80, 70]), "linear": pytest.approx([80, 60, 40])}
    assert matrices.free_shares([result("naive", 0), {"experiences": None}]) == {}


def test_every_kind_of_plot_and_a_heat_map_for_each_label() -> None:
    found = drawn(small().of("digits-split"))
    assert list(found) == ["seen", "first", "time", "memory", "free", "matrix"]
    assert len(found["matrix"]) == 3
    assert len(found["free"]) == 1
    assert "lowest to highest" in found["seen"][0].caption
    assert "Dotted: joint" in found["seen"][0].caption
    assert "95 %" in drawn(large(methods=3, seeds=5).of("digits-split"))["seen"][0].caption


def test_heat_maps_have_their_numbers_up_to_twelve_experiences() -> None:
    few = drawn(large(methods=2, experiences=12, seeds=1).of("digits-split"))["matrix"][0].svg
    many = drawn(large(methods=2, experiences=13, seeds=1).of("digits-split"))["matrix"][0].svg
    assert len([text for text in texts(few) if re.fullmatch(r"\d+\.\d|100", text)]) == 144
    assert not [text for text in texts(many) if re.fullmatch(r"\d+\.\d", text)]


def test_numbers_can_be_read_on_their_cells() -> None:
    import matplotlib

    colours = matplotlib.colormaps["cividis"]
    for step in range(101):
        on = luminance(colours(step / 100))
        contrasts = {"white": 1.05 / (on + 0.05), "black": (on + 0.05) / 0.05}
        chosen = contrasts[ink(colours(step / 100))]
        assert chosen >= 4.5


def test_the_scale_of_heat_maps_is_of_what_is_learned() -> None:
    assert lower_end([[[95.0, 3.0], [84.0, 99.0]]]) == 80.0
    assert lower_end([[[95.0, 3.0], [84.0, 99.0]], [[71.0, 90.0]]]) == 70.0
    assert lower_end([[[100.0]]]) == 90.0
    assert lower_end([[[None]]]) == 0.0
    assert lower_end([]) == 0.0


def test_joint_training_is_a_level_and_not_a_curve() -> None:
    alone = drawn({"joint": [joint(0), joint(1)]})
    assert "joint" in texts(alone["seen"][0].svg)
    assert "all" in texts(alone["matrix"][0].svg)
    assert matrices.at_the_end([[96.0, 97.0, 98.0]]) == [97.0, 96.0]


def test_no_ids_clash_and_all_references_hold() -> None:
    made = "".join(plot.svg for plots_ in drawn(small().of("digits-split")).values() for plot in plots_)
    ids = re.findall(r'\bid="([^"]*)"', made)
    assert len(ids) == len(set(ids))
    references = re.findall(r'href="#([^"]*)"', made) + re.findall(r"url\(#([^)]*)\)", made)
    assert references
    assert set(references) <= set(ids)


def test_labels_are_text_and_nothing_else() -> None:
    label = '_$x$ <b>&"id="y" url(#z)'
    found = drawn({label: [with_bases(label, 0)], "b": [result("b", 0)]})
    escaped = "_$x$ &lt;b&gt;&amp;"
    for kind in ("seen", "time", "matrix"):
        assert any(text.startswith(escaped) for text in texts(found[kind][0].svg)), kind
        assert "<b>" not in found[kind][0].svg
    assert "url(#z)" in "".join(texts(found["matrix"][0].svg))


def test_drawing_is_repeatable_and_leaves_matplotlib_alone() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    runs = small().of("digits-split")
    assert drawn(runs) == drawn(runs)
    assert dict(matplotlib.rcParams) == before
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.facecolor": "red"}):
        changed = drawn(runs)
    assert changed == drawn(runs)


def test_drawing_needs_no_window_system() -> None:
    code = (
        "import sys; from tests.benchmarks.report.examples import small; from benchmarks.report.html import page; "
        "page(small()); sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert run_to_end([sys.executable, "-c", code]).returncode == 0


def test_a_drawing_says_what_it_shows() -> None:
    with drawing():
        figure = canvas(2, 1)
        figure.add_subplot().plot([0, 1])
        svg = to_svg(figure, "here", "a < b")
    assert svg.startswith("<svg ")
    assert 'role="img"' in svg
    assert 'aria-labelledby="here-title"' in svg
    assert '<title id="here-title">a &lt; b</title>' in svg
    assert "<style" not in svg
    assert "http" not in svg


@pytest.mark.parametrize(
    "changes",
    [
        {"accuracy_matrix": None},
        {"accuracy_matrix": []},
        {"accuracy_matrix": [[]]},
        {"accuracy_matrix": [[float("nan")] * 3] * 3},
        {"accuracy_matrix": [[90.0]]},
        {"acc": None, "train_seconds": None, "peak_memory_mb": None},
        {"train_seconds": 0.0, "peak_memory_mb": float("nan")},
        {"experiences": [None, {"free_share": {"conv": None}}]},
    ],
)
def test_runs_with_holes_are_drawn_as_far_as_they_go(changes: dict[str, Any]) -> None:
    drawn({"a": [result("a", 0, **changes), result("a", 1, **changes)]})
    drawn({"a": [result("a", 0, **changes)], "b": [result("b", 0)], "joint": [joint(0)]})


def test_many_layers_and_wide_ranges() -> None:
    shares = [{"free_share": {f"layer{k}": 0.5 for k in range(40)}}] * 3
    found = drawn({"gpm": [result("gpm", 0, experiences=shares)], "slow": [result("slow", 0, train_seconds=3000.0)]})
    assert "first layer" in found["free"][0].caption
    assert not [text for text in texts(found["free"][0].svg) if text.startswith("layer")]
    assert "1000" in texts(found["time"][0].svg)
