"""Networks, data and old gradients for the tests of LOGD's core."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from avalanche_gradproj.methods.logd_core import LayerwiseGradientDecomposition

FEATURES, CLASSES, KEPT = 12, 4, 6


class Attentive(nn.Module):
    """Packed attention between two linear layers, with an activation in place after the first."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, CLASSES, bias=False)

    def forward(self, x):
        x = F.relu(self.first(x.view(-1, 4, 3)), inplace=True)
        return self.last(self.attention(x, x, x)[0].mean(1))


class Repeated(nn.Module):
    """One layer used twice."""

    def __init__(self):
        super().__init__()
        self.step = nn.Linear(FEATURES, FEATURES)
        self.out = nn.Linear(FEATURES, CLASSES)

    def forward(self, x):
        return self.out(torch.tanh(self.step(torch.tanh(self.step(x)))))


def convolutional(norm=False):
    layers = [nn.Conv2d(2, 4, 2, padding=1, groups=2), nn.BatchNorm2d(4) if norm else nn.Identity()]
    layers += [nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 4 * 3, CLASSES)]
    return nn.Sequential(nn.Unflatten(1, (2, 3, 2)), *layers)


MODELS = {
    "mlp": lambda: nn.Sequential(nn.Linear(FEATURES, 7), nn.ReLU(), nn.Linear(7, CLASSES, bias=False)),
    "convolution": convolutional,
    "attention": Attentive,
    "repeated": Repeated,
}


def data(seed, size=20):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, FEATURES, generator=generator), torch.randint(CLASSES, (size,), generator=generator)


def learned(model, experiences=3, **kwargs):
    """LOGD with the memory of some experiences, and training of the next one begun."""
    settings = {"patterns_per_exp": KEPT, "criterion": F.cross_entropy, **kwargs}
    logd = LayerwiseGradientDecomposition(**settings)
    for seed in range(experiences):
        x, y = data(seed)
        chosen = logd.draw(len(x))
        logd.consolidate(model, [(x[chosen], y[chosen])])
    logd.start(model)
    return logd


def fresh(name, dtype=torch.float64):
    torch.manual_seed(0)
    model = MODELS[name]() if name in MODELS else convolutional(norm=True)
    return model.to(dtype)


def reference(logd, model, criterion=F.cross_entropy):
    """Gradients of the old experiences, one backward pass each: parameter name -> [K, *shape]."""
    rows = []
    for k in range(len(logd.memory)):
        x, y, _ = logd.memory[k]
        one = copy.deepcopy(model)
        one.zero_grad()
        criterion(one(x), y).backward()
        rows.append({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in one.named_parameters()})
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
