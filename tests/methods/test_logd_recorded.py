"""The official variant on gradients recorded in training on real images, against the formulas written out densely."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from avalanche_gradproj.methods.logd_core import LayerwiseGradientDecomposition

KEPT, MARGIN, COMPONENTS, TENSORS = 40, 0.5, 3, 5


def experiences(count):
    """Scikit-learn's digits under permutations of their pixels."""
    digits = load_digits()
    x, y = torch.tensor(digits.images.reshape(-1, 64) / 16.0, dtype=torch.float32), torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        chosen, order = torch.randperm(len(x), generator=generator)[:200], torch.randperm(64, generator=generator)
        yield x[chosen][:, order], y[chosen]


def official(g, old):
    """One block of the official code's update, formula by formula, in float64."""
    s = old.sum(0)
    if len(old) == 1:
        return g - min(s @ g / (s @ s), -MARGIN) * s
    centred = old - old.mean(0)
    values, vectors = np.linalg.svd(centred, full_matrices=False)[1:]
    v = vectors[:COMPONENTS][values[:COMPONENTS] > 1e-6 * np.linalg.norm(old, axis=1).max()]
    p_g, p_s = g - v.T @ (v @ g), s - v.T @ (v @ s)
    if s @ p_g > 0:
        return p_g
    ratio = (s @ p_g) / (s @ p_s)
    return p_g - min(ratio, -MARGIN) * s + ratio * v.T @ (v @ s)


def flat(gradients):
    return [np.concatenate([g.double().numpy().ravel() for g in part]) for part in (gradients[:TENSORS], gradients[5:])]


@pytest.mark.parametrize("count", [2, 7])
def test_every_step_of_training_is_the_official_update(count):
    """To 1e-5 of the update's length, at every step and in both blocks, with 1 to 6 old experiences."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    logd = LayerwiseGradientDecomposition(
        KEPT,
        COMPONENTS,
        variant="official",
        margin=MARGIN,
        blocks=TENSORS,
        selection="last",
        criterion=F.cross_entropy,
    )
    memory, worst, conflicts = [], 0.0, 0
    for x, y in experiences(count):
        with logd.experience(model, optimizer):
            for begin in range(0, len(x), 10):
                batch = x[begin : begin + 10], y[begin : begin + 10]
                old = [flat(torch.autograd.grad(F.cross_entropy(model(a), b), parameters)) for a, b in memory]
                optimizer.zero_grad()
                F.cross_entropy(model(batch[0]), batch[1]).backward()
                before = flat([p.grad.clone() for p in parameters])
                logd.observe(batch)
                logd.transform()
                after = flat([p.grad for p in parameters])
                for block in range(2 if old else 0):
                    rows = np.stack([own[block] for own in old])
                    expected = official(before[block], rows)
                    worst = max(worst, np.linalg.norm(after[block] - expected) / np.linalg.norm(expected))
                    conflicts += bool(rows.sum(0) @ before[block] < 0)
                optimizer.step()
        logd.consolidate(model, [])
        memory.append((x[-KEPT:], y[-KEPT:]))
    print(f"{count} experiences: worst relative difference {worst:.1e}, {conflicts} conflicts")
    assert conflicts > 5
    assert worst < 1e-5
