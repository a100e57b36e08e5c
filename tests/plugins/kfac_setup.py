"""What the tests of K-FAC Laplace inside Avalanche share: cases, a stream of new classes, a learner."""

from __future__ import annotations

import torch
from avalanche.benchmarks.scenarios import class_incremental_benchmark
from avalanche.benchmarks.utils import DataAttribute
from avalanche.benchmarks.utils.classification_dataset import ClassificationDataset
from avalanche.models import IncrementalClassifier
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive
from torch import nn
from torch.utils.data import TensorDataset

from avalanche_gradproj import KFACLaplacePlugin
from avalanche_gradproj.testing import MethodCase

CASE = MethodCase("kfac", KFACLaplacePlugin, optimizer=lambda p: torch.optim.SGD(p, lr=0.05))
HEADS = MethodCase("kfac", KFACLaplacePlugin, optimizer=CASE.optimizer, task_incremental=True)


def class_incremental(n=120, features=12, classes=6):
    torch.manual_seed(0)
    targets = (torch.arange(n) % classes).tolist()
    data = ClassificationDataset(
        [TensorDataset(torch.randn(n, features), torch.tensor(targets))],
        data_attributes=[DataAttribute(targets, "targets")],
    )
    return class_incremental_benchmark(
        {"train": data, "test": data}, class_order=list(range(classes)), num_experiences=3
    ).train_stream


def learning(model, plugins, *, train_epochs=3):
    return Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        train_mb_size=10,
        train_epochs=train_epochs,
        eval_mb_size=10,
        plugins=plugins,
        evaluator=EvaluationPlugin(),
    )


def incremental(plugins, model=None):
    return learning(model or nn.Sequential(nn.Linear(12, 16), nn.ReLU(), IncrementalClassifier(16, 2)), plugins)
