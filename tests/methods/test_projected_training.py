"""Steps stay in the allowed subspace, for every optimizer; the reference projects densely in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from avalanche_gradproj.methods.gpm import GradientProjectionMemory
from avalanche_gradproj.methods.optimizers import gradient_suffices

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "weight decay": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=5e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=5e-3, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=2e-3, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "maximize": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, dampening=0.1, maximize=True),
}


class Network(nn.Module):
    """Grouped convolution, attention, norms, linear layers with and without bias."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.hidden = nn.Linear(6, 20, bias=False)
        self.last = nn.Linear(20, 4)

    def forward(self, x):
        y = torch.relu_(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        y = y + self.attention(y, y, y)[0]
        return self.last(torch.tanh(self.hidden(y.mean(1))))


def data(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64) @ torch.randn(
        3, 2 * 4 * 4, generator=generator, dtype=torch.float64
    )
    return x.view(40, 2, 4, 4).to(dtype), torch.randint(4, (40,), generator=generator)


def train(model, optimizer, x, y, gpm=None, epochs=3):
    for _ in range(epochs):
        for i in range(0, len(x), 8):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[i : i + 8]), y[i : i + 8]).backward()
            if gpm is not None:
                gpm.transform()
            optimizer.step()
            if gpm is not None:
                gpm.after_step()


def layer_matrices(model):
    """Every layer's weights as the papers write them, bias last, by hand."""

    def joined(weight, bias):
        return weight if bias is None else torch.cat([weight, bias[:, None]], 1)

    conv = joined(model.conv.weight.flatten(1), model.conv.bias)
    packed = joined(model.attention.in_proj_weight, model.attention.in_proj_bias)
    matrices = {("conv", 0): conv[:3], ("conv", 1): conv[3:]}
    matrices |= {(f"attention.{letter}_proj", 0): packed[6 * i : 6 * i + 6] for i, letter in enumerate("qkv")}
    out = model.attention.out_proj
    matrices[("attention.out_proj", 0)] = joined(out.weight, out.bias)
    matrices[("hidden", 0)] = model.hidden.weight
    matrices[("last", 0)] = joined(model.last.weight, model.last.bias)
    return {key: value.detach().double().clone() for key, value in matrices.items()}


