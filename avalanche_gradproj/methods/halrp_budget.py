"""How much every task adds to a model, and how much it may: counted in numbers that are stored, zeros left out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from avalanche_gradproj.errors import ConfigurationError, StateError
from avalanche_gradproj.layers.tasks import PackedPerturbation, Perturbation, PerturbedLayer, TaskLayer


@dataclass(frozen=True)
class TaskRecord:
    """What one task added.

    Attributes:
        task: its label.
        ranks: rank of each perturbed layer as chosen, before pruning.
        numbers: stored numbers, zeros of the low-rank factors left out.
        dense: entries of its low-rank factors before pruning.
        zeros: how many of them pruning has set to 0.
        stored_bytes: bytes of its tensors as they are stored, bits that say where numbers are included.
    """

    task: int
    ranks: dict[str, int]
    numbers: int
    dense: int
    zeros: int
    stored_bytes: int


@dataclass
class Ledger:
    """What the first task's model holds, and what other tasks added.

    Attributes:
        base: numbers of the model as it was given.
        records: by the task's label, in the order of learning.
    """

    base: int
    records: dict[int, TaskRecord]

    @property
    def growth(self) -> float:
        """Numbers added by all tasks, over those of the base."""
        return sum(record.numbers for record in self.records.values()) / self.base

    def share(self, task: int, max_growth: float | None, remaining: int | None, *, again: bool = False) -> int | None:
        """Return how many numbers a task may add: an equal part of what others have left; None for any number.

        Args:
            task: its label.
            max_growth: bound on the growth, None for none.
            remaining: tasks that will need a part, this one included; None if unknown: it may take half of the rest.
            again: whether the factors of others will be pruned again to make room.
        """
        if max_growth is None:
            return None
        others = [record for label, record in self.records.items() if label != task]
        used = sum(record.numbers - again * (record.dense - record.zeros) for record in others)
        left = max(0, room(max_growth, self.base) - used)
        return left // (2 if remaining is None else max(1, remaining))

    def state(self) -> dict[str, Any]:
        """Return numbers and names."""
        return {"base": self.base, "records": [asdict(record) for record in self.records.values()]}

    @classmethod
    def of_state(cls, state: Any) -> Ledger:
        """Return what `state` described.

        Raises:
            StateError: if it is damaged.
        """
        try:
            records = [TaskRecord(**record) for record in state["records"]]
            base = int(state["base"])
        except (TypeError, KeyError, ValueError) as error:
            raise StateError(f"the state's records of tasks are damaged ({error!r}): save it again") from error
        return cls(base, {record.task: record for record in records})


def room(max_growth: float, base: int) -> int:
    """Return how many numbers a bound allows, of a product that may be rounded down below a whole number."""
    return int(max_growth * base * (1 + 1e-12))


def numbers_of(modules: Iterable[nn.Module]) -> int:
    """Count the parameters and buffers of modules."""
    return sum(tensor.numel() for module in modules for tensor in (*module.parameters(), *module.buffers()))


def bytes_of(modules: Iterable[nn.Module]) -> int:
    """Count the bytes of the parameters and buffers of modules."""
    return sum(tensor.nbytes for module in modules for tensor in (*module.parameters(), *module.buffers()))


def added(layers: Mapping[str, TaskLayer], task: int, heads: Iterable[nn.Module]) -> int:
    """Count the numbers that a task has added to a model: those of its layers and heads."""
    own = [layer.tasks[str(task)] for layer in layers.values() if str(task) in layer.tasks]
    sparse = [module for module in own if isinstance(module, Perturbation | PackedPerturbation)]
    dense = [module for module in own if not isinstance(module, Perturbation | PackedPerturbation)]
    return sum(module.numbers() for module in sparse) + numbers_of([*dense, *heads])


def least(layers: Mapping[str, TaskLayer], heads: int) -> int:
    """Count the numbers that a task adds at least: scales, biases, norm layers, head, one direction a layer.

    Args:
        layers: a model's.
        heads: numbers of a task's heads that the model itself holds.
    """
    total = heads
    for layer in layers.values():
        if isinstance(layer, PerturbedLayer):
            weight, groups = layer.base.weight, getattr(layer.base, "groups", 1)
            out, into = weight.shape[0], weight.shape[1] * groups
            total += 2 * (out + into) + (0 if layer.base.bias is None else out)
        else:
            total += numbers_of([layer.base])
    return total


def check_share(
    layers: Mapping[str, TaskLayer],
    ledger: Ledger,
    tasks: Sequence[int],
    task: int,
    max_growth: float | None,
    remaining: int | None,
    heads: Iterable[nn.Module],
    *,
    again: bool,
) -> None:
    """Check, also before the first task, that a new task can be given one direction a layer.

    Args:
        layers: a model's.
        ledger: what there is.
        tasks: labels that were learned.
        task: the label that begins.
        max_growth: bound on the growth; None for none.
        remaining: new labels to come, this one included; None if unknown.
        heads: the task's heads that the model itself holds.
        again: see `Ledger.share`.

    Raises:
        ConfigurationError: naming `max_growth`, what is left, what is needed and a bound that suffices.
    """
    if not tasks:
        remaining = None if remaining is None else remaining - 1
    share = ledger.share(task, max_growth, remaining, again=again)
    if share is None or remaining == 0 or task in tasks:
        return
    needed, base = least(layers, numbers_of(heads)), ledger.base
    if needed <= share:
        return
    parts = 2 if remaining is None else remaining
    suffices = max_growth + ((needed - share) * parts + parts) / base if max_growth is not None else 0.0
    raise ConfigurationError(
        f"max_growth={max_growth} leaves {share} numbers for a task, and scales, biases, norm layers, head and one "
        f"direction a layer are {needed}: give max_growth={math.ceil(1000 * suffices) / 1000} or more"
    )
