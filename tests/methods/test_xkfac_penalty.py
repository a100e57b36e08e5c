"""XK-FAC's penalty by hand, its weights, and what it holds when statistics drift."""

from __future__ import annotations

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from avalanche_gradproj.methods.kfac import KroneckerLaplace
from avalanche_gradproj.methods.xkfac import ExtendedKroneckerLaplace
from tests.methods.xkfac_setup import CLASSES, N, batches, data, network, train

pytestmark = pytest.mark.usefixtures("double")


def terms_of(xkfac):
    """The dense form of each layer, by name, and its centre: sums of Kronecker products, rows of [W, b] in order."""
    found = {}
    for form in xkfac._memory.forms:
        for name, layer in form.layers.items():
            dense = sum(np.kron(term.left.matrix[0].numpy(), _whole(term.right)) for term in layer.terms)
            found.setdefault(name, []).append((form.weight * dense, layer.centre[0].numpy()))
    return found


def _whole(factor):
    matrix = factor.matrix[0].numpy()
    return matrix if factor.rest is None else matrix @ matrix.T + factor.rest[0].item() * np.eye(len(matrix))


def test_penalty_and_its_gradient_by_hand():
    """Value and gradient of one layer's term, with all that depends on the mini-batch's statistics, written out."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, CLASSES))
    xkfac = ExtendedKroneckerLaplace(2.0, adaptive=False, reparameterise=False, exclude=["3"], damping=0.3)
    train(xkfac, model, 0)
    xkfac.start(model, samples=N)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.train()
    x, _ = data(5)
    for parameter in model.parameters():
        parameter.grad = None
    with xkfac.active():
        model(x)
        value = xkfac.penalty()
    value.backward()

    ((dense, centre),) = terms_of(xkfac)["0"]
    layer, norm = model[0], model[1]
    a, w, b = x.numpy(), layer.weight.detach().numpy(), layer.bias.detach().numpy()
    gamma, beta = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    h = a @ w.T + b
    m, v = h.mean(0), h.var(0)
    s = np.sqrt(v + norm.eps)
    merged = np.concatenate([(gamma / s)[:, None] * w, (gamma * (b - m) / s + beta)[:, None]], axis=1)
    difference = (merged - centre).reshape(-1)
    # strength 2 times N samples are folded into the form; damping counts them too; the loss is a mean over N
    curvature = (dense + 0.3 * 2.0 * N * np.eye(len(dense))) / N
    g = (curvature @ difference).reshape(merged.shape)
    assert value.item() == pytest.approx(0.5 * difference @ curvature @ difference, rel=1e-10)
    gw, gb = g[:, :-1], g[:, -1]
    of_scale = (gw * w).sum(1) + gb * (b - m)  # derivative by gamma / s
    of_mean, of_variance = -gb * gamma / s, of_scale * gamma * -0.5 / s**3
    of_h = of_mean / N + of_variance * 2.0 * (h - m) / N
    np.testing.assert_allclose(norm.weight.grad.numpy(), of_scale / s, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(norm.bias.grad.numpy(), gb, rtol=1e-9, atol=1e-12)
    expected = (gamma / s)[:, None] * gw + of_h.T @ a
    np.testing.assert_allclose(layer.weight.grad.numpy(), expected, rtol=1e-9, atol=1e-11)
    # The statistics take with them what a bias adds: it has no effect.
    np.testing.assert_allclose(layer.bias.grad.numpy(), gb * gamma / s + of_h.sum(0), rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(layer.bias.grad.numpy(), 0, atol=1e-10)
    assert np.abs(expected).max() > 1e-3


def test_in_evaluation_mode_running_statistics_are_used():
    model = network()
    xkfac = ExtendedKroneckerLaplace(1.0, adaptive=False, reparameterise=False)
    train(xkfac, model, 0)
    xkfac.start(model, samples=N)
    model.eval()
    with xkfac.active():
        assert xkfac.penalty().item() == pytest.approx(0, abs=1e-20)
        with torch.no_grad():
            model[1].running_mean += 0.5
        assert xkfac.penalty().item() > 1e-5  # statistics are held too


@pytest.mark.parametrize("mode", ["separate", "online"])
def test_without_batch_norm_it_is_kfac(mode):
    """Bit for bit: the same factors, the same penalty, the same weights after training."""

    def plain():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Unflatten(1, (1, 2, 2)),
            nn.Conv2d(1, 4, 2),
            nn.Flatten(),
            nn.LayerNorm(4),
            nn.Tanh(),
            nn.Linear(4, CLASSES),
        )

    kfac, xkfac = KroneckerLaplace(2.0, mode=mode), ExtendedKroneckerLaplace(2.0, mode=mode, adaptive=False)
    one, other = plain(), plain()
    for seed in range(3):
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (one, other)]
        train(xkfac, other, seed, optimizer=optimizers[1])
        with kfac.experience(one, samples=N):
            for x, y in batches(seed) * 4:
                optimizers[0].zero_grad()
                (F.cross_entropy(one(x), y) + kfac.penalty()).backward()
                optimizers[0].step()
        kfac.consolidate(one, batches(seed))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    forms = [[form.tensors() for form in method._memory.forms] for method in (kfac, xkfac)]
    assert all(torch.equal(a, b) for x, y in zip(*forms, strict=True) for a, b in zip(x, y, strict=True))
    start = nn.utils.parameters_to_vector(plain().parameters())
    assert not torch.equal(start, nn.utils.parameters_to_vector(one.parameters()))


def test_balanced_weights_count_every_experience_equally():
    """With T learned: (loss + sum of their penalties) / (T + 1), whatever their sizes."""
    model = network()
    xkfac = ExtendedKroneckerLaplace(adaptive=False, reparameterise=False, mode="separate")
    for experience, size in enumerate((N, 8)):
        train(xkfac, model, experience, learn=False)
        x, y = data(experience, size)
        xkfac.consolidate(model, [(x, y)])
    assert [form.weight for form in xkfac._memory.forms] == [1.0, 1.0]
    xkfac.start(model, samples=1000, batches=batches(7))
    x, y = data(9)
    model.train()
    with torch.no_grad():
        model[0].weight += 0.3
    with xkfac.active():
        loss = F.cross_entropy(model(x), y)
        objective = xkfac.objective(loss).item()
    total = 0.0
    with torch.no_grad():
        weights = dict(zip(("0", "3"), _merged_by_hand(model, x), strict=True))
        weights["6"] = torch.cat([model[6].weight, model[6].bias[:, None]], 1).numpy()
    for name, forms in terms_of(xkfac).items():
        for dense, centre in forms:
            difference = (weights[name] - centre).reshape(-1)
            total += 0.5 * difference @ dense @ difference
    assert objective == pytest.approx((loss.item() + total) / 3, rel=1e-9)
    assert total > 1e-2


def _merged_by_hand(model, x):
    found = []
    for layer, norm in ((model[0], model[1]), (model[3], model[4])):
        h = layer(x)
        s = torch.sqrt(h.var(0, correction=0) + norm.eps)
        bias = (0 if layer.bias is None else layer.bias) - h.mean(0)
        found.append(
            torch.cat([(norm.weight / s)[:, None] * layer.weight, (norm.weight * bias / s + norm.bias)[:, None]], 1)
        )
        x = torch.tanh((h - h.mean(0)) / s * norm.weight + norm.bias)
    return [matrix.numpy() for matrix in found]


def test_adaptive_scales_multiply_loss_and_penalty():
    model = network()
    xkfac = ExtendedKroneckerLaplace(3.0, reparameterise=False)
    train(xkfac, model, 0)
    xkfac.start(model, samples=N, batches=batches(1))
    means = None
    model.train()
    with xkfac.active():
        for step in range(3):
            x, y = data(20 + step)
            with torch.no_grad():
                model[3].weight += 0.05
            loss = F.cross_entropy(model(x), y)
            penalty = xkfac.penalty().item()
            model(x)
            objective = xkfac.objective(loss).item()
            present = np.array([loss.item(), penalty])
            means = present if means is None else 0.95 * means + 0.05 * present
            assert objective == pytest.approx(2 * (means * present).sum() / means.sum(), rel=1e-9)


def test_merged_penalty_holds_the_function_when_statistics_drift():
    """New data with another mean and scale: the old function is kept better than by K-FAC on weights alone."""

    def shifted(seed):
        x, y = data(seed, 64)
        return x * 3.0 - 4.0, y

    changes = {}
    for name, xkfac in (
        ("merge", ExtendedKroneckerLaplace(30.0, adaptive=False)),
        ("track", ExtendedKroneckerLaplace(30.0, adaptive=False, batchnorm="track")),
    ):
        torch.manual_seed(1)
        model = network()
        train(xkfac, model, 0, steps=40)
        model.eval()
        old = model(data(0)[0]).softmax(1).detach()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        x, y = shifted(1)
        model.train()
        with xkfac.experience(model, optimizer, samples=N, batches=[(x, y)]):
            for _ in range(300):
                optimizer.zero_grad()
                xkfac.objective(F.cross_entropy(model(x), y)).backward()
                optimizer.step()
        model.eval()
        changes[name] = (model(data(0)[0]).softmax(1) - old).abs().mean().item()
    assert changes["merge"] < 0.5 * changes["track"]


def test_online_terms_are_averaged_each_with_its_own():
    """B sums to a mean with the weights, A too, first terms with first and second with second."""
    models, single = [], []
    model = network()
    xkfac = ExtendedKroneckerLaplace([1.0, 2.0, 3.0], adaptive=False, reparameterise=False)
    for seed in range(3):
        train(xkfac, model, seed)
        models.append(copy.deepcopy(model))
    for seed, (own, strength) in enumerate(zip(models, (1.0, 2.0, 3.0), strict=True)):
        alone = ExtendedKroneckerLaplace(strength, adaptive=False)
        alone.experiences = seed  # the labels that are drawn depend on it
        alone._last_samples = N
        alone._samples = N
        alone.consolidate(own, batches(seed))
        single.append(alone._memory.forms[0].layers["0"].terms)
    terms = xkfac._memory.forms[0].layers["0"].terms
    assert len(terms) == 2
    for index, term in enumerate(terms):
        for side in ("left", "right"):
            parts = [_whole(getattr(own[index], side)) for own in single]
            mean = sum(share * part for share, part in zip((1 / 6, 2 / 6, 3 / 6), parts, strict=True))
            np.testing.assert_allclose(_whole(getattr(term, side)), mean, rtol=1e-10, atol=1e-14)
            assert all(np.abs(a - b).max() > 1e-9 for a, b in pairwise(parts))
