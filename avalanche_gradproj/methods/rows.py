"""One pass of data through a model, the rows of every covered layer summed up."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from avalanche_gradproj.errors import ConfigurationError, DataError, ModelError, NonFiniteError
from avalanche_gradproj.layers.record import record, undisturbed
from avalanche_gradproj.layers.unit import Unit
from avalanche_gradproj.linalg.moments import RowStatistics
from avalanche_gradproj.methods.base import Forward


def collect_rows(
    model: nn.Module,
    units: Sequence[Unit],
    batches: Iterable[Any],
    *,
    limits: Mapping[str, int | None],
    forward: Forward | None = None,
) -> dict[str, RowStatistics]:
    """Stream batches through a model in evaluation mode and keep each layer's rows or their second moment.

    Memory: the rows of one mini-batch (of one chunk of it, for convolutions) and `RowStatistics` of each layer.

    Args:
        model: left as it was: modes, gradients, statistics, random states.
        units: the layers.
        batches: a tensor of samples, or a tuple whose first element is one, each.
        limits: layer name -> number of samples it uses, the first so many; None for all.
        forward: runs the model on a batch; default `model(batch)`.

    Raises:
        DataError: if there are fewer samples than a limit.
        NonFiniteError: if a layer's rows hold an infinity or a NaN, naming it.
        ModelError: if a layer's samples cannot be told apart where a limit asks for it.
    """
    statistics = {unit.name: RowStatistics(unit.blocks, unit.features) for unit in units}
    finite = set(limits.values()) - {None}
    enough = (
        max((limit for limit in finite if limit is not None), default=None) if None not in limits.values() else None
    )
    seen = size = 0

    def sink(unit: Unit, x: Tensor) -> None:
        limit = limits[unit.name]
        take = size if limit is None else min(size, limit - seen)
        if take <= 0:
            return
        for rows in unit.rows(x if take == size else first_samples(unit, x, size, take)):
            statistics[unit.name].update(rows)

    with undisturbed(model), record(units, inputs=sink):
        for given in batches:
            batch = given
            size = len(batch if isinstance(batch, Tensor) else batch[0])
            if enough is not None and len(finite) == 1 and seen + size > enough:
                size = enough - seen
                batch = _first(batch, size)
            if forward is None:
                model(batch)
            else:
                forward(model, batch)
            seen += size
            if enough is not None and seen >= enough:
                break
    if seen == 0 or (enough is not None and seen < enough):
        raise DataError(f"{seen} samples came and {enough or 1} are needed: give more data or a smaller n_samples")
    for unit in units:
        _refuse_non_finite(unit, statistics[unit.name])
    return statistics


def per_layer(values: tuple[Any, ...] | None, units: Sequence[Unit], argument: str = "") -> list[Any]:
    """Return one value a layer, from one for all or one each.

    Raises:
        ConfigurationError: if there are several, and not one a layer.
    """
    if values is None or len(values) == 1:
        return [None if values is None else values[0]] * len(units)
    if len(values) != len(units):
        raise ConfigurationError(
            f"{argument} has {len(values)} values and the model {len(units)} covered layers "
            f"({', '.join(unit.name for unit in units)}): give one value, or one a layer"
        )
    return list(values)


def first_samples(unit: Unit, x: Tensor, size: int, take: int) -> Tensor:
    """Return the part of a layer's input that belongs to the first samples of a mini-batch.

    Args:
        unit: the layer.
        x: its input; its leading dimension counts samples, or samples times something (windows, tokens).
        size: samples in the mini-batch.
        take: how many of them are wanted.

    Raises:
        ModelError: if the input's leading dimension is no multiple of the number of samples.
    """
    if unit.batch_dimension == 1 and x.dim() == 2 and x.shape[0] % size == 0:
        x = x.view(-1, size, x.shape[-1])  # attention flattens [sequence, samples] before its output projection
    if (unit.batch_dimension == 1 or x.shape[0] != size) and x.dim() > 2 and x.shape[1] == size:
        return x[:, :take]
    if unit.batch_dimension == 1 or x.shape[0] % size:
        raise ModelError(
            f"layer {unit.name!r}: its input has {x.shape[0]} leading entries for {size} samples, so that they cannot "
            "be told apart: give one n_samples for all layers instead of one a layer"
        )
    return x[: take * (x.shape[0] // size)]


def warn_of_unseen(unit: Unit, rows: RowStatistics) -> None:
    """Warn of a layer that was trained but never called while its inputs were recorded."""
    if rows.count == 0 and unit.weight.parameter.grad is not None:
        warnings.warn(
            f"layer {unit.name!r} was trained but never called while its inputs were recorded (it is used in training "
            "mode alone, or its weight is used outside of it): what it learned is not protected",
            stacklevel=3,
        )


def _first(batch: Any, count: int) -> Any:
    """Return the first samples of a mini-batch: of a tensor, or of every tensor in a tuple."""
    if isinstance(batch, Tensor):
        return batch[:count]
    return [part[:count] if isinstance(part, Tensor) else part for part in batch]


def _refuse_non_finite(unit: Unit, statistics: RowStatistics) -> None:
    kept = statistics.rows if statistics.rows is not None else statistics.moment
    if kept is not None and not bool(torch.isfinite(kept).all()):
        raise NonFiniteError(
            f"layer {unit.name!r} sees an infinity or a NaN at its input, from which no basis can be made: training "
            "has diverged (lower the learning rate) or the data holds one"
        )
