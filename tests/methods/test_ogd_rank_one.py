"""OGD whose projection runs through outer products, beside the one through V itself and a basis in numpy's float64."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from avalanche_gradproj.errors import NonFiniteError, StateError
from avalanche_gradproj.linalg.rank_one import FactoredRows
from avalanche_gradproj.methods.ogd import OrthogonalGradientDescent
from avalanche_gradproj.testing import no_host_round_trips


def perceptron():
    return nn.Sequential(nn.Flatten(), nn.Linear(32, 12), nn.Tanh(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 4))


class Mixed(nn.Module):
    """A convolution, a norm layer, a plain parameter, linear layers with and without biases."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.ones(1))
        self.hidden, self.last = nn.Linear(64, 12, bias=False), nn.Linear(12, 4)

    def forward(self, x):
        y = torch.tanh(self.norm(self.conv(x))) * self.scale
        return self.last(torch.tanh(self.hidden(y.flatten(1))))


class Shared(nn.Module):
    """One layer called twice, one called at every row of the image, and two called once."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.last = nn.Linear(32, 10), nn.Linear(10, 10), nn.Linear(10, 4)
        self.rows = nn.Linear(4, 4)

    def forward(self, x):
        y = torch.tanh(self.first(torch.tanh(self.rows(x)).flatten(1)))
        return self.last(torch.tanh(self.again(torch.tanh(self.again(y)))))


class Heads(nn.Module):
    """A body and a last layer for each task; other tasks' heads get no gradient."""

    def __init__(self):
        super().__init__()
        self.body, self.task = nn.Linear(32, 12), 0
        self.heads = nn.ModuleList([nn.Linear(12, 4) for _ in range(3)])

    def forward(self, x):
        return self.heads[self.task](torch.tanh(self.body(x.flatten(1))))


#: Model and the parameters that are outer products.
MODELS = {
    "perceptron": (perceptron, ["1.weight", "3.weight", "5.weight"]),
    "mixed": (Mixed, ["hidden.weight", "last.weight"]),
    "shared": (Shared, ["first.weight", "last.weight"]),
    "heads": (Heads, ["body.weight", "heads.0.weight", "heads.1.weight", "heads.2.weight"]),
}
OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=5e-3),
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def data(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 2, 4, 4, generator=generator, dtype=torch.float64) + seed
    return x.to(dtype), torch.randint(4, (40,), generator=generator)


def ogd_with(projection, count=20, **arguments):
    ogd = OrthogonalGradientDescent(count, **arguments)
    ogd._memory.projection = projection
    return ogd


def train(ogd, model, optimizer, x, y, epochs=3):
    for _ in range(epochs):
        for i in range(0, len(x), 8):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[i : i + 8]), y[i : i + 8]).backward()
            ogd.transform()
            optimizer.step()
            ogd.after_step()


def learn(ogd, model, optimizer, t, dtype=torch.float64):
    if isinstance(model, Heads):
        model.task = t
    x, y = data(t, dtype)
    with ogd.experience(model, optimizer):
        train(ogd, model, optimizer, x, y)
    ogd.consolidate(model, [(x, y)])


def flat(model, names=None):
    parameters = dict(model.named_parameters())
    return np.concatenate([parameters[name].detach().double().numpy().ravel() for name in names or parameters])


def projected(ogd):
    return next(note for note in ogd.report().notes if note.startswith("projection: "))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_the_same_weights_as_through_the_vectors(name, optimizer):
    """In float64, gradient mode (momentum) and update mode (Adam), over three experiences."""
    make, outer = MODELS[name]
    found = {}
    for projection in ("dense", "factored"):
        torch.manual_seed(0)
        model, ogd = make().double(), ogd_with(projection)
        steps = OPTIMIZERS[optimizer](model.parameters())
        for t in range(3):
            learn(ogd, model, steps, t)
        ogd.start(model, steps)
        found[projection] = flat(model), ogd.vectors.numpy(), projected(ogd)
    sizes = {key: p.numel() for key, p in model.named_parameters()}
    share = 100 * sum(sizes[key] for key in outer) / sum(sizes.values())
    assert found["factored"][2].startswith(f"projection: factored ({share:.1f} % of a vector are outer products")
    assert found["dense"][2] == "projection: dense (asked for)"
    np.testing.assert_allclose(found["factored"][0], found["dense"][0], atol=1e-9)
    assert not np.array_equal(found["factored"][0], found["dense"][0])  # they are computed otherwise


