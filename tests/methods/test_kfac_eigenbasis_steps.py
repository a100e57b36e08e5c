"""Steps in the eigenbasis of Kronecker factors: what others find, what is remembered, what is turned."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from avalanche_gradproj.errors import StateError
from avalanche_gradproj.linalg.eigenbasis import Eigenbasis
from avalanche_gradproj.methods.kfac import KroneckerLaplace
from avalanche_gradproj.testing import no_host_round_trips
from tests.methods.kfac_eigenbasis_setup import (
    Attentive,
    adam,
    data,
    distance,
    hooks_of,
    learned,
    snapshot,
    steps,
    trained,
)
from tests.methods.kfac_setup import CLASSES
from tests.methods.optimizers import OPTIMIZERS

pytestmark = pytest.mark.usefixtures("double")


def test_other_hooks_and_whoever_comes_later_find_weights_and_gradients():
    model, laplace = learned()
    optimizer, seen = adam(model), []
    optimizer.register_step_post_hook(lambda *_: seen.append(snapshot(model)))
    with laplace.experience(model, optimizer, samples=60):
        for _ in range(3):
            steps(laplace, model, optimizer, data(9), 0)
            optimizer.zero_grad()
            F.cross_entropy(model(data(9)[0]), data(9)[1]).backward()
            gradients = [(p.grad, p.grad.clone()) for p in model.parameters()]
            optimizer.step()
            assert distance(seen[-1], snapshot(model)) == 0
            for p, (gradient, value) in zip(model.parameters(), gradients, strict=True):
                assert p.grad is gradient
                assert torch.equal(gradient, value)
    assert len(hooks_of(optimizer)) == 1


def test_an_experience_may_be_entered_several_times():
    """As Avalanche does, once an epoch: the optimizer's memory stays."""

    def run(*counts):
        model, laplace = learned()
        optimizer = adam(model)
        laplace.start(model, optimizer, samples=60)
        for count in counts:
            with laplace.active():
                steps(laplace, model, optimizer, data(9), count)
        return snapshot(model)

    assert distance(run(6), run(2, 0, 4)) == 0
    assert distance(run(6), run(5)) > 0


