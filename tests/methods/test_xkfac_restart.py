"""XK-FAC's restarts, damaged states, and calls at wrong moments."""

from __future__ import annotations

import gc
import io
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from avalanche_gradproj.errors import ConfigurationError, DataError, NonFiniteError, StateError
from avalanche_gradproj.methods.xkfac import ExtendedKroneckerLaplace
from tests.methods.xkfac_setup import N, batches, data, network, train

pytestmark = pytest.mark.usefixtures("double")


def test_wrong_moments():
    model = network()
    xkfac = ExtendedKroneckerLaplace()
    with pytest.raises(StateError, match="start"), xkfac.active():
        pass
    train(xkfac, model, 0)
    with pytest.raises(DataError, match=r"batches=loader.*reparameterise=False"):
        xkfac.start(model, samples=N)
    assert not xkfac.penalising
    model.train()
    x, y = data(1)
    with xkfac.experience(model, samples=N, batches=batches(1)):
        with pytest.raises(StateError, match=r"'1'.*after model\(x\)"):
            xkfac.penalty()
        model(x)
        xkfac.objective(F.cross_entropy(model(x), y))
        with pytest.raises(StateError, match=r"'1'.*after model\(x\)"):
            xkfac.penalty()
        with pytest.raises(DataError, match=r"BatchNorm '1' got a mini-batch of one sample"):
            model(x[:1])
    with pytest.raises(DataError, match="one sample"):
        ExtendedKroneckerLaplace().consolidate(model, [(x[:1], y[:1])])
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError):
        ExtendedKroneckerLaplace().consolidate(model, batches())
    xkfac.criterion = nn.CrossEntropyLoss(reduction="sum")
    with pytest.raises(ConfigurationError, match="mean of cross-entropies"):
        xkfac.start(model, samples=N, batches=batches(1))


def test_restart_and_pickle_continue_bit_for_bit():
    def run(stop):
        torch.manual_seed(2)
        model = network()
        xkfac = ExtendedKroneckerLaplace(damping=0.01)
        for seed in range(4):
            train(xkfac, model, seed)
            if stop == "state":
                file = io.BytesIO()
                torch.save(xkfac.state_dict(), file)
                file.seek(0)
                xkfac = ExtendedKroneckerLaplace(damping=0.01)
                xkfac.load_state_dict(torch.load(file, weights_only=True))
            elif stop == "pickle":
                xkfac = pickle.loads(pickle.dumps(xkfac))
        return nn.utils.parameters_to_vector(model.parameters())

    expected = run(None)
    assert torch.equal(run("state"), expected)
    assert torch.equal(run("pickle"), expected)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"pairs": [1]}, "'pairs'"),
        ({"held": None}, "'held'"),
        ({"moved_for": "1"}, "'moved_for'"),
        ({"method": "K-FAC Laplace"}, "XK-FAC"),
    ],
)
def test_damaged_states_are_refused(change, match):
    xkfac = ExtendedKroneckerLaplace()
    train(xkfac, network(), 0)
    before = str(xkfac.state_dict())
    with pytest.raises(StateError, match=match):
        xkfac.load_state_dict({**xkfac.state_dict(), **change})
    assert str(xkfac.state_dict()) == before


def test_no_reference_to_the_model_is_kept():
    model = network()
    xkfac = ExtendedKroneckerLaplace()
    train(xkfac, model, 0)
    train(xkfac, model, 1)
    pointer = weakref.ref(model)
    del model
    gc.collect()
    assert pointer() is None
