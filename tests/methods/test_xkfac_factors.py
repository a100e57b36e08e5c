"""Curvature across samples that BatchNorm couples, against the dense Gauss-Newton matrix of the mini-batch's loss.

K-FAC is the single product B_within (x) E[a a^T], XK-FAC the sum of the layer's terms, both of one pass over the same
mini-batches. Run with -s for the tables.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from avalanche_gradproj.layers.merged import merge
from avalanche_gradproj.layers.norm import batch_norms
from avalanche_gradproj.layers.select import cover
from avalanche_gradproj.methods.kfac_factors import FactorPass
from tests.methods.dense_batch_loss import blocks, folded

CLASSES, NETWORKS, BATCHES = 3, 10, 30


@pytest.fixture(autouse=True)
def _double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def factor_pass(model, *, pairs=(), by_batch=None, fisher="exact", seed=0, extended=True, **kwargs):
    """Every BatchNorm by mini-batch unless told; pairs (layer, norm) are merged."""
    norms, merged = batch_norms(model), dict(pairs)
    units = [merge(u, merged[u.name], norms[merged[u.name]]) if u.name in merged else u for u in cover(model).units]
    by_batch = list(norms.values()) if by_batch is None else by_batch
    generator = torch.Generator().manual_seed(seed)
    return FactorPass(model, units, extended=extended, by_batch=by_batch, fisher=fisher, generator=generator, **kwargs)


def collect(model, batches, **kwargs):
    return factor_pass(model, **kwargs).run(batches)


def matrix(factor):
    return factor.matrix if factor.rest is None else factor.matrix @ factor.matrix.mT


def form(sums, name):
    """The sum of a layer's terms, a block after the other, as [blocks, out d, out d]."""
    terms = sums.layers[name].terms(sums.samples)
    assert all(term.damping == 0 and (term.right.rest is None or not term.right.rest.any()) for term in terms)
    pairs = [zip(matrix(term.left), matrix(term.right), strict=True) for term in terms]
    return sum(torch.stack([torch.kron(left, right) for left, right in own]) for own in pairs)


def errors(sums, name, reference):
    """Relative Frobenius errors of K-FAC and of XK-FAC."""
    right, left = sums.layers[name].factors(sums.samples)
    found = torch.kron(left[0], right[0]), form(sums, name)[0]
    return [((own - reference).norm() / reference.norm()).item() for own in found]


def averaged(references):
    """Mean over mini-batches of dicts of blocks."""
    references = list(references)
    return {name: sum(own[name] for own in references) / len(references) for name in references[0]}


def mlp(features=20, *, after_relu=False):
    middle = [nn.ReLU(), nn.BatchNorm1d(10)] if after_relu else [nn.BatchNorm1d(10), nn.ReLU()]
    again = [type(m)(*[10] * isinstance(m, nn.BatchNorm1d)) for m in middle]
    return nn.Sequential(nn.Linear(features, 10), *middle, nn.Linear(10, 10), *again, nn.Linear(10, CLASSES))


def cnn(norm=nn.BatchNorm2d):
    first, second = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 4, 2)
    head = [nn.Flatten(), nn.Linear(16, CLASSES)]
    return nn.Sequential(first, norm(3), nn.ReLU(), second, norm(4), nn.ReLU(), *head)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.second(torch.tanh(self.norm(self.first(x)))).mean(1)


def spread(model):
    """Scales and shifts that differ."""
    for norm in batch_norms(model).values():
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    return model


@pytest.mark.parametrize("fisher", ["exact", "sampled"])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, CLASSES)), (4,)),
        (lambda: cnn(lambda channels: nn.GroupNorm(1, channels)), (1, 5, 5)),
        (Tokens, (6, 4)),
    ],
    ids=["mlp", "cnn", "tokens"],
)
def test_without_batch_norm_it_is_kfac(make, shape, fisher):
    model, batches = make(), [torch.randn(n, *shape) for n in (5, 1, 3)]
    one, other = (collect(model, batches, fisher=fisher, extended=extended) for extended in (False, True))
    assert len(one.layers) >= 2
    for name, layer in one.layers.items():
        plain, extended = layer.terms(9), other.layers[name].terms(9)
        assert (len(plain), len(extended), other.layers[name].coupled) == (1, 1, False)
        assert all(torch.equal(a, b) for a, b in zip(plain[0].tensors, extended[0].tensors, strict=True))
        assert other.layers[name].totals.moment(1).any()  # kept, and not used


