"""Steps stay in the allowed subspace, for every optimizer, and what is not covered stays or is free."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from avalanche_gradproj.methods.gpm import GradientProjectionMemory
from tests.methods.optimizers import OPTIMIZERS


class Network(nn.Module):
    """Grouped convolution, attention, norms, linear layers with and without bias."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.hidden = nn.Linear(6, 20, bias=False)
        self.last = nn.Linear(20, 4)

    def forward(self, x):
        y = torch.relu_(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        y = y + self.attention(y, y, y)[0]
        return self.last(torch.tanh(self.hidden(y.mean(1))))


def data(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64) @ torch.randn(
        3, 2 * 4 * 4, generator=generator, dtype=torch.float64
    )
    return x.view(40, 2, 4, 4).to(dtype), torch.randint(4, (40,), generator=generator)


def train(model, optimizer, x, y, gpm=None, epochs=3):
    for _ in range(epochs):
        for i in range(0, len(x), 8):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[i : i + 8]), y[i : i + 8]).backward()
            if gpm is not None:
                gpm.transform()
            optimizer.step()
            if gpm is not None:
                gpm.after_step()


def layer_matrices(model):
    """Every layer's weights as the papers write them, bias last, by hand."""

    def joined(weight, bias):
        return weight if bias is None else torch.cat([weight, bias[:, None]], 1)

    conv = joined(model.conv.weight.flatten(1), model.conv.bias)
    packed = joined(model.attention.in_proj_weight, model.attention.in_proj_bias)
    matrices = {("conv", 0): conv[:3], ("conv", 1): conv[3:]}
    matrices |= {(f"attention.{letter}_proj", 0): packed[6 * i : 6 * i + 6] for i, letter in enumerate("qkv")}
    out = model.attention.out_proj
    matrices[("attention.out_proj", 0)] = joined(out.weight, out.bias)
    matrices[("hidden", 0)] = model.hidden.weight
    matrices[("last", 0)] = joined(model.last.weight, model.last.bias)
    return {key: value.detach().double().clone() for key, value in matrices.items()}


def leaks(start, end, bases):
    found = {}
    for (name, block), before in start.items():
        basis, change = bases[name][block].double(), end[name, block] - before
        found[name, block] = float((change @ basis).norm() / max(change.norm(), 1e-3 * before.norm()))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_leak_after_three_experiences(name, dtype):
    """The promise of the package, measured from outside: leak <= 1e-4 (float32), 1e-10 (float64)."""
    torch.manual_seed(0)
    model = Network().to(dtype)
    free = copy.deepcopy(model)
    optimizer, free_optimizer = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](free.parameters())
    gpm = GradientProjectionMemory(0.8, 0.02, 40)
    for t in range(3):
        x, y = data(t, dtype)
        start, bases, free_start = layer_matrices(model), gpm.bases, layer_matrices(free)
        with gpm.experience(model, optimizer):
            train(model, optimizer, x, y, gpm)
        train(free, free_optimizer, x, y)
        gpm.consolidate(model, [x])
        if t > 0:
            protected = leaks(start, layer_matrices(model), bases)
            unprotected = leaks(free_start, layer_matrices(free), bases)
            print(
                f"{name} {dtype} t={t}: worst leak {max(protected.values()):.1e}, "
                f"unprotected {max(unprotected.values()):.2f}"
            )
            assert max(protected.values()) <= (1e-4 if dtype == torch.float32 else 1e-10)
            assert max(unprotected.values()) > 0.5
            assert max(gpm.leak.values()) <= (1e-4 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_step_stays_inside_before_the_final_correction(name):
    """What `finish` corrects is rounding alone: the steps themselves are projected."""
    torch.manual_seed(0)
    model = Network().double()
    optimizer = OPTIMIZERS[name](model.parameters())
    gpm = GradientProjectionMemory(0.8, 0.02, 40)
    for t in range(3):
        x, y = data(t, torch.float64)
        start, bases = layer_matrices(model), gpm.bases
        gpm.start(model, optimizer)
        with gpm.active():
            train(model, optimizer, x, y, gpm)
        if t > 0:
            assert max(leaks(start, layer_matrices(model), bases).values()) < 1e-12
        gpm.finish()
        gpm.consolidate(model, [x])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_uncovered_parameters_and_statistics_stay(name):
    torch.manual_seed(0)
    model = Network()
    optimizer = OPTIMIZERS[name](model.parameters())
    gpm = GradientProjectionMemory(0.8, 0.0, 40)
    held = None
    for t in range(3):
        x, y = data(t, torch.float32)
        with gpm.experience(model, optimizer):
            train(model, optimizer, x, y, gpm)
            assert model.norm.training == (t == 0)
        assert model.norm.training
        gpm.consolidate(model, [x])
        now = {k: v.clone() for k, v in model.norm.state_dict().items()}
        if held is not None:
            assert all(torch.equal(now[k], held[k]) for k in held)
        else:
            assert not torch.equal(now["weight"], torch.ones(6))
        held = now


def test_train_and_track_leave_them_free():
    torch.manual_seed(0)
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gpm = GradientProjectionMemory(0.8, 0.0, 40, uncovered="train", batchnorm="track")
    for t in range(2):
        before = {k: v.clone() for k, v in model.norm.state_dict().items()}
        x, y = data(t, torch.float32)
        with gpm.experience(model, optimizer):
            train(model, optimizer, x, y, gpm)
        gpm.consolidate(model, [x])
        assert not torch.equal(before["weight"], model.norm.weight)
        assert not torch.equal(before["running_mean"], model.norm.running_mean)
