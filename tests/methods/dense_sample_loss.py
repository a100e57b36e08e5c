"""A small network, and the curvature of each sample's cross-entropy by brute force: one logit at a time, in float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

CLASSES = 3


def softmax(z):
    p = np.exp(z - z.max())
    return p / p.sum()


def jacobian(model, x, parameters):
    """d logits / d parameters of one sample: [classes, numbers], parameters one after the other."""
    model.eval()
    logits = model(x[None])[0]
    rows = []
    for logit in logits:
        found = torch.autograd.grad(logit, parameters, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    torch.zeros_like(p).flatten() if g is None else g.flatten()
                    for g, p in zip(found, parameters, strict=True)
                ]
            )
        )
    return torch.stack(rows).numpy(), softmax(logits.detach().numpy())


def gauss_newton(model, inputs, parameters):
    """Mean over samples of J^T (diag p - p p^T) J."""
    total = 0
    for x in inputs:
        j, p = jacobian(model, x, parameters)
        total = total + j.T @ (np.diag(p) - np.outer(p, p)) @ j
    return total / len(inputs)


def as_matrix_first(block, out, d):
    """Reorder (weight [out, d - 1], bias [out]) into the rows of [weight, bias] [out, d]."""
    order = [
        row * (d - 1) + column if column < d - 1 else out * (d - 1) + row for row in range(out) for column in range(d)
    ]
    return block[np.ix_(order, order)]


def linear(**kwargs):
    return nn.Sequential(nn.Linear(4, 5, **kwargs), nn.Tanh(), nn.Linear(5, CLASSES, **kwargs))
