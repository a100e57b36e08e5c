"""Networks, and a plain loop, for the tests of steps in the eigenbasis of Kronecker factors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from avalanche_gradproj.methods.kfac import KroneckerLaplace
from tests.methods.kfac_setup import CLASSES


class Attentive(nn.Module):
    """Packed attention over 3 tokens, then logits of the mean token, bent: no factor has several eigenvalues of 0."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.last = nn.Linear(4, CLASSES)
        nn.init.normal_(self.attention.in_proj_bias, std=0.1)

    def forward(self, x):
        tokens = x.view(-1, 3, 4)
        return self.last(torch.tanh(2 * self.attention(tokens, tokens, tokens)[0].mean(1)))


def linear():
    return nn.Sequential(nn.Linear(12, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, CLASSES))


def grouped():
    body = nn.Sequential(nn.Unflatten(1, (2, 2, 3)), nn.Conv2d(2, 4, 2, groups=2), nn.Tanh(), nn.Flatten())
    return nn.Sequential(*body, nn.Linear(8, CLASSES, bias=False))


MODELS = {"linear": linear, "grouped": grouped, "attention": Attentive}


def data(seed, n=60):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(12, 12, generator=generator)
    return torch.randn(n, 12, generator=generator) @ mix / 3, torch.randint(CLASSES, (n,), generator=generator)


def steps(laplace, model, optimizer, batch, count):
    """Training steps of a plain loop."""
    for _ in range(count):
        optimizer.zero_grad()
        (F.cross_entropy(model(batch[0]), batch[1]) + laplace.penalty()).backward()
        optimizer.step()


def learned(make=linear, *, seed=0, experiences=2, eigenbasis=True, strength=5.0, **kwargs):
    """A model and a penalty after some experiences, all alike whether steps are to be turned or not."""
    torch.manual_seed(seed)
    model = make()
    laplace = KroneckerLaplace(strength, mode="online", eigenbasis=eigenbasis, **kwargs)
    for t in range(experiences):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with laplace.experience(model, optimizer, samples=60):
            # What is turned here differs by rounding: so that factors are bit for bit the same, only the first trains.
            steps(laplace, model, optimizer, data(t), 0 if t else 20)
        laplace.consolidate(model, [data(t)[0]])
    model.zero_grad()
    return model, laplace


def trained(make_optimizer, count=12, make=linear, **kwargs):
    """The parameters by name after an experience under penalty."""
    model, laplace = learned(make, **kwargs)
    optimizer = make_optimizer(model)
    with laplace.experience(model, optimizer, samples=60):
        steps(laplace, model, optimizer, data(9), count)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=0.02)


def distance(one, other):
    return max((one[name] - other[name]).abs().max().item() for name in one)


def hooks_of(optimizer):
    return [*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}
