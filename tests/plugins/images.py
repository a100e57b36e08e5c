"""A small stream of images for networks that want some."""

from __future__ import annotations

import torch
from avalanche.benchmarks.scenarios import benchmark_from_datasets, with_classes_timeline, with_task_labels
from avalanche.benchmarks.utils import (
    ConstantSequence,
    DataAttribute,
    TaskAwareSupervisedClassificationDataset,
    TaskLabels,
)
from torch.utils.data import TensorDataset


def image_stream(count=16, experiences=3, size=32, *, tasks=False):
    """Random images [count, 3, size, size] of 4 classes in each experience, one task or a task each."""
    generator = torch.Generator().manual_seed(0)
    datasets = []
    for number in range(experiences):
        targets = torch.arange(count) % 4
        data = TensorDataset(torch.randn(count, 3, size, size, generator=generator), targets)
        attributes = [DataAttribute(targets.tolist(), "targets"), TaskLabels(ConstantSequence(number * tasks, count))]
        datasets.append(TaskAwareSupervisedClassificationDataset([data], data_attributes=attributes))
    return with_task_labels(with_classes_timeline(benchmark_from_datasets(train=datasets)))
