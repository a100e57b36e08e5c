"""A penalty of which a part is kept for several steps: when it is formed anew, and what that does to training."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from avalanche_gradproj.linalg import kept
from avalanche_gradproj.methods.kfac import KroneckerLaplace
from avalanche_gradproj.methods.xkfac import ExtendedKroneckerLaplace

pytestmark = pytest.mark.usefixtures("double")


@pytest.fixture(autouse=True)
def _small_is_cheap(monkeypatch):
    """Split the products of small networks too."""
    monkeypatch.setattr(kept, "OPERATION_COST", 0)
    monkeypatch.setattr(kept, "_COLUMNS", 1)
    monkeypatch.setattr(kept, "_WORTH", 10.0)


def samples(n=60, shift=0.0):
    """Inputs of a steep spectrum: few directions lead."""
    return torch.randn(n, 30) * torch.exp(-0.25 * torch.arange(30)) + shift


def network():
    """Matrices, and a norm layer whose scale and shift have a diagonal."""
    return nn.Sequential(nn.Linear(30, 25), nn.LayerNorm(25), nn.Tanh(), nn.Linear(25, 3))


def learned(model, x, **options):
    laplace = KroneckerLaplace(mode="online", **options)
    laplace.consolidate(model, [x])
    return laplace


def walk(model, laplace, steps, *, seed=1):
    """Move the weights before each call but the first; return the penalty's value and gradients at each place."""
    generator = torch.Generator().manual_seed(seed)
    values, found = [], []
    for step in range(steps):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator) * (step > 0))
        model.zero_grad()
        value = laplace.penalty()
        value.backward()
        values.append(value.item())
        found.append([p.grad.clone() for p in model.parameters()])
    return values, found


def compared(every, steps, *, seed=1, model=None, x=None):
    """Which calls give the exact gradient of the first layer, and whether the others come near it."""
    model, x = model or network(), samples() if x is None else x
    exact, held = learned(model, x), learned(model, x, refresh_every=every)
    start = copy.deepcopy(model.state_dict())
    with exact.experience(model, samples=30):
        values, expected = walk(model, exact, steps, seed=seed)
    model.load_state_dict(start)
    with held.experience(model, samples=30):
        kept_values, found = walk(model, held, steps, seed=seed)
    fresh = [torch.allclose(a[0], b[0], rtol=1e-9, atol=1e-14) for a, b in zip(found, expected, strict=True)]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a[2], b[2])  # the diagonal is never kept
        assert (a[0] - b[0]).norm() <= b[0].norm()  # a sample, whose mean tests of `kept` look at
    for call, (a, b) in enumerate(zip(kept_values, values, strict=True)):
        assert a == pytest.approx(b, rel=1e-9 if fresh[call] else 0.5)
    return [call for call, same in enumerate(fresh) if same]


@pytest.mark.parametrize(
    ("every", "fresh"),
    [(1, list(range(12))), (2, [0, 1, 2, 4, 6, 8, 10]), (5, [0, 1, 2, 4, 5, 10]), (8, [0, 1, 2, 4, 8])],
)
def test_calls_in_which_all_products_are_formed(every, fresh):
    """Early ones among them: in the first one the weights are at the centre, and there is nothing to keep."""
    assert compared(every, 12) == fresh


def test_every_experience_counts_anew():
    model, x = network(), samples()
    assert compared(4, 6, model=model, x=x) == [0, 1, 2, 4]
    assert compared(4, 6, model=model, x=x, seed=2) == [0, 1, 2, 4]


def trained(start, steps, lr=0.02, **options):
    """Weights after some steps on other data, under the penalty of the first."""
    torch.manual_seed(3)
    model, x, later, y = copy.deepcopy(start), samples(), samples(shift=0.3), torch.randint(3, (60,))
    laplace = learned(model, x, **{"strength": 20.0, **options})
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with laplace.experience(model, optimizer, samples=60):
        for _ in range(steps):
            optimizer.zero_grad()
            (F.cross_entropy(model(later), y) + laplace.penalty()).backward()
            optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("steps", [5, 60])
