"""XK-FAC: its penalty by hand, its weights, what holds BatchNorm, its state, training in a plain loop."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from avalanche_gradproj.errors import ConfigurationError, DataError, ModelError, NonFiniteError, StateError
from avalanche_gradproj.methods.kfac import KroneckerLaplace
from avalanche_gradproj.methods.xkfac import ExtendedKroneckerLaplace

CLASSES, N = 3, 24


@pytest.fixture(autouse=True)
def _double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def network():
    return nn.Sequential(
        nn.Linear(4, 6),
        nn.BatchNorm1d(6),
        nn.Tanh(),
        nn.Linear(6, 5, bias=False),
        nn.BatchNorm1d(5),
        nn.Tanh(),
        nn.Linear(5, CLASSES),
    )


def data(seed=0, n=N):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=generator) * 1.5 + 0.7, torch.randint(CLASSES, (n,), generator=generator)


def batches(seed=0, size=8):
    x, y = data(seed)
    return list(zip(x.split(size), y.split(size), strict=True))


def train(xkfac, model, seed, *, steps=4, lr=0.05, optimizer=None, learn=True):
    """One experience in a plain loop; returns the objectives of its steps."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=lr, momentum=0.5)
    objectives = []
    model.train()
    with xkfac.experience(model, optimizer, samples=N, batches=batches(seed)):
        for x, y in batches(seed) * steps:
            optimizer.zero_grad()
            objective = xkfac.objective(F.cross_entropy(model(x), y))
            objective.backward()
            optimizer.step()
            objectives.append(objective.item())
    if learn:
        xkfac.consolidate(model, batches(seed))
    return objectives


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


def test_frozen_batch_norm_stays_as_the_first_experience_left_it():
    model = network()
    xkfac = ExtendedKroneckerLaplace(batchnorm="freeze")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05, weight_decay=0.1)
    before = copy.deepcopy(model[1].state_dict())
    train(xkfac, model, 0, optimizer=optimizer)
    first = copy.deepcopy(model[1].state_dict())
    assert all(not torch.equal(before[key], first[key]) for key in first)
    weights = model[0].weight.clone()
    train(xkfac, model, 1, optimizer=optimizer)
    assert all(torch.equal(value, first[key]) for key, value in model[1].state_dict().items())
    assert not torch.equal(model[0].weight, weights)
    assert model[1].training
    assert model[1].weight.requires_grad
    assert xkfac.report()["1.weight"].treatment == "frozen"
    assert "held from the second experience on: 1, 4" in str(xkfac.report())
    # Samples do not depend on each other: one product a layer.
    assert {len(layer.terms) for layer in xkfac._memory.forms[0].layers.values()} == {1}


def test_which_layers_have_terms_across_samples():
    def counts(**settings):
        xkfac = ExtendedKroneckerLaplace(**settings)
        train(xkfac, network(), 0)
        (form,) = xkfac._memory.forms
        return {name: len(layer.terms) for name, layer in form.layers.items()}, sorted(form.diagonal)

    assert counts() == ({"0": 2, "3": 1, "6": 1}, [])
    assert counts(inter_example=False) == ({"0": 1, "3": 1, "6": 1}, [])
    norms = ["1.bias", "1.weight", "4.bias", "4.weight"]
    assert counts(batchnorm="track") == ({"0": 2, "3": 2, "6": 1}, norms)
    assert counts(batchnorm="track", inter_example=False) == ({"0": 1, "3": 1, "6": 1}, norms)
    assert counts(exclude=["1"]) == ({"0": 2, "3": 1, "6": 1}, [])
    assert counts(exclude=["4"]) == ({"0": 1, "3": 1, "6": 1}, [])


class Activated(nn.Module):
    """A BatchNorm behind an activation, and one without statistics."""

    def __init__(self, track=True):
        super().__init__()
        self.first, self.norm = nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=track)
        self.second, self.paired, self.out = nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.out(torch.tanh(self.paired(self.second(self.norm(torch.tanh(self.first(x)))))))


def test_unpaired_batch_norms_are_refused_before_training_or_held():
    model = Activated()
    before = copy.deepcopy(model.state_dict())
    xkfac = ExtendedKroneckerLaplace()
    with pytest.raises(ModelError, match=r"BatchNorm 'norm'.*not the output.*unpaired='freeze'"):
        xkfac.start(model, samples=N, batches=batches())
    with pytest.raises(ModelError, match="BatchNorm 'norm'"):  # without data, as soon as there is some
        xkfac.consolidate(model, batches())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert xkfac.experiences == 0
    held = ExtendedKroneckerLaplace(unpaired="freeze")
    train(held, model, 0)
    first = copy.deepcopy(model.state_dict())
    train(held, model, 1)
    assert all(torch.equal(value, first[f"norm.{key}"]) for key, value in model.norm.state_dict().items())
    assert not torch.equal(model.paired.weight, first["paired.weight"])
    with pytest.raises(ModelError, match=r"'norm' keeps no running statistics"):
        ExtendedKroneckerLaplace(batchnorm="freeze").start(Activated(track=False))
    with pytest.raises(ModelError, match=r"'norm' keeps no running statistics.*neither merged nor held"):
        ExtendedKroneckerLaplace(unpaired="freeze").start(Activated(track=False), batches=batches())
    train(ExtendedKroneckerLaplace(exclude=["norm"]), Activated(), 0)
    with pytest.raises(ConfigurationError, match="'second'"):
        ExtendedKroneckerLaplace(pairs={"norm": "second"}).start(Activated(), batches=batches())


def test_reparameterisation_happens_once_an_experience_and_keeps_the_function():
    model = network()
    xkfac = ExtendedKroneckerLaplace()
    optimizer = torch.optim.Adam(model.parameters())
    train(xkfac, model, 0, optimizer=optimizer)
    x, _ = data(1)
    before, weight = model.eval()(x), model[0].weight.clone()
    assert model[0].weight in optimizer.state
    xkfac.start(model, optimizer, samples=N, batches=batches(1))
    torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-9)
    assert not torch.equal(model[0].weight, weight)
    assert model[0].weight not in optimizer.state
    assert model[6].weight in optimizer.state
    again = model[0].weight.clone()
    xkfac.finish()
    xkfac.start(model, optimizer, samples=N, batches=batches(2))  # another piece of the same experience
    assert torch.equal(model[0].weight, again)
    without = ExtendedKroneckerLaplace(reparameterise=False)
    train(without, model, 0)
    again = model[0].weight.clone()
    without.start(model, samples=N)
    assert torch.equal(model[0].weight, again)


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


def test_no_reference_to_the_model_is_kept():
    model = network()
    xkfac = ExtendedKroneckerLaplace()
    train(xkfac, model, 0)
    train(xkfac, model, 1)
    pointer = weakref.ref(model)
    del model
    gc.collect()
    assert pointer() is None


def test_report_names_pairs():
    xkfac = ExtendedKroneckerLaplace()
    train(xkfac, network(), 0)
    report = xkfac.report()
    assert {row.parameter for row in report} == {name for name, _ in network().named_parameters()}
    for name in ("0.weight", "0.bias", "1.weight", "1.bias"):
        row = report[name]
        assert (row.treatment, row.layer) == ("penalised", "0")
        assert "BatchNorm '1'" in row.reason
    assert "1 (behind 0), 4 (behind 3)" in str(report)
