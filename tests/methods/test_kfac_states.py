"""States of the Laplace penalty: restarts, damaged ones, other models, errors that leave no trace."""

from __future__ import annotations

import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn

from avalanche_gradproj.errors import DataError, NonFiniteError, StateError
from avalanche_gradproj.methods.kfac import KroneckerLaplace
from tests.methods.kfac_setup import CLASSES, data, learn, network, thin, wide

pytestmark = pytest.mark.usefixtures("double")


@pytest.mark.usefixtures("small_is_cheap")
@pytest.mark.parametrize("mode", ["separate", "online"])
def test_restart_and_pickle_continue_bit_for_bit(mode):
    results, kwargs = [], {"mode": mode, "truncate": 0.9, "damping": 0.01}
    for how in ("never stopped", "state", "pickle"):
        torch.manual_seed(0)
        model = wide()
        laplace = KroneckerLaplace(2.0, **kwargs)
        for t in range(2):
            learn(laplace, model, data(seed=t))
        assert thin(laplace) >= 2
        if how == "state":
            buffer = io.BytesIO()
            torch.save(laplace.state_dict(), buffer)
            buffer.seek(0)
            held, laplace = laplace.bytes_held, KroneckerLaplace(2.0, **kwargs)
            laplace.load_state_dict(torch.load(buffer, weights_only=True))
            assert laplace.bytes_held == held
        if how == "pickle":
            laplace = pickle.loads(pickle.dumps(laplace))
        assert thin(laplace) >= 2
        learn(laplace, model, data(seed=2))
        results.append([*model.state_dict().values(), torch.tensor(laplace.bytes_by_experience)])
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def damaged(state, how):
    layer = state["forms"][0]["layers"]["0"]
    if how == "mode":
        state["mode"] = "online"
    elif how == "experiences":
        state["experiences"] = "two"
    elif how == "forms":
        state["forms"] = [{"weight": 1.0}]
    elif how == "shape":
        layer["terms"][0]["left"]["matrix"] = torch.ones(1, 4, 4)
    elif how == "finite":
        layer["terms"][0]["right"]["matrix"][0, 0, 0] = float("nan")
    elif how == "other model":
        layer["centre"] = torch.zeros(1, 5, 7)
        layer["terms"][0]["right"]["matrix"] = torch.eye(7)[None]
    return state


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ("mode", "mode='online'"),
        ("experiences", "'experiences' is 'two'"),
        ("forms", "damaged"),
        ("shape", "layer '0'"),
        ("finite", "layer '0'.*NaN"),
        ("other model", "layer '0' is"),
    ],
)
def test_states_refused_by_name(how, match):
    model, laplace = network(), KroneckerLaplace()
    learn(laplace, model, data())
    held = str(laplace.state_dict())
    with pytest.raises(StateError, match=match):
        laplace.load_state_dict(damaged(laplace.state_dict(), how))
    assert str(laplace.state_dict()) == held


def test_online_state_with_and_without_truncation_do_not_mix():
    model, laplace = network(), KroneckerLaplace(mode="online")
    learn(laplace, model, data())
    with pytest.raises(StateError, match=r"truncate=0\.9"):
        KroneckerLaplace(mode="online", truncate=0.9).load_state_dict(laplace.state_dict())


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, CLASSES)), "layer '3'"),
        (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)), "layer '3'"),
        (lambda: nn.Sequential(nn.Linear(4, 5), nn.Identity(), nn.Tanh(), nn.Linear(5, CLASSES)), "'1.weight'"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, CLASSES)), "layer '0'"),
    ],
)
def test_another_model_is_refused_by_name(make, match):
    laplace = KroneckerLaplace()
    learn(laplace, network(), data())
    with pytest.raises(StateError, match=match):
        laplace.start(make())


def test_an_error_leaves_the_factors_as_they_were():
    model, laplace = network(), KroneckerLaplace()
    learn(laplace, model, data())
    held = str(laplace.state_dict())
    bad = data(seed=1)[0]
    bad[3] = float("nan")
    with pytest.raises(NonFiniteError):
        laplace.consolidate(model, [data()[0], bad])
    with pytest.raises(DataError, match="no sample"):
        laplace.consolidate(model, [])
    assert str(laplace.state_dict()) == held


def test_no_reference_to_the_model_is_kept():
    model, laplace = network(), KroneckerLaplace()
    learn(laplace, model, data())
    kept = weakref.ref(model[0].weight)
    del model
    gc.collect()
    assert kept() is None
