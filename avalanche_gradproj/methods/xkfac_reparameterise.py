"""New coordinates for layers and BatchNorms at the start of an experience; the network stays the same function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from avalanche_gradproj.errors import DataError, NonFiniteError
from avalanche_gradproj.layers.merged import MergedUnit
from avalanche_gradproj.layers.record import undisturbed
from avalanche_gradproj.methods.kfac_labels import up_to
from avalanche_gradproj.methods.optimizers import forget

#: Samples whose statistics a reparameterised BatchNorm starts with; training replaces them within a few steps.
STATISTICS_SAMPLES = 4096


class ChannelMoments:
    """Mean and variance of each channel over mini-batches, combined in float64."""

    def __init__(self) -> None:
        self.count = 0
        self._mean: Tensor | None = None
        self._squares: Tensor | None = None

    def update(self, y: Tensor) -> None:
        """Add a tensor [n, channels, ...]; one without samples adds nothing."""
        if y.numel() == 0:
            return
        wide = y.float() if y.element_size() < 4 else y
        count = wide.numel() // wide.shape[1]
        variance, mean = torch.var_mean(wide, dim=[axis for axis in range(wide.dim()) if axis != 1], correction=0)
        if y.device.type != "mps":
            variance, mean = variance.double(), mean.double()
        total = self.count + count
        if self._mean is None or self._squares is None:
            self._mean, self._squares = mean, variance * count
        else:
            difference = mean - self._mean
            self._squares = self._squares + variance * count + difference.square() * (self.count * count / total)
            self._mean = self._mean + difference * (count / total)
        self.count = total

    def result(self) -> tuple[Tensor, Tensor]:
        """Return mean and variance [channels] of what came."""
        if self._mean is None or self._squares is None:
            raise ValueError("nothing came")
        return self._mean, self._squares / self.count


def reparameterise(
    model: nn.Module,
    units: Sequence[MergedUnit],
    batches: Iterable[Any] | None,
    run: Callable[[Any], Any],
    optimizer: Optimizer | None = None,
) -> list[str]:
    """Give each layer its merged weight, and its BatchNorm the statistics of new data as scale and shift.

    With y = W~ a + b~ the output of a pair in evaluation, m' and v' its mean and variance over the data and
    s' = sqrt(v' + eps), the pair becomes

        W = W~, b = b~,    running mean m', running variance v',    gamma = s', beta = m'

    so that it computes y as before, and normalises the new data by what its batches will have. A layer without a bias
    leaves b~ to the BatchNorm: its running mean is m' - b~. What an optimizer remembers of the parameters belongs to
    the old coordinates and is dropped.

    Args:
        model: in evaluation mode it is the same function before and after, but for rounding.
        units: pairs; those whose BatchNorm has no scale and shift, with parameters that take no gradient, or that the
            model does not call, are left.
        batches: mini-batches of the new data, of which those with the first `STATISTICS_SAMPLES` samples are used.
        run: runs the model on one.
        optimizer: whose memory of the changed parameters is dropped.

    Returns:
        Names of the layers that were changed.

    Raises:
        DataError: if there is no data, or no sample came.
        NonFiniteError: naming a layer whose output is not finite on the data; nothing changes then.
    """
    if batches is None:
        raise DataError(
            "the statistics of the new experience are needed to reparameterise its BatchNorms: give "
            "experience(..., batches=loader), or reparameterise=False"
        )
    units = [unit for unit in units if _changeable(unit)]
    moments = {unit.name: ChannelMoments() for unit in units}

    def hook_of(name: str) -> Callable[..., None]:
        return lambda module, args, output: moments[name].update(output)

    with undisturbed(model), ExitStack() as stack:
        for unit in units:
            stack.callback(unit.norm.register_forward_hook(hook_of(unit.name)).remove)
        for batch in up_to(STATISTICS_SAMPLES, batches):
            run(batch)
    if units and not any(own.count for own in moments.values()):
        raise DataError(
            f"layer {units[0].name!r} saw no sample of the new experience, whose statistics its BatchNorm "
            f"{units[0].norm_name!r} is to start with: give batches=, or reparameterise=False"
        )
    units = [unit for unit in units if moments[unit.name].count]  # the model may not call all of them
    changes = [(unit, *_change(unit, moments[unit.name])) for unit in units]
    for unit, merged, mean, variance in changes:
        _write(unit, merged, mean, variance)
        if optimizer is not None:
            forget(optimizer, unit.parameters)
    return [unit.name for unit in units]


def _changeable(unit: MergedUnit) -> bool:
    norm = unit.norm
    return norm.weight is not None and norm.bias is not None and all(p.requires_grad for p in unit.parameters)


def _change(unit: MergedUnit, moments: ChannelMoments) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    found = moments.result()
    with torch.no_grad():
        merged = unit.tensors()
    for tensor in (*found, *merged):
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(
                f"layer {unit.name!r} merged with BatchNorm {unit.norm_name!r} gives an infinity or a NaN on the new "
                "data: training has diverged (lower the learning rate), the data holds one, or variance and eps are 0"
            )
    return (merged[0], merged[1]), *found


@torch.no_grad()
def _write(unit: MergedUnit, merged: tuple[Tensor, Tensor], mean: Tensor, variance: Tensor) -> None:
    norm, (weight, bias) = unit.norm, merged
    if norm.running_mean is None or norm.running_var is None:
        raise TypeError("a BatchNorm without running statistics was merged")
    unit.weight.parameter.copy_(weight)
    if unit.bias is not None:
        unit.bias.parameter.copy_(bias)
        norm.running_mean.copy_(mean)
    else:
        norm.running_mean.copy_(mean - bias)
    norm.running_var.copy_(variance)
    norm.weight.copy_((variance + norm.eps).sqrt())
    norm.bias.copy_(mean)
    if norm.momentum is None and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.zero_()  # the average over all batches begins anew
