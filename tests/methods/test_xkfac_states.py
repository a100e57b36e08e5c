"""XK-FAC where models or settings change: branches, turned layers, states of something else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from avalanche_gradproj.errors import ModelError, StateError
from avalanche_gradproj.methods.xkfac import ExtendedKroneckerLaplace
from tests.methods.xkfac_relu_setup import CLASSES, N, batches, network, train

pytestmark = pytest.mark.usefixtures("double")


def penalty_at_the_centre(xkfac, model):
    """Of the weights and statistics that were just learned, in evaluation: 0 if they are the centre."""
    model.eval()
    with xkfac.experience(model, samples=N, batches=batches(9)):
        return xkfac.penalty().item()


class Branches(nn.Module):
    """A branch of its own for each task, with or without a bias before its BatchNorm."""

    def __init__(self, bias=True):
        super().__init__()
        self.first, self.out, self.task = nn.Linear(4, 8), nn.Linear(8, CLASSES), 0
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8, bias=bias), nn.BatchNorm1d(8), nn.ReLU()) for _ in range(2)
        )

    def forward(self, x):
        return self.out(self.branches[self.task](torch.relu(self.first(x))))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("settings", [{}, {"pairs": {"branches.0.1": "branches.0.0", "branches.1.1": "branches.1.0"}}])
def test_a_branch_that_is_not_called_keeps_its_pair_and_its_weights(bias, settings):
    model = Branches(bias)
    xkfac = ExtendedKroneckerLaplace(1.0, adaptive=False, **settings)
    train(xkfac, model, 0)
    model.task = 1
    assert penalty_at_the_centre(xkfac, model) == pytest.approx(0, abs=1e-20)
    before = {name: value.clone() for name, value in model.branches[0].state_dict().items()}
    for seed in (1, 2):
        train(xkfac, model, seed)
    for name, value in model.branches[0].state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-12, atol=1e-12)
    layers = xkfac._memory.forms[0].layers
    assert {"branches.0.0", "branches.1.0"} <= layers.keys()
    assert all(layers[f"branches.{task}.0"].centre.shape == (1, 8, 9) for task in range(2))


def test_a_layer_that_changes_sides_is_refused():
    class Turning(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm, self.turned = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4), False

        def forward(self, x):
            return (
                self.b(self.norm(self.a(x)))[:, :CLASSES]
                if not self.turned
                else self.norm(self.b(self.a(x)))[:, :CLASSES]
            )

    model, xkfac = Turning(), ExtendedKroneckerLaplace()
    train(xkfac, model, 0)
    model.turned = True
    with pytest.raises(ModelError, match=r"'norm' was merged with layer 'a', and now it stands behind layer 'b'"):
        xkfac.start(model, samples=N, batches=batches(1))


def test_a_refused_start_changes_nothing():
    model = network()
    xkfac = ExtendedKroneckerLaplace(adaptive=False, reparameterise=False)
    train(xkfac, model, 0)
    before = str(xkfac.state_dict())
    with pytest.raises(StateError, match="no BatchNorm '4'"):
        xkfac.start(nn.Sequential(nn.Linear(4, 9), nn.BatchNorm1d(9), nn.Linear(9, 3)), batches=batches(1))
    assert str(xkfac.state_dict()) == before
    assert penalty_at_the_centre(xkfac, model) == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize(
    ("made", "other", "match"),
    [
        ({"batchnorm": "track"}, {}, "batchnorm='track'"),
        ({}, {"batchnorm": "freeze"}, "batchnorm='merge'"),
        ({}, {"strength": 1.0}, "strength='balanced'"),
        ({"strength": 1.0}, {}, "strength='balanced'"),
    ],
)
def test_states_of_other_settings_are_refused(made, other, match):
    one, another = ExtendedKroneckerLaplace(**made), ExtendedKroneckerLaplace(**other)
    train(one, network(), 0)
    before = str(another.state_dict())
    with pytest.raises(StateError, match=match):
        another.load_state_dict(one.state_dict())
    assert str(another.state_dict()) == before


def test_a_state_of_another_model_is_refused_by_name():
    held = ExtendedKroneckerLaplace(batchnorm="freeze")
    train(held, network(), 0)
    fresh = ExtendedKroneckerLaplace(batchnorm="freeze")
    fresh.load_state_dict(held.state_dict())
    fresh._plan._batchnorm = "merge"  # holds what the state says
    with pytest.raises(StateError, match="no BatchNorm '1'"):
        fresh.start(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), samples=N, batches=batches())