def test_the_optimizer_forgets_what_it_knew_in_other_coordinates():
    model, laplace = learned()
    optimizer = adam(model)
    for _ in range(2):
        F.cross_entropy(model(data(8)[0]), data(8)[1]).backward()
        optimizer.step()
    laplace.start(model, optimizer, samples=60)
    assert {name for name, p in model.named_parameters() if optimizer.state[p]} == {"1.weight", "1.bias"}
    with laplace.active():
        steps(laplace, model, optimizer, data(9), 2)
    laplace.finish()
    laplace.start(model, optimizer, samples=60)  # the next piece of the same experience
    assert all(optimizer.state[p] for p in model.parameters())
    laplace.finish()
    laplace.consolidate(model, [data(9)[0]])
    laplace.start(model, optimizer, samples=60)
    assert {name for name, p in model.named_parameters() if optimizer.state[p]} == {"1.weight", "1.bias"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on_after_it_forgot(name):
    model, laplace = learned(experiences=1)
    optimizer = OPTIMIZERS[name](model.parameters())
    for t in (1, 2):
        with laplace.experience(model, optimizer, samples=60):
            steps(laplace, model, optimizer, data(t), 3)
        laplace.consolidate(model, [data(t)[0]])
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("how", ["state", "pickle"])
@pytest.mark.parametrize("where", ["between experiences", "between pieces of one"])
def test_a_restart_continues_bit_for_bit(how, where):
    model, laplace = learned(truncate=0.9)
    optimizer = adam(model)
    with laplace.experience(model, optimizer, samples=60):
        steps(laplace, model, optimizer, data(7), 3)
    if where == "between experiences":
        laplace.consolidate(model, [data(7)[0]])
    other = copy.deepcopy(model)
    optimizers = optimizer, adam(other)
    optimizers[1].load_state_dict(copy.deepcopy(optimizer.state_dict()))
    if how == "pickle":
        again = pickle.loads(pickle.dumps(laplace))
    else:
        again = KroneckerLaplace(5.0, mode="online", truncate=0.9, eigenbasis=True)
        again.load_state_dict(laplace.state_dict())
    for own, method, takes in zip((model, other), (laplace, again), optimizers, strict=True):
        with method.experience(own, takes, samples=60):
            steps(method, own, takes, data(9), 4)
    assert distance(snapshot(model), snapshot(other)) == 0
    assert again._bases.remembered == laplace._bases.remembered > 0


def test_states_go_between_methods_with_and_without():
    _, laplace = learned(eigenbasis=False)
    turned = KroneckerLaplace(5.0, mode="online", eigenbasis=True)
    turned.load_state_dict(laplace.state_dict())
    laplace.load_state_dict(turned.state_dict())
    assert "remembered" not in laplace.state_dict()
    with pytest.raises(StateError, match="'remembered' is 'all'"):
        turned.load_state_dict({**turned.state_dict(), "remembered": "all"})


def test_no_reference_to_the_model_is_kept():
    model, laplace = learned()
    optimizer = adam(model)
    with laplace.experience(model, optimizer, samples=60):
        steps(laplace, model, optimizer, data(9), 2)
    kept = weakref.ref(model[0].weight), weakref.ref(optimizer)
    del model, optimizer
    gc.collect()
    assert kept[0]() is kept[1]() is None


@pytest.mark.parametrize("how", ["frozen", "not in the optimizer"])
def test_layers_that_do_not_move_whole_are_not_turned(how):
    """Here no layer does: training is bit for bit that without."""

    def run(eigenbasis):
        model, laplace = learned(eigenbasis=eigenbasis)
        if how == "frozen":
            model[0].bias.requires_grad_(False)
            model[3].bias.requires_grad_(False)
        optimizer = torch.optim.Adam([p for n, p in model.named_parameters() if "bias" not in n], lr=0.02)
        if how == "frozen":
            optimizer = adam(model)
        F.cross_entropy(model(data(8)[0]), data(8)[1]).backward()
        optimizer.step()
        with laplace.experience(model, optimizer, samples=60):
            steps(laplace, model, optimizer, data(9), 4)
        return snapshot(model)

    assert distance(run(True), run(False)) == 0


def test_a_layer_that_is_frozen_and_unfrozen_in_between():
    """The optimizer forgets it each time: its coordinates change."""
    model, laplace = learned()
    optimizer = adam(model)
    with laplace.experience(model, optimizer, samples=60):
        for frozen, expected in ((False, 3), (True, 2), (False, 1)):
            model[0].bias.requires_grad_(not frozen)
            before = model[0].bias.detach().clone()
            steps(laplace, model, optimizer, data(9), expected)
            assert torch.equal(before, model[0].bias) is frozen
            assert optimizer.state[model[0].weight]["step"] == expected
        assert optimizer.state[model[3].weight]["step"] == 6


def test_a_layer_that_is_turned_no_more_or_otherwise_is_forgotten():
    model, laplace = learned()
    optimizer = adam(model)
    with laplace.experience(model, optimizer, samples=60):
        steps(laplace, model, optimizer, data(9), 3)
    laplace.consolidate(model, [data(9)[0]])
    model[0].bias.requires_grad_(False)  # so that the next experience does not turn it
    with laplace.experience(model, optimizer, samples=60):
        assert not optimizer.state[model[0].weight]
        steps(laplace, model, optimizer, data(9), 2)
    group = optimizer.param_groups[0]
    bias = next(index for index, own in enumerate(group["params"]) if own is model[3].bias)
    optimizer.add_param_group({**group, "params": [group["params"].pop(bias)]})
    assert optimizer.state[model[3].weight]["step"] == 2
    with laplace.experience(model, optimizer, samples=60):  # the same experience, in a basis without the bias
        assert not optimizer.state[model[3].weight]
        assert optimizer.state[model[0].weight]["step"] == 2


class Branches(nn.Module):
    """A layer that not every step uses."""

    def __init__(self):
        super().__init__()
        self.always, self.sometimes, self.last = nn.Linear(12, 5), nn.Linear(5, 5), nn.Linear(5, CLASSES)
        self.uses = True

    def forward(self, x):
        x = torch.tanh(self.always(x))
        return self.last(torch.tanh(self.sometimes(x)) if self.uses else x)


def test_layers_without_a_gradient_stay_and_parts_without_one_count_as_zero():
    def run(eigenbasis, part):
        model, laplace = learned(Branches, eigenbasis=eigenbasis)
        # A part without gradient takes part in the step: without the eigenbasis that needs zeros.
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with laplace.experience(model, optimizer, samples=60):
            for step in range(4):
                model.uses = part or step % 2 == 0
                optimizer.zero_grad()
                F.cross_entropy(model(data(9)[0]), data(9)[1]).backward()
                if part:
                    model.always.bias.grad = None
                before = snapshot(model)
                optimizer.step()
                if part:
                    assert model.always.bias.grad is None
                elif step % 2:
                    assert torch.equal(before["sometimes.weight"], model.sometimes.weight)
                    assert model.sometimes.weight.grad is None
        return snapshot(model)

    for part in (False, True):
        assert distance(run(True, part), run(False, part)) < 1e-12


def test_packed_projections_of_which_some_are_left_alone():
    """Rows that no unit owns are shown to the optimizer as they are."""

    def run(eigenbasis, make):
        return trained(make, make=Attentive, eigenbasis=eigenbasis, exclude=["attention.k_proj"])

    def momentum(model):
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)

    assert distance(run(True, momentum), run(False, momentum)) < 1e-12
    first = {}
    for eigenbasis in (False, True):
        model, laplace = learned(Attentive, eigenbasis=eigenbasis, exclude=["attention.k_proj"])
        optimizer = adam(model)
        with laplace.experience(model, optimizer, samples=60):
            steps(laplace, model, optimizer, data(9), 1)
        first[eigenbasis] = model.attention.in_proj_weight.detach()
    same = (first[True] - first[False]).abs().amax(1) == 0
    assert same.tolist() == [False] * 4 + [True] * 4 + [False] * 4


def test_coordinates_of_weights_are_formed_once(monkeypatch):
    """Later those of the gradient alone, until somebody writes to a layer."""
    model, laplace = learned()
    optimizer, into, calls = adam(model), Eigenbasis.into, []
    monkeypatch.setattr(Eigenbasis, "into", lambda self, x: (calls.append(self), into(self, x))[1])
    with laplace.experience(model, optimizer, samples=60):
        for expected in (4, 2, 2, 3, 2):
            if expected == 3:
                with torch.no_grad():
                    model[0].bias.add_(0.1)
            calls.clear()
            steps(laplace, model, optimizer, data(9), 1)
            assert len(calls) == expected


def test_no_step_waits_for_the_device():
    model, laplace = learned(Attentive)
    optimizer = OPTIMIZERS["weight decay"](model.parameters())
    with laplace.experience(model, optimizer, samples=60):
        for _ in range(3):
            optimizer.zero_grad()
            (F.cross_entropy(model(data(9)[0]), data(9)[1]) + laplace.penalty()).backward()
            with no_host_round_trips():
                optimizer.step()


def test_the_report_says_so():
    assert "steps in the eigenbasis" in str(learned()[1].report())
    assert "steps in the eigenbasis" not in str(learned(eigenbasis=False)[1].report())
