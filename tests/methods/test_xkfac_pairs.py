"""Pairs of XK-FAC that are found, and those and other settings that are refused before training."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from avalanche_gradproj.errors import ConfigurationError, ModelError, StateError
from avalanche_gradproj.methods.xkfac import ExtendedKroneckerLaplace
from tests.methods.xkfac_relu_setup import CLASSES, N, batches, network, train

pytestmark = pytest.mark.usefixtures("double")


def test_a_batch_norm_is_excluded_whole_or_not_at_all():
    with pytest.raises(ConfigurationError, match=r"'1\.bias' and not all of BatchNorm '1'"):
        ExtendedKroneckerLaplace(exclude=["1.bias"]).start(network(), batches=batches())
    model = network()
    xkfac = ExtendedKroneckerLaplace(exclude=["1.bias", "1.weight"])
    train(xkfac, model, 0)
    weight, norm = model[0].weight.clone(), model[1].weight.clone()
    xkfac.start(model, samples=N, batches=batches(1))
    assert torch.equal(model[0].weight, weight)
    assert torch.equal(model[1].weight, norm)
    assert xkfac.report()["1.weight"].treatment == "left alone"


def test_a_given_pair_that_keeps_no_statistics_is_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.ReLU(), nn.Linear(6, 3))
    with pytest.raises(ConfigurationError, match=r"BatchNorm '1' and layer '0'.*no running statistics"):
        ExtendedKroneckerLaplace(pairs={"1": "0"}).start(model, samples=N, batches=batches())


def test_maximum_pooling_between_layer_and_batch_norm_is_no_pair():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.out = nn.Conv1d(1, 3, 1), nn.BatchNorm1d(3), nn.Linear(6, CLASSES)

        def forward(self, x):
            return self.out(self.norm(F.max_pool1d(self.conv(x[:, None]), 2)).flatten(1))

    with pytest.raises(ConfigurationError, match="'norm' and layer 'conv'"):
        ExtendedKroneckerLaplace(pairs={"norm": "conv"}).start(Pooled(), samples=N, batches=batches())


def test_what_cannot_work_is_refused_before_training():
    with pytest.raises(ConfigurationError, match="n_samples=1"):
        ExtendedKroneckerLaplace(n_samples=1).start(network(), samples=N, batches=batches())
    ExtendedKroneckerLaplace(n_samples=1, batchnorm="freeze").start(network(), samples=N, batches=batches())
    with pytest.raises(StateError, match="outside of an experience"):
        ExtendedKroneckerLaplace().objective(torch.tensor(1.0))


@pytest.mark.parametrize("mask", [-1000.0, -1e11, float("-inf")])
def test_masked_logits_hide_no_skip_connection(mask):
    """Also where most of them are masked, by large numbers."""

    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm, self.out = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, CLASSES)

        def forward(self, x):
            h = self.layer(x)
            logits = self.out(torch.relu(self.norm(h)) + h)
            return torch.cat([torch.full_like(logits[:, :2], mask), logits[:, 2:]], 1)

    with pytest.raises(ModelError, match=r"BatchNorm 'norm'.*used elsewhere"):
        ExtendedKroneckerLaplace().start(Skip(), samples=N, batches=batches())


def test_functional_dropout_hides_no_pair():
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            return F.dropout(self.net(x), 0.5)

    xkfac = ExtendedKroneckerLaplace()
    xkfac.start(Dropping(), samples=N, batches=batches())
    assert xkfac._plan.found == {"net.1": "net.0", "net.4": "net.3"}
