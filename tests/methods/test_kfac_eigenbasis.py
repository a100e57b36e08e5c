"""Steps in the eigenbasis of Kronecker factors, against dense references that share no code with them."""

from __future__ import annotations

import copy
from collections import defaultdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from avalanche_gradproj.methods.kfac import KroneckerLaplace
from tests.methods.kfac_eigenbasis_setup import MODELS, adam, data, distance, learned, steps, trained
from tests.methods.kfac_setup import CLASSES

pytestmark = pytest.mark.usefixtures("double")

#: Matrices of each model: name, weight, bias, groups.
MATRICES = {
    "linear": [("0", "0.weight", "0.bias", 1), ("3", "3.weight", "3.bias", 1)],
    "grouped": [("1", "1.weight", "1.bias", 2), ("4", "4.weight", None, 1)],
    "attention": [
        *[(f"attention.{k}_proj", "attention.in_proj_weight", "attention.in_proj_bias", 1) for k in "qkv"],
        ("attention.out_proj", "attention.out_proj.weight", "attention.out_proj.bias", 1),
        ("last", "last.weight", "last.bias", 1),
    ],
}


def vectors(model, matrices):
    """[(matrix, block)] -> its entries, row by row with the bias last; parameters of no matrix by name."""
    rest, found, row = dict(model.named_parameters()), {}, defaultdict(int)
    for name, weight, bias, groups in matrices:
        count = rest[weight].shape[0] // (3 if "in_proj" in weight else 1)
        rows = slice(row[weight], row[weight] + count)
        row[weight] += count
        parts = [rest[weight][rows].reshape(count, -1)]
        parts += [] if bias is None else [rest[bias][rows].reshape(count, 1)]
        for block, own in enumerate(torch.cat(parts, 1).detach().split(count // groups)):
            found[name, block] = own.reshape(-1).clone().requires_grad_()
    used = {part for _, weight, bias, _ in matrices for part in (weight, bias)}
    return found, {name: p.detach().clone().requires_grad_() for name, p in rest.items() if name not in used}


def parameters(model, matrices, found, others):
    """The model's parameters made of the vectors."""
    shapes, parts = {name: p.shape for name, p in model.named_parameters()}, defaultdict(list)
    for name, weight, bias, groups in matrices:
        width = shapes[weight][1:].numel() + (bias is not None)
        for block in range(groups):
            own = found[name, block].view(-1, width)
            parts[weight].append(own if bias is None else own[:, :-1])
            if bias is not None:
                parts[bias].append(own[:, -1])
    return others | {name: torch.cat(own).reshape(shapes[name]) for name, own in parts.items()}


def dense(form, name, block, rows):
    """B (x) A, and the eigenvectors V (x) U: zeros, and an identity, in rows that the factor has not."""
    (term,) = form.layers[name].terms
    left, right = term.left.whole()[block], term.right.whole()[block]
    v, u = (torch.from_numpy(np.linalg.eigh(matrix.numpy())[1]) for matrix in (left, right))
    grown = torch.zeros(rows - len(left), rows - len(left))
    return (
        torch.kron(torch.block_diag(left, grown), right),
        torch.kron(torch.block_diag(v, torch.eye(len(grown))), u),
    )


def adam_by_hand(model, laplace, matrices, batch, count, lr=0.05, eps=1e-4, betas=(0.9, 0.99)):
    """Adam on the dense coordinates (V (x) U)^T w of each matrix, and on the entries of the other parameters."""
    (form,) = laplace._memory.forms
    found, others = vectors(model, matrices)
    anchors = {key: own.detach().clone() for key, own in found.items()}
    whole, turned = {}, {}
    for key, own in found.items():
        whole[key], turned[key] = dense(form, *key, len(own) // form.layers[key[0]].centre.shape[2])
        rows = form.layers[key[0]].centre[key[1]]
        anchors[key][: rows.numel()] = rows.reshape(-1)
    leaves = found | others
    first = {key: torch.zeros(own.numel()) for key, own in leaves.items()}
    second = copy.deepcopy(first)
    for step in range(1, count + 1):
        loss = F.cross_entropy(functional_call(model, parameters(model, matrices, found, others), batch[0]), batch[1])
        for key, own in found.items():
            loss = loss + form.weight / 60 / 2 * (own - anchors[key]) @ whole[key] @ (own - anchors[key])
        for name, own in others.items():
            moved = (own - form.diagonal[name].centre).flatten()
            loss = loss + form.weight / 60 / 2 * (form.diagonal[name].values.flatten() * moved**2).sum()
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        for (key, own), gradient in zip(leaves.items(), gradients, strict=True):
            basis = turned.get(key, torch.eye(own.numel()))
            g = basis.T @ gradient.reshape(-1)
            first[key] = betas[0] * first[key] + (1 - betas[0]) * g
            second[key] = betas[1] * second[key] + (1 - betas[1]) * g**2
            unbiased = (second[key] / (1 - betas[1] ** step)).sqrt()
            z = basis.T @ own.detach().reshape(-1) - lr * first[key] / (1 - betas[0] ** step) / (unbiased + eps)
            own.data = (basis @ z).reshape(own.shape)
    return parameters(model, matrices, found, others)


def grow(model):
    """Two more outputs."""
    old, model[3] = model[3], nn.Linear(5, CLASSES + 2)
    with torch.no_grad():
        model[3].weight[:CLASSES], model[3].bias[:CLASSES] = old.weight, old.bias


@pytest.mark.parametrize(("which", "grown"), [*((which, False) for which in MODELS), ("linear", True)])
def test_adam_steps_on_the_dense_coordinates(which, grown):
    model, laplace = learned(MODELS[which])
    if grown:
        grow(model)
    batch = data(9)
    expected = adam_by_hand(copy.deepcopy(model), laplace, MATRICES[which], batch, 8)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05, eps=1e-4, betas=(0.9, 0.99))
    with laplace.experience(model, optimizer, samples=60):
        steps(laplace, model, optimizer, batch, 8)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name].detach(), rtol=1e-8, atol=1e-9)
        assert (parameter - before[name]).abs().max() > 0.05


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("which", MODELS)
def test_gradient_descent_takes_the_same_steps_in_any_basis(which, apart):
    """Momentum and weight decay too, also where biases have a rate and a decay of their own."""

    def make(model):
        groups = (
            [p for n, p in model.named_parameters() if "bias" not in n],
            [p for n, p in model.named_parameters() if "bias" in n],
        )
        settings = [{}, {"lr": 0.15, "weight_decay": 0.0} if apart else {}]
        groups = [{"params": own, **more} for own, more in zip(groups, settings, strict=True)]
        if not apart:
            groups = list(model.parameters())
        return torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1)

    plain, turned = (trained(make, make=MODELS[which], eigenbasis=on) for on in (False, True))
    assert 0 < distance(plain, turned) < 1e-12
    other, here = (trained(adam, make=MODELS[which], eigenbasis=on) for on in (False, True))
    assert distance(other, here) > 0.01


