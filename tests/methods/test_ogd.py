"""OGD against a dense numpy Gram-Schmidt in float64: the basis, the steps of every optimizer, restarts, memory."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from avalanche_gradproj.errors import ConfigurationError, DataError, ModelError, NonFiniteError, StateError
from avalanche_gradproj.methods.ogd import OrthogonalGradientDescent

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
    "two rates": lambda p: torch.optim.SGD([{"params": q, "lr": 0.01 * (i + 1)} for i, q in enumerate(p)], lr=0.1),
}


class Network(nn.Module):
    """Convolution, norm, linear layers, a plain parameter, one that never gets a gradient."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.ones(1))
        self.hidden = nn.Linear(4 * 4, 12, bias=False)
        self.last = nn.Linear(12, 4)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        y = torch.nn.functional.avg_pool2d(torch.tanh(self.norm(self.conv(x))) * self.scale, 2)
        return self.last(torch.tanh(self.hidden(y.flatten(1))))


def data(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 2, 4, 4, generator=generator, dtype=torch.float64) + seed
    return x.to(dtype), torch.randint(4, (40,), generator=generator)


def train(model, optimizer, x, y, ogd=None, epochs=4):
    for _ in range(epochs):
        for i in range(0, len(x), 8):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[i : i + 8]), y[i : i + 8]).backward()
            if ogd is not None:
                ogd.transform()
            optimizer.step()
            if ogd is not None:
                ogd.after_step()


def vector(model, names):
    parameters = dict(model.named_parameters())
    return np.concatenate([parameters[name].detach().double().numpy().ravel() for name in names])


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


def leak(start, end, basis):
    return np.linalg.norm(basis @ (end - start)) / max(np.linalg.norm(end - start), 1e-3 * np.linalg.norm(start))


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


