"""What XK-FAC does with BatchNorms: those that are held or refused, terms across samples, new coordinates."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from avalanche_gradproj.errors import ConfigurationError, ModelError
from avalanche_gradproj.methods.xkfac import ExtendedKroneckerLaplace
from tests.methods.xkfac_setup import CLASSES, N, batches, data, network, train

pytestmark = pytest.mark.usefixtures("double")


def test_frozen_batch_norm_stays_as_the_first_experience_left_it():
    model = network()
    xkfac = ExtendedKroneckerLaplace(batchnorm="freeze")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05, weight_decay=0.1)
    before = copy.deepcopy(model[1].state_dict())
    train(xkfac, model, 0, optimizer=optimizer)
    first = copy.deepcopy(model[1].state_dict())
    assert all(not torch.equal(before[key], first[key]) for key in first)
    weights = model[0].weight.clone()
    train(xkfac, model, 1, optimizer=optimizer)
    assert all(torch.equal(value, first[key]) for key, value in model[1].state_dict().items())
    assert not torch.equal(model[0].weight, weights)
    assert model[1].training
    assert model[1].weight.requires_grad
    assert xkfac.report()["1.weight"].treatment == "frozen"
    assert "held from the second experience on: 1, 4" in str(xkfac.report())
    # Samples do not depend on each other: one product a layer.
    assert {len(layer.terms) for layer in xkfac._memory.forms[0].layers.values()} == {1}


def test_which_layers_have_terms_across_samples():
    def counts(**settings):
        xkfac = ExtendedKroneckerLaplace(**settings)
        train(xkfac, network(), 0)
        (form,) = xkfac._memory.forms
        return {name: len(layer.terms) for name, layer in form.layers.items()}, sorted(form.diagonal)

    assert counts() == ({"0": 2, "3": 1, "6": 1}, [])
    assert counts(inter_example=False) == ({"0": 1, "3": 1, "6": 1}, [])
    norms = ["1.bias", "1.weight", "4.bias", "4.weight"]
    assert counts(batchnorm="track") == ({"0": 2, "3": 2, "6": 1}, norms)
    assert counts(batchnorm="track", inter_example=False) == ({"0": 1, "3": 1, "6": 1}, norms)
    assert counts(exclude=["1"]) == ({"0": 2, "3": 1, "6": 1}, [])
    assert counts(exclude=["4"]) == ({"0": 1, "3": 1, "6": 1}, [])


class Activated(nn.Module):
    """A BatchNorm behind an activation, and one without statistics."""

    def __init__(self, track=True):
        super().__init__()
        self.first, self.norm = nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=track)
        self.second, self.paired, self.out = nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.out(torch.tanh(self.paired(self.second(self.norm(torch.tanh(self.first(x)))))))


def test_unpaired_batch_norms_are_refused_before_training_or_held():
    model = Activated()
    before = copy.deepcopy(model.state_dict())
    xkfac = ExtendedKroneckerLaplace()
    with pytest.raises(ModelError, match=r"BatchNorm 'norm'.*not the output.*unpaired='freeze'"):
        xkfac.start(model, samples=N, batches=batches())
    with pytest.raises(ModelError, match="BatchNorm 'norm'"):  # without data, as soon as there is some
        xkfac.consolidate(model, batches())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert xkfac.experiences == 0
    held = ExtendedKroneckerLaplace(unpaired="freeze")
    train(held, model, 0)
    first = copy.deepcopy(model.state_dict())
    train(held, model, 1)
    assert all(torch.equal(value, first[f"norm.{key}"]) for key, value in model.norm.state_dict().items())
    assert not torch.equal(model.paired.weight, first["paired.weight"])
    with pytest.raises(ModelError, match=r"'norm' keeps no running statistics"):
        ExtendedKroneckerLaplace(batchnorm="freeze").start(Activated(track=False))
    with pytest.raises(ModelError, match=r"'norm' keeps no running statistics.*neither merged nor held"):
        ExtendedKroneckerLaplace(unpaired="freeze").start(Activated(track=False), batches=batches())
    train(ExtendedKroneckerLaplace(exclude=["norm"]), Activated(), 0)
    with pytest.raises(ConfigurationError, match="'second'"):
        ExtendedKroneckerLaplace(pairs={"norm": "second"}).start(Activated(), batches=batches())


def test_reparameterisation_happens_once_an_experience_and_keeps_the_function():
    model = network()
    xkfac = ExtendedKroneckerLaplace()
    optimizer = torch.optim.Adam(model.parameters())
    train(xkfac, model, 0, optimizer=optimizer)
    x, _ = data(1)
    before, weight = model.eval()(x), model[0].weight.clone()
    assert model[0].weight in optimizer.state
    xkfac.start(model, optimizer, samples=N, batches=batches(1))
    torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-9)
    assert not torch.equal(model[0].weight, weight)
    assert model[0].weight not in optimizer.state
    assert model[6].weight in optimizer.state
    again = model[0].weight.clone()
    xkfac.finish()
    xkfac.start(model, optimizer, samples=N, batches=batches(2))  # another piece of the same experience
    assert torch.equal(model[0].weight, again)
    without = ExtendedKroneckerLaplace(reparameterise=False)
    train(without, model, 0)
    again = model[0].weight.clone()
    without.start(model, samples=N)
    assert torch.equal(model[0].weight, again)


def test_report_names_pairs():
    xkfac = ExtendedKroneckerLaplace()
    train(xkfac, network(), 0)
    report = xkfac.report()
    assert {row.parameter for row in report} == {name for name, _ in network().named_parameters()}
    for name in ("0.weight", "0.bias", "1.weight", "1.bias"):
        row = report[name]
        assert (row.treatment, row.layer) == ("penalised", "0")
        assert "BatchNorm '1'" in row.reason
    assert "1 (behind 0), 4 (behind 3)" in str(report)


class KeptInEvaluation(nn.Sequential):
    """BatchNorms that stay fixed in training, as those of a pretrained network often do."""

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()
        return self


@pytest.mark.parametrize("batchnorm", ["merge", "track"])
def test_batch_norms_that_the_model_keeps_in_evaluation_couple_no_samples(batchnorm):
    """The factor at the merged layer's output is that of single samples, by one backward pass a sample and class."""
    model = KeptInEvaluation(*network())
    for norm in (model[1], model[4]):
        norm.running_mean.normal_(generator=torch.Generator().manual_seed(3))
        norm.running_var.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(4))
    xkfac = ExtendedKroneckerLaplace(1.0, fisher="exact", batchnorm=batchnorm, adaptive=False)
    statistics = copy.deepcopy([model[1].running_mean, model[4].running_var])
    train(xkfac, model, 0)
    assert model.training
    assert not model[1].training
    (form,) = xkfac._memory.forms
    assert {name: len(layer.terms) for name, layer in form.layers.items()} == {"0": 1, "3": 1, "6": 1}
    model.eval()
    seen = 2 if batchnorm == "merge" else 1  # the output of the BatchNorm, or of the layer before it
    expected = torch.zeros(6, 6)
    for x in data(0)[0]:
        h = model[:seen](x[None]).detach().requires_grad_()
        logs = torch.log_softmax(model[seen:](h), dim=1)[0]
        for log in logs:
            (b,) = torch.autograd.grad(log, h, retain_graph=True)
            expected += log.exp().detach() * b[0].outer(b[0]) / N
    torch.testing.assert_close(form.layers["0"].terms[0].left.matrix[0], expected)
    # They stay fixed in the next experience, which begins without new coordinates.
    assert all(torch.isfinite(torch.tensor(train(xkfac, model, 1))))
    assert torch.equal(statistics[0], model[1].running_mean)
    assert torch.equal(statistics[1], model[4].running_var)
