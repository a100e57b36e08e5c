"""What every check needs: training with fixed seeds, comparing models."""

from __future__ import annotations

from typing import Any

import torch
from avalanche.training.supervised import Naive
from torch import nn


def train(learner: Naive, benchmark: Any, experiences: range) -> None:
    """Train on some experiences, each from a seed of its own."""
    for index in experiences:
        torch.manual_seed(100 + index)
        learner.train(benchmark.train_stream[index])


def require(condition: bool, message: str) -> None:
    """Raise `AssertionError`, also where Python leaves out `assert`."""
    if not condition:
        raise AssertionError(message)


def difference(one: nn.Module, other: nn.Module) -> str:
    """Return the name of the first tensor in which two models differ, or an empty string."""
    ours, theirs = one.state_dict(), other.state_dict()
    if ours.keys() != theirs.keys():
        return min(ours.keys() ^ theirs.keys())
    for name, value in ours.items():
        if not torch.equal(value, theirs[name]):
            return name
    return ""
