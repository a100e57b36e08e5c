"""A penalty whose products serve for several steps: which weights they are of, and what they are multiplied by."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from avalanche_gradproj.methods.kfac import KroneckerLaplace
from avalanche_gradproj.methods.xkfac import ExtendedKroneckerLaplace

pytestmark = pytest.mark.usefixtures("double")


def network():
    """Matrices, and a norm layer whose scale and shift have a diagonal."""
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))


def learned(model, x, **options):
    laplace = KroneckerLaplace(mode="online", **options)
    laplace.consolidate(model, [x])
    return laplace


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


def walk(model, laplace, steps, *, seed=1):
    """Move the weights `steps` times; return the penalty's value and gradients at each place."""
    generator = torch.Generator().manual_seed(seed)
    values, found = [], []
    for _ in range(steps):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
        model.zero_grad()
        value = laplace.penalty()
        value.backward()
        values.append(value.item())
        found.append(gradients(model))
    return values, found


@pytest.mark.parametrize("every", [2, 3])
def test_each_call_gives_what_the_last_refresh_gave(every):
    model, x = network(), torch.randn(30, 4)
    exact, held = learned(model, x), learned(model, x, refresh_every=every)
    start = copy.deepcopy(model.state_dict())
    with exact.experience(model, samples=30):
        values, expected = walk(model, exact, 7)
    model.load_state_dict(start)
    with held.experience(model, samples=30):
        kept, found = walk(model, held, 7)
    for step in range(7):
        source = step - step % every
        assert kept[step] == values[source]
        assert all(torch.equal(a, b) for a, b in zip(found[step], expected[source], strict=True))
    assert len(set(values)) == 7  # the exact ones differ at every place


def test_every_experience_begins_with_a_refresh():
    model, x = network(), torch.randn(30, 4)
    exact, held = learned(model, x), learned(model, x, refresh_every=5)
    for seed in (1, 2):
        start = copy.deepcopy(model.state_dict())
        with exact.experience(model, samples=30):
            values, _ = walk(model, exact, 2, seed=seed)
        model.load_state_dict(start)
        with held.experience(model, samples=30):
            kept, _ = walk(model, held, 2, seed=seed)
        assert kept == [values[0], values[0]]


def test_training_comes_near_the_exact_one_and_nearer_with_fewer_kept_steps():
    torch.manual_seed(3)
    start, x = network(), torch.randn(40, 4)
    y, later = torch.randint(3, (40,)), torch.randn(40, 4)

    def trained(**options):
        model = copy.deepcopy(start)
        laplace = learned(model, x, strength=5.0, **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        with laplace.experience(model, optimizer, samples=40):
            for _ in range(60):
                optimizer.zero_grad()
                (F.cross_entropy(model(later), y) + laplace.penalty()).backward()
                optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    exact = trained()
    assert torch.equal(exact, trained(refresh_every=1))
    moved = (exact - torch.cat([p.detach().flatten() for p in start.parameters()])).norm()
    near, far = ((trained(refresh_every=every) - exact).norm() / moved for every in (2, 8))
    assert 0 < near < far < 0.1


def test_two_calls_of_one_refresh_have_graphs_of_their_own():
    model, x = network(), torch.randn(30, 4)
    laplace = learned(model, x, refresh_every=4)
    with torch.no_grad():
        model[0].weight.add_(0.3)
    with laplace.experience(model, samples=30):
        one, other = laplace.penalty(), laplace.penalty()
        (2 * one).backward()
        doubled = gradients(model)
        model.zero_grad()
        other.backward()
    assert doubled[0].abs().max() > 0
    assert all(torch.equal(a, 2 * b) for a, b in zip(doubled, gradients(model), strict=True))


def test_what_is_kept_for_merged_layers_is_the_gradient_of_the_merged_matrix():
    """The statistics through which it is differentiated are those of each step's own mini-batch."""
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    old, first, second = (torch.randn(30, 4) + shift for shift in (0.0, 1.0, 2.0))
    xkfac = ExtendedKroneckerLaplace(1.0, adaptive=False, reparameterise=False, refresh_every=2)
    xkfac.consolidate(model, [old])

    def merged(x):
        """W~ and b~ by hand, from the mini-batch's mean and variance."""
        h = x @ model[0].weight.T + model[0].bias
        scale = model[1].weight / (h.var(0, unbiased=False) + model[1].eps).sqrt()
        return scale[:, None] * model[0].weight, scale * (model[0].bias - h.mean(0)) + model[1].bias

    (layer,) = (form.layers["0"] for form in xkfac._memory.forms)
    with xkfac.experience(model, samples=30, batches=[first]), xkfac.active():
        model(first)
        xkfac.penalty()
        weight, bias = (part.detach() for part in merged(first))
        # B (W - W*) A of the first step by dense products, summed over the terms.
        shift = torch.cat([weight, bias[:, None]], dim=1) - layer.centre[0]
        held = sum(t.left.whole()[0] @ shift @ t.right.whole()[0] for t in layer.terms)
        with torch.no_grad():
            model[0].weight.mul_(1.2)
        model(second)
        model.zero_grad()
        xkfac.penalty().backward()
        wanted = torch.autograd.grad(merged(second), list(model[:2].parameters()), [held[:, :-1], held[:, -1]])
    for parameter, expected in zip(model[:2].parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-8, atol=1e-10)
    assert wanted[0].abs().max() > 1e-3
