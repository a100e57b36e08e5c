"""What is kept of a task's factors when it ends: pruned by magnitude to a budget, and packed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from avalanche_gradproj.layers.perturbed import Factors
from avalanche_gradproj.layers.tasks import PRUNED, PackedPerturbation, Perturbation
from avalanche_gradproj.linalg.lowrank import largest
from avalanche_gradproj.methods.halrp_budget import Ledger, TaskRecord, added, bytes_of, room
from avalanche_gradproj.methods.halrp_tasks import TaskTraining


def pruned(factors: Mapping[str, Factors], count: int | None, threshold: float) -> dict[str, Factors]:
    """Return a task's factors with the smallest numbers of all layers set to 0.

    Args:
        factors: of one task, by layer.
        count: how many numbers of the low-rank factors may stay; None for all.
        threshold: what is not above it in magnitude goes anyway.
    """
    tensors: list[Tensor] = [getattr(own, name).detach() for own in factors.values() for name in PRUNED]
    total = sum(tensor.numel() for tensor in tensors)
    kept = iter(
        torch.where(mask, tensor, 0.0)
        for mask, tensor in zip(
            largest(tensors, total if count is None else max(0, count), threshold), tensors, strict=True
        )
    )
    return {name: Factors(own.rows, own.columns, next(kept), next(kept), own.bias) for name, own in factors.items()}


def keep_own(
    training: TaskTraining, ledger: Ledger, ranks: Mapping[str, int], share: int | None, threshold: float
) -> None:
    """Prune the task in training to its share of the budget, and pack it.

    Args:
        training: its factors are replaced by packed ones.
        ledger: gets the task's record.
        ranks: as chosen, by layer.
        share: numbers that the task may add; None for any number.
        threshold: see `pruned`.
    """
    factors = {name: own.factors() for name, own in training.perturbations().items()}
    dense = sum(getattr(own, part).numel() for own in factors.values() for part in PRUNED)
    count = None if share is None else share - _fixed(training, training.task)
    _pack(training, training.task, pruned(factors, count, threshold))
    ledger.records[training.task] = _record(training, training.task, ranks, dense)


def keep_all(training: TaskTraining, ledger: Ledger, max_growth: float | None, threshold: float) -> None:
    """Prune every later task to an equal share of its entries, where together they would exceed the budget.

    Args:
        training: the experience that ends; its task is packed and has its record.
        ledger: gets new records.
        max_growth: bound on the growth; None for none.
        threshold: see `pruned`.
    """
    if max_growth is None:
        return
    fixed = sum(_fixed(training, task) for task in ledger.records)
    dense = sum(record.dense for record in ledger.records.values())
    left = room(max_growth, ledger.base) - fixed
    if dense <= left:
        return
    for task, record in list(ledger.records.items()):
        layers = training.perturbed().items()
        factors = {name: own.factors() for name, layer in layers if (own := _packed(layer.tasks[str(task)]))}
        _pack(training, task, pruned(factors, max(0, left) * record.dense // dense, threshold))
        ledger.records[task] = _record(training, task, record.ranks, record.dense)


def _packed(module: nn.Module) -> PackedPerturbation | None:
    return module if isinstance(module, PackedPerturbation) else None


def _pack(training: TaskTraining, task: int, factors: Mapping[str, Factors]) -> None:
    training.replace({name: PackedPerturbation(own) for name, own in factors.items()}, task)


def _sparse(training: TaskTraining, task: int) -> list[Perturbation | PackedPerturbation]:
    own = [layer.tasks[str(task)] for layer in training.perturbed().values()]
    return [module for module in own if isinstance(module, Perturbation | PackedPerturbation)]


def _fixed(training: TaskTraining, task: int) -> int:
    """Count what pruning cannot change of a task."""
    factors = sum(module.pruned_numbers() for module in _sparse(training, task))
    return added(training.layers, task, training.heads.get(task, ())) - factors


def _record(training: TaskTraining, task: int, ranks: Mapping[str, int], dense: int) -> TaskRecord:
    numbers = added(training.layers, task, heads := training.heads.get(task, ()))
    left = sum(module.pruned_numbers() for module in _sparse(training, task))
    own = [layer.tasks[str(task)] for layer in training.layers.values()]
    return TaskRecord(task, dict(ranks), numbers, dense, dense - left, bytes_of([*own, *heads]))
