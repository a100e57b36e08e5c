"""What a method does with every parameter of a model, as a table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from avalanche_gradproj.layers.norm import tracked_norms, untracked_norms
from avalanche_gradproj.layers.select import Coverage
from avalanche_gradproj.layers.unit import Unit
from avalanche_gradproj.linalg.subspace import Basis


@dataclass(frozen=True)
class ReportRow:
    """One parameter (or the part of it that one layer owns).

    Attributes:
        parameter: its full name.
        shape: its shape.
        treatment: `"projected"`, `"penalised"`, `"frozen"` or `"left alone"`.
        reason: why, where it is not projected; what a penalty is made of.
        layer: the layer that it belongs to, where it is projected or penalised.
        ranks: rank of the layer's basis, one a block.
        free_share: share of the layer's input dimensions that is still free, between 0 and 1.
    """

    parameter: str
    shape: tuple[int, ...]
    treatment: str
    reason: str = ""
    layer: str = ""
    ranks: tuple[int, ...] = ()
    free_share: float | None = None


@dataclass(frozen=True)
class Report:
    """Every parameter and its treatment; prints as a table.

    Attributes:
        rows: one row a parameter.
        notes: what holds for the whole model (statistics of BatchNorm, where the projection acts).
    """

    rows: tuple[ReportRow, ...]
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[ReportRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, parameter: str) -> ReportRow:
        """Return the first row of a parameter.

        Raises:
            KeyError: if there is no such parameter.
        """
        for row in self.rows:
            if row.parameter == parameter:
                return row
        raise KeyError(parameter)

    def __str__(self) -> str:
        table = [("parameter", "shape", "treatment", "rank", "free")]
        for row in self.rows:
            treatment = f"{row.treatment} ({row.reason})" if row.reason else row.treatment
            table.append((row.parameter, "x".join(map(str, row.shape)), treatment, _ranks(row), _share(row)))
        widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([line.rstrip() for line in lines] + list(self.notes))


def _ranks(row: ReportRow) -> str:
    if not row.ranks:
        return ""
    low, high = min(row.ranks), max(row.ranks)
    if len(row.ranks) == 1:
        return str(low)
    return f"{low} a block x {len(row.ranks)}" if low == high else f"{low}-{high} a block x {len(row.ranks)}"


def _share(row: ReportRow) -> str:
    return "" if row.free_share is None else f"{100 * row.free_share:.1f} %"


def projection_report(coverage: Coverage, bases: Mapping[str, Basis], notes: Sequence[str]) -> Report:
    """Make the report of a projection method.

    Args:
        coverage: the treatment of every parameter.
        bases: basis of each covered layer.
        notes: lines below the table.
    """
    owners: dict[str, list[Unit]] = defaultdict(list)
    for unit in coverage.units:
        for part in unit.slices:
            owners[part.name].append(unit)
    rows = []
    for name, parameter in coverage.parameters.items():
        shape = tuple(parameter.shape)
        for unit in owners.get(name, ()):  # a packed projection has several owners
            basis = bases[unit.name]
            row = ReportRow(name, shape, "projected", "", unit.name, basis.ranks, basis.free_share)
            if not parameter.requires_grad:
                row = replace(row, treatment="left alone", reason="takes no gradient")
            rows.append(row)
        if name in coverage.frozen:
            rows.append(ReportRow(name, shape, "frozen", "no matrix layer, from the second experience on"))
        elif name in coverage.alone:
            rows.append(ReportRow(name, shape, "left alone", coverage.alone[name]))
    return Report(tuple(rows), tuple(notes))


def statistics_notes(model: nn.Module, *, held: bool) -> list[str]:
    """Say what happens to running statistics of normalisation layers.

    Args:
        model: the model.
        held: whether they stay as the first experience left them.
    """
    notes = []
    if tracked_norms(model):
        what = "held from the second experience on" if held else "left to drift"
        notes.append(f"running statistics of {len(tracked_norms(model))} normalisation layer(s): {what}")
    if untracked_norms(model):
        notes.append(
            f"{len(untracked_norms(model))} normalisation layer(s) keep no running statistics: nothing to hold"
        )
    return notes