@pytest.mark.parametrize(("make", "shape"), [(mlp, (20,)), (cnn, (1, 5, 5))])
def test_the_total_is_zero_before_a_batch_norm(make, shape):
    model = spread(make())
    sums = collect(model, [1 + torch.randn(6, *shape) for _ in range(3)])
    last = list(sums.layers)[-1]
    for name, layer in sums.layers.items():
        within, total = layer.outputs.moment(1), layer.totals.moment(1)
        assert layer.coupled == (name != last)
        assert len(layer.terms(18)) == (1 if name == last else 2)
        assert bool(total.norm() <= 1e-10 * within.norm()) == (name != last)


def test_which_layers_are_coupled():
    x = torch.randn(6, 20)
    held = collect(mlp(), [x], by_batch=[])  # running statistics couple nothing
    assert [(layer.coupled, len(layer.terms(6))) for layer in held.layers.values()] == [(False, 1)] * 3
    model = mlp()
    second = collect(model, [x], by_batch=[model[4]])
    assert [layer.coupled for layer in second.layers.values()] == [True, True, False]
    first = collect(model, [x], by_batch=[model[1]])
    assert [layer.coupled for layer in first.layers.values()] == [True, False, False]
    model[4] = nn.BatchNorm1d(10, track_running_stats=False)
    assert [layer.coupled for layer in collect(model, [x], by_batch=[]).layers.values()] == [True, True, False]
    behind = collect(mlp(), [x], pairs=[("0", "1"), ("3", "4")])  # what follows the pair counts, not its own BatchNorm
    assert [layer.coupled for layer in behind.layers.values()] == [True, False, False]


class Beside(nn.Module):
    """A layer whose output is the same for all rows, as its matrix is zero; what differs comes in beside it.

    Gradients then say nothing of what enters the layer. Only samples with a mark have a loss: the others have one
    class that is not masked.
    """

    def __init__(self, layer, own, norm):
        super().__init__()
        self.layer, self.own, self.norm, self.out = layer, own, norm, nn.LazyLinear(CLASSES)
        nn.init.zeros_(layer.weight if isinstance(own, nn.Identity) else own.weight)
        self.width = layer.weight.shape[1] * getattr(layer, "groups", 1)

    def forward(self, x):
        a, z, mark = x[:, : self.width], x[:, self.width : -1], x[:, -1].reshape(len(x), -1)[:, 0]
        logits = self.out(torch.tanh(self.norm(torch.tanh(self.own(self.layer(a)) + z))).flatten(1))
        return logits.masked_fill((mark[:, None] == 0) & (torch.arange(CLASSES) > 0), -float("inf"))


BESIDE = {
    "linear": lambda: Beside(nn.Linear(2, 4), nn.Identity(), nn.BatchNorm1d(4)),
    "convolution": lambda: Beside(nn.Conv2d(2, 4, 1), nn.Identity(), nn.BatchNorm2d(4)),
    "groups": lambda: Beside(nn.Conv2d(4, 4, 1, groups=2), nn.Identity(), nn.BatchNorm2d(4)),
    "merged linear": lambda: Beside(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)),
    "merged convolution": lambda: Beside(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)),
}


