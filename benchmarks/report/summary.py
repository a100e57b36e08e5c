"""Mean, spread and interval of each figure over the seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from scipy import stats

#: How much an interval covers.
LEVEL = 0.95


@dataclass(frozen=True)
class Metric:
    """A figure of a run.

    Attributes:
        key: its name in a result.
        name: its name for people.
        unit: unit that people read it in; empty for plain numbers.
        digits: decimal places; None takes as many as the size of the number asks for.
        factor: from the result's unit to the one that people read.
        meaning: what it is.
        better: whether a higher or a lower one is better; None where that depends.
        lowest: the lowest value that it can have, in the result's unit; None where there is none.
        highest: the highest one.
    """

    key: str
    name: str
    unit: str
    digits: int | None
    meaning: str
    factor: float = 1.0
    better: Literal["higher", "lower"] | None = None
    lowest: float | None = 0.0
    highest: float | None = None

    @property
    def heading(self) -> str:
        """Name with unit."""
        return f"{self.name} ({self.unit})" if self.unit else self.name


METRICS = (
    Metric(
        "acc", "ACC", "%", 2, "mean accuracy over all experiences after the last one", better="higher", highest=100.0
    ),
    Metric(
        "bwt",
        "BWT",
        "%",
        2,
        "mean change of the accuracy on earlier experiences since each was learned, over all but the last",
        better="higher",
        lowest=-100.0,
        highest=100.0,
    ),
    Metric(
        "forgetting",
        "forgetting",
        "%",
        2,
        "mean loss from the best accuracy on an earlier experience to the final one",
        better="lower",
        lowest=-100.0,
        highest=100.0,
    ),
    Metric(
        "forward_transfer",
        "FWT",
        "%",
        2,
        "mean accuracy on the next experience before it is learned, less that of "
        "the untrained network; none where each experience has a head of its own, which is still untrained then",
        better="higher",
        lowest=-100.0,
        highest=100.0,
    ),
    Metric(
        "train_seconds",
        "training",
        "s",
        None,
        "wall-clock time of the training alone; it depends on what else the machine did",
        better="lower",
    ),
    Metric("peak_memory_mb", "peak memory", "MiB", 0, "see the note on memory", better="lower"),
    Metric(
        "added_parameters",
        "added parameters",
        "",
        0,
        "parameters, and other numbers of the method in the network, that it has gained in the end",
        better="lower",
    ),
    Metric(
        "growth", "growth", "%", 1, "what the method added to the network, as a share of its numbers", 100.0, "lower"
    ),
    Metric(
        "bytes_held",
        "held",
        "kB",
        None,
        "what the method keeps of earlier experiences, where that is counted; of replay and A-GEM what their samples "
        "take as the tensors that they are trained on, though Avalanche holds references to them",
        1e-3,
        "lower",
    ),
)

#: The same by key.
BY_KEY: Mapping[str, Metric] = {metric.key: metric for metric in METRICS}


@dataclass(frozen=True)
class Figure:
    """One figure over the seeds.

    Attributes:
        count: how many runs have it.
        mean: their mean; None if none has it.
        std: sample standard deviation; None for fewer than two.
        low: lower end of the t-interval of the mean; None for fewer than two.
        high: its upper end.
    """

    count: int = 0
    mean: float | None = None
    std: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Row:
    """What is known of one label in one protocol.

    Attributes:
        label: method, and what of it varies.
        method: the method.
        seeds: seeds of its runs.
        figures: metric to figure.
        changed: what differs from the protocol's own settings.
        joint: whether it learned all experiences at once, so that nothing comes one after the other.
        diverged: how many of its runs ended with a loss that is no number; they count in its figures.
        data: digests of the images of its runs, where they are known.
    """

    label: str
    method: str
    seeds: tuple[int, ...]
    figures: Mapping[str, Figure]
    changed: Mapping[str, str]
    joint: bool
    diverged: int = 0
    data: tuple[str, ...] = ()


def number(value: Any) -> float | None:
    """Return a figure as a float; None for what is missing, not a number or infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def figure(values: Iterable[Any]) -> Figure:
    """Summarise one figure.

    Args:
        values: one of each run; what is missing or not finite is left out.

    Returns:
        Mean, deviation and interval of the others.
    """
    known = [value for value in map(number, values) if value is not None]
    if not known:
        return Figure()
    mean = statistics.fmean(known)
    if len(known) == 1:
        return Figure(1, mean)
    std = statistics.stdev(known)
    half = half_width(std, len(known))
    return Figure(len(known), mean, std, mean - half, mean + half)


def half_width(std: float, count: int) -> float:
    """Half of the t-interval of a mean.

    Args:
        std: sample standard deviation.
        count: of how many values, two or more.

    Returns:
        What is added to and taken from the mean.
    """
    return float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * std / math.sqrt(count)


def is_joint(result: Mapping[str, Any]) -> bool:
    """Tell whether a run learned all its experiences at once: it was tested after one training, on many."""
    matrix = result.get("accuracy_matrix") or []
    return len(matrix) == 1 and len(matrix[0]) > 1


def summarise(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Row]:
    """Summarise the runs of one protocol.

    Args:
        runs: label to its runs, as `Study.of` returns them.

    Returns:
        One row a label, in order.
    """
    return [
        Row(
            label,
            str(own[0].get("method", label)),
            tuple(run["seed"] for run in own),
            {metric.key: figure(_value(run, metric.key) for run in own) for metric in METRICS},
            dict(own[0].get("changed") or {}),
            is_joint(own[0]),
            sum(bool(run.get("diverged")) for run in own),
            tuple(dict.fromkeys(run["data"] for run in own if run.get("data") is not None)),
        )
        for label, own in runs.items()
        if own
    ]


def _value(run: Mapping[str, Any], key: str) -> Any:
    """Read a figure; there is no forward transfer to a head that is still untrained."""
    heads = (run.get("hyper_parameters") or {}).get("outputs") == "heads"
    return None if heads and key == "forward_transfer" else run.get(key)


def shown(rows: Sequence[Row], columns: Sequence[str] = ()) -> list[Metric]:
    """Choose the metrics of a table.

    Args:
        rows: its rows.
        columns: keys of the metrics asked for, in their order (`columns.check`); none takes those that a row has.

    Returns:
        The metrics.
    """
    if columns:
        return [BY_KEY[key] for key in columns]
    return [metric for metric in METRICS if any(row.figures[metric.key].count for row in rows)]
