"""The pass for the factors: models that hide their layers, batch statistics, what it leaves alone and refuses."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from avalanche_gradproj.errors import DataError, ModelError, NonFiniteError
from avalanche_gradproj.layers.select import cover
from avalanche_gradproj.methods.kfac_factors import FactorPass
from tests.methods.dense_sample_loss import CLASSES, gauss_newton, linear, softmax
from tests.methods.kfac_factors_setup import collect, pair

pytestmark = pytest.mark.usefixtures("double")


class Backbone(nn.Module):
    """A body without gradients, a head with some."""

    def __init__(self, run):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 5))
        self.first, self.head, self.run = nn.Linear(4, 4), nn.Linear(5, CLASSES), run

    def forward(self, x):
        return self.head(self.run(self.body, self.first(x)))


def without_gradients(body, x):
    with torch.no_grad():
        return body(x)


def test_layers_that_the_model_runs_without_gradients_have_no_factors():
    model, x = Backbone(without_gradients), torch.randn(6, 4)
    sums = collect(model, [x[:4], x[4:]])
    assert [name for name in sums.layers if sums.layers[name].factors(6) is not None] == ["head"]
    assert not sums.diagonal
    b = gauss_newton(model, x, [model.head.bias])
    np.testing.assert_allclose(pair(sums, "head")[1][0], b, atol=1e-12)


def test_checkpoints():
    x = torch.randn(6, 4)
    plain = Backbone(lambda body, x: body(x))
    kept = Backbone(lambda body, x: checkpoint(body, x, use_reentrant=False))
    kept.load_state_dict(plain.state_dict())
    one, other = collect(plain, [x]), collect(kept, [x])
    for name in one.layers:
        for a, b in zip(pair(one, name), pair(other, name), strict=True):
            np.testing.assert_allclose(a, b)
    assert sorted(one.diagonal) == sorted(other.diagonal) == ["body.1.bias", "body.1.weight"]
    with pytest.raises(ModelError, match="use_reentrant=False"):
        collect(Backbone(lambda body, x: checkpoint(body, x, use_reentrant=True)), [x])


def test_inference_mode_is_refused():
    with torch.inference_mode(), pytest.raises(ModelError, match="inference_mode"):
        collect(linear(), [torch.randn(3, 4)])


def test_a_model_whose_layers_are_never_called_is_refused():
    class Hidden(nn.Module):
        """As a compiled model, it does not call its layers' hooks."""

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, CLASSES)

        def forward(self, x):
            return F.linear(x, self.layer.weight, self.layer.bias)

    with pytest.raises(ModelError, match=r"none of the covered layers was called.*torch\.compile"):
        collect(Hidden(), [torch.randn(3, 4)])


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        ({"x": torch.ones(2, 4)}, "is a dict"),
        (({"x": torch.ones(2, 4)}, torch.zeros(2)), "tuple whose inputs are a dict"),
        (["x", "y"], "list whose inputs are a str"),
        ((), "is a tuple"),
    ],
)
def test_inputs_that_are_no_tensors_are_refused(batch, match):
    for forward in (None, lambda model, own: model(own["x"])):
        with pytest.raises(DataError, match=f"{match}.*inputs must be tensors"):
            collect(linear(), [batch], forward=forward)


def test_means_and_totals_for_whoever_needs_them():
    model, x = linear(), torch.randn(6, 4)
    run = FactorPass(model, cover(model).units, fisher="empirical", extended=True, generator=torch.Generator())
    y = torch.tensor([0, 1, 2, 0, 1, 1])
    layer = run.run([(x[:4], y[:4]), (x[4:], y[4:])]).layers["2"]
    hidden = np.concatenate([model[:2](x).detach().numpy(), np.ones((6, 1))], 1)
    np.testing.assert_allclose(layer.inputs.mean().numpy()[0], hidden.mean(0))
    g = model(x).softmax(1).detach().numpy() - np.eye(3)[y.numpy()]
    first, second = g[:4].sum(0), g[4:].sum(0)
    np.testing.assert_allclose(layer.totals.moment(1).numpy()[0], np.outer(first, first) + np.outer(second, second))


