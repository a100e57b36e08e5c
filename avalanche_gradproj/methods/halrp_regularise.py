"""The gradients of HALRP's weight decay and l1 term, added without a loss of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from avalanche_gradproj.methods.halrp_tasks import TaskTraining


class Regulariser:
    """Adds to gradients what `l1 |factors| + weight_decay / 2 ||parameters||^2` in the loss would.

    Args:
        training: of the first task: its weights of Linear and Conv layers (not the head's) decay, as long as they are
            trained; of another one: its scales and factors do, and the factors have the l1 term.
        l1: weight of the sum of absolute values; their gradient at 0 is 0.
        weight_decay: weight of half the sum of squares.
    """

    def __init__(self, training: TaskTraining, l1: float, weight_decay: float) -> None:
        own = training.perturbations().values()
        base: list[Any] = [layer.base.weight for layer in training.perturbed().values() if training.alone]
        factors: list[nn.Parameter] = [p for one in own for p in (one.left, one.right)]
        scales: list[nn.Parameter] = [p for one in own for p in (one.rows, one.columns)]  # type: ignore[misc]
        self._terms: tuple[tuple[float, list[nn.Parameter]], ...] = (
            (weight_decay, [*base, *factors, *scales]),
            (l1, factors),
        )

    @torch.no_grad()
    def add(self) -> None:
        """Add to the present gradients; parameters without one are left out."""
        for sparse, (weight, parameters) in enumerate(self._terms):
            pairs = [(p, p.grad) for p in parameters if p.grad is not None] if weight else []
            if pairs:
                values = [parameter.detach() for parameter, _ in pairs]
                values = list(torch._foreach_sign(values)) if sparse else values
                torch._foreach_add_([gradient for _, gradient in pairs], values, alpha=weight)
