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
from tests.methods import dense_batch_loss as by_hand

NETWORKS = 10


pytestmark = pytest.mark.usefixtures("double")


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


@pytest.mark.parametrize("fisher", ["exact", "sampled"])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, by_hand.CLASSES)), (4,)),
        (lambda: by_hand.cnn(lambda channels: nn.GroupNorm(1, channels)), (1, 5, 5)),
        (by_hand.Tokens, (6, 4)),
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


@pytest.mark.parametrize(("make", "shape"), [(by_hand.mlp, (20,)), (by_hand.cnn, (1, 5, 5))])
def test_the_total_is_zero_before_a_batch_norm(make, shape):
    model = by_hand.spread(make())
    sums = collect(model, [1 + torch.randn(6, *shape) for _ in range(3)])
    last = list(sums.layers)[-1]
    for name, layer in sums.layers.items():
        within, total = layer.outputs.moment(1), layer.totals.moment(1)
        assert layer.coupled == (name != last)
        assert len(layer.terms(18)) == (1 if name == last else 2)
        assert bool(total.norm() <= 1e-10 * within.norm()) == (name != last)


def test_which_layers_are_coupled():
    x = torch.randn(6, 20)
    held = collect(by_hand.mlp(), [x], by_batch=[])  # running statistics couple nothing
    assert [(layer.coupled, len(layer.terms(6))) for layer in held.layers.values()] == [(False, 1)] * 3
    model = by_hand.mlp()
    second = collect(model, [x], by_batch=[model[4]])
    assert [layer.coupled for layer in second.layers.values()] == [True, True, False]
    first = collect(model, [x], by_batch=[model[1]])
    assert [layer.coupled for layer in first.layers.values()] == [True, False, False]
    model[4] = nn.BatchNorm1d(10, track_running_stats=False)
    assert [layer.coupled for layer in collect(model, [x], by_batch=[]).layers.values()] == [True, True, False]
    behind = collect(by_hand.mlp(), [x], pairs=[("0", "1"), ("3", "4")])  # a pair's own BatchNorm is part of it
    assert [layer.coupled for layer in behind.layers.values()] == [True, False, False]


@pytest.mark.parametrize("make", by_hand.BESIDE.values(), ids=by_hand.BESIDE.keys())
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
    by_hand.spread(model.norm)
    merged = not isinstance(model.own, nn.Identity)
    sums = collect(model, batches, pairs=[("layer", "own")] if merged else ())
    models = [by_hand.folded(model, x, "layer", "own") if merged else model for x in batches]
    dense = averaged(by_hand.blocks(own, x, ["layer"]) for own, x in zip(models, batches, strict=True))
    found = form(sums, "layer")
    right, left = sums.layers["layer"].factors(sums.samples)
    size = found.shape[1]
    for group, own in enumerate(found):
        part = dense["layer"][group * size : (group + 1) * size, group * size : (group + 1) * size]
        torch.testing.assert_close(own, part, rtol=1e-9, atol=1e-10 * part.abs().max().item())
        assert (torch.kron(left[group], right[group]) - part).norm() > 0.2 * part.norm()  # K-FAC is not exact
    assert all(matrix(term.left).norm() > 1e-3 * left.norm() for term in sums.layers["layer"].terms(sums.samples))


def table(title, make, batches_of, names, *, networks=NETWORKS, count=30, repeat=1, pairs=()):
    """Print a line a network; return [networks, layers, 2] errors of K-FAC and XK-FAC."""
    found = []
    for seed in range(networks):
        torch.manual_seed(seed)
        model = make()
        batches = [batches_of() for _ in range(count)]
        sums = collect(model, batches * repeat, seed=seed, pairs=pairs)  # each time with other signs
        models = [by_hand.folded(model, x, *pairs[0]) if pairs else model for x in batches]
        dense = averaged(by_hand.blocks(own, x, names) for own, x in zip(models, batches, strict=True))
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
    found = table(f"three Linear layers, two BatchNorms, batch {size}", by_hand.mlp, features(size), ["0", "3"])
    assert (found[..., 1] < found[..., 0]).all()
    assert (found[..., 1].mean(0) <= 0.8).all()
    # as a prototype measured: 0.67 and 0.41 in the first layer, 0.54 and 0.58 in the second
    np.testing.assert_allclose(found[..., 1].mean(0), [0.68, 0.54] if size == 8 else [0.43, 0.56], atol=0.05)


def test_the_error_where_an_activation_stands_before_batch_norm():
    """The sum over rows is not zero there."""
    title = "BatchNorm behind ReLU, batch 32"
    found = table(title, lambda: by_hand.mlp(after_relu=True), features(32), ["0", "3"], repeat=2)
    assert (found[..., 1] < found[..., 0]).all()
    assert (found[..., 1].mean(0) <= 0.8).all()


def test_the_error_of_convolutions():
    found = table("two convolutions, batch 8", by_hand.cnn, images(8), ["0", "3"], networks=5)
    assert (found[..., 1] < found[..., 0]).all()
    assert (found[..., 1].mean(0) <= 0.8).all()


