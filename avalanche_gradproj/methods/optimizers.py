"""What an optimizer does to projected gradients, and to which parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adagrad, Optimizer

from avalanche_gradproj.layers.unit import Unit
from avalanche_gradproj.linalg.subspace import Basis

#: Settings of SGD that make its step: parameters of one matrix must share them.
_STEP = ("lr", "momentum", "dampening", "nesterov", "maximize")


def gradient_suffices(optimizer: Optimizer | None, matrices: Iterable[Sequence[nn.Parameter]] = ()) -> bool:
    """Whether a step made of projected gradients stays in their subspace.

    True for `torch.optim.SGD` itself (with any momentum, dampening, Nesterov) without weight decay: its step is a
    linear combination of the gradients it was given, one for all parameters of a matrix. Weight decay adds the weight,
    elementwise rules (Adam and its kin) leave every subspace, and of an unknown class nothing is known.

    Args:
        optimizer: what takes the steps; None if unknown.
        matrices: parameters that one projection mixes (a weight and its bias): each such set must have one learning
            rate and one momentum.
    """
    if type(optimizer) is not SGD or any(group["weight_decay"] != 0 for group in optimizer.param_groups):
        return False
    settings = {id(p): tuple(group[key] for key in _STEP) for group in optimizer.param_groups for p in group["params"]}
    return all(len({settings[id(p)] for p in matrix if id(p) in settings}) <= 1 for matrix in matrices)


def movable(optimizer: Optimizer | None, parameter: nn.Parameter) -> bool:
    """Whether training can move a parameter: it takes a gradient, and the optimizer (if known) owns it."""
    if optimizer is None or not parameter.requires_grad:
        return parameter.requires_grad
    return any(own is parameter for group in optimizer.param_groups for own in group["params"])


def basis_of_movable(unit: Unit, basis: Basis, optimizer: Optimizer | None) -> Basis:
    """Return the basis to be removed where a part of a unit cannot move (a frozen bias, say).

    With the bias held, W a stays only if the rest of W changes orthogonally to the rest of M: the basis becomes that of
    the movable rows of M, and every direction of the others.

    Args:
        unit: the layer.
        basis: its basis over all features.
        optimizer: what takes the steps; None if unknown.
    """
    rows: list[bool] = []
    for part in unit.slices:
        width = part.of(part.parameter).numel() // (unit.blocks * unit.out)
        rows += [movable(optimizer, part.parameter)] * width
    if all(rows) or basis.rank == 0:
        return basis
    free = torch.tensor(rows, device=basis.columns.device)
    fixed = torch.eye(basis.features, dtype=basis.columns.dtype, device=free.device)[:, ~free]
    blocks = []
    for columns in basis.per_block():
        rest = torch.zeros_like(columns)
        rest[free] = columns[free]
        left, values, _ = torch.linalg.svd(rest.double().cpu(), full_matrices=False)
        kept = left[:, values > 1e-6].to(columns)
        blocks.append(torch.cat([kept, fixed], dim=1))
    return Basis.from_blocks(blocks)


def momentum_of(optimizer: Optimizer, parameter: nn.Parameter) -> torch.Tensor | None:
    """Return the momentum buffer of a parameter, None where there is none."""
    state: dict[str, Any] = optimizer.state.get(parameter, {})
    return state.get("momentum_buffer")


def adopt(optimizer: Optimizer, new: Iterable[tuple[nn.Parameter, Sequence[nn.Parameter]]]) -> None:
    """Let an optimizer train parameters, in the groups of others; one that it has already stays where it is.

    Args:
        optimizer: its groups are changed in place; it remembers nothing of the new parameters.
        new: a parameter and those that it may be grouped with: the first that the optimizer has; the first group if
            it has none.
    """
    groups = optimizer.param_groups
    owners = {id(own): index for index, group in enumerate(groups) for own in group["params"]}
    for parameter, like in new:
        if id(parameter) not in owners:
            owners[id(parameter)] = next((owners[id(other)] for other in like if id(other) in owners), 0)
            groups[owners[id(parameter)]]["params"].append(parameter)


def dismiss(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Take parameters, and what is remembered of them, out of an optimizer; those that it does not have are ignored."""
    gone = {id(parameter): parameter for parameter in parameters}
    for group in optimizer.param_groups:
        group["params"][:] = [own for own in group["params"] if id(own) not in gone]
    forget(optimizer, gone.values())


def forget(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Drop what an optimizer remembers of parameters (momentum, moments)."""
    gone = {id(parameter): parameter for parameter in parameters}
    for parameter in gone.values():
        optimizer.state.pop(parameter, None)
    if isinstance(optimizer, Adagrad):  # makes its sums when it is made, and never again
        for group in optimizer.param_groups:
            own = [parameter for parameter in group["params"] if id(parameter) in gone]
            if own:
                optimizer.state.update(Adagrad(own, initial_accumulator_value=group["initial_accumulator_value"]).state)
