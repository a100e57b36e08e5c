"""Projected steps against references that project densely in float64, and changes of somebody else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from avalanche_gradproj.methods.gpm import GradientProjectionMemory
from avalanche_gradproj.methods.optimizers import gradient_suffices


@pytest.mark.parametrize("route", ["auto", "dense", "factored", "complement", "inputs"])
def test_sgd_follows_the_dense_reference(route):
    """With SGD and momentum the weights are those of projecting every gradient with a dense float64 matrix."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 40), nn.ReLU(inplace=True), nn.Linear(40, 5, bias=False)).double()
    gpm = GradientProjectionMemory(0.9, 0.0, 30, route=route)
    gpm.consolidate(model, [torch.randn(30, 3, dtype=torch.float64) @ torch.randn(3, 9, dtype=torch.float64)])
    x, y = torch.randn(24, 9, dtype=torch.float64), torch.randint(5, (24,))

    twin = copy.deepcopy(model)
    first, second = (
        torch.eye(d, dtype=torch.float64) - m @ m.T for d, (m,) in zip((10, 40), gpm.bases.values(), strict=True)
    )
    velocity = [torch.zeros(40, 10, dtype=torch.float64), torch.zeros(5, 40, dtype=torch.float64)]
    for _ in range(20):
        twin.zero_grad()
        nn.functional.cross_entropy(twin(x), y).backward()
        gradients = [
            torch.cat([twin[0].weight.grad, twin[0].bias.grad[:, None]], 1) @ first,
            twin[2].weight.grad @ second,
        ]
        velocity = [0.9 * v + g for v, g in zip(velocity, gradients, strict=True)]
        with torch.no_grad():
            twin[0].weight -= 0.1 * velocity[0][:, :9]
            twin[0].bias -= 0.1 * velocity[0][:, 9]
            twin[2].weight -= 0.1 * velocity[1]

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with gpm.experience(model, optimizer):
        for _ in range(20):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            gpm.transform()
            optimizer.step()
            gpm.after_step()
    for name, value in model.state_dict().items():
        assert torch.allclose(value, twin.state_dict()[name], atol=1e-11), name


def test_update_mode_is_the_projected_step_of_adam():
    """W <- W_old + P dW with dW Adam's own step, step by step."""
    torch.manual_seed(0)
    model = nn.Linear(8, 3, bias=False).double()
    twin = copy.deepcopy(model)
    gpm = GradientProjectionMemory(0.9, 0.0, 30)
    gpm.consolidate(model, [torch.randn(30, 2, dtype=torch.float64) @ torch.randn(2, 8, dtype=torch.float64)])
    (basis,) = gpm.bases[""]
    x, y = torch.randn(10, 8, dtype=torch.float64), torch.randint(3, (10,))
    optimizer, other = torch.optim.Adam(model.parameters(), lr=0.05), torch.optim.Adam(twin.parameters(), lr=0.05)
    with gpm.experience(model, optimizer):
        for _ in range(15):
            for net, opt in ((model, optimizer), (twin, other)):
                opt.zero_grad()
                nn.functional.cross_entropy(net(x), y).backward()
            gpm.transform()
            optimizer.step()
            gpm.after_step()
            old = twin.weight.detach().clone()
            other.step()
            step = twin.weight.detach() - old
            twin.weight.data = old + step - step @ basis @ basis.T
    assert torch.allclose(model.weight, twin.weight, atol=1e-12)


def test_when_the_gradient_is_enough():
    weights = [nn.Parameter(torch.ones(2))]

    class Own(torch.optim.SGD):
        pass

    assert gradient_suffices(torch.optim.SGD(weights, lr=1, momentum=0.9, nesterov=True))
    assert not gradient_suffices(torch.optim.SGD(weights, lr=1, weight_decay=1e-5))
    assert not gradient_suffices(Own(weights, lr=1))
    assert not gradient_suffices(torch.optim.Adam(weights))
    assert not gradient_suffices(None)


def test_a_penalty_of_somebody_else_is_projected_too():
    """An L2 term reaches the weight beside the layer's forward: the fast route must notice and repair it."""
    torch.manual_seed(0)
    model = nn.Linear(64, 64).double()
    gpm = GradientProjectionMemory(0.7, 0.0, 30, route="inputs")
    gpm.consolidate(model, [torch.randn(30, 64, dtype=torch.float64)])
    (basis,) = gpm.bases[""]
    x = torch.randn(4, 64, dtype=torch.float64)
    with gpm.experience(model, torch.optim.SGD(model.parameters(), lr=0.1)):
        for penalty in (0.0, 1.0, 0.0):
            model.zero_grad()
            (model(x).square().sum() + penalty * (model.weight**3).sum()).backward()
            gpm.transform()
            found = torch.cat([model.weight.grad, model.bias.grad[:, None]], 1)
            model.zero_grad()
            y = nn.functional.linear(x, model.weight, model.bias)
            (y.square().sum() + penalty * (model.weight**3).sum()).backward()
            whole = torch.cat([model.weight.grad, model.bias.grad[:, None]], 1)
            assert torch.allclose(found, whole - whole @ basis @ basis.T, atol=1e-10)


@pytest.mark.parametrize("route", ["dense", "inputs"])
def test_removed_share(route):
    """Share of the squared gradient norm removed, against finished gradients projected by hand."""
    torch.manual_seed(0)
    model = nn.Linear(20, 16).double()
    gpm = GradientProjectionMemory(0.6, 0.0, 30, route=route)
    gpm.monitor = True
    gpm.consolidate(model, [torch.randn(30, 20, dtype=torch.float64)])
    (basis,) = gpm.bases[""]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    removed = whole = 0.0
    with gpm.experience(model, optimizer):
        for seed in range(5):
            x = torch.randn(7, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            model(x).pow(2).sum().backward()
            gpm.transform()
            y = nn.functional.linear(x, model.weight, model.bias)
            gradient = 2 * y.T.detach() @ torch.cat([x, torch.ones(7, 1)], 1)
            removed += float((gradient @ basis @ basis.T).square().sum())
            whole += float(gradient.square().sum())
    assert gpm.removed_share[""] == pytest.approx(removed / whole, rel=1e-9)


def test_changes_after_the_method_are_announced_and_taken_back():
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    gpm = GradientProjectionMemory(0.9, 0.0, 30)
    gpm.consolidate(model, [torch.randn(30, 2) @ torch.randn(2, 6)])
    start = model.weight.detach().clone()
    (basis,) = gpm.bases[""]
    with (
        pytest.warns(UserWarning, match="taken back at its end"),
        gpm.experience(model, torch.optim.SGD(model.parameters(), lr=0.1)),
    ):
        model.weight.data += 1.0
    change = torch.cat([model.weight - start, torch.zeros(3, 1)], 1).detach()
    assert (change @ basis).norm() < 0.5 * change.norm()
