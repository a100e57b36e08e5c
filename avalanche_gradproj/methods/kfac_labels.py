"""From a mini-batch's logits to the gradients that its factors are made of, and the losses for which that is right."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avalanche_gradproj.errors import ConfigurationError, DataError, ModelError, NonFiniteError
from avalanche_gradproj.linalg.cross_entropy import logit_directions
from avalanche_gradproj.methods.base import Forward

#: Mean loss of a mini-batch, from logits and targets.
Criterion = Callable[[Tensor, Tensor], Tensor]


def check_criterion(criterion: Criterion | None, fisher: str) -> None:
    """Refuse a loss that the Fisher matrix is not of.

    Args:
        criterion: the loss; None for a mean of cross-entropies.
        fisher: `"sampled"` and `"exact"` take labels from the softmax of the logits, so that the loss must be a mean
            of cross-entropies; `"empirical"` takes a mean or a sum of any losses of samples.

    Raises:
        ConfigurationError: naming the criterion.
    """
    reduction = getattr(criterion, "reduction", "mean")
    if fisher == "empirical":
        if reduction not in ("mean", "sum"):
            raise ConfigurationError(
                f"criterion {criterion!r} has reduction={reduction!r}: fisher='empirical' needs a mean or a sum of the "
                "samples' losses"
            )
        return
    if criterion is None or criterion is F.cross_entropy:
        return
    # A subclass may compute anything in a forward of its own.
    plain = isinstance(criterion, nn.CrossEntropyLoss) and type(criterion).forward is nn.CrossEntropyLoss.forward
    if not plain or reduction != "mean" or getattr(criterion, "weight", None) is not None:
        raise ConfigurationError(
            f"criterion {criterion!r} is no mean of cross-entropies with equal weights, and fisher={fisher!r} takes "
            "labels from the softmax of the logits: use torch.nn.CrossEntropyLoss(), or fisher='empirical'"
        )


def samples_of(batch: Any) -> int:
    """Return the number of samples in a mini-batch.

    Raises:
        DataError: if it is neither a tensor nor a tuple whose first element is one.
    """
    inputs = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(inputs, Tensor):
        what = type(batch).__name__ + ("" if inputs is batch else f" whose inputs are a {type(inputs).__name__}")
        raise DataError(
            f"a mini-batch is a {what}: inputs must be tensors, given alone or as (inputs, ...); take dicts apart, and "
            "put them together again in `forward`"
        )
    return len(inputs)


def drawn(n_samples: int | None, size: int, generator: torch.Generator) -> Tensor:
    """Draw the samples of an experience that its factors are to be made of.

    Args:
        n_samples: how many, None for all.
        size: samples of the experience.
        generator: of the draw.

    Returns:
        Their indices.

    Raises:
        DataError: if there are fewer than `n_samples`.
    """
    if n_samples is None:
        return torch.arange(size)
    if size < n_samples:
        raise DataError(
            f"the experience has {size} samples and n_samples={n_samples} are to be drawn: give n_samples<={size}"
        )
    return torch.randperm(size, generator=generator)[:n_samples]


def at_most(n_samples: int | None, batches: Iterable[Any]) -> Iterator[Any]:
    """Yield mini-batches.

    Raises:
        DataError: as soon as more than `n_samples` have come: those were to be drawn.
    """
    came = 0
    for batch in batches:
        came += samples_of(batch)
        if n_samples is not None and came > n_samples:
            raise DataError(f"{came} samples came and n_samples={n_samples}: give those that `draw(size)` picks")
        yield batch


def run_on(model: nn.Module, batch: Any, forward: Forward | None) -> Any:
    """Run a model on a mini-batch: by `forward`, else on the tensor, or on the first element of a tuple."""
    if forward is not None:
        return forward(model, batch)
    return model(batch if isinstance(batch, Tensor) else batch[0])


def up_to(enough: int, batches: Iterable[Any]) -> Iterator[Any]:
    """Yield mini-batches until at least so many samples have come."""
    came = 0
    for batch in batches:
        yield batch
        came += samples_of(batch)
        if came >= enough:
            return


def check_logits(logits: Any, size: int) -> None:
    """Check a model's output.

    Args:
        logits: what came.
        size: n, samples in the mini-batch.

    Raises:
        ModelError: if it is no tensor [n, classes].
        NonFiniteError: if it holds an infinity or a NaN; minus infinity, a class that is masked, may be beside others.
    """
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != size:
        came = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(f"the model's output is {came}, expected logits [{size}, classes]: give such a `forward`")
    largest = logits.detach().amax(dim=1).abs()
    if not bool((largest < math.inf).all()):  # that of a row with a NaN is NaN, which is not less than anything
        raise NonFiniteError(
            "a logit is an infinity or a NaN (or all of a sample are masked): training has diverged (lower the "
            "learning rate) or the data holds one"
        )


def refuse_reentrant(logits: Tensor) -> None:
    """Refuse checkpoints that run layers without gradients, and once more in the backward pass.

    Raises:
        ModelError: if the logits came through one.
    """
    nodes, seen = [logits.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if "CheckpointFunction" in node.name():
            raise ModelError(
                "the model runs layers in a reentrant checkpoint, where their gradients cannot be told by layer: give "
                "torch.utils.checkpoint.checkpoint use_reentrant=False"
            )
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]


def directions_of(
    logits: Tensor,
    batch: Any,
    fisher: str,
    generator: torch.Generator | None,
    criterion: Criterion | None,
    *,
    signs: bool,
) -> Iterator[Tensor]:
    """Yield gradients at the logits of a mini-batch; see `linalg.cross_entropy.logit_directions`.

    Args:
        logits: [n, classes].
        batch: `(inputs, targets, ...)`; targets are used by `"empirical"` alone.
        fisher: which Fisher matrix.
        generator: of labels and signs.
        criterion: whose gradient `"empirical"` takes; None for cross-entropy.
        signs: give each direction of `"exact"` a random sign a sample. Where samples influence each other in the
            network, the cross terms of their directions, which belong to no Fisher matrix, then vanish on average.

    Yields:
        [n, classes], in the logits' type.

    Raises:
        DataError: for targets that are missing or have no logit.
    """
    if fisher == "empirical":
        labels = _labels(batch, logits, whole=criterion is None)
        if criterion is None:
            yield from logit_directions(logits, fisher, labels=labels)
        else:
            yield _loss_gradient(criterion, logits, labels)
        return
    for direction in logit_directions(logits, fisher, generator=generator):
        if signs and fisher == "exact":
            drawn = torch.randint(0, 2, (len(logits), 1), generator=generator) * 2 - 1
            yield direction * drawn.to(direction)
        else:
            yield direction


def _labels(batch: Any, logits: Tensor, *, whole: bool) -> Tensor:
    if isinstance(batch, Tensor) or len(batch) < 2 or not isinstance(batch[1], Tensor) or len(batch[1]) != len(logits):
        raise DataError("fisher='empirical' takes the true labels: give batches (inputs, targets, ...) of tensors")
    labels = batch[1].to(logits.device)
    numbers = labels.dim() == 1 and not labels.is_floating_point()
    if whole and not numbers:
        raise DataError(f"targets {tuple(labels.shape)} of type {labels.dtype} came, expected [{len(logits)}] classes")
    if numbers and (int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]):
        raise DataError(
            f"labels from {int(labels.min())} to {int(labels.max())} came and the model has {logits.shape[1]} logits: "
            "labels must count from 0 within the outputs of their task"
        )
    return labels


def _loss_gradient(criterion: Criterion, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the gradient of each sample's loss at its logits, from the criterion's mean (or sum)."""
    with torch.enable_grad():
        z = logits.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(criterion(z, labels), z)
    return gradient if getattr(criterion, "reduction", "mean") == "sum" else gradient * len(logits)