@pytest.mark.parametrize("make", BESIDE.values(), ids=BESIDE.keys())
def test_it_is_exact_where_activations_are_independent_of_gradients(make):
    """Every row's activation takes every value, whatever those of the others are; each sample in turn has a loss."""
    model = make()
    n, shape = (2, (1, 2)) if isinstance(model.layer, nn.Conv2d) else (3, ())
    rows = n * int(np.prod(shape))
    values, z = torch.randn(2, model.width) + 1, torch.randn(n, 4, *shape)
    batches = []
    for chosen, marked in itertools.product(itertools.product(range(2), repeat=rows), range(n)):
        a = values[list(chosen)].reshape(n, *shape, -1).movedim(-1, 1)
        mark = (torch.arange(n) == marked).double().reshape(n, 1, *[1] * len(shape)).expand(n, 1, *shape)
        batches.append(torch.cat([a, z, mark], 1))
    model(batches[0])
    spread(model.norm)
    merged = not isinstance(model.own, nn.Identity)
    sums = collect(model, batches, pairs=[("layer", "own")] if merged else ())
    dense = averaged(blocks(folded(model, x, "layer", "own") if merged else model, x, ["layer"]) for x in batches)
    found = form(sums, "layer")
    right, left = sums.layers["layer"].factors(sums.samples)
    size = found.shape[1]
    for group, own in enumerate(found):
        part = dense["layer"][group * size : (group + 1) * size, group * size : (group + 1) * size]
        torch.testing.assert_close(own, part, rtol=1e-9, atol=1e-10 * part.abs().max().item())
        assert (torch.kron(left[group], right[group]) - part).norm() > 0.2 * part.norm()  # K-FAC is not exact
    assert all(matrix(term.left).norm() > 1e-3 * left.norm() for term in sums.layers["layer"].terms(sums.samples))


def table(title, make, batches_of, names, *, networks=NETWORKS, pairs=()):
    """Print a line a network; return [networks, layers, 2] errors of K-FAC and XK-FAC."""
    found = []
    for seed in range(networks):
        torch.manual_seed(seed)
        model = make()
        batches = [batches_of() for _ in range(BATCHES)]
        sums = collect(model, batches * 2, seed=seed, pairs=pairs)  # twice: other signs
        if pairs:
            dense = {n: averaged(blocks(folded(model, x, n, b), x, [n]) for x in batches)[n] for n, b in pairs}
        else:
            dense = averaged(blocks(model, x, names) for x in batches)
        found.append([errors(sums, name, dense[name]) for name in names])
    print(f"\n{title}\nnetwork  " + "  ".join(f"layer {name}: K-FAC  XK-FAC" for name in names))
    for label, own in [*enumerate(found), ("mean", np.mean(found, axis=0))]:
        print(f"{label!s:>7}  " + "  ".join(f"{a:14.3f} {b:7.3f}" for a, b in own))
    return np.array(found)


def features(size, mean=1.0):
    return lambda: mean + torch.randn(size, 20)


def images(size):
    return lambda: 1 + torch.randn(size, 1, 5, 5)


@pytest.mark.parametrize("size", [8, 32])
def test_the_error_is_smaller_in_every_network(size):
    found = table(f"three Linear layers, two BatchNorms, batch {size}", mlp, features(size), ["0", "3"])
    assert (found[..., 1] < found[..., 0]).all()
    assert (found[..., 1].mean(0) <= 0.8).all()
    # as a prototype measured: 0.67 and 0.41 in the first layer, 0.54 and 0.58 in the second
    np.testing.assert_allclose(found[..., 1].mean(0), [0.68, 0.54] if size == 8 else [0.43, 0.56], atol=0.05)


def test_the_error_where_an_activation_stands_before_batch_norm():
    """The sum over rows is not zero there."""
    found = table("BatchNorm behind ReLU, batch 32", lambda: mlp(after_relu=True), features(32), ["0", "3"])
    assert (found[..., 1] < found[..., 0]).all()
    assert (found[..., 1].mean(0) <= 0.8).all()


def test_the_error_of_convolutions():
    found = table("two convolutions, batch 8", cnn, images(8), ["0", "3"], networks=5)
    assert (found[..., 1] < found[..., 0]).all()
    assert (found[..., 1].mean(0) <= 0.8).all()