@DTYPES
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_leak_over_an_experience(name, optimizer, dtype):
    """Measured from outside, before and after the correction at the end."""
    torch.manual_seed(0)
    model, ogd = MODELS[name][0]().to(dtype), ogd_with("factored")
    steps, bound = OPTIMIZERS[optimizer](model.parameters()), 1e-4 if dtype == torch.float32 else 1e-10
    for t in range(3):
        names, basis, start = list(ogd.shapes), ogd.vectors.double().numpy().copy(), flat(model)
        if isinstance(model, Heads):
            model.task = t
        x, y = data(t, dtype)
        ogd.start(model, steps)
        assert t == 0 or "factored" in projected(ogd)
        with ogd.active():
            train(ogd, model, steps, x, y)
        changes = [flat(model) - start]
        ogd.finish()
        changes.append(flat(model) - start)
        for change in changes if t else ():
            assert np.linalg.norm(change) > 1e-2
            assert np.linalg.norm(basis @ change) <= bound * np.linalg.norm(change)
        assert t == 0 or names == list(dict(model.named_parameters()))
        ogd.consolidate(model, [(x, y)])


def test_dependent_gradients_are_left_out():
    torch.manual_seed(0)
    model, (x, y) = perceptron().double(), data(0)
    x, y = x[:7].repeat(5, 1, 1, 1), y[:7].repeat(5)
    ogd = ogd_with("factored", 35)
    for _ in range(2):
        ogd.consolidate(model, [(x, y)])
    assert len(ogd.vectors) == 7
    start, basis = flat(model), ogd.vectors.numpy().copy()
    steps = torch.optim.SGD(model.parameters(), lr=0.1)
    ogd.start(model, steps)
    assert "factored" in projected(ogd)
    train(ogd, model, steps, *data(1))
    assert np.linalg.norm(basis @ (flat(model) - start)) < 1e-12


