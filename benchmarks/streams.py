"""Avalanche benchmarks from images in memory: split by class, or the same images with permuted pixels.

Every experience is a view on one shared uint8 tensor: an index list and, for permutations, an order of the
pixels. Normalised floats exist only for the samples being looked at, so ten permutations of MNIST take the
memory of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from avalanche.benchmarks.scenarios import benchmark_from_datasets, with_classes_timeline, with_task_labels
from avalanche.benchmarks.utils import (
    ConstantSequence,
    DataAttribute,
    TaskAwareSupervisedClassificationDataset,
    TaskLabels,
)
from sklearn.utils import shuffle
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.record import Normalisation
from benchmarks.settings import InputError
from benchmarks.sources import ImageData

Labels = Literal["task", "class"]
_PERMUTATION_POOL = 10


def normalise(pixels: Tensor, rule: Normalisation) -> Tensor:
    """Turn pixels into floats: `(pixel / scale - mean) / std`.

    Args:
        pixels: uint8 [..., channels, height, width].
        rule: scale, mean and std.

    Returns:
        float32 of the same shape.
    """
    floats = pixels.to(torch.float32).div_(rule.scale)
    if len(rule.mean) == len(rule.std) == 1:
        # Numbers instead of tensors: much cheaper for single samples.
        neutral = (rule.mean[0], rule.std[0]) == (0, 1)
        return floats if neutral else floats.sub_(rule.mean[0]).div_(rule.std[0])
    mean = torch.tensor(rule.mean, dtype=torch.float32)[:, None, None]
    std = torch.tensor(rule.std, dtype=torch.float32)[:, None, None]
    return floats.sub_(mean).div_(std)


class LazyImages(Dataset[tuple[Tensor, int]]):
    """Some samples of a shared tensor of images, permuted and normalised when asked for.

    Args:
        images: uint8 [n, channels, height, width], shared between experiences.
        targets: int64 [n], labels as the network sees them.
        indices: which samples belong to this dataset, int64 [m].
        normalisation: pixels to floats.
        permutation: order of the pixels of a flattened image, int64 [channels * height * width]; None leaves
            them.
    """

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        indices: Tensor,
        normalisation: Normalisation,
        permutation: Tensor | None = None,
    ) -> None:
        self._images = images
        self._indices = indices
        self._normalisation = normalisation
        self._permutation = permutation
        self.targets: Tensor = targets[indices]
        # Single samples come fastest from plain lists.
        self._positions: list[int] = indices.tolist()
        self._labels: list[int] = self.targets.tolist()

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One sample: float32 [channels, height, width] and its label."""
        return self._prepare(self._images[self._positions[index]][None])[0], self._labels[index]

    def as_tensors(self, indices: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """All samples, or some, at once; equal to stacking single ones.

        Args:
            indices: positions within this dataset, int64; None takes all, in order.

        Returns:
            Images float32 [m, channels, height, width] and labels int64 [m].
        """
        if indices is None:
            return self._prepare(self._images[self._indices]), self.targets.clone()
        return self._prepare(self._images[self._indices[indices]]), self.targets[indices]

    def _prepare(self, pixels: Tensor) -> Tensor:
        # Permuting bytes instead of floats moves a quarter of the memory; normalised pixel by pixel (one mean
        # for all) it is the same.
        if self._permutation is not None:
            pixels = pixels.flatten(1)[:, self._permutation].reshape(pixels.shape)
        return normalise(pixels, self._normalisation)


@dataclass(frozen=True)
class Stream:
    """A benchmark and what else is known about it.

    Attributes:
        benchmark: Avalanche's scenario with the streams `train`, `test` and, where asked for, `valid`.
        train: the datasets of the training experiences, for bulk access.
        test: the datasets of the test experiences.
        valid: the datasets of the validation experiences; empty where there are none.
        input_shape: channels, height, width.
        n_outputs: units of a head.
        n_heads: number of heads; 0 for one shared output layer.
    """

    benchmark: Any
    train: tuple[LazyImages, ...]
    test: tuple[LazyImages, ...]
    valid: tuple[LazyImages, ...]
    input_shape: tuple[int, int, int]
    n_outputs: int
    n_heads: int


@dataclass(frozen=True)
class Sampling:
    """Which training samples go where.

    Attributes:
        valid_share: share of an experience's training samples that goes to validation.
        valid_rule: `first` takes the first samples in order; `random` shuffles with `seed` first.
        train_limit: at most so many training samples an experience, a random choice; 0 keeps all.
        seed: for the random choices; they depend on nothing else.
    """

    valid_share: float = 0.0
    valid_rule: Literal["first", "random"] = "random"
    train_limit: int = 0
    seed: int = 0

    def divide(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Divide the training samples of one experience into training and validation samples, int64 each."""
        order = np.arange(len(indices))
        if self.valid_rule == "random":
            order = shuffle(order, random_state=self.seed)
        n_valid = int(self.valid_share * len(order))
        train, valid = order[n_valid:], order[:n_valid]
        if 0 < self.train_limit < len(train):
            train = shuffle(train, random_state=self.seed)[: self.train_limit]
        return indices[torch.from_numpy(train)], indices[torch.from_numpy(valid)]


def split_by_class(
    data: ImageData,
    groups: Sequence[Sequence[int]],
    normalisation: Normalisation,
    sampling: Sampling,
    labels: Labels = "task",
) -> Stream:
    """Make one experience of each group of classes.

    Args:
        data: the images.
        groups: the classes of each experience, in the order of their local labels.
        normalisation: pixels to floats.
        sampling: training and validation samples.
        labels: `task`: labels 0 .. c-1 within each experience, and task labels (task-incremental); `class`:
            the classes' own labels and task label 0 throughout (class-incremental).

    Returns:
        The stream; heads have as many units as the largest group, the shared layer as many as there are
        classes.

    Raises:
        InputError: if a class appears twice.
    """
    flat = [label for group in groups for label in group]
    if len(flat) != len(set(flat)):
        raise InputError(f"a class appears in two experiences: {flat}")
    local = torch.arange(data.n_classes)
    if labels == "task":
        for group in groups:
            local[torch.tensor(group)] = torch.arange(len(group))
    labels_train, labels_test = local[data.y_train], local[data.y_test]
    train, valid, test = [], [], []
    for group in groups:
        members = torch.tensor(group)
        inside_train = torch.isin(data.y_train, members).nonzero()[:, 0]
        inside_test = torch.isin(data.y_test, members).nonzero()[:, 0]
        for_train, for_valid = sampling.divide(inside_train)
        train.append(LazyImages(data.x_train, labels_train, for_train, normalisation))
        valid.append(LazyImages(data.x_train, labels_train, for_valid, normalisation))
        test.append(LazyImages(data.x_test, labels_test, inside_test, normalisation))
    task = labels == "task"
    n_outputs = max(len(group) for group in groups) if task else data.n_classes
    return _assemble(train, test, valid, n_outputs, n_heads=len(groups) if task else 0, task_labels=task)


def permutations(n_experiences: int, n_pixels: int, seed: int) -> list[Tensor]:
    """Draw the pixel orders of the permuted-MNIST protocol of the GPM family.

    The order at position i is `sklearn.utils.shuffle(arange(n_pixels), random_state=100 r + i)`, r the i-th
    element of the shuffled numbers 0 .. 9 (`random_state=seed`); every experience is permuted, the first one
    too.

    Args:
        n_experiences: how many; beyond ten, the numbers drawn from grow with it.
        n_pixels: pixels of an image.
        seed: the run's seed.

    Returns:
        One order each, int64 [n_pixels].
    """
    numbers = shuffle(np.arange(max(n_experiences, _PERMUTATION_POOL)), random_state=seed)
    states = [int(number) * 100 + position for position, number in enumerate(numbers[:n_experiences])]
    return [torch.from_numpy(shuffle(np.arange(n_pixels), random_state=state)) for state in states]


def permute(data: ImageData, orders: Sequence[Tensor], normalisation: Normalisation, sampling: Sampling) -> Stream:
    """Make one experience of each order of the pixels, with the same images and labels (domain-incremental).

    Args:
        data: the images.
        orders: a pixel order for each experience.
        normalisation: pixels to floats, the same for every channel.
        sampling: training and validation samples, the same in every experience.

    Returns:
        The stream, with one shared output layer and task label 0 throughout.
    """
    for_train, for_valid = sampling.divide(torch.arange(len(data.y_train)))
    for_test = torch.arange(len(data.y_test))

    def views(images: Tensor, labels: Tensor, indices: Tensor) -> list[LazyImages]:
        return [LazyImages(images, labels, indices, normalisation, order) for order in orders]

    train = views(data.x_train, data.y_train, for_train)
    valid = views(data.x_train, data.y_train, for_valid)
    test = views(data.x_test, data.y_test, for_test)
    return _assemble(train, test, valid, data.n_classes, n_heads=0, task_labels=False)


def _assemble(
    train: list[LazyImages],
    test: list[LazyImages],
    valid: list[LazyImages],
    n_outputs: int,
    *,
    n_heads: int,
    task_labels: bool,
) -> Stream:
    """Wrap datasets into Avalanche's and collect what is known about them."""
    parts = {"train": train, "test": test}
    if all(len(dataset) > 0 for dataset in valid):
        parts["valid"] = valid
    wrapped = {name: _wrap(datasets, task_labels) for name, datasets in parts.items()}
    benchmark = with_task_labels(with_classes_timeline(benchmark_from_datasets(**wrapped)))
    image, _ = train[0][0]
    return Stream(
        benchmark=benchmark,
        train=tuple(train),
        test=tuple(test),
        valid=tuple(parts.get("valid", ())),
        input_shape=(image.shape[0], image.shape[1], image.shape[2]),
        n_outputs=n_outputs,
        n_heads=n_heads,
    )


def _wrap(datasets: list[LazyImages], task_labels: bool) -> list[Any]:
    """Attach Avalanche's targets and task labels; equal targets share one attribute, slow to index."""
    result = []
    targets: DataAttribute | None = None
    for position, dataset in enumerate(datasets):
        if targets is None or not torch.equal(dataset.targets, datasets[position - 1].targets):
            targets = DataAttribute(dataset.targets.tolist(), "targets")
        tasks = TaskLabels(ConstantSequence(position if task_labels else 0, len(dataset)))
        result.append(TaskAwareSupervisedClassificationDataset([dataset], data_attributes=[targets, tasks]))
    return result
