"""Data, streams and networks for the tests of the in-memory loader."""

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from avalanche.benchmarks import benchmark_from_datasets, task_incremental_benchmark, with_task_labels
from avalanche.benchmarks.scenarios.supervised import class_incremental_benchmark, with_classes_timeline
from avalanche.benchmarks.utils import (
    AvalancheDataset,
    DataAttribute,
    TransformGroups,
    make_avalanche_dataset,
)
from avalanche.benchmarks.utils.data_attribute import ConstantSequence, TaskLabels
from avalanche.core import SupervisedPlugin
from avalanche.models import MultiTaskModule
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from avalanche_gradproj.plugins.in_memory import InMemoryDataPlugin

DIGITS = load_digits()
X = torch.tensor(DIGITS.data, dtype=torch.float32) / 16
Y = torch.tensor(DIGITS.target)
TRAIN, TEST = torch.arange(0, 400), torch.arange(1400, 1600)


class Samples(Dataset):
    """A dataset that only knows single samples, and counts how often it is asked."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows
        self.targets = Y[rows].tolist()
        self.reads = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        self.reads += 1
        return X[self.rows[index]], self.targets[index]


class Lazy(Dataset):
    """A dataset that makes its samples when asked, one by one or all at once, and counts."""

    def __init__(self, rows: torch.Tensor, shift: float = 0.0) -> None:
        self.rows = rows
        self.targets = Y[rows].tolist()
        self.shift = shift
        self.reads = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        self.reads += 1
        return X[self.rows[index]].flip(0), self.targets[index]

    def as_tensors(self) -> tuple[torch.Tensor, ...]:
        return X[self.rows].flip(1) + self.shift, Y[self.rows]


def dataset(source: Any, transform: Any = None, task: int | None = None) -> AvalancheDataset:
    targets = source.tensors[1].tolist() if isinstance(source, TensorDataset) else source.targets
    attributes = [DataAttribute(targets, "targets")]
    if task is not None:
        attributes.append(TaskLabels(ConstantSequence(task, len(targets))))
    groups = None if transform is None else TransformGroups({"train": (transform, None), "eval": (transform, None)})
    return make_avalanche_dataset(source, data_attributes=attributes, transform_groups=groups)


def tensor_data(rows: torch.Tensor) -> TensorDataset:
    return TensorDataset(X[rows], Y[rows])


def task_aware(benchmark: Any) -> Any:
    return with_classes_timeline(with_task_labels(benchmark))


def class_incremental(make: Any = tensor_data) -> Any:
    return class_incremental_benchmark(
        {"train": dataset(make(TRAIN)), "test": dataset(make(TEST))},
        num_experiences=2,
        class_order=list(range(10)),
    )


def task_incremental(make: Any = tensor_data) -> Any:
    return with_classes_timeline(task_incremental_benchmark(class_incremental(make)))


def multi_task(make: Any = tensor_data) -> Any:
    """Joint data of three tasks of 30, 100 and 7 samples, interleaved: groups have to be oversampled."""
    labels = [5] * 30 + [2] * 100 + [7] * 7
    order = torch.randperm(137, generator=torch.Generator().manual_seed(1)).tolist()
    attributes = [DataAttribute(Y[:137].tolist(), "targets"), TaskLabels(labels)]
    joint = make_avalanche_dataset(make(torch.arange(137)), data_attributes=attributes).subset(order)
    return task_aware(benchmark_from_datasets(train=[joint], test=[joint.subset(range(50))]))


def concatenated(make: Any = tensor_data) -> Any:
    """One task whose data come from two leaves, in an order that mixes them."""
    parts = [dataset(make(TRAIN[:60]), task=0), dataset(make(TRAIN[100:190]), task=0)]
    joint = parts[0].concat(parts[1])
    order = torch.randperm(150, generator=torch.Generator().manual_seed(2)).tolist()
    return task_aware(benchmark_from_datasets(train=[joint.subset(order)], test=[joint.subset(order[::-1])]))


class Head(MultiTaskModule):
    """A small network with dropout, so that the global random state matters in each step; a head per task."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.3))
        self.heads = nn.Parameter(torch.randn(10, 10, 16) / 4)

    def forward(self, x: torch.Tensor, task_labels: torch.Tensor) -> torch.Tensor:
        return torch.einsum("nof,nf->no", self.heads[task_labels], self.body(x))


class Recorder(SupervisedPlugin):
    """Keeps every batch as it comes, before the step can change it."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[torch.Tensor]] = []
        self.loaders: list[Any] = []
        self.lengths: list[int] = []

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        self.batches.append([part.clone() for part in strategy.mbatch])

    before_eval_iteration = before_training_iteration

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        self.loaders.append(strategy.dataloader)
        self.lengths.append(len(strategy.dataloader))

    def before_eval_forward(self, strategy: Any, **kwargs: Any) -> None:
        if not self.loaders or self.loaders[-1] is not strategy.dataloader:
            self.loaders.append(strategy.dataloader)
            self.lengths.append(len(strategy.dataloader))


def strategy(plugins: list[Any], *, multi_head: bool = True, mb_size: int = 32, **options: Any) -> Naive:
    torch.manual_seed(3)
    model = Head() if multi_head else nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Dropout(0.3), nn.Linear(16, 10))
    return Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        train_mb_size=mb_size,
        eval_mb_size=64,
        plugins=plugins,
        evaluator=EvaluationPlugin(),
        **options,
    )


def run(benchmark: Any, plugins: list[Any], options: dict[str, Any], **loading: Any) -> tuple[Any, ...]:
    """Train and evaluate; return what was recorded, the final weights and the random state."""
    recorder = Recorder()
    tasks = hasattr(next(iter(benchmark.train_stream)), "task_labels")
    learner = strategy([*plugins, recorder], multi_head=tasks, **options)
    torch.manual_seed(4)
    for experience in benchmark.train_stream:
        learner.train(experience, eval_streams=[benchmark.test_stream], **loading)
    return recorder, learner.model.state_dict(), torch.get_rng_state()


def assert_runs_equal(one: tuple[Any, ...], two: tuple[Any, ...]) -> None:
    (left, left_weights, left_state), (right, right_weights, right_state) = one, two
    assert len(left.batches) == len(right.batches) > 0
    assert left.lengths == right.lengths
    for mine, theirs in zip(left.batches, right.batches, strict=True):
        assert [(part.dtype, part.shape) for part in mine] == [(part.dtype, part.shape) for part in theirs]
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert torch.equal(left_state, right_state)
    assert left_weights.keys() == right_weights.keys()
    assert all(torch.equal(left_weights[name], right_weights[name]) for name in left_weights)


def replaced(plugin: InMemoryDataPlugin, data: Any, loader: Any = None, *, training: bool = True) -> Any:
    """Return what the plugin makes of a strategy's loader."""
    loader = DataLoader(data, batch_size=16, collate_fn=data.collate_fn) if loader is None else loader
    fake = SimpleNamespace(adapted_dataset=data, dataloader=loader, device=torch.device("cpu"))
    (plugin.before_training_exp if training else plugin.before_eval_exp)(fake)
    return fake.dataloader


def random_states() -> list[Any]:
    return [torch.get_rng_state(), torch.tensor(np.random.get_state()[1].astype(np.int64)), random.getstate()]  # noqa: NPY002


def assert_states_equal(one: list[Any], two: list[Any]) -> None:
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert one[2] == two[2]


# Equality with Avalanche's loader.
