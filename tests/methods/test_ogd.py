"""OGD against a dense numpy Gram-Schmidt in float64: the basis, and the steps of every optimizer."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from avalanche_gradproj.methods.ogd import OrthogonalGradientDescent
from tests.methods.ogd_setup import OPTIMIZERS, Network, data, leak, train, two_experiences, vector


def dense_basis(vectors):
    """Gram-Schmidt in numpy, three passes; rows."""
    basis = []
    for row in vectors:
        rest = row.copy()
        for _ in range(3):
            for other in basis:
                rest -= (other @ rest) * other
        if np.linalg.norm(rest) > 1e-9 * np.linalg.norm(row):
            basis.append(rest / np.linalg.norm(rest))
    return np.array(basis)


def label_gradients(model, names, x, y):
    """The gradient of each true class's logit, one backward pass each."""
    parameters = dict(model.named_parameters())
    model.eval()
    rows = []
    for image, label in zip(x, y, strict=True):
        logit = model(image[None])[0, label]
        found = torch.autograd.grad(logit, [parameters[name] for name in names], allow_unused=True)
        rows.append(
            np.concatenate(
                [
                    np.zeros(parameters[name].numel()) if g is None else g.double().numpy().ravel()
                    for name, g in zip(names, found, strict=True)
                ]
            )
        )
    model.train()
    return np.array(rows)


def test_the_basis_over_two_experiences_is_gram_schmidt_of_the_drawn_samples():
    torch.manual_seed(0)
    model = Network().double()
    ogd = OrthogonalGradientDescent(6, seed=3)
    names, rows, drawn = [name for name, _ in model.named_parameters()], [], []
    for t in range(2):
        x, y = data(t)
        with ogd.experience(model, optimizer := torch.optim.SGD(model.parameters(), lr=0.1)):
            train(model, optimizer, x, y, ogd, epochs=1)
        chosen = ogd.draw(40)
        drawn.append(sorted(chosen.tolist()))
        rows.append(label_gradients(model, names, x[chosen], y[chosen]))
        batches = [(x[part], y[part]) for part in chosen.split(4)]
        ogd.consolidate(model, batches)
    assert list(ogd.shapes) == names
    assert list(range(6)) != drawn[0] != drawn[1]
    np.testing.assert_allclose(ogd.vectors.numpy(), dense_basis(np.concatenate(rows)), atol=1e-10)
    assert ogd.bytes_held == 12 * len(rows[0][0]) * 8 + 12 * 12 * 8


@pytest.mark.parametrize(("target", "classes"), [("ave", 1), ("all", 4)])
def test_other_targets_span_what_they_say(target, classes):
    torch.manual_seed(0)
    model, (x, y) = Network().double(), data(0)
    names = [name for name, _ in model.named_parameters()]
    ogd = OrthogonalGradientDescent(8, target=target)
    ogd.consolidate(model, [(x, y)])
    samples = 8 // classes
    every = np.stack([label_gradients(model, names, x[:samples], torch.full((samples,), c)) for c in range(4)], axis=1)
    expected = dense_basis(every.mean(1) if target == "ave" else every.reshape(8, -1))
    np.testing.assert_allclose(ogd.vectors.numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_leak_after_three_experiences(name, dtype):
    """Measured from outside: leak <= 1e-4 (float32), 1e-10 (float64), before the correction at the end too."""
    torch.manual_seed(0)
    model = Network().to(dtype)
    free = copy.deepcopy(model)
    optimizer, free_optimizer = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](free.parameters())
    ogd = OrthogonalGradientDescent(30)
    for t in range(3):
        x, y = data(t, dtype)
        names = list(ogd.shapes)
        basis = ogd.vectors.double().numpy().copy()
        if t > 0:
            start, free_start = vector(model, names), vector(free, names)
        ogd.start(model, optimizer)
        with ogd.active():
            train(model, optimizer, x, y, ogd)
        if t > 0:
            uncorrected = leak(start, vector(model, names), basis)
        ogd.finish()
        train(free, free_optimizer, x, y)
        if t > 0:
            protected, unprotected = (
                leak(start, vector(model, names), basis),
                leak(free_start, vector(free, names), basis),
            )
            print(f"{name} {dtype} t={t}: leak {protected:.1e} ({uncorrected:.1e}), unprotected {unprotected:.2f}")
            bound = 1e-4 if dtype == torch.float32 else 1e-10
            assert protected <= bound
            assert uncorrected <= bound
            assert ogd.leak["all"] == pytest.approx(protected, abs=bound / 10)
            assert unprotected > 0.1
            assert np.linalg.norm(vector(model, names) - start) > 1e-3  # it learns all the same
        ogd.consolidate(model, [(x, y)])


