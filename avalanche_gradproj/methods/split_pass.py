"""One pass over the samples of several experiences, weight gradients split by experience."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from avalanche_gradproj.errors import ModelError
from avalanche_gradproj.layers.record import watch
from avalanche_gradproj.layers.select import cover
from avalanche_gradproj.layers.unit import Unit
from avalanche_gradproj.methods.base import Forward
from avalanche_gradproj.methods.gradient_blocks import GradientBlocks


def covered_units(model: nn.Module, names: Sequence[str]) -> tuple[list[Unit], str]:
    """Return the matrix layers that hold the named parameters, and why they do not hold all (empty if they do)."""
    try:
        coverage = cover(model, uncovered="train")
    except ModelError as error:
        return [], str(error).partition(":")[0]
    rows: dict[str, int] = defaultdict(int)
    for part in (part for unit in coverage.units for part in unit.slices):
        rows[part.name] += part.stop - part.start
    for name in names:
        if name not in rows or rows[name] < coverage.parameters[name].shape[0]:
            return [], f"{name!r} is in no matrix layer"
    wanted = set(names)
    return [unit for unit in coverage.units if any(part.name in wanted for part in unit.slices)], ""


class SplitPass:
    """Gradients of K losses from one forward and one backward pass.

    The backward pass ends at the outputs of the matrix layers: no weight gradient is formed but those split by
    experience, `D_k^T A_k` for all k in one batched product.

    Args:
        model: the model; its parameters' gradients stay as they are.
        units: the layers that hold all parameters in question.
        forward: runs the model on (inputs, targets[, task labels]).
        criterion: loss of (a slice of) its output against targets.
    """

    def __init__(
        self, model: nn.Module, units: Sequence[Unit], forward: Forward, criterion: Callable[[Any, Tensor], Tensor]
    ) -> None:
        self._model, self._units = model, list(units)
        self._forward, self._criterion = forward, criterion

    def compute(self, blocks: GradientBlocks, batch: tuple[Tensor, ...], count: int) -> None:
        """Write the gradients of `count` experiences into the first rows of `blocks`.

        Args:
            blocks: where they go.
            batch: inputs, targets and possibly task labels of all samples, experience after experience, the same
                number each.
            count: K.

        Raises:
            ModelError: if the model's output or a layer's input cannot be split by sample.
        """
        calls: list[tuple[Unit, Tensor, GradientEdge, slice]] = []

        def on_call(unit: Unit, x: Tensor, output: Tensor, columns: slice) -> Tensor:
            # A view that is overwritten in place gets another history in some versions of torch.
            output = output.clone() if output._is_view() else output
            # The edge, not the tensor: an activation in place after the layer would become part of the tensor.
            calls.append((unit, x.detach(), get_gradient_edge(output), columns))
            return output

        size = len(batch[0])
        with torch.enable_grad():
            with watch(self._units, on_call):
                output = self._forward(self._model, batch)
            if not isinstance(output, Tensor) or output.shape[:1] != (size,):
                raise ModelError("the model's output is not one tensor with a row a sample")
            parts = zip(output.chunk(count), batch[1].chunk(count), strict=True)
            loss = torch.stack([self._criterion(part, targets) for part, targets in parts]).sum()
            edges = list({(edge.node, edge.output_nr): edge for _, _, edge, _ in calls}.values())
            found = torch.autograd.grad(loss, edges, allow_unused=True)
        gradients = {(edge.node, edge.output_nr): value for edge, value in zip(edges, found, strict=True)}
        with torch.no_grad():
            missing = {part.name for unit in self._units for part in unit.slices}
            for unit, x, edge, columns in calls:
                gradient = gradients[edge.node, edge.output_nr]
                if gradient is not None:
                    own = gradient[..., columns] if columns != slice(None) else gradient
                    _add(blocks, unit, x, own, size, count, missing)
            for name in missing & set(blocks.spans):
                blocks.view(slice(0, count), name).zero_()


def _add(
    blocks: GradientBlocks, unit: Unit, x: Tensor, gradient: Tensor, size: int, count: int, missing: set[str]
) -> None:
    """Add one call's share of a unit's gradients; a parameter in `missing` is written first."""
    dtype = blocks.rows.dtype
    if unit.input_route:
        taps = unit.features - (unit.bias is not None)
        rows = _by_experience(unit, x, size, count).reshape(count, -1, taps).to(dtype)
        outs = _by_experience(unit, gradient, size, count).reshape(count, -1, unit.out).to(dtype)
        weight = torch.bmm(outs.mT, rows)
        bias = outs.sum(dim=1) if unit.bias is not None else None
        _write(blocks, unit, weight.unsqueeze(1), bias, count, missing)
        return
    matrices = []
    every_x, every_gradient = _by_experience(unit, x, size, count), _by_experience(unit, gradient, size, count)
    for k in range(count):
        outs = unit.output_rows(_one(unit, every_gradient, k)).to(dtype)
        total, begin = outs.new_zeros(unit.blocks, unit.out, unit.features), 0
        for rows in unit.rows(_one(unit, every_x, k)):
            total.baddbmm_(outs[:, begin : begin + rows.shape[1]].mT, rows.to(dtype))
            begin += rows.shape[1]
        matrices.append(total)
    matrix = torch.stack(matrices)
    if unit.bias is None:
        _write(blocks, unit, matrix, None, count, missing)
    else:
        _write(blocks, unit, matrix[..., :-1], matrix[..., -1].flatten(1), count, missing)


def _write(
    blocks: GradientBlocks, unit: Unit, weight: Tensor, bias: Tensor | None, count: int, missing: set[str]
) -> None:
    """Add weight [K, blocks, out, taps] and bias [K, blocks * out] into the rows; packed parameters have parts."""
    for part, value in ((unit.weight, weight), (unit.bias, bias)):
        if part is None or value is None or part.name not in blocks.spans:
            continue
        target = blocks.view(slice(0, count), part.name)
        if part.name in missing and not part.is_whole:
            target.zero_()
        own = target[:, part.start : part.stop]
        if part.name in missing and part.is_whole:
            own.copy_(value.reshape(own.shape))
        else:
            own.add_(value.reshape(own.shape))
        missing.discard(part.name)


def _by_experience(unit: Unit, tensor: Tensor, size: int, count: int) -> Tensor:
    """Return a tensor whose samples are grouped by experience: [K, n, ...], or [.., K, n, features] sequence first.

    Raises:
        ModelError: if its leading dimension is no multiple of the number of samples.
    """
    if unit.batch_dimension == 1:
        return tensor.reshape(-1, count, size // count, tensor.shape[-1])
    if tensor.shape[0] % size:
        raise ModelError(f"the input of layer {unit.name!r} cannot be split by sample")
    return tensor.reshape(count, tensor.shape[0] // count, *tensor.shape[1:])


def _one(unit: Unit, tensor: Tensor, k: int) -> Tensor:
    return tensor[:, k] if unit.batch_dimension == 1 else tensor[k]
