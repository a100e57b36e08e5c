"""A network with BatchNorms and ReLUs, its data and a short plain loop for the tests of XK-FAC where things change."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

CLASSES, N = 3, 24


def network(width=6):
    return nn.Sequential(
        nn.Linear(4, width),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, 5),
        nn.BatchNorm1d(5),
        nn.ReLU(),
        nn.Linear(5, CLASSES),
    )


def batches(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(N, 4, generator=generator) + 0.5, torch.randint(CLASSES, (N,), generator=generator)
    return list(zip(x.split(8), y.split(8), strict=True))


def train(xkfac, model, seed, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05)
    model.train()
    with xkfac.experience(model, optimizer, samples=N, batches=batches(seed)):
        for x, y in batches(seed) * 2:
            optimizer.zero_grad()
            xkfac.objective(F.cross_entropy(model(x), y)).backward()
            optimizer.step()
    xkfac.consolidate(model, batches(seed))
