"""OGD where parts of a model rest, grow, come later or get no gradient, and its report."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from avalanche_gradproj.errors import ConfigurationError, ModelError, StateError
from avalanche_gradproj.methods.ogd import OrthogonalGradientDescent
from tests.methods.ogd_setup import OPTIMIZERS, Network, data, leak, train, two_experiences, vector


@pytest.mark.parametrize(("batchnorm", "moved"), [("freeze", False), ("track", True)])
def test_running_statistics(batchnorm, moved):
    torch.manual_seed(0)
    model, ogd = Network(), OrthogonalGradientDescent(10, batchnorm=batchnorm)
    optimizer = two_experiences(ogd, model)
    before, weight = model.norm.running_mean.clone(), model.norm.weight.detach().clone()
    x, y = data(2, torch.float32)
    with ogd.experience(model, optimizer):
        train(model, optimizer, x, y, ogd)
        assert model.norm.training == moved
    assert model.norm.training
    assert torch.equal(model.norm.running_mean, before) != moved
    assert not torch.equal(model.norm.weight, weight)  # norm parameters train, projected


@pytest.mark.parametrize("rest", ["no gradient", "not in the optimizer"])
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_parameters_that_rest_do_not_let_the_others_leak(name, rest):
    """A frozen part cannot take its share of a projected step: the others must be orthogonal without it."""
    torch.manual_seed(0)
    model, ogd, (x, y) = Network().double(), OrthogonalGradientDescent(20), data(0)
    ogd.consolidate(model, [(x, y)])
    names, basis, resting = list(ogd.shapes), ogd.vectors.numpy().copy(), vector(model, ["conv.weight", "conv.bias"])
    if rest == "no gradient":
        model.conv.requires_grad_(False)
    trained = [p for n, p in model.named_parameters() if not n.startswith("conv")]
    optimizer, start = OPTIMIZERS[name](trained), vector(model, names)
    x, y = data(1)
    with ogd.experience(model, optimizer):
        train(model, optimizer, x, y, ogd)
        reason = "takes no gradient" if rest == "no gradient" else "the optimizer does not have it"
        assert ogd.report()["conv.weight"].reason == reason
        assert leak(start, vector(model, names), basis) < 1e-10
    assert np.array_equal(vector(model, ["conv.weight", "conv.bias"]), resting)
    assert np.linalg.norm(vector(model, names) - start) > 1e-3


class Growing(nn.Module):
    """A body and a last layer that can be replaced by a larger one."""

    def __init__(self):
        super().__init__()
        self.body, self.last = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.last(torch.tanh(self.body(x)))

    def grow(self, classes):
        old, self.last = self.last, nn.Linear(8, classes).double()
        with torch.no_grad():
            self.last.weight[: old.out_features], self.last.bias[: old.out_features] = old.weight, old.bias


def test_parameters_that_come_later_and_grow():
    """Vectors keep their entries at the parameters' own places, and are zero at what is new."""
    torch.manual_seed(0)
    model, ogd = Growing().double(), OrthogonalGradientDescent(10)
    x, y = torch.randn(20, 6, dtype=torch.float64), torch.randint(2, (20,))
    ogd.consolidate(model, [(x, y)])
    old = ogd.vectors.clone()
    model.grow(5)
    model.extra = nn.Linear(3, 3).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with ogd.experience(model, optimizer):
        new = ogd.vectors
        assert torch.equal(new[:, : 6 * 8 + 8], old[:, : 6 * 8 + 8])
        weights = new[:, 56 : 56 + 40].view(10, 5, 8)
        assert torch.equal(weights[:, :2].reshape(10, 16), old[:, 56:72])
        assert torch.equal(new[:, 96:98], old[:, 72:74])
        assert not weights[:, 2:].any()
        assert not new[:, 98:].any()
        names = list(ogd.shapes)
        start = vector(model, names)
        train(model, optimizer, x, torch.randint(5, (20,)), ogd)
    assert names[-2:] == ["extra.weight", "extra.bias"]
    assert leak(start, vector(model, names), new.numpy()) < 1e-10
    ogd.consolidate(model, [(x, y)])
    assert len(ogd.vectors) == 20
    model.last = nn.Linear(8, 3).double()
    with pytest.raises(StateError, match=r"'last.weight' has shape \[3, 8\] here and \[5, 8\] there"):
        ogd.start(model)


def test_a_parameter_that_grows_both_ways_keeps_its_leading_corner():
    class Table(nn.Module):
        def __init__(self, *shape):
            super().__init__()
            self.table = nn.Parameter(torch.zeros(shape))

        def forward(self, x):
            return x @ self.table.T

    ogd = OrthogonalGradientDescent(1)
    ogd.consolidate(Table(2, 3), [(torch.tensor([[1.0, 2.0, 2.0]]), torch.tensor([1]))])
    ogd.start(Table(3, 5))
    expected = torch.zeros(3, 5)
    expected[1, :3] = torch.tensor([1.0, 2.0, 2.0]) / 3
    assert torch.allclose(ogd.vectors[0].view(3, 5), expected)


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
def test_a_parameter_without_a_gradient_takes_its_part(name):
    """Where the new loss does not reach a branch, the projection of the whole vector still does."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x):
            return self.first(x) + self.second(x)

    torch.manual_seed(0)
    model, x, y = Branches().double(), torch.randn(20, 5, dtype=torch.float64), torch.randint(3, (20,))
    ogd = OrthogonalGradientDescent(10)
    ogd.consolidate(model, [(x, y)])
    names, optimizer = list(ogd.shapes), OPTIMIZERS[name](model.parameters())
    start = vector(model, names)
    ogd.start(model, optimizer)
    with ogd.active():
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model.first(x), y).backward()
            ogd.transform()
            optimizer.step()
            ogd.after_step()
    assert leak(start, vector(model, names), ogd.vectors.numpy()) < 1e-12
    assert np.linalg.norm(vector(model, ["second.weight"]) - start[18:33]) > 1e-3


def test_selection_and_report():
    model = Network()
    model.hidden.requires_grad_(False)
    ogd = OrthogonalGradientDescent(4, exclude=["norm"])
    ogd.start(model, heads=["last"])
    report = ogd.report()
    assert {row.parameter for row in report} == {name for name, _ in model.named_parameters()}
    assert report["hidden.weight"].reason == "takes no gradient"
    assert report["norm.bias"].reason == "excluded"
    assert report["last.weight"].reason == "task head"
    assert report["scale"].treatment == "projected"
    assert "0 orthonormal gradients over" in str(report)
    ogd = OrthogonalGradientDescent(4, include=["last", "conv.weight"])
    ogd.start(model, heads=["last"])
    assert list(ogd.shapes) == ["conv.weight", "last.weight", "last.bias"]
    with pytest.raises(ConfigurationError, match=r"'lst' matches no parameter; .*'last"):
        OrthogonalGradientDescent(4, include=["lst"]).start(model)
    with pytest.raises(ConfigurationError, match="is one string"):
        OrthogonalGradientDescent(4, exclude="last").start(model)
    with pytest.raises(ModelError, match="no parameter is covered"):
        OrthogonalGradientDescent(4).start(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(StateError, match="seen no model"):
        OrthogonalGradientDescent(4).report()
