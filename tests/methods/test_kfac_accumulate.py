"""Adding the penalty's gradient after the backward pass, beside the penalty in the loss."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from avalanche_gradproj.errors import StateError
from avalanche_gradproj.layers.unit import ParameterSlice
from avalanche_gradproj.methods.kfac import KroneckerLaplace
from avalanche_gradproj.methods.kfac_accumulate import accumulate
from avalanche_gradproj.methods.xkfac import ExtendedKroneckerLaplace
from tests.methods.kfac_setup import CLASSES, data, learn, move, network

pytestmark = pytest.mark.usefixtures("double")


class Attentive(nn.Module):
    """Packed projections: four matrices in two parameters; and an embedding, whose gradient may be sparse."""

    def __init__(self, sparse):
        super().__init__()
        self.words = nn.Embedding(7, 6, sparse=sparse)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x):
        tokens = self.words((x.abs() * 3).long() % 7)
        return self.head(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(dim=1))


def convolutional(memory_format=torch.contiguous_format):
    body = nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.Tanh(), nn.Conv2d(4, 6, 2), nn.Flatten())
    model = nn.Sequential(nn.Unflatten(1, (2, 4, 4)), body, nn.Linear(24, CLASSES, bias=False))
    return model.to(memory_format=memory_format)


NETWORKS = {
    "linear and norm": (network, 4),
    "grouped and plain convolutions": (convolutional, 32),
    "channels last": (lambda: convolutional(torch.channels_last), 32),
    "attention and embedding": (lambda: Attentive(sparse=False), 4),
}


def gradients(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("case", NETWORKS)
@pytest.mark.parametrize("mode", ["separate", "online"])
def test_the_same_as_in_the_loss(case, mode):
    make, features = NETWORKS[case]
    model, laplace = make(), KroneckerLaplace([2.0, 0.5], mode=mode, damping=0.1)
    for t in range(2):
        learn(laplace, model, data(12, features, seed=t))
    move(model)
    x, y = data(12, features, seed=7)
    with laplace.experience(model, samples=12):
        (F.cross_entropy(model(x), y) + laplace.penalty()).backward()
        expected, value = gradients(model), laplace.penalty().item()
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        alone = gradients(model)
        assert laplace.adds_gradient
        added = laplace.add_gradient()
    assert value > 1e-3
    assert added.item() == pytest.approx(value, rel=1e-12)
    assert not added.requires_grad
    changed = 0
    for parameter, wanted, loss in zip(model.parameters(), expected, alone, strict=True):
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-11, atol=1e-13)
        changed += not torch.allclose(wanted, loss)
    assert changed == len(alone)


def test_what_takes_no_gradient_gets_none_and_what_has_none_gets_the_penaltys():
    model, laplace = network(), KroneckerLaplace(2.0)
    learn(laplace, model, data())
    move(model)
    model[0].bias.requires_grad_(False)
    with laplace.experience(model, samples=12):
        model[1].weight.requires_grad_(False)  # of the diagonal, in the middle of the experience
        laplace.penalty().backward()
        expected = gradients(model)
        model.zero_grad()
        laplace.add_gradient()
    assert model[0].bias.grad is model[1].weight.grad is None
    for parameter, wanted in zip(model.parameters(), expected, strict=True):
        if wanted is not None:
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-11, atol=1e-13)


def test_rows_that_a_head_has_grown_are_free():
    model, laplace = network(), KroneckerLaplace(2.0, mode="online")
    learn(laplace, model, data())
    old = model[3]
    model[3] = nn.Linear(5, CLASSES + 2)
    with torch.no_grad():
        model[3].weight[:CLASSES], model[3].bias[:CLASSES] = old.weight, old.bias
    move(model)
    with laplace.experience(model, samples=12):
        laplace.penalty().backward()
        expected = gradients(model)
        model.zero_grad()
        laplace.add_gradient()
    for parameter, wanted in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-11, atol=1e-13)
    assert expected[-1][:CLASSES].abs().min() > 0
    assert not model[3].weight.grad[CLASSES:].any()
    assert not model[3].bias.grad[CLASSES:].any()


def test_sparse_gradients_become_dense():
    torch.manual_seed(0)
    model = Attentive(sparse=True)
    dense, laplace = copy.deepcopy(model), KroneckerLaplace(2.0)
    dense.words.sparse = False
    laplace.consolidate(dense, [data()])
    move(model)
    dense.load_state_dict(model.state_dict())
    found = []
    for one in (model, dense):
        with laplace.experience(one, samples=12):
            F.cross_entropy(one(data()[0]), data()[1]).backward()
            assert one.words.weight.grad.is_sparse == (one is model)
            laplace.add_gradient()
            found.append(one.words.weight.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-14)


def test_weights_of_half_precision_and_autocast():
    model, laplace = network().to(torch.bfloat16), KroneckerLaplace(2.0)
    batch = data()[0].to(torch.bfloat16), data()[1]
    learn(laplace, model, batch)
    move(model.float())
    model.to(torch.bfloat16)
    with laplace.experience(model, samples=12):
        laplace.penalty().backward()
        expected = gradients(model)
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            laplace.add_gradient()
    for parameter, wanted in zip(model.parameters(), expected, strict=True):
        assert parameter.grad.dtype == torch.bfloat16
        torch.testing.assert_close(parameter.grad, wanted)


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_not_where_somebody_watches_the_gradients_making(kind):
    model, laplace = network(), KroneckerLaplace(2.0)
    learn(laplace, model, data())
    with laplace.experience(model, samples=12):
        assert laplace.adds_gradient
        for parameter in (model[0].weight, model[1].weight):  # of a matrix, of the diagonal
            handle = getattr(parameter, kind)(lambda *_: None)
            assert not laplace.adds_gradient
            with pytest.raises(StateError, match="hooks of a parameter"):
                laplace.add_gradient()
            assert model[0].weight.grad is None
            handle.remove()
            assert laplace.adds_gradient
    assert not laplace.adds_gradient


def test_without_a_penalty_nothing_is_added():
    model, laplace = network(), KroneckerLaplace(2.0)
    with pytest.raises(StateError, match="outside of an experience"):
        laplace.add_gradient()
    with laplace.experience(model):
        assert not laplace.adds_gradient
        assert laplace.add_gradient().item() == 0
    assert gradients(model) == [None] * 6


def test_xkfac_has_it_in_the_loss_alone():
    model, x = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, CLASSES)), data()[0]
    xkfac = ExtendedKroneckerLaplace()
    xkfac.consolidate(model, [x])
    with xkfac.experience(model, samples=12, batches=[x]):
        assert not xkfac.adds_gradient
        with pytest.raises(StateError, match=r"XK-FAC.*objective"):
            xkfac.add_gradient()


class Muted(KroneckerLaplace):
    """A penalty of its own."""

    def penalty(self):
        return 0 * super().penalty()


def test_not_in_subclasses_with_a_penalty_of_their_own():
    model, laplace = network(), Muted(2.0)
    learn(laplace, model, data())
    with laplace.experience(model, samples=12):
        assert laplace.penalising
        assert not laplace.adds_gradient


def test_a_slice_of_a_parameter():
    parameter = nn.Parameter(torch.zeros(6, 2, 2))
    parameter.grad = torch.ones(6, 2, 2).to(memory_format=torch.contiguous_format).transpose(1, 2)
    part = torch.arange(12.0).view(1, 3, 4)
    accumulate(part, ParameterSlice("w", parameter, 2, 5))
    expected = torch.ones(6, 2, 2)
    expected[2:5] += part.view(3, 2, 2)
    assert torch.equal(parameter.grad, expected)