def test_where_the_gain_vanishes():
    """A layer before BatchNorm: centring its inputs changes K-FAC alone, as a shift of them changes no output."""
    along = torch.randn(5)
    along /= along.norm()

    def dominated():
        return 1 + 0.3 * torch.randn(8, 5) + 3 * torch.randn(8, 1) * along

    shifted = table("inputs of mean 1, batch 8", by_hand.mlp, features(8), ["0", "6"], networks=5)
    centred = table("inputs of mean 0, batch 8", by_hand.mlp, features(8, 0.0), ["0", "6"], networks=5)
    few = table("5 inputs, one direction dominates, batch 8", lambda: by_hand.mlp(5), dominated, ["0"], networks=5)
    gains = [own[:, 0, 1] / own[:, 0, 0] for own in (shifted, centred, few)]
    print("XK-FAC / K-FAC, mean of the first layer: " + "  ".join(f"{own.mean():.3f}" for own in gains))
    np.testing.assert_allclose(shifted[:, 0, 1], centred[:, 0, 1], rtol=1e-6)
    assert ((gains[1] > 0.9) & (gains[1] < 1)).all()
    assert gains[0].mean() < 0.25 < 0.5 < gains[2].mean() < 1
    for own in (shifted, centred):
        np.testing.assert_array_equal(own[:, 1, 0], own[:, 1, 1])


@pytest.mark.parametrize("fisher", ["sampled", "exact"])
def test_averages_converge_as_one_over_the_root_of_draws(fisher):
    """Labels and signs are drawn; what they estimate is known. Of each number of draws, many averages of their own."""
    layers = nn.Linear(3, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, by_hand.CLASSES)
    model, x = by_hand.spread(nn.Sequential(*layers)), 1 + torch.randn(4, 3)
    run, draws, sums = factor_pass(model, fisher=fisher), [1, 4, 16], [torch.zeros(2, 4, 4)]
    expected = torch.stack(by_hand.output_moments(model, x, "0"))
    for _ in range(512):
        layer = run.run([x]).layers["0"]
        sums.append(torch.stack([own.moment(len(x))[0] for own in (layer.outputs, layer.totals)]))
    spreads = []
    for count in [*draws, 512]:
        distances = torch.stack(sums)[::count].diff(dim=0) / count - expected
        spreads.append((distances.square().sum((2, 3)).mean(0).sqrt() / expected.flatten(1).norm(dim=1)).numpy())
    *spreads, final = spreads
    slopes = np.polyfit(np.log(draws), np.log(spreads), 1)[0]
    print(f"\n{fisher}: draws, errors of B_within and B_total", *zip(draws, np.round(spreads, 3), strict=True))
    print(f"slopes {slopes}, errors after 512 draws {final}")
    assert (np.abs(slopes + 0.5) < 0.1).all()
    assert (final < 2.5 * spreads[0] / 512**0.5).all()


@pytest.mark.parametrize(("make", "batches_of"), by_hand.EXACT.values(), ids=by_hand.EXACT.keys())
def test_the_last_pair_is_exact_where_theory_says_so(make, batches_of):
    model, batches = make(), batches_of()
    sums = collect(model, batches, pairs=[("layer", "norm")])
    dense = averaged(by_hand.blocks(by_hand.folded(model, x, "layer", "norm"), x, ["layer"]) for x in batches)["layer"]
    assert len(sums.layers["layer"].terms(1)) == 1
    assert dense.norm() > 1e-3
    assert (form(sums, "layer")[0] - dense).norm() < 1e-8 * dense.norm()


@pytest.mark.parametrize("kind", ["linear", "convolutional"])
def test_the_error_of_the_first_pair_is_smaller_in_every_network(kind):
    make, batches_of = (by_hand.mlp, features(8)) if kind == "linear" else (by_hand.cnn, images(8))
    title = f"layer and BatchNorm behind it as one matrix, {kind}, batch 8"
    few = {"pairs": [("0", "1")], "networks": NETWORKS if kind == "linear" else 5, "count": 15, "repeat": 4}
    found = table(title, lambda: by_hand.spread(make()), batches_of, ["0"], **few)
    assert (found[..., 1] < found[..., 0]).all()
    assert (found[..., 1].mean(0) <= 0.8).all()


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("running", ["same", "other"])
def test_a_diagonal_that_takes_one_pass_a_sample_is_that_of_evaluation(running, merged):
    """Samples do not meet there, whether or not the mini-batch has the running statistics."""
    model, x = by_hand.trained().eval(), torch.randn(7, 4)
    if running == "same":
        by_hand.with_statistics_of(model, x)
    pairs = [("first", "norm"), ("second", "after")] if merged else ()
    sums = collect(model, [x], diagonal=["scale"], pairs=pairs)

    def run(scale):
        return torch.func.functional_call(model, {"scale": scale}, (x,))

    dense = by_hand.curvature(run, [model.scale.detach()])[0].diagonal()
    torch.testing.assert_close(sums.diagonal["scale"] / 7, dense)


@pytest.mark.parametrize("left", [float("inf"), 0, 1, 2])
def test_nothing_is_disturbed(left):
    """Also where the model breaks down: in its first mini-batch, in passes of single samples, in the second."""
    model, x = by_hand.trained(), torch.randn(8, 4)
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
