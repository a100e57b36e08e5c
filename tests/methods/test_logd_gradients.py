"""LOGD's old gradients: one pass over all experiences where it will do, one pass each elsewhere."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from avalanche_gradproj.methods.logd_core import LayerwiseGradientDecomposition
from tests.methods.logd_setup import CLASSES, FEATURES, MODELS, convolutional, data, fresh, learned, reference


def memory_of(logd, dtype=torch.float64):
    """The memory's inputs in the model's type."""
    logd.memory._keep([(x.to(dtype), y, t) for x, y, t in logd.memory._samples])


def start_again(logd, model):
    memory_of(logd)
    logd.start(model)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", MODELS)
def test_one_pass_equals_one_pass_each(name, reduction):
    def criterion(output, target):
        return F.cross_entropy(output, target, reduction=reduction)

    model = fresh(name)
    logd = learned(model.float(), criterion=criterion)
    model.double()
    start_again(logd, model)
    assert logd._old.single_pass, logd._old.reason
    assert "one pass over all of them" in str(logd.report())
    expected = reference(logd, model, criterion)
    logd._gradients.rows.fill_(torch.nan)
    logd._old.compute()
    for parameter, value in expected.items():
        found = logd._gradients.view(slice(0, 3), parameter)
        torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-12, msg=lambda text, n=parameter: f"{n}: {text}")
    logd._old._split = None
    logd._gradients.rows.fill_(torch.nan)
    logd._old.compute()
    for parameter, value in expected.items():
        torch.testing.assert_close(logd._gradients.view(slice(0, 3), parameter), value, rtol=1e-9, atol=1e-12)


class Standardised(nn.Module):
    """Samples meet in the middle: no layer says so."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(FEATURES, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        x = self.one(x)
        return self.two(x - x.mean(0))


class Elsewhere(nn.Module):
    """A weight is used outside of its layer."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(FEATURES, CLASSES)

    def forward(self, x):
        return self.one(x) + F.linear(x.square(), self.one.weight)


class Scaled(nn.Sequential):
    """A parameter that is in no matrix layer."""

    def __init__(self):
        super().__init__(nn.Linear(FEATURES, CLASSES))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return super().forward(x) * self.scale


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Standardised, "influence each other"),
        (Elsewhere, "outside of its layer"),
        (Scaled, "'scale' is in no matrix layer"),
        (lambda: convolutional(norm=True), "BatchNorm in training mode"),
    ],
)
def test_where_one_pass_will_not_do_each_experience_gets_its_own(make, reason):
    torch.manual_seed(0)
    model = make()
    logd = learned(model)
    assert not logd._old.single_pass
    assert reason in str(logd.report())
    expected = reference(logd, model)
    logd._old.compute()
    for parameter, value in expected.items():
        torch.testing.assert_close(logd._gradients.view(slice(0, 3), parameter), value)


def test_batchnorm_put_into_training_mode_after_the_start():
    model = fresh("norm", torch.float32)
    model.eval()
    for parameter in model[2].parameters():
        parameter.requires_grad_(False)
    logd = learned(model)
    assert logd._old.single_pass
    model.train()
    assert not logd._old.single_pass
    expected = reference(logd, model)
    logd._old.compute()
    for parameter in logd._gradients.parameters:
        found = logd._gradients.view(slice(0, 3), parameter)
        torch.testing.assert_close(found, expected[parameter])


def test_memory_passes_leave_statistics_gradients_and_modes():
    model = fresh("norm", torch.float32)
    logd = learned(model)
    x, y = data(9)
    F.cross_entropy(model(x), y).backward()
    before = copy.deepcopy(model.state_dict())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    logd._old.compute()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())
    assert all(module.training for module in model.modules())
    assert model[2].track_running_stats

    def fails(output, target):
        raise ZeroDivisionError

    logd._old._criterion = fails
    with pytest.raises(ZeroDivisionError):
        logd._old.compute()
    assert model[2].track_running_stats


def test_experiences_of_different_input_shapes():
    model = nn.Sequential(nn.AdaptiveAvgPool1d(3), nn.Linear(3, CLASSES))
    logd = LayerwiseGradientDecomposition(2, criterion=F.cross_entropy)
    for size in (6, 9):
        logd.consolidate(model, [(torch.randn(2, size), torch.tensor([0, 1]))])
    logd.start(model)
    assert "differ in shape" in str(logd.report())
    logd._old.compute()
    assert bool((logd._gradients.rows[:2].norm(dim=1) > 0).all())