def test_training_comes_near_the_exact_one(steps):
    """Also in an experience of fewer steps than are kept, which would be without a penalty otherwise."""
    start = network()
    exact, without = trained(start, steps), trained(start, steps, strength=0.0)
    assert torch.equal(exact, trained(start, steps, refresh_every=1))
    held = (exact - without).norm()
    for every in (2, 8):
        assert 0 < (trained(start, steps, refresh_every=every) - exact).norm() / held < 0.1


def test_a_pickle_in_training_goes_on_as_the_original():
    model, x = network(), samples()
    laplace = learned(model, x, refresh_every=4)
    with laplace.experience(model, samples=30):
        walk(model, laplace, 3)
        again = pickle.loads(pickle.dumps(laplace))
    with again.experience(model, samples=30), laplace.experience(model, samples=30):
        one, other = again.penalty(), laplace.penalty()
    assert one.item() == other.item() > 0


def dealt(matrix, leading, count, block):
    """The matrix with its leading eigenvalues as they are, and those of one block times the number of blocks."""
    values, vectors = np.linalg.eigh(matrix.numpy())
    values, vectors = values[::-1], vectors[:, ::-1]
    weights = np.zeros(len(values))
    weights[:leading] = 1
    weights[leading + block :: count] = count
    return torch.from_numpy(vectors @ np.diag(weights * values) @ vectors.T)


def test_what_is_kept_for_merged_layers_is_the_gradient_by_the_merged_matrix():
    """The statistics through which it is differentiated are those of each step's own mini-batch."""
    model = nn.Sequential(nn.Linear(30, 25), nn.BatchNorm1d(25), nn.Tanh(), nn.Linear(25, 3))
    old, *rest = (samples(shift=shift) for shift in (0.0, 0.2, 0.4, 0.6, 0.8))  # calls 0, 1 and 2 form all products
    xkfac = ExtendedKroneckerLaplace(1.0, adaptive=False, reparameterise=False, refresh_every=4)
    xkfac.consolidate(model, [old])

    def merged(x):
        """W~ and b~ by hand, from the mini-batch's mean and variance."""
        h = x @ model[0].weight.T + model[0].bias
        scale = model[1].weight / (h.var(0, unbiased=False) + model[1].eps).sqrt()
        return scale[:, None] * model[0].weight, scale * (model[0].bias - h.mean(0)) + model[1].bias

    (layer,) = (form.layers["0"] for form in xkfac._memory.forms)
    (term,) = layer.terms
    left, right = term.left.whole()[0], term.right.whole()[0]

    def moved(x):
        weight, bias = (part.detach() for part in merged(x))
        return torch.cat([weight, bias[:, None]], dim=1) - layer.centre[0]

    with xkfac.experience(model, samples=60, batches=rest[:1]), xkfac.active():
        shifts = []
        for x in rest:
            with torch.no_grad():
                model[0].weight.mul_(1.1)
            model(x)
            shifts.append(moved(x))
            model.zero_grad()
            xkfac.penalty().backward()
        (_, sampled), *none = xkfac._training.penalty._matrices[0]._kept[0]._split
        assert not none
        held = left @ shifts[2] @ right
        held += left @ (shifts[3] - shifts[2]) @ dealt(right, sampled.leading, sampled.count, 2 % sampled.count)
        wanted = torch.autograd.grad(merged(rest[3]), list(model[:2].parameters()), [held[:, :-1], held[:, -1]])
        whole = left @ shifts[3] @ right
        other = torch.autograd.grad(merged(rest[3]), list(model[:2].parameters()), [whole[:, :-1], whole[:, -1]])
    for parameter, expected in zip(model[:2].parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-8, atol=1e-10)
    assert (wanted[0] - other[0]).norm() > 1e-3 * other[0].norm()
