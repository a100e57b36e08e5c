"""The Laplace penalty against dense matrices: its value, its gradient, what it holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from avalanche_gradproj.methods.kfac import KroneckerLaplace
from tests.methods.kfac_setup import CLASSES, data, learn, move, network, thin, wide

pytestmark = pytest.mark.usefixtures("double")


def convolutional():
    body = nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.Tanh(), nn.Flatten())
    return nn.Sequential(nn.Unflatten(1, (2, 3, 3)), body, nn.Linear(16, CLASSES, bias=False))


def matrix_of(layer):
    """[blocks][out, d] with the bias last, from a Linear or a convolution."""
    weight = layer.weight.detach().numpy().copy()
    groups = getattr(layer, "groups", 1)
    weight = weight.reshape(groups, weight.shape[0] // groups, -1)
    if layer.bias is None:
        return weight
    return np.concatenate([weight, layer.bias.detach().numpy().reshape(groups, -1, 1)], axis=2)


def snapshot(model):
    return {name: matrix_of(m) for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


def reference(model, forms, centres, samples, damping):
    """The penalty by np.kron: forms are what the method holds, centres what this test noted."""
    total = 0.0
    for form, centre in zip(forms, centres, strict=True):
        for name, module in model.named_modules():
            if name in form.layers:
                (term,) = form.layers[name].terms
                for block, delta in enumerate(matrix_of(module) - centre[name]):
                    matrix = np.kron(term.left.matrix[block].numpy(), term.right.matrix[block].numpy())
                    v = delta.reshape(-1)
                    total += form.weight / samples / 2 * (v @ matrix @ v + damping * v @ v)
        for name, own in form.diagonal.items():
            d = (model.get_parameter(name).detach() - centre[name]).numpy().reshape(-1)
            total += form.weight / samples / 2 * (d @ ((own.values.numpy().reshape(-1) + damping) * d))
    return total


def noted(model):
    """Centres of matrices and of the parameters of norm layers."""
    return snapshot(model) | {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("make", [network, convolutional])
@pytest.mark.parametrize("mode", ["separate", "online"])
@pytest.mark.parametrize("damping", [0.0, 0.2])
def test_value_and_gradient_against_the_dense_matrix(make, mode, damping):
    model, features = make(), 4 if make is network else 18
    laplace = KroneckerLaplace([2.0, 0.5], mode=mode, damping=damping, fisher="exact")
    centres = []
    for t, size in enumerate((12, 6)):
        learn(laplace, model, data(size, features, seed=t), samples=10 * size)
        centres.append(noted(model))
    forms = laplace._memory.forms
    assert [form.weight for form in forms] == ([240.0, 30.0] if mode == "separate" else [270.0])
    centres = centres if mode == "separate" else centres[1:]
    move(model)
    laplace.start(model, samples=50)
    value = laplace.penalty()
    expected = reference(model, forms, centres, 50, damping)
    assert value.item() == pytest.approx(expected, rel=1e-10)
    assert value.item() > 0.01
    model.zero_grad()
    (3 * value).backward()  # a scaled loss scales its gradient
    for parameter in model.parameters():
        flat = parameter.detach().view(-1)
        for index in range(0, flat.numel(), 3):
            kept, slope = flat[index].item(), []
            for step in (1e-4, -1e-4):
                flat[index] = kept + step
                slope.append(reference(model, forms, centres, 50, damping))
            flat[index] = kept
            assert parameter.grad.view(-1)[index].item() == pytest.approx(
                3 * (slope[0] - slope[1]) / 2e-4, rel=1e-6, abs=1e-9
            )


def test_autograd_agrees_through_the_sum_with_the_loss():
    model, (x, y) = network(), data()
    laplace = KroneckerLaplace(fisher="exact")
    learn(laplace, model, (x, y))
    form, centre = laplace._memory.forms[0], noted(model)
    move(model)
    laplace.start(model, samples=12)
    (F.cross_entropy(model(x), y) + laplace.penalty()).backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    total = F.cross_entropy(model(x), y)
    for name in ("0", "3"):
        layer, (term,) = model.get_submodule(name), form.layers[name].terms
        delta = torch.cat([layer.weight, layer.bias[:, None]], 1) - torch.from_numpy(centre[name][0])
        total = total + 0.5 * torch.trace(term.left.matrix[0] @ delta @ term.right.matrix[0] @ delta.T)
    for name in ("1.weight", "1.bias"):
        delta = model.get_parameter(name) - centre[name]
        total = total + 0.5 * (form.diagonal[name].values * delta.square()).sum()
    total.backward()
    for one, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad)


@pytest.mark.usefixtures("small_is_cheap")
@pytest.mark.parametrize("mode", ["separate", "online"])
def test_truncated_factors_against_the_dense_matrix(mode):
    model, laplace, centres = wide(), KroneckerLaplace([2.0, 0.5], mode=mode, truncate=0.9, fisher="exact"), []
    for t in range(2):
        learn(laplace, model, data(seed=t), samples=12)
        centres.append(snapshot(model))
    assert thin(laplace) >= 2
    assert "eigenvectors" in laplace.report()["0.weight"].reason + laplace.report()["3.weight"].reason
    move(model)
    expected = 0.0
    for form, centre in zip(laplace._memory.forms, centres[-len(laplace._memory.forms) :], strict=True):
        for name, layer in form.layers.items():
            dense = []
            for factor in (layer.terms[0].left, layer.terms[0].right):
                matrix = factor.matrix[0].numpy()
                thick = matrix if factor.rest is None else matrix @ matrix.T + factor.rest.item() * np.eye(factor.size)
                dense.append(thick)
            delta = matrix_of(model.get_submodule(name))[0] - centre[name][0]
            expected += form.weight / 20 / 2 * np.sum(delta * (dense[0] @ delta @ dense[1]))
    for parameter in model[1].parameters():
        parameter.requires_grad_(False)  # without its diagonal terms
    laplace.start(model, samples=20)
    assert laplace.penalty().item() == pytest.approx(expected, rel=1e-9)
    assert expected > 0.01


def test_the_penalty_is_differentiable_once():
    model, laplace = network(), KroneckerLaplace()
    learn(laplace, model, data())
    move(model)
    laplace.start(model)
    (first,) = torch.autograd.grad(laplace.penalty(), model[0].weight, create_graph=True)
    assert first.any()
    assert not first.requires_grad  # a constant to whoever differentiates again


def test_penalty_holds_the_weights_where_the_old_data_needs_them():
    """Stronger penalties leave less of the old loss behind, at the price of the new one."""
    old, new = data(60, seed=0), data(60, seed=5)
    rises = []
    for strength in (0.0, 1.0, 5.0):
        torch.manual_seed(0)
        model, laplace = network(), KroneckerLaplace(strength)
        learn(laplace, model, old, steps=300, lr=0.3)
        before = F.cross_entropy(model(old[0]), old[1]).item()
        met = learn(laplace, model, new, steps=300, lr=0.05)
        rises.append(F.cross_entropy(model(old[0]), old[1]).item() - before)
        assert met[0] == 0
        assert (met[-1] > 0) == (strength > 0)
    assert rises[0] > 2 * rises[1] > 2 * rises[2] > 0


def test_half_precision_weights_and_autocast():
    torch.set_default_dtype(torch.float32)
    model, laplace = network(), KroneckerLaplace(5.0)
    learn(laplace, model, data())
    move(model)
    laplace.start(model)
    value = laplace.penalty()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = laplace.penalty()
    assert again.dtype == torch.float32
    assert torch.equal(value, again)
    laplace.finish()
    half = network().to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    laplace.start(half)
    low = laplace.penalty()
    low.backward()
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(value.item(), rel=0.05)
    assert all(parameter.grad.dtype == torch.bfloat16 for parameter in half.parameters())


def test_two_penalties_of_one_step_do_not_disturb_each_other():
    model, laplace = network(), KroneckerLaplace()
    learn(laplace, model, data())
    move(model)
    laplace.start(model)
    first = laplace.penalty()
    first.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    first = laplace.penalty()
    kept = [p.detach().clone() for p in model.parameters()]
    move(model, seed=2)
    laplace.penalty()
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), kept, strict=True):
            parameter.copy_(value)
    first.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))
