"""Small networks, streams and strategies for the tests of HALRP inside Avalanche."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from avalanche.benchmarks.scenarios import benchmark_from_datasets, with_classes_timeline, with_task_labels
from avalanche.benchmarks.utils import (
    ConstantSequence,
    DataAttribute,
    TaskAwareSupervisedClassificationDataset,
    TaskLabels,
)
from avalanche.core import SupervisedPlugin
from avalanche.models import MultiHeadClassifier, MultiTaskModule
from avalanche.models.utils import avalanche_forward
from avalanche.training.plugins import EvaluationPlugin
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from avalanche_gradproj import HALRP

FEATURES, CLASSES, SAMPLES = 6, 3, 24
PROBE = torch.randn(10, FEATURES, generator=torch.Generator().manual_seed(99))


def body() -> nn.Sequential:
    """A convolution and a Linear layer, each with its BatchNorm."""
    return nn.Sequential(
        nn.Unflatten(1, (2, 3)),
        nn.Conv1d(2, 4, 2),
        nn.BatchNorm1d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8, 7),
        nn.BatchNorm1d(7),
        nn.ReLU(),
    )


class Heads(MultiTaskModule):
    """The body with one head a task, called as Avalanche's own models are."""

    def __init__(self, masking: bool = False, width: int = CLASSES) -> None:
        super().__init__()
        self.body = body()
        self.head = MultiHeadClassifier(7, width, masking=masking)

    def forward(self, x: Tensor, task_labels: Tensor) -> Any:
        return self.head(self.body(x), task_labels)


def network(kind: str = "plain", seed: int = 0, **settings: Any) -> nn.Module:
    """Return the body with a plain last layer, or with `MultiHeadClassifier`."""
    torch.manual_seed(seed)
    return Heads(**settings) if kind == "heads" else nn.Sequential(*body(), nn.Linear(7, CLASSES))


def dataset(labels: Sequence[int], classes: int = CLASSES, seed: int = 0, samples: int = SAMPLES) -> Any:
    """Return random samples with the task labels of one experience; several are interleaved."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, FEATURES, generator=generator)
    y = (x @ torch.randn(FEATURES, classes, generator=generator)).argmax(1)
    y[:classes] = torch.arange(classes)
    tasks = ConstantSequence(labels[0], samples) if len(labels) == 1 else (list(labels) * samples)[:samples]
    attributes = [DataAttribute(y.tolist(), "targets"), TaskLabels(tasks)]
    return TaskAwareSupervisedClassificationDataset([TensorDataset(x, y)], data_attributes=attributes)


def benchmark(tasks: Sequence[Any] = (0, 1, 2), classes: Sequence[int] | None = None, **settings: Any) -> Any:
    """Return a stream with an experience for every entry: its label, or a tuple of several."""
    sets = [
        dataset(labels if isinstance(labels, tuple) else (labels,), (classes or [CLASSES] * 99)[i], i, **settings)
        for i, labels in enumerate(tasks)
    ]
    made = with_task_labels(with_classes_timeline(benchmark_from_datasets(train=sets, test=sets)))
    for stream in made.streams.values():
        for experience in stream:  # heads with masks index by it, and a set is no index
            experience.classes_in_this_experience = sorted(experience.classes_in_this_experience)
    return made


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


def two_groups(model: nn.Module) -> torch.optim.Optimizer:
    """Return SGD with biases, and what else is called so, in a group of their own."""
    named = list(model.named_parameters())
    groups = [[p for name, p in named if name.endswith("bias") is biases] for biases in (False, True)]
    return torch.optim.SGD([{"params": groups[0]}, {"params": groups[1], "lr": 0.3}], lr=0.05, momentum=0.9)


def learner(model: nn.Module, optimizer: Any = sgd, *, plugins: Sequence[Any] = (), **settings: Any) -> HALRP:
    """Return the strategy on a model."""
    fixed = {"train_mb_size": 8, "train_epochs": 2, "eval_mb_size": 16, "evaluator": EvaluationPlugin()}
    settings = {**fixed, "max_growth": 4.0, **settings}
    return HALRP(model=model, optimizer=optimizer(model), plugins=list(plugins), **settings)


def train(strategy: Any, experiences: Sequence[Any], **kwargs: Any) -> None:
    """Train on one experience after the other, each from a random state of its own."""
    for experience in experiences:
        torch.manual_seed(100 + experience.current_experience)
        strategy.train(experience, **kwargs)


@torch.no_grad()
def outputs(model: nn.Module, task: int | Tensor, x: Tensor = PROBE) -> Tensor:
    """Return what a model computes in evaluation, as Avalanche's strategies call it."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    labels = torch.full((len(x),), task) if isinstance(task, int) else task
    try:
        return avalanche_forward(model, x, labels)
    finally:
        for module, mode in modes.items():
            module.training = mode


def all_outputs(model: nn.Module, tasks: Sequence[int]) -> dict[int, Tensor]:
    return {task: outputs(model, task) for task in tasks}


def assert_same(one: dict[int, Tensor], other: dict[int, Tensor]) -> None:
    """Compare outputs by task bit for bit; heads may have grown wider."""
    for task, expected in one.items():
        assert torch.equal(other[task][:, : expected.shape[1]], expected), f"outputs of task {task} moved"


class Interrupt(SupervisedPlugin):
    """Raises once, at the n-th call of a callback while an experience is trained."""

    def __init__(self, experience: int, call: str, count: int = 1, error: type[BaseException] = KeyboardInterrupt):
        super().__init__()
        self.experience, self.left, self.error = experience, count, error
        setattr(self, call, self._tick)

    def _tick(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        if strategy.experience.current_experience == self.experience:
            self.left -= 1
            if self.left == 0:
                raise self.error


def stale(strategy: Any) -> list[Any]:
    """Return shapes of parameters that the optimizer has and the model has not; none may be in it twice."""
    held = [p for group in strategy.optimizer.param_groups for p in group["params"]]
    assert len({id(p) for p in held}) == len(held)
    own = {id(p) for p in strategy.model.parameters()}
    assert {id(p) for p in strategy.optimizer.state} <= {id(p) for p in held}
    return [tuple(p.shape) for p in held if id(p) not in own]


@contextlib.contextmanager
def failing(module: nn.Module, name: str, count: int, error: type[BaseException] = KeyboardInterrupt) -> Any:
    """Let the n-th call of a function of a module raise."""
    original, left = getattr(module, name), [count]

    def run(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise error
        return original(*args, **kwargs)

    setattr(module, name, run)
    try:
        yield
    finally:
        setattr(module, name, original)
