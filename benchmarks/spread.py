"""How much the final accuracy of a task depends on the order in which the tasks are learned.

The figures are those of APD (ICLR 2020): a task's disparity is its best final accuracy over the orders minus its worst;
AOPD is the mean over the tasks and MOPD the largest. Several seeds are averaged first, order by order and task by task.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.settings import InputError, unknown

_KEYS = ("protocol", "method", "seed", "hyper_parameters", "accuracy_matrix", "task_order", "experience_groups")

#: What the columns of the table mean.
EXPLANATION = (
    "ACC of each order and their mean; AOPD, MOPD: mean and maximum over tasks of the best minus the worst final "
    "accuracy over orders (seeds averaged first); percent."
)

Runs = Mapping[Path, Mapping[str, Any]]


@dataclass(frozen=True)
class Spread:
    """One method over several orders.

    Attributes:
        protocol: what was run.
        method: its name.
        seeds: how many runs there are of each order.
        accuracies: order to ACC, the mean over tasks and seeds.
        mean: mean of these.
        aopd: mean over tasks of the disparity over orders.
        mopd: largest of these disparities.
    """

    protocol: str
    method: str
    seeds: int
    accuracies: Mapping[str, float]
    mean: float
    aopd: float
    mopd: float


def read(folders: Sequence[Path]) -> dict[Path, dict[str, Any]]:
    """Read the runs below some folders.

    Args:
        folders: every `.json` file in them and below is a run.

    Returns:
        File to its run, in the order of the names.

    Raises:
        InputError: if a folder is none or has no run, or a file is not that of a run with an order of tasks.
    """
    runs: dict[Path, dict[str, Any]] = {}
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{str(folder)!r} is no folder; expected one with the JSON files of runs")
        files = sorted(file for file in folder.rglob("*.json") if file.name not in ("format.json", "status.json"))
        if not files:
            raise InputError(f"{str(folder)!r} holds no JSON file; expected those of runs with different task_order")
        runs.update({file: _read_run(file) for file in files})
    return runs


def _read_run(file: Path) -> dict[str, Any]:
    """Read one run and see that it can be placed."""
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is not readable as JSON: {' '.join(str(error).split())}") from error
    missing = [key for key in _KEYS if not isinstance(result, dict) or key not in result]
    if missing:
        raise InputError(f"{file} is not the file of a run: it lacks {missing[0]!r}; move it or give another folder")
    if result["task_order"] is None:
        raise InputError(
            f"{file}: {result['protocol']} has no task_order; give folders of a protocol that has, as cifar100-halrp"
        )
    return result


def spreads(runs: Runs, methods: Sequence[str] | None = None) -> list[Spread]:
    """Compare the orders of each method.

    Args:
        runs: what `read` returned.
        methods: their names, in the order wanted; None takes all, in that of the files.

    Returns:
        One entry a method.

    Raises:
        InputError: if the runs are of several protocols; or those of a method differ in more than order and seed, have
            the same order and seed, lack a seed in an order, or have fewer than two orders.
    """
    _same(runs, "protocol", {file: run["protocol"] for file, run in runs.items()}, "give folders of one protocol")
    present = list(dict.fromkeys(run["method"] for run in runs.values()))
    for method in methods or ():
        if method not in present:
            raise unknown("method", method, present)
    return [
        _spread(method, {f: run for f, run in runs.items() if run["method"] == method}) for method in methods or present
    ]


def _spread(method: str, runs: Runs) -> Spread:
    """Check and compare the runs of one method."""
    _check_settings(method, runs)
    orders: dict[str, dict[int, Mapping[int, float]]] = {}
    for file, run in sorted(runs.items(), key=lambda item: (item[1]["task_order"], item[1]["seed"])):
        seeds = orders.setdefault(run["task_order"], {})
        if run["seed"] in seeds:
            raise InputError(f"{method}: {file} is a second run of order {run['task_order']}, seed {run['seed']}")
        seeds[run["seed"]] = dict(zip(run["experience_groups"], run["accuracy_matrix"][-1], strict=True))
    if len(orders) < 2:
        raise InputError(
            f"{method}: there are runs of task_order {', '.join(orders)} alone; expected at least two orders: run the "
            "others with --set task_order=, or leave the method out with --methods"
        )
    _check_seeds(method, orders)
    means = {
        order: {group: statistics.fmean(run[group] for run in seeds.values()) for group in next(iter(seeds.values()))}
        for order, seeds in orders.items()
    }
    _check_groups(method, means)
    first = next(iter(means.values()))
    disparities = [max(m[group] for m in means.values()) - min(m[group] for m in means.values()) for group in first]
    accuracies = {order: statistics.fmean(values.values()) for order, values in means.items()}
    return Spread(
        protocol=next(iter(runs.values()))["protocol"],
        method=method,
        seeds=len(next(iter(orders.values()))),
        accuracies=accuracies,
        mean=statistics.fmean(accuracies.values()),
        aopd=statistics.fmean(disparities),
        mopd=max(disparities),
    )


def _check_settings(method: str, runs: Runs) -> None:
    """Refuse runs that differ in more than order and seed."""
    keys = sorted({key for run in runs.values() for key in run["hyper_parameters"]} - {"task_order"})
    for key in keys:
        values = {file: run["hyper_parameters"].get(key) for file, run in runs.items()}
        _same(runs, f"{method}: {key}", values, "only task_order and seed may differ")


def _same(runs: Runs, what: str, values: Mapping[Path, Any], advice: str) -> None:
    """Refuse values that differ."""
    first = next(iter(runs))
    for file, value in values.items():
        if value != values[first]:
            raise InputError(f"{what} is {values[first]!r} in {first} and {value!r} in {file}; {advice}")


def _check_seeds(method: str, orders: Mapping[str, Mapping[int, Any]]) -> None:
    """Refuse orders without a seed that another one has: the mean over seeds would not be of the same runs."""
    everything = sorted({seed for seeds in orders.values() for seed in seeds})
    for order, seeds in orders.items():
        missing = [seed for seed in everything if seed not in seeds]
        if missing:
            raise InputError(f"{method}: order {order} lacks seed {missing[0]}, which another order has; run it too")


def _check_groups(method: str, means: Mapping[str, Mapping[int, float]]) -> None:
    """Refuse orders of different tasks, as the first few of each are."""
    first = next(iter(means))
    for order, values in means.items():
        if set(values) != set(means[first]):
            raise InputError(
                f"{method}: order {first} has the groups of classes {sorted(means[first])} and order {order} "
                f"{sorted(values)}; expected the same: run all experiences"
            )


def table(found: Sequence[Spread]) -> Table:
    """Make a table for the terminal.

    Args:
        found: what `spreads` returned.

    Returns:
        The table.
    """
    orders = sorted({order for spread in found for order in spread.accuracies})
    result = Table(title=found[0].protocol)
    result.add_column("method")
    for header in ("seeds", *orders, "mean", "AOPD", "MOPD"):
        result.add_column(header, justify="right", no_wrap=True)
    for spread in found:
        cells = [f"{spread.accuracies[order]:.2f}" if order in spread.accuracies else "-" for order in orders]
        figures = [f"{value:.2f}" for value in (spread.mean, spread.aopd, spread.mopd)]
        result.add_row(spread.method, str(spread.seeds), *cells, *figures)
    return result
