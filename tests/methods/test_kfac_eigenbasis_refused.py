"""Steps in the eigenbasis of Kronecker factors: options, optimizers and closures that are refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from avalanche_gradproj.errors import ConfigurationError
from avalanche_gradproj.methods.kfac import KroneckerLaplace
from tests.methods.kfac_eigenbasis_setup import MODELS, adam, data, distance, learned, snapshot, steps

pytestmark = pytest.mark.usefixtures("double")


@pytest.mark.parametrize(
    ("options", "named"), [({}, "mode='separate'"), ({"mode": "online", "eigenbasis": 1}, "eigenbasis=1")]
)
def test_options_refused_by_name(options, named):
    with pytest.raises(ConfigurationError, match=f"eigenbasis.*{named}" if "mode" not in options else named):
        KroneckerLaplace(**{"eigenbasis": True, **options})


def test_optimizers_refused_by_name_before_the_first_experience():
    model, laplace = MODELS["linear"](), KroneckerLaplace(mode="online", eigenbasis=True)
    with pytest.raises(ConfigurationError, match=r"needs the optimizer.*experience\(model, optimizer\)"):
        laplace.start(model)
    with pytest.raises(ConfigurationError, match=r"LBFGS needs 'closure'.*Adam"):
        laplace.start(model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ConfigurationError, match=r"is a list, expected a torch.optim.Optimizer"):
        laplace.start(model, [torch.optim.SGD(model.parameters())])
    optimizer = adam(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    with laplace.experience(model, optimizer):
        steps(laplace, model, optimizer, data(0), 2)
    laplace.consolidate(model, [data(0)[0]])
    with laplace.experience(model, optimizer):
        steps(laplace, model, optimizer, data(0), 2)
        scheduler.step()
        steps(laplace, model, optimizer, data(0), 1)
    neutral = KroneckerLaplace(0.0, mode="online", eigenbasis=True)
    with neutral.experience(model):
        pass


@pytest.mark.parametrize("by_name", [False, True])
def test_a_closure_is_refused_before_anything_changed(by_name):
    model, laplace = learned()
    optimizer, calls = adam(model), []
    with laplace.experience(model, optimizer, samples=60):
        F.cross_entropy(model(data(9)[0]), data(9)[1]).backward()
        before, gradients = snapshot(model), [p.grad for p in model.parameters()]
        closure = {"closure": lambda: calls.append(1)}
        with pytest.raises(ConfigurationError, match=r"closure.*eigenbasis=False"):
            optimizer.step(**closure) if by_name else optimizer.step(*closure.values())
        assert distance(before, snapshot(model)) == 0
        assert all(p.grad is own for p, own in zip(model.parameters(), gradients, strict=True))
        optimizer.step(closure=None)
    assert not calls
