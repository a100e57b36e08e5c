"""Which parts of a model the Laplace penalty holds, reports and leaves alone, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from avalanche_gradproj.errors import ConfigurationError, ModelError, StateError
from avalanche_gradproj.methods.kfac import KroneckerLaplace
from tests.methods.kfac_setup import CLASSES, data, learn, move, network

pytestmark = pytest.mark.usefixtures("double")


def test_compiled_models_are_refused_before_training():
    model = network()
    with pytest.raises(ModelError, match=r"layer '_orig_mod\.0'.*torch\.compile.*model\._orig_mod"):
        KroneckerLaplace().start(torch.compile(model, backend="eager"))
    model[0] = torch.compile(model[0], backend="eager")
    with pytest.raises(ModelError, match=r"layer '0\._orig_mod'"):
        KroneckerLaplace().start(model)
    KroneckerLaplace(exclude=["0._orig_mod"]).start(model)
    KroneckerLaplace(0.0).start(model)


def test_rows_that_a_head_grows_are_free():
    for mode in ("separate", "online"):
        torch.manual_seed(0)
        model, laplace = nn.Sequential(nn.Linear(4, 2)), KroneckerLaplace(mode=mode, fisher="exact", damping=0.1)
        learn(laplace, model, (data()[0], data()[1] % 2), samples=12)
        old = model[0]
        values = []
        for scale in (0.0, 5.0):
            model[0] = nn.Linear(4, 4)
            with torch.no_grad():
                model[0].weight[:2], model[0].bias[:2] = old.weight + 0.1, old.bias
                model[0].weight[2:] = scale
            laplace.start(model, samples=12)
            value = laplace.penalty()
            value.backward()
            values.append(value.item())
            assert model[0].weight.grad[:2].all()
            assert not model[0].weight.grad[2:].any()
            assert not model[0].bias.grad[2:].any()
            laplace.finish()
        assert values[0] == values[1] > 0
        learn(laplace, model, data(12, seed=1), samples=12)
        move(model)
        laplace.start(model, samples=12)
        model.zero_grad()
        laplace.penalty().backward()
        assert model[0].weight.grad.all()


def test_parameters_that_take_no_gradient_are_left_alone():
    model, laplace = network(), KroneckerLaplace()
    learn(laplace, model, data())
    move(model)
    laplace.start(model)
    everything = laplace.penalty().item()
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    laplace.finish()
    laplace.start(model)
    value = laplace.penalty()
    assert 0 < value.item() < everything
    model.zero_grad()
    value.backward()
    assert model[0].weight.grad is None
    assert model[3].weight.grad is not None
    assert laplace.report()["0.weight"].treatment == "left alone"
    learn(laplace, model, data(seed=1))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    learn(laplace, model, data(seed=2))


def test_wrong_moments_and_wrong_losses():
    laplace = KroneckerLaplace()
    with pytest.raises(StateError, match="outside of an experience"):
        laplace.penalty()
    with pytest.raises(StateError, match="no model yet"):
        laplace.report()
    laplace.criterion = nn.MSELoss()
    with pytest.raises(ConfigurationError, match="MSELoss"):
        laplace.start(network())
    with pytest.raises(ModelError, match="no layer is covered"):
        KroneckerLaplace().start(nn.Sequential(nn.LayerNorm(3)))
    with pytest.raises(ConfigurationError, match="nowhere"):
        KroneckerLaplace(exclude=["nowhere"]).start(network())
    KroneckerLaplace(0.0, exclude=["3"]).start(network())


def test_a_layer_that_is_never_called_is_warned_of_and_has_no_term():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.spare = nn.Linear(4, CLASSES), nn.Linear(4, CLASSES)

        def forward(self, x):
            return self.first(x) + (self.spare(x) if self.training else 0)

    model, laplace = Spare(), KroneckerLaplace(mode="online")
    with pytest.warns(UserWarning, match="layer 'spare' was trained but never called"):
        learn(laplace, model, data())
    assert "none yet" in laplace.report()["spare.weight"].reason
    model.eval()
    learn(laplace, model, data(seed=1))
    model.spare.requires_grad_(False)
    learn(laplace, model, data(seed=2))


def test_report_names_every_parameter_and_the_bytes():
    model, laplace = network(), KroneckerLaplace(fisher="empirical", mode="online", exclude=["3"])
    learn(laplace, model, data())
    report = laplace.report()
    assert {row.parameter: row.treatment for row in report} == {
        "0.weight": "penalised",
        "0.bias": "penalised",
        "1.weight": "penalised",
        "1.bias": "penalised",
        "3.weight": "left alone",
        "3.bias": "left alone",
    }
    assert report["0.bias"].layer == "0"
    assert report["1.bias"].reason == "diagonal"
    assert report["3.bias"].reason == "excluded"
    text = str(report)
    assert "true labels" in text
    assert "cross terms" in text
    assert f"experience 0: {8 * (25 + 25 + 25 + 4 * 5)} bytes" in text
