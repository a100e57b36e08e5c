"""Avalanche benchmarks from images in memory: split by class, or the same images with pixels in another order.

Every experience is a view on one shared uint8 tensor: an index list and, for permutations and rotations, an order
of the pixels. Normalised floats exist only for the samples being looked at, so ten permutations of MNIST take the
memory of one to train on (to be evaluated, each takes another byte a pixel for the time of a run: `evaluate.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from avalanche.benchmarks.scenarios import benchmark_from_datasets, with_classes_timeline, with_task_labels
from avalanche.benchmarks.utils import (
    ConstantSequence,
    DataAttribute,
    TaskAwareSupervisedClassificationDataset,
    TaskLabels,
)
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.orders import BLACK
from benchmarks.record import Normalisation
from benchmarks.sampling import Sampling
from benchmarks.settings import InputError
from benchmarks.sources import ImageData

Labels = Literal["task", "class", "masked"]


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
    mean = torch.tensor(rule.mean, dtype=torch.float32, device=pixels.device)[:, None, None]
    std = torch.tensor(rule.std, dtype=torch.float32, device=pixels.device)[:, None, None]
    return floats.sub_(mean).div_(std)


class LazyImages(Dataset[tuple[Tensor, int]]):
    """Some samples of a shared tensor of images, brought into order and normalised when asked for.

    Args:
        images: uint8 [n, channels, height, width], shared between experiences.
        targets: int64 [n], labels as the network sees them.
        indices: which samples belong to this dataset, int64 [m].
        normalisation: pixels to floats.
        order: source pixels of a flattened image (`orders.py`), int64 [channels * height * width]; None leaves
            them.
    """

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        indices: Tensor,
        normalisation: Normalisation,
        order: Tensor | None = None,
    ) -> None:
        self._images = images
        self._indices = indices
        #: Pixels to floats.
        self.normalisation = normalisation
        outside = None if order is None else order == BLACK
        self._order = None if order is None else order.clamp(min=0)
        self._outside = outside if outside is not None and bool(outside.any()) else None
        self.targets: Tensor = targets[indices]
        # Single samples come fastest from plain lists.
        self._positions: list[int] = indices.tolist()
        self._labels: list[int] = self.targets.tolist()

    @property
    def shared_images(self) -> Tensor:
        """The tensor of images that this dataset looks at, together with others."""
        return self._images

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One sample: float32 [channels, height, width] and its label."""
        pixels = self._ordered(self._images[self._positions[index]][None])
        return normalise(pixels, self.normalisation)[0], self._labels[index]

    def as_tensors(self, indices: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """All samples, or some, at once; equal to stacking single ones.

        Args:
            indices: positions within this dataset, int64; None takes all, in order.

        Returns:
            Images float32 [m, channels, height, width] and labels int64 [m].
        """
        if indices is None:
            return normalise(self.pixels(), self.normalisation), self.targets.clone()
        return normalise(self.pixels(indices), self.normalisation), self.targets[indices]

    def pixels(self, indices: Tensor | None = None) -> Tensor:
        """All samples, or some, before normalisation: uint8 [m, channels, height, width].

        Args:
            indices: positions within this dataset, int64; None takes all, in order.
        """
        return self._ordered(self._images[self._indices if indices is None else self._indices[indices]])

    def _ordered(self, pixels: Tensor) -> Tensor:
        # Ordering bytes instead of floats moves a quarter of the memory; normalised pixel by pixel (one mean
        # for all) it is the same.
        if self._order is None:
            return pixels
        flat = pixels.flatten(1)[:, self._order]
        if self._outside is not None:
            flat.masked_fill_(self._outside, 0)
        return flat.reshape(pixels.shape)


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
        n_heads: number of tasks with outputs of their own; 0 for one output layer shared by all.
        classes: units of one output layer that belong to each task, the others being masked; empty where each task
            has a head, or all share all units.
    """

    benchmark: Any
    train: tuple[LazyImages, ...]
    test: tuple[LazyImages, ...]
    valid: tuple[LazyImages, ...]
    input_shape: tuple[int, int, int]
    n_outputs: int
    n_heads: int
    classes: tuple[tuple[int, ...], ...] = ()


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
        labels: `task`: labels 0 .. c-1 within each experience, and task labels (task-incremental); `masked`: the
            classes' own labels, and task labels (task-incremental, one output layer); `class`: the classes' own
            labels and task label 0 throughout (class-incremental).

    Returns:
        The stream; heads have as many units as the largest group, one layer has as many as there are classes.

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
    for position, group in enumerate(groups):
        members = torch.tensor(group)
        inside_train = torch.isin(data.y_train, members).nonzero()[:, 0]
        inside_test = torch.isin(data.y_test, members).nonzero()[:, 0]
        for_train, for_valid = sampling.divide(inside_train, position)
        train.append(LazyImages(data.x_train, labels_train, for_train, normalisation))
        valid.append(LazyImages(data.x_train, labels_train, for_valid, normalisation))
        test.append(LazyImages(data.x_test, labels_test, inside_test, normalisation))
    n_outputs = max(len(group) for group in groups) if labels == "task" else data.n_classes
    stream = _assemble(train, test, valid, n_outputs, n_heads=0 if labels == "class" else len(groups))
    return replace(stream, classes=tuple(map(tuple, groups))) if labels == "masked" else stream


def permute(
    data: ImageData,
    orders: Sequence[Tensor],
    normalisation: Normalisation,
    sampling: Sampling,
    labels: Literal["task", "class"] = "class",
) -> Stream:
    """Make one experience of each order of the pixels, with the same classes.

    Args:
        data: the images.
        orders: a pixel order for each experience.
        normalisation: pixels to floats, the same for every channel.
        sampling: training and validation samples of each experience.
        labels: `class`: one shared output layer and task label 0 throughout (domain-incremental); `task`: task labels
            and a head for each experience (task-incremental). The labels of the samples are the classes' own.

    Returns:
        The stream.
    """
    every, for_test = torch.arange(len(data.y_train)), torch.arange(len(data.y_test))
    train, valid, test = [], [], []
    divided = sampling.divide(every)
    for position, order in enumerate(orders):
        if position and sampling.draw_rule == "each":
            divided = sampling.divide(every, position)
        train.append(LazyImages(data.x_train, data.y_train, divided[0], normalisation, order))
        valid.append(LazyImages(data.x_train, data.y_train, divided[1], normalisation, order))
        test.append(LazyImages(data.x_test, data.y_test, for_test, normalisation, order))
    return _assemble(train, test, valid, data.n_classes, n_heads=len(orders) if labels == "task" else 0)


def _assemble(
    train: list[LazyImages],
    test: list[LazyImages],
    valid: list[LazyImages],
    n_outputs: int,
    *,
    n_heads: int,
) -> Stream:
    """Wrap datasets into Avalanche's and collect what is known about them."""
    parts = {"train": train, "test": test}
    if all(len(dataset) > 0 for dataset in valid):
        parts["valid"] = valid
    wrapped = {name: _wrap(datasets, n_heads > 0) for name, datasets in parts.items()}
    benchmark = with_task_labels(with_classes_timeline(benchmark_from_datasets(**wrapped)))
    for own in benchmark.streams.values():
        own.benchmark = benchmark  # Avalanche's decorators leave it out; a plugin finds the other streams by it
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