def test_where_the_gain_vanishes():
    """A layer before BatchNorm: centring its inputs changes K-FAC alone, as a shift of them changes no output."""
    along = torch.randn(5)
    along /= along.norm()

    def dominated():
        return 1 + 0.3 * torch.randn(8, 5) + 3 * torch.randn(8, 1) * along

    shifted = table("inputs of mean 1, batch 8", mlp, features(8), ["0", "6"])
    centred = table("inputs of mean 0, batch 8", mlp, features(8, 0.0), ["0", "6"])
    few = table("5 inputs, one direction dominates, batch 8", lambda: mlp(5), dominated, ["0"])
    gains = [own[:, 0, 1] / own[:, 0, 0] for own in (shifted, centred, few)]
    print("XK-FAC / K-FAC, mean of the first layer: " + "  ".join(f"{own.mean():.3f}" for own in gains))
    np.testing.assert_allclose(shifted[:, 0, 1], centred[:, 0, 1], rtol=1e-6)
    assert ((gains[1] > 0.9) & (gains[1] < 1)).all()
    assert gains[0].mean() < 0.25 < 0.5 < gains[2].mean() < 1
    for own in (shifted, centred):
        np.testing.assert_array_equal(own[:, 1, 0], own[:, 1, 1])


@pytest.mark.parametrize("fisher", ["sampled", "exact"])
def test_averages_converge_as_one_over_the_root_of_draws(fisher):
    """Labels and signs are drawn; what they estimate is known."""
    model = spread(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, CLASSES)))
    x, draws, seeds = 1 + torch.randn(4, 3), [8, 32, 128], 24
    expected = output_moments(model, x, "0")
    squares = np.zeros((len(draws), 2))
    for seed in range(seeds):
        run, done = factor_pass(model, fisher=fisher, seed=seed), 0
        for row, count in enumerate(draws):
            layer = run.run([x] * (count - done)).layers["0"]
            done = count
            for column, own in enumerate((layer.outputs, layer.totals)):
                distance = own.moment(4 * count)[0] - expected[column]
                squares[row, column] += (distance / expected[column].norm()).square().sum().item() / seeds
    spreads = np.sqrt(squares)
    slopes = np.polyfit(np.log(draws), np.log(spreads), 1)[0]
    print(f"\n{fisher}: relative errors of B_within, B_total after {draws} draws {spreads.T.round(4)}, slopes {slopes}")
    assert (np.abs(slopes + 0.5) < 0.1).all()
    assert (spreads[-1] < 0.15).all()


class Square(nn.Module):
    def forward(self, x):
        return x.square()


def alone(inputs, *behind, scale=None, before=()):
    """A last pair ("layer", "norm"), with what stands before and behind it."""
    layer = inputs if isinstance(inputs, nn.Module) else nn.Linear(inputs, 5)
    channels = layer.weight.shape[0]
    norm = spread(nn.BatchNorm2d(channels) if isinstance(layer, nn.Conv2d) else nn.BatchNorm1d(channels))
    if scale is not None:
        nn.init.constant_(norm.weight, scale)
    parts = {str(place): part for place, part in enumerate(before)}
    parts |= {"layer": layer, "norm": norm} | {f"b{place}": part for place, part in enumerate(behind)}
    model = nn.Sequential()
    for name, part in parts.items():
        model.add_module(name, part)
    return model


def two():
    """Of two samples, BatchNorm makes opposites; squares do not tell them apart, so that they have one B."""
    before = [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh()]
    model = alone(6, Square(), nn.Linear(5, CLASSES), before=before)
    nn.init.zeros_(model.norm.bias)
    return model


#: Named for why one Kronecker product is the exact block of [W~, b~]: (model, mini-batches).
EXACT = {
    "two samples": (two, lambda: [1 + torch.randn(2, 4)]),
    "no scale": (
        lambda: alone(4, nn.Tanh(), nn.Linear(5, CLASSES), scale=0),
        lambda: [torch.randn(n, 4) for n in (6, 6, 6)],
    ),
    "no scale, one patch an image": (
        lambda: alone(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4, CLASSES), scale=0),
        lambda: [torch.randn(5, 2, 3, 3)],
    ),
    "all samples alike": (
        lambda: alone(4, nn.Tanh(), nn.Linear(5, CLASSES)),
        lambda: [torch.randn(1, 4).expand(6, 4).clone()],
    ),
}