@pytest.mark.parametrize("how", ["noticed", "through data"])
def test_writes_of_others_between_steps_are_seen(how):
    def run(eigenbasis):
        model, laplace = learned(eigenbasis=eigenbasis)
        decay = 0.1 if how == "noticed" else 0.0
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=decay)
        with laplace.experience(model, optimizer, samples=60):
            for _ in range(4):
                steps(laplace, model, optimizer, data(9), 2)
                with torch.no_grad():
                    for p in model.parameters():
                        (p if how == "noticed" else p.data).clamp_(-0.2, 0.2)
        return dict(model.named_parameters())

    assert distance(run(False), run(True)) < 1e-12


def test_adam_gets_further_down_an_ill_conditioned_quadratic():
    """The penalty alone, from some way off, in as many steps of whichever rate is best for each."""

    turned = torch.linalg.qr(torch.randn(20, 20))[0]
    x = torch.randn(200, 20) * torch.exp(-0.3 * torch.arange(20)) @ turned
    start = nn.Sequential(nn.Linear(20, 10), nn.Tanh(), nn.Linear(10, CLASSES))
    shift = {name: 0.5 * torch.randn_like(p) for name, p in start.named_parameters()}

    def reached(eigenbasis, lr):
        model, laplace = copy.deepcopy(start), KroneckerLaplace(100.0, mode="online", eigenbasis=eigenbasis)
        laplace.consolidate(model, [x])
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        with laplace.experience(model, optimizer, samples=200):
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.add_(shift[name])
            before = laplace.penalty().item()
            for _ in range(100):
                optimizer.zero_grad()
                laplace.penalty().backward()
                optimizer.step()
            return laplace.penalty().item() / before

    rates = (0.003, 0.01, 0.03, 0.1, 0.3)
    plain, turned = (min(reached(eigenbasis, lr) for lr in rates) for eigenbasis in (False, True))
    assert turned < 0.1 * plain


def test_factors_of_truncated_ones_are_the_whole_ones(small_is_cheap):
    model, laplace = learned(truncate=0.7)
    (form,) = laplace._memory.forms
    assert form.layers["0"].terms[0].right.rest is not None
    optimizer = adam(model)
    with laplace.experience(model, optimizer, samples=60):
        for own in laplace._training.steps._turned:
            (term,) = laplace._memory._whole.layers[own.unit.name].terms
            for factor, basis in ((term.left, own.basis.left), (term.right, own.basis.right)):
                turned = (basis.mT @ factor.matrix @ basis)[0]
                torch.testing.assert_close(turned, turned.diagonal().diag(), rtol=0, atol=1e-12)
        steps(laplace, model, optimizer, data(9), 2)


def test_half_precision_and_autocast():
    """Weights keep their type; what is formed in between is float32."""
    torch.set_default_dtype(torch.float32)

    def sgd(model):
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)

    def run(eigenbasis, autocast=False):
        model, laplace = learned(eigenbasis=eigenbasis)
        if not autocast:
            model.bfloat16()
        optimizer, (x, y) = sgd(model), data(9)
        with laplace.experience(model, optimizer, samples=60):
            for _ in range(6):
                optimizer.zero_grad()
                (F.cross_entropy(model(x.to(model[0].weight.dtype)), y) + laplace.penalty()).backward()
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    optimizer.step()
        assert {p.dtype for p in model.parameters()} == {torch.float32 if autocast else torch.bfloat16}
        return {name: p.detach().float() for name, p in model.named_parameters()}

    assert distance(run(True), run(False)) < 0.02
    model, laplace = learned()
    before = copy.deepcopy(model.bfloat16().state_dict())
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    with laplace.experience(model, still, samples=60):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        still.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert distance(run(True, autocast=True), run(False, autocast=True)) < 1e-6
