"""What HALRP does with every parameter, and what each task added."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from avalanche_gradproj.layers.task_plan import TaskPlan
from avalanche_gradproj.layers.tasks import PerturbedLayer, TaskLayer
from avalanche_gradproj.methods.halrp_budget import Ledger
from avalanche_gradproj.methods.report import Report, ReportRow


def task_report(
    model: nn.Module,
    plan: TaskPlan,
    layers: Mapping[str, TaskLayer],
    heads: Mapping[int, list[str]],
    tasks: list[int],
    ledger: Ledger,
) -> Report:
    """Make the report.

    Args:
        model: the model.
        plan: what becomes of each layer.
        layers: those with parameters for every task, by the plan's names.
        heads: task -> names of its heads in the model.
        tasks: labels in the order of learning.
        ledger: what each task added.
    """
    rows = []
    of_head = {name: task for task, names in heads.items() for name in names}
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        layer = next((one for one in layers if name.startswith(f"{one}.")), None)
        head = next((task for one, task in of_head.items() if name.startswith(f"{one}.")), None)
        if head is not None:
            rows.append(ReportRow(name, shape, "task-owned", f"head of task {head}"))
        elif layer is not None:
            rows.append(_of_layer(name, shape, layer, layers[layer], tasks))
        elif name in plan.alone:
            rows.append(ReportRow(name, shape, "left alone", plan.alone[name]))
        else:
            reason = plan.frozen.get(name, "part of a head that belongs to no task")
            rows.append(ReportRow(name, shape, "frozen", f"{reason}; the first task alone trains it"))
    return Report(tuple(rows), tuple(_notes(layers, tasks, ledger)))


def _of_layer(full: str, shape: tuple[int, ...], name: str, layer: TaskLayer, tasks: list[int]) -> ReportRow:
    kind, _, rest = full.removeprefix(f"{name}.").partition(".")
    if kind == "tasks":
        task = rest.partition(".")[0]
        rank = (layer.tasks[task].rank,) if hasattr(layer.tasks[task], "rank") else ()
        return ReportRow(full, shape, "task-owned", f"task {task}", name, rank)  # type: ignore[arg-type]
    if isinstance(layer, PerturbedLayer) and rest == "weight":
        return ReportRow(full, shape, "frozen", "base of all tasks; the first one alone trains it", name)
    first = f"task {tasks[0]}" if tasks else "the first task"
    return ReportRow(full, shape, "task-owned", first, name)


def _notes(layers: Mapping[str, TaskLayer], tasks: list[int], ledger: Ledger) -> list[str]:
    if not tasks:
        return []
    names = [name for name, layer in layers.items() if isinstance(layer, PerturbedLayer)]
    lines = [f"task {tasks[0]}: the base, {ledger.base} numbers"]
    for record in ledger.records.values():
        ranks = ", ".join(f"{name} {record.ranks[name]}" for name in names if name in record.ranks)
        lines.append(
            f"task {record.task}: {record.numbers} numbers ({100 * record.numbers / ledger.base:.2f} % of the base), "
            f"{record.stored_bytes} bytes; {record.zeros} of {record.dense} entries of factors pruned; ranks {ranks}"
        )
    return [*lines, f"growth over the base: {100 * ledger.growth:.2f} %"]
