"""The core of HALRP in plain PyTorch loops: a whole task against a reference, old tasks, optimizers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from avalanche_gradproj.methods import halrp_fit
from avalanche_gradproj.methods.halrp import LowRankPerturbation

CLASSES, N, LABELS = 3, 24, (5, 2, 9)
PROBE = torch.randn(9, 6, generator=torch.Generator().manual_seed(77), dtype=torch.float64)


@pytest.fixture(autouse=True)
def _double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Unflatten(1, (2, 3)),
        nn.Conv1d(2, 4, 2),
        nn.BatchNorm1d(4),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(8, 5),
        nn.Tanh(),
        nn.Linear(5, CLASSES),
    )


def batches(seed=0, sizes=(8, 8, 5)):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), 6, generator=generator)
    y = (x @ torch.randn(6, CLASSES, generator=generator)).argmax(1)
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=0.02)


def two_groups(model):
    named = list(model.named_parameters())
    groups = [[p for name, p in named if name.endswith("bias") is biases] for biases in (False, True)]
    return torch.optim.SGD([{"params": groups[0]}, {"params": groups[1], "lr": 0.3}], lr=0.1, momentum=0.9)


def steps(halrp, model, optimizer, data, epochs=2):
    for _ in range(epochs):
        for x, y in data:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            halrp.regularise()
            optimizer.step()


def learn(halrp, model, optimizer, task, seed=None, epochs=2, **settings):
    data = batches(task if seed is None else seed)
    model.train()
    with halrp.experience(model, optimizer, task=task, batches=data, **settings):
        steps(halrp, model, optimizer, data, epochs)


@torch.no_grad()
def outputs(halrp, model, tasks):
    model.eval()
    found = {}
    for task in tasks:
        halrp.select(task)
        found[task] = model(PROBE)
    return found


def assert_same(one, other):
    assert all(torch.equal(value, other[task]) for task, value in one.items())


class Reference:
    """The second task of `network` by the paper's formulas: explicit weights, autograd for every term, numpy's SVD."""

    def __init__(self, base, seed):
        self.base = {name: value.clone() for name, value in base.state_dict().items()}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            head = nn.Linear(5, CLASSES)
        self.own = {name: self.base[name].clone() for name in ("1.bias", "2.weight", "2.bias", "5.bias")}
        self.own |= {"7.weight": head.weight.detach().clone(), "7.bias": head.bias.detach().clone()}
        self.mean, self.var = self.base["2.running_mean"].clone(), self.base["2.running_var"].clone()

    def forward(self, w1, w5, x, training):
        p = self.own
        h = F.conv1d(x.view(-1, 2, 3), w1, p["1.bias"])
        h = torch.tanh(F.batch_norm(h, self.mean, self.var, p["2.weight"], p["2.bias"], training=training))
        return F.linear(torch.tanh(F.linear(h.flatten(1), w5, p["5.bias"])), p["7.weight"], p["7.bias"])

    def descend(self, parameters, loss, data, epochs, lr=0.1, momentum=0.9):
        velocity = [torch.zeros_like(p) for p in parameters]
        for _ in range(epochs):
            for x, y in data:
                gradients = torch.autograd.grad(loss(x, y), parameters)
                for parameter, v, gradient in zip(parameters, velocity, gradients, strict=True):
                    v.mul_(momentum).add_(gradient)
                    parameter.data.sub_(lr * v)

    def learn(self, data, held_out, *, warmup, epochs, rate, max_rank, l1, decay, numbers):
        free = {"1": self.base["1.weight"].clone(), "5": self.base["5.weight"].clone()}
        for value in (*free.values(), *self.own.values()):
            value.requires_grad_(True)
        everything = [*free.values(), *self.own.values()]

        def plain(x, y, training=True):
            return F.cross_entropy(self.forward(free["1"], free["5"], x, training), y)

        self.descend(everything, plain, data, warmup)
        importance = self.importance = dict.fromkeys(free, 0.0)
        for x, y in held_out:
            for name, g in zip(free, torch.autograd.grad(plain(x, y, False), list(free.values())), strict=True):
                importance[name] += (g**2).mean().item() * len(x) / len(held_out)
        parts, scores = {}, []
        for name, value in free.items():
            wf, wb = value.detach().numpy(), self.base[f"{name}.weight"].numpy()
            wf, wb = (w.reshape(w.shape[0], w.shape[1], -1) for w in (wf, wb))
            r = (wf * wb).sum((1, 2)) / (wb * wb).sum((1, 2))
            wr = r[:, None, None] * wb
            c = (wf * wr).sum((0, 2)) / (wr * wr).sum((0, 2))
            u, sigma, v = np.linalg.svd((wf - wr * c[None, :, None]).mean(2), full_matrices=False)
            parts[name] = [r, c, u * np.sqrt(sigma), np.sqrt(sigma)[:, None] * v]
            scores += [(wf.shape[2] * s**2 * importance[name], name) for s in sigma]
        scores.sort(reverse=True)
        total, reached, self.ranks = sum(score for score, _ in scores), 0.0, dict.fromkeys(free, 0)
        for score, name in scores:
            if reached < rate * total:
                reached, self.ranks[name] = reached + score, self.ranks[name] + 1
        self.ranks = {name: min(max(1, rank), max_rank) for name, rank in self.ranks.items()}
        for name, (r, c, left, right) in parts.items():
            cut = self.ranks[name]
            own = [torch.tensor(a).requires_grad_(True) for a in (r, c, left[:, :cut], right[:cut])]
            parts[name] = own

        def weights():
            for name, (r, c, left, right) in parts.items():
                base, ones = self.base[f"{name}.weight"], (1,) * (self.base[f"{name}.weight"].dim() - 2)
                low = (left @ right).view(*base.shape[:2], *ones)
                yield base * r.view(-1, 1, *ones) * c.view(1, -1, *ones) + low

        def objective(x, y):
            loss = F.cross_entropy(self.forward(*weights(), x, True), y)
            for r, c, left, right in parts.values():
                loss = loss + decay / 2 * sum((p**2).sum() for p in (r, c, left, right))
                loss = loss + l1 * (left.abs().sum() + right.abs().sum())
            return loss

        every = [*(p for own in parts.values() for p in own), *self.own.values()]
        self.descend(every, objective, data, epochs)
        factors = [p for own in parts.values() for p in own[2:]]
        fixed = sum(p.numel() for p in every) - sum(p.numel() for p in factors) + len(self.mean) * 2 + 1
        magnitudes = sorted((v for p in factors for v in p.detach().abs().flatten().tolist()), reverse=True)
        limit = magnitudes[numbers - fixed] if numbers - fixed < len(magnitudes) else 0.0
        for p in factors:
            p.data[p.data.abs() <= limit] = 0
        self.weights, self.parts, self.cut = list(weights()), parts, sum(v <= limit for v in magnitudes)
        return self


@pytest.mark.parametrize(
    ("warmup", "rate", "max_rank", "max_growth", "held_out"),
    [(1, 0.9, 100, 2.0, False), (2, 1.0, 3, 1.35, True), (2, 0.3, 1, 1.2, False)],
)
def test_a_whole_second_task_is_the_reference_s(warmup, rate, max_rank, max_growth, held_out, monkeypatch):
    seen, fitted = [], halrp_fit.fitted
    monkeypatch.setattr(halrp_fit, "fitted", lambda *args: seen.append(args[2]) or fitted(*args))
    settings = {"approximation_rate": rate, "max_rank": max_rank, "l1": 3e-3, "weight_decay": 2e-3, "seed": 4}
    halrp, model = LowRankPerturbation(warmup_epochs=warmup, max_growth=max_growth, **settings), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    learn(halrp, model, optimizer, 0, remaining=2)
    plain = network()
    plain.load_state_dict({n.replace(".base", ""): v for n, v in model.state_dict().items() if "first" not in n})
    numbers = int(max_growth * sum(value.numel() for value in plain.state_dict().values()))
    held = batches(7, sizes=(6, 3)) if held_out else batches(1)
    formulas = {"warmup": warmup, "rate": rate, "max_rank": max_rank, "l1": 3e-3, "decay": 2e-3, "numbers": numbers}
    reference = Reference(plain, seed=4 + 1).learn(batches(1), held, epochs=3, **formulas)
    learn(halrp, model, optimizer, 1, epochs=3, remaining=1, held_out=held if held_out else None)
    assert {name: value.item() for name, value in seen[0].items()} == pytest.approx(reference.importance)
    assert halrp.ranks == reference.ranks
    assert halrp.ledger.records[1].zeros == reference.cut
    expected = reference.forward(*reference.weights, PROBE, False)
    torch.testing.assert_close(outputs(halrp, model, [1])[1], expected.detach(), rtol=1e-8, atol=1e-8)
    for name, (r, c, left, right) in reference.parts.items():
        own = model.get_submodule(name).tasks["1"].factors()
        for found, value in ((own.rows, r), (own.columns, c), (own.left[0] @ own.right[0], left @ right)):
            torch.testing.assert_close(found, value.detach(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("decay", [0.0, 0.03])
@pytest.mark.parametrize("optimizer", [sgd, adam])
def test_the_first_task_is_plain_training_with_a_decay_in_the_loss(decay, optimizer):
    plain, model = network(), network()
    halrp = LowRankPerturbation(weight_decay=decay, l1=0.5, max_growth=None)
    own, learner = optimizer(plain), optimizer(model)
    for x, y in batches(0) * 2:
        own.zero_grad()
        penalty = decay / 2 * (plain[1].weight.square().sum() + plain[5].weight.square().sum())
        (F.cross_entropy(plain(x), y) + (penalty if decay else 0.0)).backward()
        own.step()
    learn(halrp, model, learner, 0)
    found = {n.replace(".base", ""): v for n, v in model.state_dict().items() if not n.endswith("first")}
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-8 if decay else 0)


@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_regularise_adds_the_gradients_of_its_penalty(tasks):
    """Three: the first task learned again, of which nothing decays any more."""
    model = network()
    optimizer, halrp = sgd(model), LowRankPerturbation(l1=0.02, weight_decay=0.3, max_growth=None)
    labels = [0, 1, 0][:tasks]
    for task in labels[:-1]:
        learn(halrp, model, optimizer, task)
    model.train()
    halrp.start(model, optimizer, task=labels[-1], batches=batches(labels[-1]))
    x, y = batches(8)[0]
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    own = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    decay = {1: ("1.base.weight", "5.base.weight"), 2: ("left", "right", "rows", "columns"), 3: ()}[tasks]
    penalty = sum((0.15 * (p**2).sum() for n, p in own if n.endswith(decay)), torch.zeros(()))
    penalty = penalty + sum((0.02 * p.abs().sum() for n, p in own if n.endswith(("left", "right"))), torch.zeros(()))
    expected = torch.autograd.grad(loss + penalty, [p for _, p in own], retain_graph=True)
    loss.backward()
    halrp.regularise()
    assert len(own) == {1: 8, 2: 14, 3: 6}[tasks]
    for (_, parameter), gradient in zip(own, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-12)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("optimizer", [sgd, adam, two_groups])
def test_old_outputs_stay_and_the_optimizer_has_what_it_should(optimizer):
    model, halrp = network(), LowRankPerturbation(max_growth=3.0)
    learner = optimizer(model)
    seen = {}
    for task in (*LABELS, 2, 5):
        learn(halrp, model, learner, task, seed=len(seen))
        now = outputs(halrp, model, halrp.tasks)
        assert_same({old: value for old, value in seen.items() if old != task}, now)
        assert task not in seen or not torch.equal(seen[task], now[task])
        seen = now
        held = [(i, p) for i, group in enumerate(learner.param_groups) for p in group["params"]]
        names = {id(p): name for name, p in model.named_parameters()}
        assert sorted(names[id(p)] for _, p in held) == sorted(names.values())
        if optimizer is two_groups:
            assert all((i == 1) is names[id(p)].endswith("bias") for i, p in held)
        if len(halrp.tasks) > 1:
            assert not {"1.base.weight", "5.base.weight"} & {names[id(p)] for p in learner.state}
    assert halrp.tasks == list(LABELS)


def test_factors_in_training_are_in_the_group_of_the_weight():
    model, halrp = network(), LowRankPerturbation(max_growth=None)
    optimizer = two_groups(model)
    learn(halrp, model, optimizer, 0)
    halrp.start(model, optimizer, task=1, batches=batches(1))
    groups = [{id(p) for p in group["params"]} for group in optimizer.param_groups]
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.rpartition(".")[2] for n in names} == {"rows", "columns", "left", "right", "weight", "bias"}
    for name, parameter in model.named_parameters():
        assert [id(parameter) in group for group in groups] == [not name.endswith("bias"), name.endswith("bias")]
    assert not optimizer.state.keys() & set(model.parameters())  # of the warm-up


def test_it_goes_on_from_its_state():
    """`wrap`, then both states: equal to never having stopped."""
    kept = []
    for stopped in (False, True):
        model, halrp = network(), LowRankPerturbation(max_growth=4.0)
        learner = sgd(model)
        for task in LABELS:
            if stopped and task != 5:
                old, saved, halrp, model = model, halrp.state_dict(), LowRankPerturbation(max_growth=4.0), network(3)
                halrp.load_state_dict(saved)
                halrp.wrap(model)
                model.load_state_dict(old.state_dict())
                learner = sgd(model)
            learn(halrp, model, learner, task)
        kept.append(outputs(halrp, model, LABELS))
    assert_same(*kept)