def large():
    """A perceptron that is large enough for outer products to pay, with 60 gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(500, 60), nn.ReLU(), nn.Linear(60, 5))
    return model, torch.randn(60, 500), torch.randint(5, (60,))


def test_outer_products_are_chosen_where_they_pay_and_no_step_waits():
    model, x, y = large()
    ogd = OrthogonalGradientDescent(60)
    ogd.consolidate(model, [(x, y)])
    steps = torch.optim.SGD(model.parameters(), lr=0.1)
    ogd.start(model, steps)
    assert projected(ogd).startswith("projection: factored")
    assert isinstance(ogd._training._projection, FactoredRows)
    start = flat(model)
    for _ in range(3):
        steps.zero_grad()
        nn.functional.cross_entropy(model(x[:10] + 1), y[:10]).backward()
        with no_host_round_trips():
            ogd.transform()
            steps.step()
            ogd.after_step()
    change = flat(model) - start
    assert np.linalg.norm(ogd.vectors.double().numpy() @ change) < 1e-5 * np.linalg.norm(change)
    ogd.finish()
    small = OrthogonalGradientDescent(10)
    small.consolidate(perceptron(), [data(0, torch.float32)])
    small.start(perceptron())
    assert projected(small) == "projection: dense (cheaper here)"


@DTYPES
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_restart_is_bit_exact(tmp_path, optimizer, dtype):
    torch.manual_seed(0)
    model, ogd = Mixed().to(dtype), ogd_with("factored")
    steps = OPTIMIZERS[optimizer](model.parameters())
    for t in range(2):
        learn(ogd, model, steps, t, dtype)
    torch.save(ogd.state_dict(), tmp_path / "state.pt")
    fresh, copied = ogd_with("factored"), pickle.loads(pickle.dumps(ogd))
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    twin, third = copy.deepcopy(model), copy.deepcopy(model)
    other, another = OPTIMIZERS[optimizer](twin.parameters()), OPTIMIZERS[optimizer](third.parameters())
    for loaded in (other, another):
        loaded.load_state_dict(copy.deepcopy(steps.state_dict()))
    for method, net, opt in ((ogd, model, steps), (fresh, twin, other), (copied, third, another)):
        method.start(net, opt)
        assert "factored" in projected(method)
        method.finish()
        learn(method, net, opt, 2, dtype)
    for method, net in ((fresh, twin), (copied, third)):
        assert all(torch.equal(v, net.state_dict()[k]) for k, v in model.state_dict().items())
        assert torch.equal(ogd.vectors, method.vectors)
        assert torch.equal(ogd._memory.vectors.triangle, method._memory.vectors.triangle)


def test_a_state_without_a_triangle_loads_and_runs_dense():
    torch.manual_seed(0)
    model, ogd = perceptron(), ogd_with("factored")
    steps = OPTIMIZERS["momentum"](model.parameters())
    learn(ogd, model, steps, 0, torch.float32)
    state = ogd.state_dict()
    del state["memory"]["triangle"]
    old = ogd_with("factored")
    old.load_state_dict(state)
    assert old.bytes_held == ogd.bytes_held - 8 * len(ogd.vectors) ** 2
    learn(old, model, steps, 1, torch.float32)
    assert len(old.vectors) == 40
    assert "triangle" not in old.state_dict()["memory"]
    old.start(model, steps)
    assert "dense (the vectors that came are not known" in projected(old)


def test_a_damaged_triangle_is_refused_by_name():
    torch.manual_seed(0)
    ogd = ogd_with("factored")
    ogd.consolidate(perceptron(), [data(0, torch.float32)])
    state, before = ogd.state_dict(), ogd._memory.vectors
    good = state["memory"]["triangle"]
    full = good.clone()
    full[0, 3] = 0.1
    negative, infinite = good.clone(), good.clone()
    negative[4] *= -1
    infinite[7, 2] = float("nan")
    message = r"the state's triangle is damaged: .*expected a lower triangular \[20, 20"
    for bad in ("B", good[:5], good.long(), full, negative, infinite, 2 * good, good[0]):
        with pytest.raises(StateError, match=message):
            ogd.load_state_dict({**state, "memory": {**state["memory"], "triangle": bad}})
        assert ogd._memory.vectors is before
    ogd.load_state_dict(state)
    assert torch.equal(ogd._memory.vectors.triangle, good)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_parameters_that_rest_leave_no_outer_products(optimizer):
    torch.manual_seed(0)
    model, ogd = perceptron().double(), ogd_with("factored")
    learn(ogd, model, OPTIMIZERS[optimizer](model.parameters()), 0)
    model[3].requires_grad_(False)
    basis, start = ogd.vectors.numpy().copy(), flat(model)
    steps = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    ogd.start(model, steps)
    assert "projection: dense" in projected(ogd)
    train(ogd, model, steps, *data(1))
    assert np.linalg.norm(basis @ (flat(model) - start)) < 1e-10 * np.linalg.norm(flat(model) - start)


def test_parameters_that_grow_and_come_later_are_outer_products_still():
    torch.manual_seed(0)
    model, ogd = Heads().double(), ogd_with("factored")
    ogd.consolidate(model, [data(0)])
    old, model.heads[0] = model.heads[0], nn.Linear(12, 6).double()
    with torch.no_grad():
        model.heads[0].weight[:4], model.heads[0].bias[:4] = old.weight, old.bias
    model.heads.append(nn.Linear(12, 4).double())
    steps = OPTIMIZERS["adam"](model.parameters())
    ogd.start(model, steps)
    names, start = list(ogd.shapes), None
    start = flat(model, names)
    outer = sum(p.numel() for name, p in model.named_parameters() if name.endswith("weight"))
    assert f"factored ({100 * outer / len(start):.1f} %" in projected(ogd)
    train(ogd, model, steps, *data(1))
    change = flat(model, names) - start
    assert np.linalg.norm(ogd.vectors.numpy() @ change) < 1e-10 * np.linalg.norm(change)


def test_sparse_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6), nn.Flatten(), nn.Linear(18, 4))
    x, y = torch.randint(11, (40, 3)), torch.randint(4, (40,))
    found = {}
    for projection in ("dense", "factored"):
        twin, ogd = copy.deepcopy(model), ogd_with(projection)
        ogd.consolidate(twin, [(x, y)])
        twin[0].sparse = True
        steps = torch.optim.SGD(twin.parameters(), lr=0.1)
        ogd.start(twin, steps)
        assert f"projection: {projection}" in projected(ogd)
        train(ogd, twin, steps, x.flip(0), y)
        found[projection] = flat(twin)
    np.testing.assert_allclose(found["factored"], found["dense"], atol=1e-5)


def test_half_precision():
    torch.manual_seed(0)
    half, ogd = perceptron().bfloat16(), ogd_with("factored", 10)
    learn(ogd, half, steps := torch.optim.SGD(half.parameters(), lr=0.05), 0, torch.bfloat16)
    ogd.start(half, steps)
    assert "factored" in projected(ogd)
    train(ogd, half, steps, *data(1, torch.bfloat16))
    ogd.finish()
    assert ogd.leak["all"] < 0.05


def test_memory_bound_and_errors_keep_vectors_and_triangle_together():
    torch.manual_seed(0)
    model = perceptron()
    one = 4 * sum(p.numel() for p in model.parameters())
    ogd = ogd_with("factored", 20, max_bytes=45 * one)
    ogd.consolidate(model, [data(0, torch.float32)])
    vectors, triangle = ogd.vectors.clone(), ogd._memory.vectors.triangle.clone()
    (x, y), bad = data(1, torch.float32), torch.full((40, 2, 4, 4), float("inf"))
    with pytest.raises(NonFiniteError):
        ogd.consolidate(model, [(x[:8], y[:8]), (bad, y)])
    assert torch.equal(ogd.vectors, vectors)
    assert torch.equal(ogd._memory.vectors.triangle, triangle)
    ogd.consolidate(model, [(x, y)])
    with pytest.warns(UserWarning, match="15 of 20 gradients"):
        ogd.consolidate(model, [data(2, torch.float32)])
    held = ogd._memory.vectors
    assert ogd.bytes_held == 45 * one + 45 * 45 * 8
    assert torch.equal(held.triangle[:20, :20], triangle)
    steps = torch.optim.SGD(model.parameters(), lr=0.1)
    start = flat(model)
    ogd.start(model, steps)
    assert "factored" in projected(ogd)
    train(ogd, model, steps, *data(3, torch.float32))
    change = flat(model) - start
    assert np.linalg.norm(held.rows.double().numpy() @ change) < 1e-5 * np.linalg.norm(change)
