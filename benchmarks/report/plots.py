"""All plots of one protocol, as elements of a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.report import curves, heatmaps, matrices, scatter
from benchmarks.report.look import Style, styles
from benchmarks.report.protocol_facts import named
from benchmarks.report.study import Study
from benchmarks.report.summary import Row, is_joint, summarise

Runs = Mapping[str, Sequence[Mapping[str, Any]]]

#: How the band of a curve is described.
_BAND = {
    True: f"Bands: 95 % t-interval of the mean with {matrices.ENOUGH} runs or more, else lowest to highest run.",
    False: "Bands: lowest to highest run.",
}


@dataclass(frozen=True)
class Plot:
    """One drawing.

    Attributes:
        kind: which plot it is: `seen`, `first`, `time`, `memory`, `free` or `matrix`.
        svg: the `<svg>` element.
        caption: what it shows, as plain text.
        label: whose it is; empty for those of all labels.
    """

    kind: str
    svg: str
    caption: str
    label: str = ""


def draw(study: Study) -> dict[str, list[Plot]]:
    """Draw all plots of a report.

    Args:
        study: what there is to report.

    Returns:
        The plots of each protocol with a finished run, ready for one page.
    """
    looks = styles([result["label"] for result in study.results])
    prefixes = {name: f"p{index}" for index, name in enumerate(named(study), 1)}
    return {name: plots(prefixes[name], study.of(name), looks) for name in study.protocols}


def plots(prefix: str, runs: Runs, looks: Mapping[str, Style]) -> list[Plot]:
    """Draw everything that the runs of one protocol have numbers for.

    Args:
        prefix: what ids begin with, another one for each protocol of a page.
        runs: label to its runs, as `Study.of` returns them.
        looks: label to its look.

    Returns:
        The plots, those of the accuracy first, a heat map for each label last.
    """
    return [
        *_over_time(prefix, runs, looks),
        *_against_cost(prefix, runs, looks),
        *_free(prefix, runs),
        *_matrices(prefix, runs),
    ]


def _over_time(prefix: str, runs: Runs, looks: Mapping[str, Style]) -> Iterator[Plot]:
    """Accuracy over the experiences."""
    sequential = {label: own for label, own in runs.items() if own and not is_joint(own[0])}
    joint = {label: own for label, own in runs.items() if own and is_joint(own[0])}
    several = max((len(own) for own in sequential.values()), default=0)
    band = f" {_BAND[several >= matrices.ENOUGH]}" if several > 1 else ""
    for kind, read, place, title, axis in (
        ("seen", matrices.seen_so_far, 0, "Average accuracy on the experiences seen so far", "average accuracy (%)"),
        ("first", matrices.first_experience, 1, "Accuracy on the first experience", "accuracy on the first (%)"),
    ):
        lines = {
            label: matrices.curve([read(matrices.matrix_of(run)) for run in own]) for label, own in sequential.items()
        }
        levels = {
            label: matrices.curve([[matrices.at_the_end(matrices.matrix_of(run))[place]] for run in own]).mean[0]
            for label, own in joint.items()
        }
        cut = " Cut off at 0 and 100 %." if any(map(curves.beyond, lines.values())) else ""
        svg = curves.draw(f"{prefix}-{kind}", f"{title}, after each one", axis, lines, levels, looks)
        if svg:
            dotted = f" Dotted: {', '.join(levels)}, trained on all at once." if levels else ""
            yield Plot(kind, svg, f"{title}, after each one; mean over seeds.{band}{cut}{dotted}")


def _against_cost(prefix: str, runs: Runs, looks: Mapping[str, Style]) -> Iterator[Plot]:
    """Accuracy at the end against what it cost."""
    rows = summarise(runs)
    for kind, key, title, axis in (
        ("time", "train_seconds", "training time", "training time (s)"),
        ("memory", "peak_memory_mb", "peak memory", "peak memory (MiB)"),
    ):
        svg = scatter.draw(f"{prefix}-{kind}", f"ACC against {title}", axis, rows, key, looks)
        if svg:
            yield Plot(kind, svg, f"ACC at the end against {title}; mean over seeds.{_bars(rows, key)}")


def _bars(rows: Sequence[Row], key: str) -> str:
    """Say what the bars of dots are."""
    found = [(row.figures[each], scatter.whiskers(row.figures[each], each)) for row in rows for each in ("acc", key)]
    if not any(len(row.seeds) > 1 for row in rows):
        return ""
    cut = any(ends is not None and ends != (figure.std, figure.std) for figure, ends in found)
    return f" Bars: sample standard deviation{', as far as it is possible' if cut else ''}."


def _free(prefix: str, runs: Runs) -> Iterator[Plot]:
    """Free share of each layer, for methods with bases."""
    for index, (label, own) in enumerate(runs.items()):
        shares = matrices.free_shares(own)
        if shares:
            svg = curves.draw_layers(f"{prefix}-free{index}", f"Free share of each layer, {label}", shares)
            many = " Colour: from the first layer, dark, to the last, light." if len(shares) > curves.NAMED else ""
            caption = f"{label}: share of each layer's input space that is still free; mean over seeds.{many}"
            yield Plot("free", svg, caption, label)


def _matrices(prefix: str, runs: Runs) -> Iterator[Plot]:
    """Mean accuracy matrices on one scale."""
    found = {label: matrices.mean_matrix(own) for label, own in runs.items()}
    low = heatmaps.lower_end(found.values())
    for index, (label, matrix) in enumerate(found.items()):
        if matrix:
            svg = heatmaps.draw(f"{prefix}-matrix{index}", f"Accuracy matrix of {label}", label, matrix, low)
            count = len(runs[label])
            below = " and below" if low > 0 else ""
            seeds = f"mean over {count} seeds" if count > 1 else "one seed"
            yield Plot("matrix", svg, f"{label}, {seeds}. Darkest: {low:.0f} %{below}.", label)
