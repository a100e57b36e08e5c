"""What the conformance kit runs methods on: small networks, small random streams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from avalanche.benchmarks.scenarios import benchmark_from_datasets, with_classes_timeline, with_task_labels
from avalanche.benchmarks.utils import (
    ConstantSequence,
    DataAttribute,
    TaskAwareSupervisedClassificationDataset,
    TaskLabels,
)
from avalanche.models import MultiHeadClassifier, MultiTaskModule
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive
from torch import Tensor, nn
from torch.utils.data import TensorDataset

FEATURES, CLASSES, SAMPLES, EXPERIENCES = 12, 4, 48, 3


@dataclass(frozen=True)
class MethodCase:
    """One method under test.

    Attributes:
        name: for messages.
        make: makes the plugin with settings under which it acts on streams of 48 samples.
        neutral: makes it with settings under which training must equal Naive's bit for bit; None if there are none.
        optimizer: makes the optimizer; default SGD with momentum.
        bad_arguments: (a call that must raise, what its message must name) pairs.
        task_incremental: whether the method needs task labels and one head a task.
        looks_back: whether the method runs the model on old samples within a step: Avalanche's multi-head models
            then look at task labels, which waits for the device and is not the method's doing.
        device: where the checks train, such as `"cuda"`.
    """

    name: str
    make: Callable[[], Any]
    neutral: Callable[[], Any] | None = None
    optimizer: Callable[[Any], torch.optim.Optimizer] = field(
        default=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    )
    bad_arguments: Sequence[tuple[Callable[[], Any], str]] = ()
    task_incremental: bool = False
    looks_back: bool = False
    device: str = "cpu"


class Convolutional(nn.Module):
    """Convolution, BatchNorm, a plain parameter and two linear layers: covered and uncovered parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 2)
        self.norm = nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.ones(1))
        self.hidden = nn.Linear(4 * 2 * 3, 10)
        self.out = nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, 12] to logits [n, 4]."""
        features = torch.relu(self.norm(self.conv(x.view(-1, 1, 3, 4))) * self.scale)
        return self.out(torch.relu(self.hidden(features.flatten(1))))


class MultiHead(MultiTaskModule):
    """The same body with Avalanche's task heads."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Convolutional()
        self.body.out = nn.Identity()  # type: ignore[assignment]
        self.head = MultiHeadClassifier(10, CLASSES, masking=False)

    def forward(self, x: Tensor, task_labels: Tensor) -> Any:
        """Map [n, 12] and task labels to logits [n, 4]."""
        return self.head(self.body(x), task_labels)


def stream(*, task_labels: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Return a benchmark of 3 experiences of 48 random samples each, in subspaces of their own."""
    generator = torch.Generator().manual_seed(seed)
    datasets = []
    for task in range(EXPERIENCES):
        inputs = torch.randn(SAMPLES, 3, generator=generator) @ torch.randn(3, FEATURES, generator=generator)
        targets = torch.randint(CLASSES, (SAMPLES,), generator=generator)
        attributes = [
            DataAttribute(targets.tolist(), "targets"),
            TaskLabels(ConstantSequence(task if task_labels else 0, SAMPLES)),
        ]
        data = TensorDataset(inputs.to(dtype), targets)
        datasets.append(TaskAwareSupervisedClassificationDataset([data], data_attributes=attributes))
    benchmark = benchmark_from_datasets(train=datasets, test=datasets)
    return with_task_labels(with_classes_timeline(benchmark))


def strategy(case: MethodCase, plugins: Sequence[Any], *, seed: int = 0, **kwargs: Any) -> Naive:
    """Return a Naive strategy with plugins, on a network drawn from a seed."""
    torch.manual_seed(seed)
    model = MultiHead() if case.task_incremental else Convolutional()
    settings = {"train_mb_size": 8, "train_epochs": 2, "eval_mb_size": 16, "evaluator": EvaluationPlugin(), **kwargs}
    model.to(case.device)
    return Naive(
        model=model, optimizer=case.optimizer(model.parameters()), plugins=plugins, device=case.device, **settings
    )
