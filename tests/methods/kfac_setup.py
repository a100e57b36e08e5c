"""Small networks, data and a plain loop for the tests of the Laplace penalty."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

CLASSES = 3


def network():
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, CLASSES))


def wide():
    """Factors of few large eigenvalues."""
    return nn.Sequential(nn.Linear(4, 24), nn.LayerNorm(24), nn.Tanh(), nn.Linear(24, CLASSES))


def thin(laplace):
    """How many factors are truncated."""
    terms = [term for form in laplace._memory.forms for layer in form.layers.values() for term in layer.terms]
    return sum(factor.rest is not None for term in terms for factor in (term.left, term.right))


def data(n=12, features=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, features, generator=generator), torch.randint(CLASSES, (n,), generator=generator)


def learn(laplace, model, batch, *, steps=3, samples=None, lr=0.1):
    """One experience of a plain loop; returns the penalties that were met."""
    optimizer, met = torch.optim.SGD(model.parameters(), lr=lr), []
    with laplace.experience(model, optimizer, samples=samples):
        for _ in range(steps):
            optimizer.zero_grad()
            penalty = laplace.penalty()
            met.append(penalty.item())
            (F.cross_entropy(model(batch[0]), batch[1]) + penalty).backward()
            optimizer.step()
    laplace.consolidate(model, [batch])
    model.zero_grad()
    return met


def move(model, seed=1):
    """Move every parameter somewhere else."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
