"""Accuracies of a network on every test experience, and the figures made of them.

Counts are exact, and nothing here touches the global random state: the order of the test images comes from a
generator of its own and is the same at every evaluation. It matters only to networks that normalise with the
statistics of the test batch, for which sorted images would make batches of one class.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from avalanche.models.utils import avalanche_forward
from torch import Tensor, nn

from benchmarks.streams import LazyImages, Stream, normalise

_ORDER_SEED = 20240229

#: Datasets that were evaluated, as long as they live, in the order of evaluation.
_PUT_TOGETHER: WeakKeyDictionary[LazyImages, tuple[Tensor, Tensor]] = WeakKeyDictionary()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode without gradients, and every module back into the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def batches(dataset: LazyImages, batch_size: int, device: torch.device | str) -> Iterator[tuple[Tensor, Tensor]]:
    """Go once through a dataset in a fixed shuffled order.

    Args:
        dataset: the samples.
        batch_size: samples of a batch; the last one may be smaller.
        device: where the batches go.

    Yields:
        Images and labels.
    """
    pixels, labels = (part.to(device) for part in _shuffled(dataset))
    for start in range(0, len(pixels), batch_size):
        part = slice(start, start + batch_size)
        yield normalise(pixels[part], dataset.normalisation), labels[part]


def _shuffled(dataset: LazyImages) -> tuple[Tensor, Tensor]:
    """Return a dataset's pixels and labels in the fixed order, put together once: a byte a pixel is kept."""
    if dataset not in _PUT_TOGETHER:
        generator = torch.Generator().manual_seed(_ORDER_SEED)
        order = torch.randperm(len(dataset), generator=generator)
        _PUT_TOGETHER[dataset] = dataset.pixels(order), dataset.targets[order]
    return _PUT_TOGETHER[dataset]


def forget() -> None:
    """Let go of the datasets that were put together: at the end of a run."""
    _PUT_TOGETHER.clear()


def logits(model: nn.Module, images: Tensor, task: int) -> Tensor:
    """Apply a network to a batch of one task, [batch, units]."""
    return avalanche_forward(model, images, torch.full((len(images),), task, device=images.device))


def scores(
    model: nn.Module, stream: Stream, batch_size: int, device: torch.device | str
) -> tuple[list[float], list[float]]:
    """Test on every experience.

    Args:
        model: the network.
        stream: its test experiences; with several heads, experience i uses head i.
        batch_size: samples of a batch.
        device: where the network is.

    Returns:
        Percent correct and mean cross-entropy for each test experience.
    """
    accuracies, losses = [], []
    with evaluating(model):
        for position, dataset in enumerate(stream.test):
            task = position if stream.n_heads else 0
            correct = torch.zeros((), dtype=torch.int64, device=device)
            total = torch.zeros((), dtype=torch.float64, device=device)
            for images, labels in batches(dataset, batch_size, device):
                outputs = logits(model, images, task)
                correct += (outputs.argmax(1) == labels).sum()
                total += nn.functional.cross_entropy(outputs, labels, reduction="sum")
            accuracies.append(100.0 * int(correct) / len(dataset))
            losses.append(float(total) / len(dataset))
    return accuracies, losses


def mean_loss(model: nn.Module, dataset: LazyImages, task: int, batch_size: int, device: torch.device | str) -> float:
    """Compute the mean cross-entropy of a network in evaluation mode.

    Args:
        model: the network.
        dataset: the samples.
        task: their task label.
        batch_size: samples of a batch.
        device: where the network is.

    Returns:
        The mean over samples (not over batches); NaN or infinite where the network is.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    with evaluating(model):
        for images, labels in batches(dataset, batch_size, device):
            losses = nn.functional.cross_entropy(logits(model, images, task), labels, reduction="none")
            total += losses.sum(dtype=torch.float64)
    return float(total) / len(dataset)


def average_accuracy(matrix: Sequence[Sequence[float]]) -> float:
    """ACC: mean of the last row.

    Args:
        matrix: row = after this experience, column = test experience, percent.

    Returns:
        The mean accuracy at the end, percent.
    """
    return sum(matrix[-1]) / len(matrix[-1])


def backward_transfer(matrix: Sequence[Sequence[float]]) -> float | None:
    """BWT: `1 / (T-1) * sum over i < T of (A[T, i] - A[i, i])`.

    Args:
        matrix: T rows and T columns, percent.

    Returns:
        The mean change since each experience was learned; None where there is nothing before the last one or
        the rows are not one for each experience (joint training).
    """
    last = len(matrix) - 1
    if last < 1 or len(matrix[-1]) != len(matrix):
        return None
    return sum(matrix[last][i] - matrix[i][i] for i in range(last)) / last


def forgetting(matrix: Sequence[Sequence[float]]) -> float | None:
    """Mean over i < T of the best accuracy on i in any earlier row minus the final one.

    Args:
        matrix: T rows and T columns, percent.

    Returns:
        The mean loss from the best; None where BWT is None.
    """
    last = len(matrix) - 1
    if last < 1 or len(matrix[-1]) != len(matrix):
        return None
    return sum(max(row[i] for row in matrix[:last]) - matrix[last][i] for i in range(last)) / last


def forward_transfer(matrix: Sequence[Sequence[float]], initial: Sequence[float]) -> float | None:
    """FWT: `1 / (T-1) * sum over i > 1 of (A[i-1, i] - b[i])`, Lopez-Paz and Ranzato (NeurIPS 2017), equation 4.

    Args:
        matrix: T rows and T columns, percent.
        initial: b, the accuracies of the network before any training, percent.

    Returns:
        What earlier experiences did for those still to come; None where BWT is None. A task with a head of its own has
        an untrained one until its turn: then the figure says nothing.
    """
    last = len(matrix) - 1
    if last < 1 or len(matrix[-1]) != len(matrix):
        return None
    return sum(matrix[i - 1][i] - initial[i] for i in range(1, last + 1)) / last