def leaks(start, end, bases):
    found = {}
    for (name, block), before in start.items():
        basis, change = bases[name][block].double(), end[name, block] - before
        found[name, block] = float((change @ basis).norm() / max(change.norm(), 1e-3 * before.norm()))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_leak_after_three_experiences(name, dtype):
    """The promise of the package, measured from outside: leak <= 1e-4 (float32), 1e-10 (float64)."""
    torch.manual_seed(0)
    model = Network().to(dtype)
    free = copy.deepcopy(model)
    optimizer, free_optimizer = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](free.parameters())
    gpm = GradientProjectionMemory(0.8, 0.02, 40)
    for t in range(3):
        x, y = data(t, dtype)
        start, bases, free_start = layer_matrices(model), gpm.bases, layer_matrices(free)
        with gpm.experience(model, optimizer):
            train(model, optimizer, x, y, gpm)
        train(free, free_optimizer, x, y)
        gpm.consolidate(model, [x])
        if t > 0:
            protected = leaks(start, layer_matrices(model), bases)
            unprotected = leaks(free_start, layer_matrices(free), bases)
            print(
                f"{name} {dtype} t={t}: worst leak {max(protected.values()):.1e}, "
                f"unprotected {max(unprotected.values()):.2f}"
            )
            assert max(protected.values()) <= (1e-4 if dtype == torch.float32 else 1e-10)
            assert max(unprotected.values()) > 0.5
            assert max(gpm.leak.values()) <= (1e-4 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_step_stays_inside_before_the_final_correction(name):
    """What `finish` corrects is rounding alone: the steps themselves are projected."""
    torch.manual_seed(0)
    model = Network().double()
    optimizer = OPTIMIZERS[name](model.parameters())
    gpm = GradientProjectionMemory(0.8, 0.02, 40)
    for t in range(3):
        x, y = data(t, torch.float64)
        start, bases = layer_matrices(model), gpm.bases
        gpm.start(model, optimizer)
        with gpm.active():
            train(model, optimizer, x, y, gpm)
        if t > 0:
            assert max(leaks(start, layer_matrices(model), bases).values()) < 1e-12
        gpm.finish()
        gpm.consolidate(model, [x])


@pytest.mark.parametrize("route", ["auto", "dense", "factored", "complement", "inputs"])
def test_sgd_follows_the_dense_reference(route):
    """With SGD and momentum the weights are those of projecting every gradient with a dense float64 matrix."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 40), nn.ReLU(inplace=True), nn.Linear(40, 5, bias=False)).double()
    gpm = GradientProjectionMemory(0.9, 0.0, 30, route=route)
    gpm.consolidate(model, [torch.randn(30, 3, dtype=torch.float64) @ torch.randn(3, 9, dtype=torch.float64)])
    x, y = torch.randn(24, 9, dtype=torch.float64), torch.randint(5, (24,))

    twin = copy.deepcopy(model)
    first, second = (
        torch.eye(d, dtype=torch.float64) - m @ m.T for d, (m,) in zip((10, 40), gpm.bases.values(), strict=True)
    )
    velocity = [torch.zeros(40, 10, dtype=torch.float64), torch.zeros(5, 40, dtype=torch.float64)]
    for _ in range(20):
        twin.zero_grad()
        nn.functional.cross_entropy(twin(x), y).backward()
        gradients = [
            torch.cat([twin[0].weight.grad, twin[0].bias.grad[:, None]], 1) @ first,
            twin[2].weight.grad @ second,
        ]
        velocity = [0.9 * v + g for v, g in zip(velocity, gradients, strict=True)]
        with torch.no_grad():
            twin[0].weight -= 0.1 * velocity[0][:, :9]
            twin[0].bias -= 0.1 * velocity[0][:, 9]
            twin[2].weight -= 0.1 * velocity[1]

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with gpm.experience(model, optimizer):
        for _ in range(20):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            gpm.transform()
            optimizer.step()
            gpm.after_step()
    for name, value in model.state_dict().items():
        assert torch.allclose(value, twin.state_dict()[name], atol=1e-11), name


def test_update_mode_is_the_projected_step_of_adam():
    """W <- W_old + P dW with dW Adam's own step, step by step."""
    torch.manual_seed(0)
    model = nn.Linear(8, 3, bias=False).double()
    twin = copy.deepcopy(model)
    gpm = GradientProjectionMemory(0.9, 0.0, 30)
    gpm.consolidate(model, [torch.randn(30, 2, dtype=torch.float64) @ torch.randn(2, 8, dtype=torch.float64)])
    (basis,) = gpm.bases[""]
    x, y = torch.randn(10, 8, dtype=torch.float64), torch.randint(3, (10,))
    optimizer, other = torch.optim.Adam(model.parameters(), lr=0.05), torch.optim.Adam(twin.parameters(), lr=0.05)
    with gpm.experience(model, optimizer):
        for _ in range(15):
            for net, opt in ((model, optimizer), (twin, other)):
                opt.zero_grad()
                nn.functional.cross_entropy(net(x), y).backward()
            gpm.transform()
            optimizer.step()
            gpm.after_step()
            old = twin.weight.detach().clone()
            other.step()
            step = twin.weight.detach() - old
            twin.weight.data = old + step - step @ basis @ basis.T
    assert torch.allclose(model.weight, twin.weight, atol=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_uncovered_parameters_and_statistics_stay(name):
    torch.manual_seed(0)
    model = Network()
    optimizer = OPTIMIZERS[name](model.parameters())
    gpm = GradientProjectionMemory(0.8, 0.0, 40)
    held = None
    for t in range(3):
        x, y = data(t, torch.float32)
        with gpm.experience(model, optimizer):
            train(model, optimizer, x, y, gpm)
            assert model.norm.training == (t == 0)
        assert model.norm.training
        gpm.consolidate(model, [x])
        now = {k: v.clone() for k, v in model.norm.state_dict().items()}
        if held is not None:
            assert all(torch.equal(now[k], held[k]) for k in held)
        else:
            assert not torch.equal(now["weight"], torch.ones(6))
        held = now


def test_train_and_track_leave_them_free():
    torch.manual_seed(0)
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gpm = GradientProjectionMemory(0.8, 0.0, 40, uncovered="train", batchnorm="track")
    for t in range(2):
        before = {k: v.clone() for k, v in model.norm.state_dict().items()}
        x, y = data(t, torch.float32)
        with gpm.experience(model, optimizer):
            train(model, optimizer, x, y, gpm)
        gpm.consolidate(model, [x])
        assert not torch.equal(before["weight"], model.norm.weight)
        assert not torch.equal(before["running_mean"], model.norm.running_mean)


def test_when_the_gradient_is_enough():
    weights = [nn.Parameter(torch.ones(2))]

    class Own(torch.optim.SGD):
        pass

    assert gradient_suffices(torch.optim.SGD(weights, lr=1, momentum=0.9, nesterov=True))
    assert not gradient_suffices(torch.optim.SGD(weights, lr=1, weight_decay=1e-5))
    assert not gradient_suffices(Own(weights, lr=1))
    assert not gradient_suffices(torch.optim.Adam(weights))
    assert not gradient_suffices(None)


def test_a_penalty_of_somebody_else_is_projected_too():
    """An L2 term reaches the weight beside the layer's forward: the fast route must notice and repair it."""
    torch.manual_seed(0)
    model = nn.Linear(64, 64).double()
    gpm = GradientProjectionMemory(0.7, 0.0, 30, route="inputs")
    gpm.consolidate(model, [torch.randn(30, 64, dtype=torch.float64)])
    (basis,) = gpm.bases[""]
    x = torch.randn(4, 64, dtype=torch.float64)
    with gpm.experience(model, torch.optim.SGD(model.parameters(), lr=0.1)):
        for penalty in (0.0, 1.0, 0.0):
            model.zero_grad()
            (model(x).square().sum() + penalty * (model.weight**3).sum()).backward()
            gpm.transform()
            found = torch.cat([model.weight.grad, model.bias.grad[:, None]], 1)
            model.zero_grad()
            y = nn.functional.linear(x, model.weight, model.bias)
            (y.square().sum() + penalty * (model.weight**3).sum()).backward()
            whole = torch.cat([model.weight.grad, model.bias.grad[:, None]], 1)
            assert torch.allclose(found, whole - whole @ basis @ basis.T, atol=1e-10)


@pytest.mark.parametrize("route", ["dense", "inputs"])
def test_removed_share(route):
    """Share of the squared gradient norm removed, against finished gradients projected by hand."""
    torch.manual_seed(0)
    model = nn.Linear(20, 16).double()
    gpm = GradientProjectionMemory(0.6, 0.0, 30, route=route)
    gpm.monitor = True
    gpm.consolidate(model, [torch.randn(30, 20, dtype=torch.float64)])
    (basis,) = gpm.bases[""]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    removed = whole = 0.0
    with gpm.experience(model, optimizer):
        for seed in range(5):
            x = torch.randn(7, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            model(x).pow(2).sum().backward()
            gpm.transform()
            y = nn.functional.linear(x, model.weight, model.bias)
            gradient = 2 * y.T.detach() @ torch.cat([x, torch.ones(7, 1)], 1)
            removed += float((gradient @ basis @ basis.T).square().sum())
            whole += float(gradient.square().sum())
    assert gpm.removed_share[""] == pytest.approx(removed / whole, rel=1e-9)


def test_changes_after_the_method_are_announced_and_taken_back():
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    gpm = GradientProjectionMemory(0.9, 0.0, 30)
    gpm.consolidate(model, [torch.randn(30, 2) @ torch.randn(2, 6)])
    start = model.weight.detach().clone()
    (basis,) = gpm.bases[""]
    with (
        pytest.warns(UserWarning, match="taken back at its end"),
        gpm.experience(model, torch.optim.SGD(model.parameters(), lr=0.1)),
    ):
        model.weight.data += 1.0
    change = torch.cat([model.weight - start, torch.zeros(3, 1)], 1).detach()
    assert (change @ basis).norm() < 0.5 * change.norm()
