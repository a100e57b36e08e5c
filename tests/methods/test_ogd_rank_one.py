"""OGD whose projection runs through outer products, beside the one through V itself and a basis in numpy's float64."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from avalanche_gradproj.linalg.rank_one import FactoredRows
from avalanche_gradproj.methods.ogd import OrthogonalGradientDescent
from avalanche_gradproj.testing import no_host_round_trips
from tests.methods.ogd_rank_one_setup import (
    DTYPES,
    OPTIMIZERS,
    Heads,
    Mixed,
    flat,
    learn,
    ogd_with,
    perceptron,
    projected,
    train,
)
from tests.methods.ogd_setup import data


class Shared(nn.Module):
    """One layer called twice, one called at every row of the image, and two called once."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.last = nn.Linear(32, 10), nn.Linear(10, 10), nn.Linear(10, 4)
        self.rows = nn.Linear(4, 4)

    def forward(self, x):
        y = torch.tanh(self.first(torch.tanh(self.rows(x)).flatten(1)))
        return self.last(torch.tanh(self.again(torch.tanh(self.again(y)))))


#: Model and the parameters that are outer products.
MODELS = {
    "perceptron": (perceptron, ["1.weight", "3.weight", "5.weight"]),
    "mixed": (Mixed, ["hidden.weight", "last.weight"]),
    "shared": (Shared, ["first.weight", "last.weight"]),
    "heads": (Heads, ["body.weight", "heads.0.weight", "heads.1.weight", "heads.2.weight"]),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_the_same_weights_as_through_the_vectors(name, optimizer):
    """In float64, gradient mode (momentum) and update mode (Adam), over three experiences."""
    make, outer = MODELS[name]
    found = {}
    for projection in ("dense", "factored"):
        torch.manual_seed(0)
        model, ogd = make().double(), ogd_with(projection)
        steps = OPTIMIZERS[optimizer](model.parameters())
        for t in range(3):
            learn(ogd, model, steps, t)
        ogd.start(model, steps)
        found[projection] = flat(model), ogd.vectors.numpy(), projected(ogd)
    sizes = {key: p.numel() for key, p in model.named_parameters()}
    share = 100 * sum(sizes[key] for key in outer) / sum(sizes.values())
    assert found["factored"][2].startswith(f"projection: factored ({share:.1f} % of a vector are outer products")
    assert found["dense"][2] == "projection: dense (asked for)"
    np.testing.assert_allclose(found["factored"][0], found["dense"][0], atol=1e-9)
    assert not np.array_equal(found["factored"][0], found["dense"][0])  # they are computed otherwise


@DTYPES
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_leak_over_an_experience(name, optimizer, dtype):
    """Measured from outside, before and after the correction at the end."""
    torch.manual_seed(0)
    model, ogd = MODELS[name][0]().to(dtype), ogd_with("factored")
    steps, bound = OPTIMIZERS[optimizer](model.parameters()), 1e-4 if dtype == torch.float32 else 1e-10
    for t in range(3):
        names, basis, start = list(ogd.shapes), ogd.vectors.double().numpy().copy(), flat(model)
        if isinstance(model, Heads):
            model.task = t
        x, y = data(t, dtype)
        ogd.start(model, steps)
        assert t == 0 or "factored" in projected(ogd)
        with ogd.active():
            train(ogd, model, steps, x, y)
        changes = [flat(model) - start]
        ogd.finish()
        changes.append(flat(model) - start)
        for change in changes if t else ():
            assert np.linalg.norm(change) > 1e-2
            assert np.linalg.norm(basis @ change) <= bound * np.linalg.norm(change)
        assert t == 0 or names == list(dict(model.named_parameters()))
        ogd.consolidate(model, [(x, y)])


def test_dependent_gradients_are_left_out():
    torch.manual_seed(0)
    model, (x, y) = perceptron().double(), data(0)
    x, y = x[:7].repeat(5, 1, 1, 1), y[:7].repeat(5)
    ogd = ogd_with("factored", 35)
    for _ in range(2):
        ogd.consolidate(model, [(x, y)])
    assert len(ogd.vectors) == 7
    start, basis = flat(model), ogd.vectors.numpy().copy()
    steps = torch.optim.SGD(model.parameters(), lr=0.1)
    ogd.start(model, steps)
    assert "factored" in projected(ogd)
    train(ogd, model, steps, *data(1))
    assert np.linalg.norm(basis @ (flat(model) - start)) < 1e-12


def large():
    """A perceptron that is large enough for outer products to pay, with 60 gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(500, 60), nn.ReLU(), nn.Linear(60, 5))
    return model, torch.randn(60, 500), torch.randint(5, (60,))


def test_outer_products_are_chosen_where_they_pay_and_no_step_waits():
    model, x, y = large()
    ogd = OrthogonalGradientDescent(60)
    ogd.consolidate(model, [(x, y)])
    steps = torch.optim.SGD(model.parameters(), lr=0.1)
    ogd.start(model, steps)
    assert projected(ogd).startswith("projection: factored")
    assert isinstance(ogd._training._projection, FactoredRows)
    start = flat(model)
    for _ in range(3):
        steps.zero_grad()
        nn.functional.cross_entropy(model(x[:10] + 1), y[:10]).backward()
        with no_host_round_trips():
            ogd.transform()
            steps.step()
            ogd.after_step()
    change = flat(model) - start
    assert np.linalg.norm(ogd.vectors.double().numpy() @ change) < 1e-5 * np.linalg.norm(change)
    ogd.finish()
    small = OrthogonalGradientDescent(10)
    small.consolidate(perceptron(), [data(0, torch.float32)])
    small.start(perceptron())
    assert projected(small) == "projection: dense (cheaper here)"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_parameters_that_rest_leave_no_outer_products(optimizer):
    torch.manual_seed(0)
    model, ogd = perceptron().double(), ogd_with("factored")
    learn(ogd, model, OPTIMIZERS[optimizer](model.parameters()), 0)
    model[3].requires_grad_(False)
    basis, start = ogd.vectors.numpy().copy(), flat(model)
    steps = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    ogd.start(model, steps)
    assert "projection: dense" in projected(ogd)
    train(ogd, model, steps, *data(1))
    assert np.linalg.norm(basis @ (flat(model) - start)) < 1e-10 * np.linalg.norm(flat(model) - start)


def test_parameters_that_grow_and_come_later_are_outer_products_still():
    torch.manual_seed(0)
    model, ogd = Heads().double(), ogd_with("factored")
    ogd.consolidate(model, [data(0)])
    old, model.heads[0] = model.heads[0], nn.Linear(12, 6).double()
    with torch.no_grad():
        model.heads[0].weight[:4], model.heads[0].bias[:4] = old.weight, old.bias
    model.heads.append(nn.Linear(12, 4).double())
    steps = OPTIMIZERS["adam"](model.parameters())
    ogd.start(model, steps)
    names, start = list(ogd.shapes), None
    start = flat(model, names)
    outer = sum(p.numel() for name, p in model.named_parameters() if name.endswith("weight"))
    assert f"factored ({100 * outer / len(start):.1f} %" in projected(ogd)
    train(ogd, model, steps, *data(1))
    change = flat(model, names) - start
    assert np.linalg.norm(ogd.vectors.numpy() @ change) < 1e-10 * np.linalg.norm(change)


def test_sparse_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6), nn.Flatten(), nn.Linear(18, 4))
    x, y = torch.randint(11, (40, 3)), torch.randint(4, (40,))
    found = {}
    for projection in ("dense", "factored"):
        twin, ogd = copy.deepcopy(model), ogd_with(projection)
        ogd.consolidate(twin, [(x, y)])
        twin[0].sparse = True
        steps = torch.optim.SGD(twin.parameters(), lr=0.1)
        ogd.start(twin, steps)
        assert f"projection: {projection}" in projected(ogd)
        train(ogd, twin, steps, x.flip(0), y)
        found[projection] = flat(twin)
    np.testing.assert_allclose(found["factored"], found["dense"], atol=1e-5)


def test_half_precision():
    torch.manual_seed(0)
    half, ogd = perceptron().bfloat16(), ogd_with("factored", 10)
    learn(ogd, half, steps := torch.optim.SGD(half.parameters(), lr=0.05), 0, torch.bfloat16)
    ogd.start(half, steps)
    assert "factored" in projected(ogd)
    train(ogd, half, steps, *data(1, torch.bfloat16))
    ogd.finish()
    assert ogd.leak["all"] < 0.05
