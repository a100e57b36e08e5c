"""A network, optimizers and a plain loop for the tests of OGD, and the leak measured from outside."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from tests.methods import optimizers as shared

OPTIMIZERS = shared.OPTIMIZERS | {
    "two rates": lambda p: torch.optim.SGD([{"params": q, "lr": 0.01 * (i + 1)} for i, q in enumerate(p)], lr=0.1),
}


class Network(nn.Module):
    """Convolution, norm, linear layers, a plain parameter, one that never gets a gradient."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.ones(1))
        self.hidden = nn.Linear(4 * 4, 12, bias=False)
        self.last = nn.Linear(12, 4)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        y = torch.nn.functional.avg_pool2d(torch.tanh(self.norm(self.conv(x))) * self.scale, 2)
        return self.last(torch.tanh(self.hidden(y.flatten(1))))


def data(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 2, 4, 4, generator=generator, dtype=torch.float64) + seed
    return x.to(dtype), torch.randint(4, (40,), generator=generator)


def train(model, optimizer, x, y, ogd=None, epochs=4):
    for _ in range(epochs):
        for i in range(0, len(x), 8):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[i : i + 8]), y[i : i + 8]).backward()
            if ogd is not None:
                ogd.transform()
            optimizer.step()
            if ogd is not None:
                ogd.after_step()


def vector(model, names):
    parameters = dict(model.named_parameters())
    return np.concatenate([parameters[name].detach().double().numpy().ravel() for name in names])


def leak(start, end, basis):
    return np.linalg.norm(basis @ (end - start)) / max(np.linalg.norm(end - start), 1e-3 * np.linalg.norm(start))


def two_experiences(ogd, model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for t in range(2):
        x, y = data(t, torch.float32)
        with ogd.experience(model, optimizer):
            train(model, optimizer, x, y, ogd, epochs=1)
        ogd.consolidate(model, [(x, y)])
    return optimizer
