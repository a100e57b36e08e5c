"""A network with BatchNorms, its data and a plain loop for the tests of XK-FAC."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

CLASSES, N = 3, 24


def network():
    return nn.Sequential(
        nn.Linear(4, 6),
        nn.BatchNorm1d(6),
        nn.Tanh(),
        nn.Linear(6, 5, bias=False),
        nn.BatchNorm1d(5),
        nn.Tanh(),
        nn.Linear(5, CLASSES),
    )


def data(seed=0, n=N):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=generator) * 1.5 + 0.7, torch.randint(CLASSES, (n,), generator=generator)


def batches(seed=0, size=8):
    x, y = data(seed)
    return list(zip(x.split(size), y.split(size), strict=True))


def train(xkfac, model, seed, *, steps=4, lr=0.05, optimizer=None, learn=True):
    """One experience in a plain loop; returns the objectives of its steps."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=lr, momentum=0.5)
    objectives = []
    model.train()
    with xkfac.experience(model, optimizer, samples=N, batches=batches(seed)):
        for x, y in batches(seed) * steps:
            optimizer.zero_grad()
            objective = xkfac.objective(F.cross_entropy(model(x), y))
            objective.backward()
            optimizer.step()
            objectives.append(objective.item())
    if learn:
        xkfac.consolidate(model, batches(seed))
    return objectives
