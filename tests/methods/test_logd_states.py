"""LOGD's restarts, and the states, arguments, models and data that it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from avalanche_gradproj.errors import ConfigurationError, DataError, ModelError, NonFiniteError, StateError
from avalanche_gradproj.methods.logd_core import LayerwiseGradientDecomposition
from tests.methods.logd_setup import KEPT, data, fresh, learned


def test_state_goes_on_bit_for_bit(tmp_path):
    model = fresh("mlp").float()
    logd = learned(model)
    torch.save(logd.state_dict(), tmp_path / "state.pt")
    other = LayerwiseGradientDecomposition(KEPT, criterion=F.cross_entropy)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.experiences == 3
    assert torch.equal(other.draw(20), logd.draw(20))
    found = []
    for method in (logd, other):
        one = copy.deepcopy(model)
        method.start(one)
        F.cross_entropy(one(data(9)[0]), data(9)[1]).backward()
        method.transform()
        found.append([p.grad for p in one.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"patterns_per_exp": 5}, "patterns_per_exp=5"),
        ({"experiences": "3"}, "experiences"),
        ({"samples": [[torch.zeros(2, 3), torch.zeros(2), None]]}, "experience 0"),
        ({"samples": [[torch.zeros(KEPT, 3), torch.zeros(KEPT), None]]}, f"({KEPT}, 3)"),
        ({"samples": [None]}, "experience 0"),
        ({"samples": []}, "learned 3 experiences and holds samples of 0: there is no memory for an old experience"),
        ({"experiences": 4}, "learned 4 experiences and holds samples of 3"),
    ],
)
def test_damaged_states_are_refused(change, named):
    logd = learned(fresh("mlp").float())
    before = str(logd.state_dict())
    with pytest.raises(StateError) as error:
        logd.load_state_dict({**logd.state_dict(), **change})
    assert named in str(error.value)
    assert str(logd.state_dict()) == before


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"patterns_per_exp": -1}, "patterns_per_exp=-1"),
        ({"patterns_per_exp": 2.0}, "patterns_per_exp=2.0"),
        ({"blocks": 0}, "blocks=0"),
        ({"blocks": True}, "blocks=True"),
        ({"blocks": "module"}, "blocks='module'"),
        ({"selection": "best"}, "selection='best'"),
        ({"memory_device": "nowhere"}, "memory_device='nowhere'"),
        ({"seed": None}, "seed=None"),
        ({"n_components": -1}, "n_components=-1"),
        ({"margin": "big"}, "margin='big'"),
    ],
)
def test_bad_arguments(kwargs, named):
    with pytest.raises(ConfigurationError) as error:
        LayerwiseGradientDecomposition(**kwargs)
    assert named in str(error.value)


def test_errors_before_training_begins():
    model = fresh("mlp").float()
    for kwargs, kind, named in (
        ({"blocks": 4}, ConfigurationError, "blocks=4"),
        ({"criterion": None}, ConfigurationError, "criterion=None"),
        ({"exclude": ["*"]}, ModelError, "no parameter"),
        ({"include": ["nothing"]}, ConfigurationError, "'nothing'"),
        ({"forward": lambda model, batch: model(batch[0], *batch[2])}, IndexError, "range"),
        ({"forward": lambda model, batch: model(batch[0], task=1)}, ModelError, "task labels"),
    ):
        with pytest.raises(kind, match=named.replace("*", ".")):
            learned(model, **kwargs)
    with pytest.raises(ModelError, match="lazy"):
        learned(nn.LazyLinear(3), 0)


def test_bad_data():
    logd = LayerwiseGradientDecomposition(KEPT)
    x, y = data(0)
    with pytest.raises(DataError, match="patterns_per_exp=6"):
        logd.draw(5)
    for batches, kind, named in (
        ([(x[:3], y[:3])], DataError, "3 samples came"),
        ([x], DataError, "targets"),
        ([(x, y.tolist())], DataError, "list"),
        ([(x * torch.inf, y)], NonFiniteError, "experience 0"),
    ):
        with pytest.raises(kind, match=named):
            logd.consolidate(nn.Identity(), batches)
    assert logd.experiences == len(logd.memory) == 0
