"""Factors of sampled, exact and true labels: what they converge to, masked classes, losses that do not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from avalanche_gradproj.errors import ConfigurationError, DataError, NonFiniteError
from avalanche_gradproj.methods.kfac_labels import check_criterion
from tests.methods.dense_sample_loss import CLASSES, linear
from tests.methods.kfac_factors_setup import collect, pair

pytestmark = pytest.mark.usefixtures("double")


def test_sampled_converges_to_exact_as_one_over_the_root_of_draws():
    model, x = linear(), torch.randn(4, 4)
    exact = {name: pair(collect(model, [x]), name)[1] for name in ("0", "2")}
    errors = {}
    for draws in (25, 2500):
        squares = []
        for seed in range(12):
            sums = collect(model, [x.repeat(draws, 1)], fisher="sampled", seed=seed)
            squares.append([np.sum((pair(sums, name)[1] - exact[name]) ** 2) for name in exact])
        errors[draws] = np.sqrt(np.mean(squares, axis=0))
    ratios = errors[25] / errors[2500]
    assert ((ratios > 6.5) & (ratios < 15)).all()  # 10 but for the spread of 12 seeds
    assert (errors[2500] < 0.05 * np.array([np.linalg.norm(b) for b in exact.values()])).all()


def test_empirical_takes_the_true_labels_and_the_given_loss():
    model, x, y = linear(), torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    a, b = pair(collect(model, [(x[:4], y[:4]), (x[4:], y[4:])], fisher="empirical"), "2")
    probabilities = model(x).softmax(1).detach().numpy()
    g = probabilities - np.eye(3)[y.numpy()]
    np.testing.assert_allclose(b[0], g.T @ g / 6, atol=1e-12)
    for criterion in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum"), None):
        again = pair(collect(model, [(x, y)], fisher="empirical", criterion=criterion), "2")[1]
        np.testing.assert_allclose(again, b, atol=1e-12)
    targets = torch.randn(6, CLASSES)

    def squared(z, target):
        return (z - target).square().sum(1).mean()

    _, b = pair(collect(model, [(x, targets)], fisher="empirical", criterion=squared), "2")
    g = 2 * (model(x).detach() - targets).numpy()
    np.testing.assert_allclose(b[0], g.T @ g / 6, atol=1e-12)
    assert a.shape == (1, 6, 6)


class Masked(nn.Module):
    """Only the first classes have finite logits."""

    def __init__(self, fill=-float("inf")):
        super().__init__()
        self.hidden, self.out, self.fill = nn.Linear(4, 5), nn.Linear(5, CLASSES + 2), fill
        self.shift = nn.Parameter(torch.randn(5))

    def forward(self, x):
        mask = torch.arange(CLASSES + 2) >= CLASSES
        return self.out(torch.tanh(self.hidden(x)) + self.shift).masked_fill(mask, self.fill)


@pytest.mark.parametrize("fisher", ["exact", "sampled", "empirical"])
def test_classes_that_are_masked_have_no_part(fisher):
    model, x, y = Masked(), torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    sums = collect(model, [(x, y)], fisher=fisher)
    a, b = pair(sums, "out")
    assert not b[0, CLASSES:].any()
    model.fill = -1e4  # no probability either
    again = collect(model, [(x, y)], fisher=fisher)
    np.testing.assert_allclose(b, pair(again, "out")[1], atol=1e-12)
    np.testing.assert_allclose(pair(sums, "hidden")[1], pair(again, "hidden")[1], atol=1e-12)
    np.testing.assert_allclose(sums.diagonal["shift"], again.diagonal["shift"], atol=1e-12)
    assert b[0, :CLASSES].any()
    assert a.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_other_logits_that_are_not_finite_are_refused(value):
    with pytest.raises(NonFiniteError, match="logit"):
        collect(Masked(value), [torch.randn(3, 4)])

    class Nothing(nn.Sequential):
        def forward(self, x):
            logits = super().forward(x)
            return torch.where(torch.arange(len(x))[:, None] == 1, -float("inf"), logits)

    with pytest.raises(NonFiniteError, match="all of a sample are masked"):
        collect(Nothing(nn.Linear(4, CLASSES)), [torch.randn(3, 4)])


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        (torch.ones(2, 4).double(), "true labels"),
        ((torch.ones(2, 4).double(), torch.tensor([0, 3])), "labels from 0 to 3"),
        ((torch.ones(2, 4).double(), torch.randn(2, 3)), "expected"),
    ],
)
def test_labels_refused(batch, match):
    with pytest.raises(DataError, match=match):
        collect(linear(), [batch], fisher="empirical")


class Squared(nn.CrossEntropyLoss):
    """A subclass that computes something else."""

    def forward(self, z, y):
        return super().forward(z, y) ** 2


class Named(nn.CrossEntropyLoss):
    """A subclass that computes the same."""


@pytest.mark.parametrize(
    ("criterion", "fisher", "accepted"),
    [
        (None, "sampled", True),
        (nn.CrossEntropyLoss(), "sampled", True),
        (nn.CrossEntropyLoss(label_smoothing=0.1), "exact", True),
        (F.cross_entropy, "exact", True),
        (nn.MSELoss(), "sampled", False),
        (nn.CrossEntropyLoss(reduction="sum"), "exact", False),
        (nn.CrossEntropyLoss(weight=torch.ones(3)), "sampled", False),
        (Squared(), "exact", False),
        (Squared(), "empirical", True),
        (Named(), "sampled", True),
        (nn.MSELoss(), "empirical", True),
        (nn.CrossEntropyLoss(reduction="none"), "empirical", False),
    ],
)
def test_losses(criterion, fisher, accepted):
    if accepted:
        check_criterion(criterion, fisher)
    else:
        with pytest.raises(ConfigurationError, match="criterion"):
            check_criterion(criterion, fisher)
