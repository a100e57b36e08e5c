"""Networks, optimizers and a plain loop for the tests of OGD whose projection runs through outer products."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from avalanche_gradproj.methods.ogd import OrthogonalGradientDescent
from tests.methods.ogd_setup import data


def perceptron():
    return nn.Sequential(nn.Flatten(), nn.Linear(32, 12), nn.Tanh(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 4))


class Mixed(nn.Module):
    """A convolution, a norm layer, a plain parameter, linear layers with and without biases."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.ones(1))
        self.hidden, self.last = nn.Linear(64, 12, bias=False), nn.Linear(12, 4)

    def forward(self, x):
        y = torch.tanh(self.norm(self.conv(x))) * self.scale
        return self.last(torch.tanh(self.hidden(y.flatten(1))))


class Heads(nn.Module):
    """A body and a last layer for each task; other tasks' heads get no gradient."""

    def __init__(self):
        super().__init__()
        self.body, self.task = nn.Linear(32, 12), 0
        self.heads = nn.ModuleList([nn.Linear(12, 4) for _ in range(3)])

    def forward(self, x):
        return self.heads[self.task](torch.tanh(self.body(x.flatten(1))))


OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=5e-3),
}

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def ogd_with(projection, count=20, **arguments):
    ogd = OrthogonalGradientDescent(count, **arguments)
    ogd._memory.projection = projection
    return ogd


def train(ogd, model, optimizer, x, y, epochs=3):
    for _ in range(epochs):
        for i in range(0, len(x), 8):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[i : i + 8]), y[i : i + 8]).backward()
            ogd.transform()
            optimizer.step()
            ogd.after_step()


def learn(ogd, model, optimizer, t, dtype=torch.float64):
    if isinstance(model, Heads):
        model.task = t
    x, y = data(t, dtype)
    with ogd.experience(model, optimizer):
        train(ogd, model, optimizer, x, y)
    ogd.consolidate(model, [(x, y)])


def flat(model, names=None):
    parameters = dict(model.named_parameters())
    return np.concatenate([parameters[name].detach().double().numpy().ravel() for name in names or parameters])


def projected(ogd):
    return next(note for note in ogd.report().notes if note.startswith("projection: "))
