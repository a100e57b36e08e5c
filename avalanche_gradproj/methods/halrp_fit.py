"""From a freely trained copy of a network to the factors that perturb the first task's (arXiv 2311.15161)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from avalanche_gradproj.errors import DataError, NonFiniteError
from avalanche_gradproj.layers.perturbed import Factors, canonical
from avalanche_gradproj.layers.record import undisturbed
from avalanche_gradproj.layers.tasks import PerturbedLayer
from avalanche_gradproj.linalg.lowrank import ScaledFit, choose_ranks, fit
from avalanche_gradproj.methods.halrp_tasks import TaskTraining

#: Computes the loss of a mini-batch, a scalar: `loss(batch)`.
Loss = Callable[[Any], Tensor]


def warm_up(batches: Iterable[Any], loss: Loss, optimizer: Optimizer, epochs: int) -> None:
    """Train whatever takes gradients for some epochs, without any penalty."""
    for _ in range(epochs):
        for batch in batches:
            optimizer.zero_grad()
            loss(batch).backward()
            optimizer.step()


def importances(
    model: nn.Module, weights: Mapping[str, Tensor], batches: Iterable[Any], loss: Loss
) -> dict[str, Tensor]:
    """Return the mean squared gradient of each weight: of mini-batches' mean losses, each times its size.

    The network is in evaluation mode. It is the empirical Fisher information with true labels, its off-diagonal terms
    across the samples of a mini-batch included, as the official code computes it.

    Args:
        model: left as it was.
        weights: layer -> its weight.
        batches: sequences whose first element holds the samples.
        loss: of one of them.

    Returns:
        Layer -> a scalar in float64.

    Raises:
        DataError: if there is no mini-batch.
    """
    sums = {name: torch.zeros((), dtype=torch.float64, device=weight.device) for name, weight in weights.items()}
    count = 0
    with undisturbed(model):
        for batch in batches:
            with torch.enable_grad():
                value = loss(batch)
            gradients = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
            for name, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:
                    sums[name] += gradient.square().mean(dtype=torch.float64) * len(batch[0])
            count += 1
    if count == 0:
        raise DataError("importance: there is no mini-batch to compute gradients from; give data")
    return {name: total / count for name, total in sums.items()}


def fitted(
    layers: Mapping[str, PerturbedLayer],
    free: Mapping[str, nn.Module],
    importance: Mapping[str, Tensor],
    rate: float,
    max_rank: int,
) -> tuple[dict[str, Factors], dict[str, int]]:
    """Fit every layer's free weight by its base, with ranks chosen over all layers together.

    Args:
        layers: the layers by name.
        free: a freely trained copy of each.
        importance: weight of each layer's squared error.
        rate: share of the weighted squared error that is to be explained.
        max_rank: directions of a layer.

    Returns:
        Factors, with the free copy's bias, and ranks, by layer.

    Raises:
        NonFiniteError: if a free weight or an importance is not finite, naming the layer.
    """
    fits: dict[str, ScaledFit] = {}
    for name, layer in layers.items():
        weight = free[name].weight
        if not bool(torch.isfinite(weight).all() & torch.isfinite(importance[name])):  # type: ignore[arg-type]
            raise NonFiniteError(
                f"layer {name!r}: the weight of the warm-up, or its gradient, holds an infinity or a NaN: training has "
                "diverged (lower the learning rate) or the data holds one"
            )
        fits[name] = fit(canonical(layer.base, weight), canonical(layer.base, layer.base.weight))  # type: ignore[arg-type]
    scores = [(own.energies * importance[name].to(own.energies.device)).cpu() for name, own in fits.items()]
    ranks = dict(zip(fits, choose_ranks(scores, rate, max_rank), strict=True))
    factors = {}
    for name, own in fits.items():
        like, bias = layers[name].base.weight, free[name].bias
        left, right = own.left[:, :, : ranks[name]], own.right[:, : ranks[name]]
        scales = own.rows.flatten().to(like), own.columns.flatten().to(like)
        factors[name] = Factors(*scales, left.to(like), right.to(like), bias)  # type: ignore[arg-type]
    return factors, ranks


def fit_task(
    training: TaskTraining,
    optimizer: Optimizer,
    batches: Iterable[Any],
    held_out: Iterable[Any] | None,
    loss: Loss,
    *,
    epochs: int,
    rate: float,
    max_rank: int,
) -> dict[str, int]:
    """Warm up the free copies of a task, fit them, and put factors in their places.

    Args:
        training: of a new task, its free copies in place.
        optimizer: trains them, and then the factors.
        batches: mini-batches of the task.
        held_out: mini-batches for the layers' importance; None for `batches`.
        loss: of a mini-batch.
        epochs: of the warm-up.
        rate: see `fitted`.
        max_rank: see `fitted`.

    Returns:
        Ranks by layer.
    """
    layers = training.perturbed()
    free = {name: layer.tasks[str(training.task)] for name, layer in layers.items()}
    warm_up(batches, loss, optimizer, epochs)
    weights: dict[str, Tensor] = {name: module.weight for name, module in free.items()}  # type: ignore[misc]
    importance = importances(training.model, weights, batches if held_out is None else held_out, loss)
    factors, ranks = fitted(layers, free, importance, rate, max_rank)
    training.install(factors)
    return ranks