def test_momentum_follows_the_dense_reference():
    """v <- m v + P g, W <- W - lr v with P a dense float64 projector; the velocity of before is projected too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = torch.randn(24, 6, dtype=torch.float64), torch.randint(3, (24,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    names = [name for name, _ in model.named_parameters()]
    ogd = OrthogonalGradientDescent(10)
    with ogd.experience(model, optimizer):
        train(model, optimizer, x, y, ogd, epochs=1)
    basis = dense_basis(label_gradients(model, names, x[:10], y[:10]))
    ogd.consolidate(model, [(x, y)])
    projector = np.eye(basis.shape[1]) - basis.T @ basis
    velocity = projector @ np.concatenate(
        [optimizer.state[p]["momentum_buffer"].numpy().ravel() for p in model.parameters()]
    )
    twin, weights = copy.deepcopy(model), vector(model, names)
    with ogd.experience(model, optimizer):
        for _ in range(15):
            torch.nn.utils.vector_to_parameters(torch.from_numpy(weights), twin.parameters())
            gradient = torch.autograd.grad(nn.functional.cross_entropy(twin(x), y), list(twin.parameters()))
            velocity = 0.9 * velocity + projector @ np.concatenate([g.numpy().ravel() for g in gradient])
            weights = weights - 0.1 * velocity
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            ogd.transform()
            optimizer.step()
            ogd.after_step()
    np.testing.assert_allclose(vector(model, names), weights, atol=1e-11)


def test_remembered_logits_move_less():
    """What it is for: to first order the true-class logits of remembered samples stay."""
    drifts = []
    for n in (0, 40):
        torch.manual_seed(0)
        model = Network().double()
        ogd, (x, y), (new, labels) = OrthogonalGradientDescent(n), data(0), data(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with ogd.experience(model, optimizer):
            train(model, optimizer, x, y, ogd)
        ogd.consolidate(model, [(x, y)])
        model.eval()
        before = model(x)[torch.arange(40), y].detach()
        for _ in range(2):
            optimizer.zero_grad()
            with ogd.experience(model, optimizer):
                nn.functional.cross_entropy(model(new), labels).backward()
                ogd.transform()
                optimizer.step()
                ogd.after_step()
        drifts.append((model(x)[torch.arange(40), y] - before).norm().item())
    assert drifts[1] < 0.05 * drifts[0]


def test_neutral_does_nothing():
    torch.manual_seed(0)
    model = Network()
    twin = copy.deepcopy(model)
    ogd = OrthogonalGradientDescent(0)
    two_experiences(ogd, model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
    for t in range(2):
        train(twin, optimizer, *data(t, torch.float32), epochs=1)
    assert all(torch.equal(v, twin.state_dict()[k]) for k, v in model.state_dict().items())
    assert (ogd.bytes_held, ogd.leak, ogd.experiences) == (0, {}, 2)


@pytest.mark.parametrize(("rate", "bound"), [(0.05, 0.05), (0.002, 0.3)])
def test_half_precision_is_protected_as_far_as_its_type_can_say(rate, bound):
    """Small steps in bfloat16 are mostly rounding: no reason to suspect another plugin."""
    torch.manual_seed(0)
    model, ogd = Network().bfloat16(), OrthogonalGradientDescent(10)
    x, y = data(0, torch.bfloat16)
    ogd.consolidate(model, [(x, y)])
    assert ogd.vectors.dtype == torch.float32
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ogd.experience(model, optimizer):
            train(model, optimizer, *data(1, torch.bfloat16), ogd)
    print(f"bfloat16, rate {rate}: leak {ogd.leak['all']:.1e}")
    assert ogd.leak["all"] < bound


def test_changes_after_the_method_are_announced_and_taken_back():
    torch.manual_seed(0)
    model, ogd, (x, y) = Network(), OrthogonalGradientDescent(30), data(0, torch.float32)
    ogd.consolidate(model, [(x, y)])
    start = vector(model, list(ogd.shapes))
    ogd.start(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter)
    with pytest.warns(UserWarning, match="taken back at its end"):
        ogd.finish()
    assert leak(start, vector(model, list(ogd.shapes)), ogd.vectors.double().numpy()) < 1e-5