def two_experiences(ogd, model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for t in range(2):
        x, y = data(t, torch.float32)
        with ogd.experience(model, optimizer):
            train(model, optimizer, x, y, ogd, epochs=1)
        ogd.consolidate(model, [(x, y)])
    return optimizer


def test_restart_is_bit_exact(tmp_path):
    torch.manual_seed(0)
    model, ogd = Network(), OrthogonalGradientDescent(10)
    optimizer = two_experiences(ogd, model)
    torch.save(ogd.state_dict(), tmp_path / "state.pt")
    fresh, twin = OrthogonalGradientDescent(10), copy.deepcopy(model)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    other = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
    other.load_state_dict(optimizer.state_dict())
    x, y = data(2, torch.float32)
    for method, net, opt in ((ogd, model, optimizer), (fresh, twin, other)):
        with method.experience(net, opt):
            train(net, opt, x, y, method)
        method.consolidate(net, [(x, y)])
    assert all(torch.equal(v, twin.state_dict()[k]) for k, v in model.state_dict().items())
    assert torch.equal(ogd.vectors, fresh.vectors)
    assert ogd.draw(40).equal(fresh.draw(40))


def test_damaged_and_foreign_states_are_refused():
    torch.manual_seed(0)
    ogd = OrthogonalGradientDescent(10)
    two_experiences(ogd, Network())
    good, held = ogd.state_dict(), ogd.vectors.clone()
    shapes = good["memory"]["shapes"]
    for memory, message in (
        (None, "damaged"),
        ({"shapes": shapes, "vectors": held[:, 1:]}, "expected \\[count"),
        ({"shapes": shapes | {"hidden.weight": [16, 12]}, "vectors": held}, "'hidden.weight' it holds \\[16, 12\\]"),
        ({"shapes": {"a": [2]}, "vectors": torch.ones(1, 2)}, "'scale' it holds nothing"),
    ):
        with pytest.raises(StateError, match=message):
            ogd.load_state_dict({**good, "memory": memory})
    with pytest.raises(StateError, match="'experiences' is None"):
        ogd.load_state_dict({**good, "experiences": None})
    assert torch.equal(ogd.vectors, held)
    fresh = OrthogonalGradientDescent(10)
    fresh.load_state_dict(good)
    with pytest.raises(StateError, match=r"'scale', which is not covered in this model \(it has no such"):
        fresh.start(nn.Linear(3, 2))
    fresh = OrthogonalGradientDescent(10, exclude=["norm"])
    fresh.load_state_dict(good)
    with pytest.raises(StateError, match=r"'norm.weight', which is not covered in this model \(excluded\)"):
        fresh.start(Network())


def test_max_bytes_bounds_what_is_held_and_says_what_is_lost():
    torch.manual_seed(0)
    model = Network()
    one = 4 * sum(p.numel() for p in model.parameters())
    with pytest.raises(ConfigurationError, match=rf"holds 9 gradients of .*give max_bytes>={10 * one}"):
        OrthogonalGradientDescent(10, max_bytes=10 * one - 1).start(model)
    ogd = OrthogonalGradientDescent(10, max_bytes=15 * one + 3)
    x, y = data(0, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ogd.consolidate(model, [(x, y)])
    first = ogd.vectors.clone()
    for expected in (5, 10):
        x, y = data(expected, torch.float32)
        with pytest.warns(
            UserWarning, match=f"so that {expected} of 10 gradients of experience .* were not stored"
        ) as found:
            ogd.consolidate(model, [(x, y)])
        assert len(found) == 1
        assert ogd.bytes_held == 15 * one + 15 * 15 * 8  # the bound is on the matrix
        assert len(ogd.vectors) == 15
    assert torch.equal(ogd.vectors[:10], first)
    assert ogd.experiences == 3


def test_dependent_gradients_are_dropped():
    torch.manual_seed(0)
    model, (x, y) = Network(), data(0, torch.float32)
    x, y = x[:5].repeat(8, 1, 1, 1), y[:5].repeat(8)
    ogd = OrthogonalGradientDescent(40)
    for _ in range(2):
        ogd.consolidate(model, [(x, y)])
        assert len(ogd.vectors) == 5


def test_all_skips_logits_that_depend_on_nothing():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 4)

        def forward(self, x):
            return self.layer(x).masked_fill(torch.tensor([False, True, False, True]), -1000.0)

    model, x = Masked(), torch.randn(9, 5)
    ogd = OrthogonalGradientDescent(6, target="all")
    ogd.consolidate(model, [(x, torch.zeros(9, dtype=torch.long))])
    rows = ogd.vectors.reshape(6, -1)
    weights = rows[:, :20].reshape(6, 4, 5)
    assert not weights[:, [1, 3]].any()
    assert len(rows) == 6
    spanned = torch.cat([x[:3], torch.ones(3, 1)], 1)  # three samples, two logits each
    assert (
        np.linalg.matrix_rank(
            np.concatenate([spanned.numpy(), torch.cat([weights[:, 0], rows[:, 20:21]], 1).numpy()]), tol=1e-5
        )
        == 3
    )


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


@pytest.mark.parametrize(("batchnorm", "moved"), [("freeze", False), ("track", True)])
def test_running_statistics(batchnorm, moved):
    torch.manual_seed(0)
    model, ogd = Network(), OrthogonalGradientDescent(10, batchnorm=batchnorm)
    optimizer = two_experiences(ogd, model)
    before, weight = model.norm.running_mean.clone(), model.norm.weight.detach().clone()
    x, y = data(2, torch.float32)
    with ogd.experience(model, optimizer):
        train(model, optimizer, x, y, ogd)
        assert model.norm.training == moved
    assert model.norm.training
    assert torch.equal(model.norm.running_mean, before) != moved
    assert not torch.equal(model.norm.weight, weight)  # norm parameters train, projected


@pytest.mark.parametrize("rest", ["no gradient", "not in the optimizer"])
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_parameters_that_rest_do_not_let_the_others_leak(name, rest):
    """A frozen part cannot take its share of a projected step: the others must be orthogonal without it."""
    torch.manual_seed(0)
    model, ogd, (x, y) = Network().double(), OrthogonalGradientDescent(20), data(0)
    ogd.consolidate(model, [(x, y)])
    names, basis, resting = list(ogd.shapes), ogd.vectors.numpy().copy(), vector(model, ["conv.weight", "conv.bias"])
    if rest == "no gradient":
        model.conv.requires_grad_(False)
    trained = [p for n, p in model.named_parameters() if not n.startswith("conv")]
    optimizer, start = OPTIMIZERS[name](trained), vector(model, names)
    x, y = data(1)
    with ogd.experience(model, optimizer):
        train(model, optimizer, x, y, ogd)
        reason = "takes no gradient" if rest == "no gradient" else "the optimizer does not have it"
        assert ogd.report()["conv.weight"].reason == reason
        assert leak(start, vector(model, names), basis) < 1e-10
    assert np.array_equal(vector(model, ["conv.weight", "conv.bias"]), resting)
    assert np.linalg.norm(vector(model, names) - start) > 1e-3


class Growing(nn.Module):
    """A body and a last layer that can be replaced by a larger one."""

    def __init__(self):
        super().__init__()
        self.body, self.last = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.last(torch.tanh(self.body(x)))

    def grow(self, classes):
        old, self.last = self.last, nn.Linear(8, classes).double()
        with torch.no_grad():
            self.last.weight[: old.out_features], self.last.bias[: old.out_features] = old.weight, old.bias


def test_parameters_that_come_later_and_grow():
    """Vectors keep their entries at the parameters' own places, and are zero at what is new."""
    torch.manual_seed(0)
    model, ogd = Growing().double(), OrthogonalGradientDescent(10)
    x, y = torch.randn(20, 6, dtype=torch.float64), torch.randint(2, (20,))
    ogd.consolidate(model, [(x, y)])
    old = ogd.vectors.clone()
    model.grow(5)
    model.extra = nn.Linear(3, 3).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with ogd.experience(model, optimizer):
        new = ogd.vectors
        assert torch.equal(new[:, : 6 * 8 + 8], old[:, : 6 * 8 + 8])
        weights = new[:, 56 : 56 + 40].view(10, 5, 8)
        assert torch.equal(weights[:, :2].reshape(10, 16), old[:, 56:72])
        assert torch.equal(new[:, 96:98], old[:, 72:74])
        assert not weights[:, 2:].any()
        assert not new[:, 98:].any()
        names = list(ogd.shapes)
        start = vector(model, names)
        train(model, optimizer, x, torch.randint(5, (20,)), ogd)
    assert names[-2:] == ["extra.weight", "extra.bias"]
    assert leak(start, vector(model, names), new.numpy()) < 1e-10
    ogd.consolidate(model, [(x, y)])
    assert len(ogd.vectors) == 20
    model.last = nn.Linear(8, 3).double()
    with pytest.raises(StateError, match=r"'last.weight' has shape \[3, 8\] here and \[5, 8\] there"):
        ogd.start(model)


def test_a_parameter_that_grows_both_ways_keeps_its_leading_corner():
    class Table(nn.Module):
        def __init__(self, *shape):
            super().__init__()
            self.table = nn.Parameter(torch.zeros(shape))

        def forward(self, x):
            return x @ self.table.T

    ogd = OrthogonalGradientDescent(1)
    ogd.consolidate(Table(2, 3), [(torch.tensor([[1.0, 2.0, 2.0]]), torch.tensor([1]))])
    ogd.start(Table(3, 5))
    expected = torch.zeros(3, 5)
    expected[1, :3] = torch.tensor([1.0, 2.0, 2.0]) / 3
    assert torch.allclose(ogd.vectors[0].view(3, 5), expected)


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
def test_a_parameter_without_a_gradient_takes_its_part(name):
    """Where the new loss does not reach a branch, the projection of the whole vector still does."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x):
            return self.first(x) + self.second(x)

    torch.manual_seed(0)
    model, x, y = Branches().double(), torch.randn(20, 5, dtype=torch.float64), torch.randint(3, (20,))
    ogd = OrthogonalGradientDescent(10)
    ogd.consolidate(model, [(x, y)])
    names, optimizer = list(ogd.shapes), OPTIMIZERS[name](model.parameters())
    start = vector(model, names)
    ogd.start(model, optimizer)
    with ogd.active():
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model.first(x), y).backward()
            ogd.transform()
            optimizer.step()
            ogd.after_step()
    assert leak(start, vector(model, names), ogd.vectors.numpy()) < 1e-12
    assert np.linalg.norm(vector(model, ["second.weight"]) - start[18:33]) > 1e-3


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


def test_selection_and_report():
    model = Network()
    model.hidden.requires_grad_(False)
    ogd = OrthogonalGradientDescent(4, exclude=["norm"])
    ogd.start(model, heads=["last"])
    report = ogd.report()
    assert {row.parameter for row in report} == {name for name, _ in model.named_parameters()}
    assert report["hidden.weight"].reason == "takes no gradient"
    assert report["norm.bias"].reason == "excluded"
    assert report["last.weight"].reason == "task head"
    assert report["scale"].treatment == "projected"
    assert "0 orthonormal gradients over" in str(report)
    ogd = OrthogonalGradientDescent(4, include=["last", "conv.weight"])
    ogd.start(model, heads=["last"])
    assert list(ogd.shapes) == ["conv.weight", "last.weight", "last.bias"]
    with pytest.raises(ConfigurationError, match=r"'lst' matches no parameter; .*'last"):
        OrthogonalGradientDescent(4, include=["lst"]).start(model)
    with pytest.raises(ConfigurationError, match="is one string"):
        OrthogonalGradientDescent(4, exclude="last").start(model)
    with pytest.raises(ModelError, match="no parameter is covered"):
        OrthogonalGradientDescent(4).start(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(StateError, match="seen no model"):
        OrthogonalGradientDescent(4).report()


def test_errors_leave_the_memory_as_it_was():
    torch.manual_seed(0)
    model, (x, y) = Network(), data(0, torch.float32)
    ogd = OrthogonalGradientDescent(10)
    ogd.consolidate(model, [(x, y)])
    held = ogd.vectors.clone()
    bad = x.clone()
    bad[3] = float("nan")
    for batches, error, message in (
        ([(x[:8], y[:8])], DataError, "8 gradients came and 10 are needed"),
        ([(x[:8], y[:8]), (x[8:], y[8:] + 4)], DataError, "the model has 4 logits"),
        ([(x[8:12], y[8:12]), (bad, y)], NonFiniteError, "infinity or a NaN"),
        ([x], DataError, "expected a tuple"),
        ([], DataError, "0 gradients came"),
    ):
        with pytest.raises(error, match=message):
            ogd.consolidate(model, batches)
        assert torch.equal(ogd.vectors, held)
        assert ogd.experiences == 1
    with pytest.raises(DataError, match="has 9 samples and n_gradients=10"):
        ogd.draw(9)
    assert len(OrthogonalGradientDescent(10, target="all").draw(9)) == 9


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