@pytest.mark.parametrize(("make", "batches_of"), EXACT.values(), ids=EXACT.keys())
def test_the_last_pair_is_exact_where_theory_says_so(make, batches_of):
    model, batches = make(), batches_of()
    sums = collect(model, batches, pairs=[("layer", "norm")])
    dense = averaged(blocks(folded(model, x, "layer", "norm"), x, ["layer"]) for x in batches)["layer"]
    assert len(sums.layers["layer"].terms(1)) == 1
    assert dense.norm() > 1e-3
    assert (form(sums, "layer")[0] - dense).norm() < 1e-8 * dense.norm()


@pytest.mark.parametrize("kind", ["linear", "convolutional"])
def test_the_error_of_the_first_pair_is_smaller_in_every_network(kind):
    make, batches_of = (mlp, features(8)) if kind == "linear" else (cnn, images(8))
    networks = NETWORKS if kind == "linear" else 5
    title = f"layer and BatchNorm behind it as one matrix, {kind}, batch 8"
    found = table(title, lambda: spread(make()), batches_of, ["0"], pairs=[("0", "1")], networks=networks)
    assert (found[..., 1] < found[..., 0]).all()
    assert (found[..., 1].mean(0) <= 0.8).all()


class Scaled(nn.Module):
    """A parameter that belongs to no layer, between BatchNorms; may break down."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(4, 5), nn.BatchNorm1d(5)
        self.scale, self.second, self.after = nn.Parameter(torch.randn(5)), nn.Linear(5, 5), nn.BatchNorm1d(5)
        self.dropout, self.out, self.left = nn.Dropout(0.5), nn.Linear(5, CLASSES), float("inf")

    def forward(self, x):
        hidden = self.after(self.second(torch.tanh(self.norm(self.first(x)) * self.scale)))
        self.left -= 1
        if self.left < 0:
            raise KeyError("broken")
        return self.out(self.dropout(torch.tanh(hidden)))


def trained():
    """Running statistics, gradients and modes that say something."""
    model = spread(Scaled())
    for _ in range(3):
        nn.functional.cross_entropy(model(2 + 3 * torch.randn(6, 4)), torch.randint(CLASSES, (6,))).backward()
    model.norm.eval()
    return model


@pytest.mark.parametrize("merged", [False, True])
def test_a_diagonal_that_takes_one_pass_a_sample_is_that_of_evaluation(merged):
    model, x = trained(), torch.randn(7, 4)
    pairs = [("first", "norm"), ("second", "after")] if merged else ()
    sums = collect(model, [x[:4], x[4:]], diagonal=["scale"], pairs=pairs)
    model.eval()

    def run(scale):
        return torch.func.functional_call(model, {"scale": scale}, (x,))

    dense = curvature(run, [model.scale.detach()])[0].diagonal()
    torch.testing.assert_close(sums.diagonal["scale"] / 7, dense)


@pytest.mark.parametrize("left", [float("inf"), 0, 1, 2])
def test_nothing_is_disturbed(left):
    """Also where the model breaks down: in its first mini-batch, in passes of single samples, in the second."""
    model, x = trained(), torch.randn(8, 4)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    buffers = {name: id(buffer) for name, buffer in model.named_buffers()}
    gradients = [p.grad.clone() for p in model.parameters()]
    modes, random = [m.training for m in model.modules()], torch.get_rng_state()
    model.left = left
    run = factor_pass(model, diagonal=["scale"], pairs=[("second", "after")])
    if left < float("inf"):
        with pytest.raises(KeyError, match="broken"):
            run.run([x[:4], x[4:]])
    else:
        run.run([x[:4], x[4:]])
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == buffers
    assert all(torch.equal(g, p.grad) for g, p in zip(gradients, model.parameters(), strict=True))
    assert modes == [m.training for m in model.modules()]
    assert torch.equal(random, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
