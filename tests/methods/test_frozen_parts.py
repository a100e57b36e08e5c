"""Parameters that cannot move, or move by rules of their own: frozen, outside the optimizer, in other groups."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from avalanche_gradproj.methods.gpm import GradientProjectionMemory
from avalanche_gradproj.methods.optimizers import gradient_suffices


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))


def inputs(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(40, 3, generator=generator) @ torch.randn(3, 8, generator=generator)


def train(model, optimizer, gpm, x, steps=30):
    y = torch.arange(40) % 4
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        gpm.transform()
        optimizer.step()
        gpm.after_step()


def groups(model, **of_biases):
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    weights = [p for n, p in model.named_parameters() if n.endswith("weight")]
    return [{"params": weights}, {"params": biases, **of_biases}]


CASES = {
    "biases learn faster": lambda m: torch.optim.SGD(groups(m, lr=0.5), lr=0.1),
    "biases have momentum": lambda m: torch.optim.SGD(groups(m, momentum=0.9), lr=0.1),
    "biases not in the optimizer": lambda m: torch.optim.SGD(groups(m)[0]["params"], lr=0.1),
    "biases not in Adam": lambda m: torch.optim.Adam(groups(m)[0]["params"], lr=0.01),
    "biases frozen": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "weights not in the optimizer": lambda m: torch.optim.SGD(groups(m)[1]["params"], lr=0.1),
}


@pytest.mark.parametrize("route", ["auto", "dense", "inputs"])
@pytest.mark.parametrize("case", CASES)
def test_old_outputs_stay_and_nothing_foreign_moves(case, route):
    """With all energy held, the first layer's outputs for old inputs stay, whatever can and cannot move."""
    model = network()
    if case == "biases frozen":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.endswith("bias"))
    optimizer = CASES[case](model)
    gpm = GradientProjectionMemory(1.0, 0.0, 40, route=route)
    x = inputs(0)
    gpm.consolidate(model, [x])
    old, weights, start = model[0](x).detach(), copy.deepcopy(model.state_dict()), model[0].weight.detach().clone()
    gpm.start(model, optimizer)
    with gpm.active():
        train(model, optimizer, gpm, inputs(1))
    assert (model[0](x) - old).norm() < 2e-5 * old.norm()  # before anything is corrected at the end
    gpm.finish()
    assert (model[0](x) - old).norm() < 2e-5 * old.norm()
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if id(parameter) not in owned or not parameter.requires_grad:
            assert torch.equal(parameter, weights[name]), name
    assert torch.equal(start, model[0].weight) == ("weights not" in case)


def test_groups_decide_what_is_projected():
    model = network()
    matrices = [[model[0].weight, model[0].bias], [model[2].weight, model[2].bias]]
    assert gradient_suffices(torch.optim.SGD(groups(model), lr=0.1), matrices)
    assert not gradient_suffices(torch.optim.SGD(groups(model, lr=0.2), lr=0.1), matrices)
    assert not gradient_suffices(torch.optim.SGD(groups(model, momentum=0.2), lr=0.1), matrices)
    layers = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.2}]
    assert gradient_suffices(torch.optim.SGD(layers, lr=0.1), matrices)


def test_freezing_and_thawing_between_experiences():
    """A layer frozen for a while is still remembered, and protected when it learns again."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gpm = GradientProjectionMemory(1.0, 0.0, 40)
    for t in range(3):
        model[0].requires_grad_(t != 1)
        with gpm.experience(model, optimizer):
            train(model, optimizer, gpm, inputs(t))
        if t == 1:
            assert gpm.report()["0.weight"].reason == "takes no gradient"
            old = model[0](inputs(1)).detach()
        gpm.consolidate(model, [inputs(t)])
    assert (model[0](inputs(1)) - old).norm() < 2e-5 * old.norm()


def test_a_new_norm_trains_in_its_first_experience():
    """Only what an earlier experience has used is frozen."""
    model = nn.ModuleDict({"body": nn.Linear(8, 12), "norm0": nn.LayerNorm(12), "out": nn.Linear(12, 4)})
    gpm = GradientProjectionMemory(0.9, 0.0, 40)
    for t in range(2):
        if t == 1:
            model["norm1"] = nn.LayerNorm(12)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with gpm.experience(model, optimizer):
            optimizer.zero_grad()
            y = model["body"](inputs(t))
            for i in range(t + 1):
                y = model[f"norm{i}"](y)
            nn.functional.cross_entropy(model["out"](y), torch.arange(40) % 4).backward()
            gpm.transform()
            optimizer.step()
            gpm.after_step()
        gpm.consolidate(model, [inputs(t)], forward=lambda m, x: m["out"](m["body"](x)))
    assert torch.equal(before["norm0.weight"], model["norm0"].weight)
    assert not torch.equal(before["norm1.weight"], model["norm1"].weight)


def test_functional_calls_get_their_own_gradients():
    """Inside training, a pass with other weights (meta-learning) is nobody's business."""
    model = network()
    gpm = GradientProjectionMemory(0.9, 0.0, 40, route="inputs")
    gpm.consolidate(model, [inputs(0)])
    fast = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    with gpm.experience(model, torch.optim.SGD(model.parameters(), lr=0.1)):
        loss = torch.func.functional_call(model, fast, inputs(1)).square().sum()
    found = torch.autograd.grad(loss, list(fast.values()))
    loss = torch.func.functional_call(copy.deepcopy(model), fast, inputs(1)).square().sum()
    for one, other in zip(found, torch.autograd.grad(loss, list(fast.values())), strict=True):
        assert torch.allclose(one, other)


def test_passes_that_are_not_listened_to_get_whole_gradients():
    model = network()
    gpm = GradientProjectionMemory(0.9, 0.0, 40, route="inputs")
    gpm.consolidate(model, [inputs(0)])
    with gpm.experience(model, torch.optim.SGD(model.parameters(), lr=0.1)):
        gpm.listen(False)
        (found,) = torch.autograd.grad(model(inputs(1)).square().sum(), model[0].weight)
        gpm.listen(True)
        (projected,) = torch.autograd.grad(model(inputs(1)).square().sum(), model[0].weight)
    (expected,) = torch.autograd.grad(model(inputs(1)).square().sum(), model[0].weight)
    assert torch.allclose(found, expected)
    assert not torch.allclose(projected, expected)