@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
def test_nothing_is_disturbed(fisher):
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, CLASSES))
    x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    F.cross_entropy(model(x), y).backward()
    model[1].eval()
    before = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()], torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    collect(model, [(x, y)], fisher=fisher)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before[0].items())
    assert all(torch.equal(g, p.grad) for g, p in zip(before[1], model.parameters(), strict=True))
    assert torch.equal(before[2], torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert not any(module._forward_hooks for module in model.modules())


def test_a_frozen_layer_has_factors_while_it_is_kept():
    model, x = linear(), torch.randn(5, 4)
    units = cover(model).units
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    run = FactorPass(model, units, fisher="exact")
    b = pair(run.run([x]), "0")[1]
    for parameter in model[0].parameters():
        parameter.requires_grad_(True)
    np.testing.assert_allclose(b, pair(collect(model, [x]), "0")[1])


def batch_normalised(plain=False):
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, CLASSES))
    if plain:
        model.register_parameter("scale", nn.Parameter(torch.ones(1)))
    return model


def test_exact_has_no_cross_terms_of_samples_on_average():
    """Where samples meet in BatchNorm, the sum of several samples' directions is no direction of one of them."""
    model, x = batch_normalised(), torch.randn(8, 4)
    expected = 0
    hidden = model[0](x).detach().requires_grad_()
    logits = model[1:](hidden)
    for n in range(8):
        j = np.stack([torch.autograd.grad(z, hidden, retain_graph=True)[0].numpy() for z in logits[n]])  # [c, 8, 6]
        p = softmax(logits[n].detach().numpy())
        expected = expected + np.einsum("cmi,cd,dmj->ij", j, np.diag(p) - np.outer(p, p), j)
    found = [pair(collect(model, [x], seed=seed), "0")[1][0] * 8 for seed in range(300)]
    spread = np.linalg.norm(np.std(found, axis=0)) / 300**0.5
    assert np.linalg.norm(np.mean(found, axis=0) - expected) < 4 * spread
    assert spread < 0.05 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("make", "batches", "error", "match"),
    [
        (linear, [], DataError, "no sample came"),
        (batch_normalised, [torch.ones(1, 4).double()], DataError, "one sample came, and layer '1'"),
        (lambda: batch_normalised(True), [torch.ones(4, 4).double()], ModelError, "parameter 'scale'.*layer '1'"),
        (
            lambda: nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (3, 2))),
            [torch.ones(2, 4).double()],
            ModelError,
            "logits",
        ),
        (linear, [torch.full((2, 4), float("inf")).double()], NonFiniteError, "logit"),
    ],
    ids=["no data", "a batch of one", "a plain parameter beside batch statistics", "no logits", "infinite"],
)
def test_refused_by_name(make, batches, error, match):
    with pytest.raises(error, match=match):
        collect(make(), batches)


def test_values_that_are_not_finite_name_the_layer():
    class Hidden(nn.Module):
        """A layer whose infinite input does not reach the logits."""

        def __init__(self):
            super().__init__()
            self.first, self.lost = nn.Linear(4, CLASSES), nn.Linear(4, 2)

        def forward(self, x):
            self.lost(x * float("inf"))
            return self.first(x)

    with pytest.raises(NonFiniteError, match=r"layer 'lost': its input"):
        collect(Hidden(), [torch.randn(3, 4)])

    class Steep(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.out = nn.Linear(4, 4), nn.Linear(4, CLASSES)

        def forward(self, x):
            return self.out(torch.sqrt(self.first(x).abs() * 0))

    with pytest.raises(NonFiniteError, match=r"layer 'first': its output's gradient"):
        collect(Steep(), [torch.randn(3, 4)])
