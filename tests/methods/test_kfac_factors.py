"""Kronecker factors against curvature by brute force: one logit, one sample at a time, in float64."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from avalanche_gradproj.errors import ConfigurationError, DataError, ModelError, NonFiniteError
from avalanche_gradproj.layers.scale import Scale
from avalanche_gradproj.layers.select import cover
from avalanche_gradproj.methods.kfac_factors import FactorPass
from avalanche_gradproj.methods.kfac_labels import check_criterion

CLASSES = 3


@pytest.fixture(autouse=True)
def _double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def collect(model, batches, *, fisher="exact", seed=0, diagonal=True, **kwargs):
    coverage = cover(model)
    generator = torch.Generator().manual_seed(seed)
    names = coverage.frozen if diagonal else ()
    run = FactorPass(model, coverage.units, diagonal=names, fisher=fisher, generator=generator, **kwargs)
    return run.run(batches)


def pair(sums, name):
    """A and B of a layer, as arrays [blocks, ., .]."""
    right, left = sums.layers[name].factors(sums.samples)
    return right.numpy(), left.numpy()


def softmax(z):
    p = np.exp(z - z.max())
    return p / p.sum()


def jacobian(model, x, parameters):
    """d logits / d parameters of one sample: [classes, numbers], parameters one after the other."""
    model.eval()
    logits = model(x[None])[0]
    rows = []
    for logit in logits:
        found = torch.autograd.grad(logit, parameters, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    torch.zeros_like(p).flatten() if g is None else g.flatten()
                    for g, p in zip(found, parameters, strict=True)
                ]
            )
        )
    return torch.stack(rows).numpy(), softmax(logits.detach().numpy())


def gauss_newton(model, inputs, parameters):
    """Mean over samples of J^T (diag p - p p^T) J."""
    total = 0
    for x in inputs:
        j, p = jacobian(model, x, parameters)
        total = total + j.T @ (np.diag(p) - np.outer(p, p)) @ j
    return total / len(inputs)


def as_matrix_first(block, out, d):
    """Reorder (weight [out, d - 1], bias [out]) into the rows of [weight, bias] [out, d]."""
    order = [
        row * (d - 1) + column if column < d - 1 else out * (d - 1) + row for row in range(out) for column in range(d)
    ]
    return block[np.ix_(order, order)]


def linear(**kwargs):
    return nn.Sequential(nn.Linear(4, 5, **kwargs), nn.Tanh(), nn.Linear(5, CLASSES, **kwargs))


def uniform():
    """A last layer that predicts the same for every sample: its B does not depend on its input."""
    model = linear()
    nn.init.zeros_(model[2].weight)
    return model


def same_inputs():
    return torch.randn(4).expand(6, 4).clone()


#: Named for why the Kronecker product is the exact block of the Gauss-Newton matrix: (model, inputs, layers).
EXACT = {
    "one sample": (linear, lambda: torch.randn(1, 4), ["0", "2"]),
    "one sample, no bias": (lambda: linear(bias=False), lambda: torch.randn(1, 4), ["0", "2"]),
    "all samples alike": (linear, same_inputs, ["0", "2"]),
    "predictions all alike": (uniform, lambda: torch.randn(7, 4), ["2"]),
    "a linear network without hidden layer, one sample": (
        lambda: nn.Sequential(nn.Linear(4, CLASSES)),
        lambda: torch.randn(1, 4),
        ["0"],
    ),
}


@pytest.mark.parametrize("case", EXACT.values(), ids=EXACT.keys())
def test_blocks_are_exact_where_theory_says_so(case):
    make, inputs, names = case
    model, x = make(), inputs()
    sums = collect(model, [x])
    for name in names:
        layer = model.get_submodule(name)
        a, b = pair(sums, name)
        block = gauss_newton(model, x, list(layer.parameters()))
        if layer.bias is not None:
            block = as_matrix_first(block, layer.out_features, layer.in_features + 1)
        np.testing.assert_allclose(np.kron(b[0], a[0]), block, rtol=1e-9, atol=1e-12)


def test_blocks_are_not_exact_elsewhere():
    """The cases above say something: with several different samples the product is an approximation."""
    model, x = linear(), torch.randn(6, 4)
    a, b = pair(collect(model, [x]), "0")
    block = as_matrix_first(gauss_newton(model, x, list(model[0].parameters())), 5, 5)
    assert np.linalg.norm(np.kron(b[0], a[0]) - block) > 0.05 * np.linalg.norm(block)


def test_one_patch_of_one_image_is_exact_for_each_group():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(6, CLASSES))
    x = torch.randn(1, 4, 3, 3)
    a, b = pair(collect(model, [x]), "0")
    block = gauss_newton(model, x, [model[0].weight, model[0].bias])
    weights, d = 3 * 18, 19
    for group in range(2):
        own = [group * weights + i for i in range(weights)] + [2 * weights + group * 3 + i for i in range(3)]
        expected = as_matrix_first(block[np.ix_(own, own)], 3, d)
        np.testing.assert_allclose(np.kron(b[group], a[group]), expected, rtol=1e-9, atol=1e-12)


def explicit_patches(image, kernel, stride, padding, dilation, groups):
    """[groups][positions, features + 1] of one image, by loops."""
    channels, height, width = image.shape
    padded = np.zeros((channels, height + 2 * padding, width + 2 * padding))
    padded[:, padding : padding + height, padding : padding + width] = image
    window, own = dilation * (kernel - 1) + 1, channels // groups
    rows = [[] for _ in range(groups)]
    for top in range(0, padded.shape[1] - window + 1, stride):
        for left in range(0, padded.shape[2] - window + 1, stride):
            for group in range(groups):
                patch = [
                    padded[c, top + dilation * i, left + dilation * j]
                    for c in range(group * own, (group + 1) * own)
                    for i in range(kernel)
                    for j in range(kernel)
                ]
                rows[group].append([*patch, 1.0])
    return [np.array(own_rows) for own_rows in rows]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 0, 1), (2, 1, 1), (1, 2, 2)])
def test_convolution_by_the_expand_convention(groups, stride, padding, dilation):
    conv = nn.Conv2d(2, 4, 2, stride=stride, padding=padding, dilation=dilation, groups=groups)
    pool = nn.Sequential(nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, CLASSES))
    model, x = nn.Sequential(conv, pool), torch.randn(3, 2, 5, 4)
    sums = collect(model, [x[:2], x[2:]])
    a, b = pair(sums, "0")
    patches = [explicit_patches(image.numpy(), 2, stride, padding, dilation, groups) for image in x]
    for group in range(groups):
        rows = np.concatenate([own[group] for own in patches])
        np.testing.assert_allclose(a[group], rows.T @ rows / len(rows), atol=1e-12)
    # B: the sum over positions of J^T F J, J the Jacobian of the logits in the output at that position.
    total = np.zeros((groups, 4 // groups, 4 // groups))
    for image in x:
        h = conv(image[None]).detach().requires_grad_()
        logits = pool(h)[0]
        j = np.stack([torch.autograd.grad(z, h, retain_graph=True)[0][0].numpy() for z in logits])
        p = softmax(logits.detach().numpy())
        for i in range(j.shape[2]):
            for k in range(j.shape[3]):
                block = j[:, :, i, k].T @ (np.diag(p) - np.outer(p, p)) @ j[:, :, i, k]
                for group in range(groups):
                    own = slice(group * 4 // groups, (group + 1) * 4 // groups)
                    total[group] += block[own, own]
    np.testing.assert_allclose(b, total / 3, atol=1e-12)


class Attention(nn.Module):
    """One attention layer over 4 tokens, then the mean token's logits."""

    def __init__(self, **kwargs):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **kwargs)
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.out(self.attention(x, x, x, need_weights=False)[0].mean(1))


@pytest.mark.parametrize("kwargs", [{}, {"kdim": 4, "vdim": 4}, {"bias": False}], ids=["packed", "apart", "no bias"])
def test_attention_projections_by_hand(kwargs):
    model, x = Attention(**kwargs), torch.randn(3, 4, 4)
    if model.attention.in_proj_bias is not None:
        nn.init.normal_(model.attention.in_proj_bias)
    sums = collect(model, [x])
    inputs = x.reshape(-1, 4).numpy()
    if model.attention.in_proj_bias is not None:
        inputs = np.concatenate([inputs, np.ones((12, 1))], axis=1)
    attention = model.attention
    if attention.in_proj_weight is not None:
        weights = attention.in_proj_weight.detach().chunk(3)
    else:
        weights = [getattr(attention, f"{c}_proj_weight").detach() for c in "qkv"]
    biases = attention.in_proj_bias.detach().chunk(3) if attention.in_proj_bias is not None else [torch.zeros(4)] * 3
    expected = np.zeros((3, 4, 4))
    for sample in x:
        projected = [(sample @ w.T + b).requires_grad_() for w, b in zip(weights, biases, strict=True)]
        q, k, v = (h.reshape(4, 2, 2).transpose(0, 1) for h in projected)
        mixed = (q @ k.mT / 2**0.5).softmax(-1) @ v
        logits = model.out(attention.out_proj(mixed.transpose(0, 1).reshape(4, 4)).mean(0))
        torch.testing.assert_close(logits, model(sample[None])[0])
        p = softmax(logits.detach().numpy())
        for index, h in enumerate(projected):
            j = np.stack([torch.autograd.grad(z, h, retain_graph=True)[0].numpy() for z in logits])
            for token in range(4):
                expected[index] += j[:, token].T @ (np.diag(p) - np.outer(p, p)) @ j[:, token] / len(x)
    for index, letter in enumerate("qkv"):
        a, b = pair(sums, f"attention.{letter}_proj")
        np.testing.assert_allclose(a[0], inputs.T @ inputs / 12, atol=1e-12)
        np.testing.assert_allclose(b[0], expected[index], atol=1e-12)
    assert pair(sums, "attention.out_proj")[1][0].any()


def test_activations_in_place_and_layers_called_twice():
    class Twice(nn.Module):
        def __init__(self, inplace):
            super().__init__()
            self.layer, self.relu, self.out = nn.Linear(4, 4), nn.ReLU(inplace=inplace), nn.Linear(4, CLASSES)

        def forward(self, x):
            return self.out(self.relu(self.layer(self.relu(self.layer(x)))))

    model = Twice(True)
    same = Twice(False)
    same.load_state_dict(model.state_dict())
    x = torch.randn(5, 4)
    for name in ("layer", "out"):
        for one, other in zip(pair(collect(model, [x]), name), pair(collect(same, [x]), name), strict=True):
            np.testing.assert_allclose(one, other)
    hidden = torch.relu(same.layer(x)).detach()
    rows = np.concatenate([np.concatenate([part.numpy(), np.ones((5, 1))], 1) for part in (x, hidden)])
    np.testing.assert_allclose(pair(collect(model, [x]), "layer")[0][0], rows.T @ rows / 10)


def test_sampled_converges_to_exact_as_one_over_the_root_of_draws():
    model, x = linear(), torch.randn(4, 4)
    exact = {name: pair(collect(model, [x]), name)[1] for name in ("0", "2")}
    errors = {}
    for draws in (25, 2500):
        squares = []
        for seed in range(12):
            sums = collect(model, [x.repeat(draws, 1)], fisher="sampled", seed=seed)
            squares.append([np.sum((pair(sums, name)[1] - exact[name]) ** 2) for name in exact])
        errors[draws] = np.sqrt(np.mean(squares, axis=0))
    ratios = errors[25] / errors[2500]
    assert ((ratios > 6.5) & (ratios < 15)).all()  # 10 but for the spread of 12 seeds
    assert (errors[2500] < 0.05 * np.array([np.linalg.norm(b) for b in exact.values()])).all()


def test_empirical_takes_the_true_labels_and_the_given_loss():
    model, x, y = linear(), torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    a, b = pair(collect(model, [(x[:4], y[:4]), (x[4:], y[4:])], fisher="empirical"), "2")
    probabilities = model(x).softmax(1).detach().numpy()
    g = probabilities - np.eye(3)[y.numpy()]
    np.testing.assert_allclose(b[0], g.T @ g / 6, atol=1e-12)
    for criterion in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum"), None):
        again = pair(collect(model, [(x, y)], fisher="empirical", criterion=criterion), "2")[1]
        np.testing.assert_allclose(again, b, atol=1e-12)
    targets = torch.randn(6, CLASSES)

    def squared(z, target):
        return (z - target).square().sum(1).mean()

    _, b = pair(collect(model, [(x, targets)], fisher="empirical", criterion=squared), "2")
    g = 2 * (model(x).detach() - targets).numpy()
    np.testing.assert_allclose(b[0], g.T @ g / 6, atol=1e-12)
    assert a.shape == (1, 6, 6)


class Mixed(nn.Module):
    """Parameters of every kind that is no matrix layer."""

    def __init__(self, norm):
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.norm = norm
        self.shift = nn.Parameter(torch.randn(6))
        self.out = nn.Linear(6, CLASSES)

    def forward(self, tokens):
        h = self.embedding(tokens)  # [n, 3, 6]
        h = self.norm(h) if isinstance(self.norm, nn.LayerNorm | nn.RMSNorm) else self.norm(h.mT).mT
        return self.out((torch.tanh(h) + self.shift).mean(1))


NORMS = {
    "batch": lambda: nn.BatchNorm1d(6),
    "layer": lambda: nn.LayerNorm(6),
    "rms": lambda: nn.RMSNorm(6),
    "group": lambda: nn.GroupNorm(2, 6),
    "instance": lambda: nn.InstanceNorm1d(6, affine=True),
    "instance, tracked": lambda: nn.InstanceNorm1d(6, affine=True, track_running_stats=True),
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
def test_diagonal_terms_are_the_diagonal_of_the_gauss_newton_matrix(norm):
    model, tokens = Mixed(norm()), torch.randint(7, (5, 3))
    for parameter in model.norm.parameters():
        nn.init.normal_(parameter)
    model(tokens)  # running statistics that say something
    sums = collect(model, [tokens[:2], tokens[2:]])
    names = [name for name, _ in model.named_parameters() if not name.startswith("out")]
    assert sorted(sums.diagonal) == sorted(names)
    for name in names:
        parameter = model.get_parameter(name)
        expected = np.diag(gauss_newton(model, tokens, [parameter])).reshape(parameter.shape)
        np.testing.assert_allclose(sums.diagonal[name].numpy() / 5, expected, rtol=1e-9, atol=1e-13)
        assert expected.any()


def test_norm_layers_on_images_sequence_first_and_used_twice():
    class Images(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.out = nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Linear(3, CLASSES)

        def forward(self, x):
            return self.out(torch.relu(self.norm(self.conv(x))).mean((2, 3)))

    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.out = nn.LayerNorm(4), nn.Linear(4, CLASSES)

        def forward(self, x):
            return self.out(torch.tanh(self.norm(x.transpose(0, 1))).mean(0))

    class Twice(nn.Module):
        """One norm layer with two uses: its gradient of a sample is the sum of both."""

        def __init__(self):
            super().__init__()
            self.norm, self.out = nn.LayerNorm(4), nn.Linear(4, CLASSES)

        def forward(self, x):
            return self.out(self.norm(torch.tanh(self.norm(x))))

    cases = (Images(), torch.randn(4, 2, 4, 4)), (Sequence(), torch.randn(5, 3, 4)), (Twice(), torch.randn(5, 4))
    for model, x in cases:
        sums = collect(model, [x])
        for name in ("norm.weight", "norm.bias"):
            expected = np.diag(gauss_newton(model, x, [model.get_parameter(name)]))
            np.testing.assert_allclose(sums.diagonal[name].numpy() / len(x), expected, rtol=1e-9)


def against_brute_force(model, x, sizes):
    """Diagonal terms of the layer `norm` from mini-batches of some sizes, against one sample at a time."""
    sums = collect(model, x.split(sizes))
    for name in ("norm.weight", "norm.bias"):
        expected = np.diag(gauss_newton(model, x, [model.get_parameter(name)]))
        np.testing.assert_allclose(sums.diagonal[name].numpy() / len(x), expected, rtol=1e-9)


class Windows(nn.Module):
    """Images in windows, [n * windows, tokens, features]; `swapped`: tokens first."""

    def __init__(self, swapped=False):
        super().__init__()
        self.norm, self.layer, self.out = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, CLASSES)
        self.swapped = swapped

    def forward(self, x):
        windows = x.reshape(-1, 4, 4)
        windows = windows.transpose(0, 1) if self.swapped else windows
        h = torch.tanh(self.layer(self.norm(windows)))
        h = h.transpose(0, 1) if self.swapped else h
        return self.out(h.reshape(len(x), -1, 4).square().mean(1))


class SequenceFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.out = nn.LayerNorm(4), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.out(torch.tanh(self.norm(x.transpose(0, 1))).square().mean(0))


class Views(nn.Module):
    """Two views of each sample, one after the other in the mini-batch."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.out = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, CLASSES)

    def forward(self, x):
        one, other = torch.tanh(self.norm(self.layer(torch.cat([x, x.flip(1)])))).chunk(2)
        return self.out(one * other)


@pytest.mark.parametrize("sizes", [3, 4, 2, 1, [4, 4, 3, 1]])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (Windows, (8, 4)),
        (lambda: Windows(swapped=True), (8, 4)),
        (SequenceFirst, (4, 4)),
        (Views, (4,)),
    ],
    ids=["windows", "windows, tokens first", "sequence first", "views"],
)
def test_norm_layers_whose_first_axis_is_not_the_samples(make, shape, sizes):
    """Also where a number of tokens or windows happens to be the number of samples."""
    against_brute_force(make(), torch.randn(12, *shape), sizes)


@pytest.mark.parametrize(
    ("norm", "shape", "size", "told"),
    [
        (nn.LayerNorm(4), (6, 4), 6, True),
        (nn.LayerNorm(4), (6, 9, 4), 6, True),
        (nn.LayerNorm(4), (6, 6, 4), 6, False),
        (nn.LayerNorm(4), (6, 12, 4), 6, False),
        (nn.LayerNorm(4), (9, 6, 4), 6, False),
        (nn.LayerNorm(4), (12, 4, 4), 6, False),
        (nn.LayerNorm((6, 4)), (6, 6, 4), 6, True),
        (nn.LayerNorm((6, 4)), (6, 4), 6, False),
        (nn.RMSNorm(4), (1, 9, 4), 1, True),
        (nn.BatchNorm2d(6), (6, 6, 6, 6), 6, True),
        (nn.BatchNorm1d(4), (12, 4), 6, False),
    ],
)
def test_when_a_shape_tells_samples_apart(norm, shape, size, told):
    """Then no pass a sample is needed."""
    assert Scale("norm", norm, {}).tells_samples(torch.zeros(shape), size) == told


def test_a_norm_layer_used_once_by_sample_and_once_by_view():
    class Both(Views):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = nn.Linear(4, 5), nn.LayerNorm(5)

        def forward(self, x):
            return self.out(self.norm(torch.tanh(self.layer(x)))) + super().forward(x)

    against_brute_force(Both(), torch.randn(6, 4), 3)


def test_norm_layers_that_tell_no_samples_apart_do_not_go_with_batch_statistics():
    class Both(Views):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(5, track_running_stats=False)

    with pytest.raises(ModelError, match=r"parameter 'norm\.weight'.*layer 'norm' normalises by the mini-batch"):
        collect(Both(), [torch.randn(4, 4)])


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "one by one"])
@pytest.mark.parametrize("sparse", [True, False])
def test_embeddings_with_sparse_gradients(sparse, batched):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.out = nn.Embedding(7, 4, sparse=sparse), nn.Linear(4, CLASSES)

        def forward(self, tokens):
            h = self.embedding(tokens)
            if not batched:
                h = h * (2.0 if float(h.detach().sum()) > 1e9 else 1.0)  # what vmap cannot look at
            return self.out(torch.tanh(h).mean(1))

    model, tokens = Words(), torch.randint(7, (5, 3))
    sums = collect(model, [tokens])
    dense = nn.Embedding.from_pretrained(model.embedding.weight.detach(), freeze=False)
    model.embedding = dense
    expected = np.diag(gauss_newton(model, tokens, [dense.weight])).reshape(7, 4)
    np.testing.assert_allclose(sums.diagonal["embedding.weight"].numpy() / 5, expected, rtol=1e-9, atol=1e-13)


class Backbone(nn.Module):
    """A body without gradients, a head with some."""

    def __init__(self, run):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 5))
        self.first, self.head, self.run = nn.Linear(4, 4), nn.Linear(5, CLASSES), run

    def forward(self, x):
        return self.head(self.run(self.body, self.first(x)))


def without_gradients(body, x):
    with torch.no_grad():
        return body(x)


def test_layers_that_the_model_runs_without_gradients_have_no_factors():
    model, x = Backbone(without_gradients), torch.randn(6, 4)
    sums = collect(model, [x[:4], x[4:]])
    assert [name for name in sums.layers if sums.layers[name].factors(6) is not None] == ["head"]
    assert not sums.diagonal
    b = gauss_newton(model, x, [model.head.bias])
    np.testing.assert_allclose(pair(sums, "head")[1][0], b, atol=1e-12)


def test_checkpoints():
    x = torch.randn(6, 4)
    plain = Backbone(lambda body, x: body(x))
    kept = Backbone(lambda body, x: checkpoint(body, x, use_reentrant=False))
    kept.load_state_dict(plain.state_dict())
    one, other = collect(plain, [x]), collect(kept, [x])
    for name in one.layers:
        for a, b in zip(pair(one, name), pair(other, name), strict=True):
            np.testing.assert_allclose(a, b)
    assert sorted(one.diagonal) == sorted(other.diagonal) == ["body.1.bias", "body.1.weight"]
    with pytest.raises(ModelError, match="use_reentrant=False"):
        collect(Backbone(lambda body, x: checkpoint(body, x, use_reentrant=True)), [x])


def test_inference_mode_is_refused():
    with torch.inference_mode(), pytest.raises(ModelError, match="inference_mode"):
        collect(linear(), [torch.randn(3, 4)])


def test_a_model_whose_layers_are_never_called_is_refused():
    class Hidden(nn.Module):
        """As a compiled model, it does not call its layers' hooks."""

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, CLASSES)

        def forward(self, x):
            return F.linear(x, self.layer.weight, self.layer.bias)

    with pytest.raises(ModelError, match=r"none of the covered layers was called.*torch\.compile"):
        collect(Hidden(), [torch.randn(3, 4)])


class Masked(nn.Module):
    """Only the first classes have finite logits."""

    def __init__(self, fill=-float("inf")):
        super().__init__()
        self.hidden, self.out, self.fill = nn.Linear(4, 5), nn.Linear(5, CLASSES + 2), fill
        self.shift = nn.Parameter(torch.randn(5))

    def forward(self, x):
        mask = torch.arange(CLASSES + 2) >= CLASSES
        return self.out(torch.tanh(self.hidden(x)) + self.shift).masked_fill(mask, self.fill)


@pytest.mark.parametrize("fisher", ["exact", "sampled", "empirical"])
def test_classes_that_are_masked_have_no_part(fisher):
    model, x, y = Masked(), torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    sums = collect(model, [(x, y)], fisher=fisher)
    a, b = pair(sums, "out")
    assert not b[0, CLASSES:].any()
    model.fill = -1e4  # no probability either
    again = collect(model, [(x, y)], fisher=fisher)
    np.testing.assert_allclose(b, pair(again, "out")[1], atol=1e-12)
    np.testing.assert_allclose(pair(sums, "hidden")[1], pair(again, "hidden")[1], atol=1e-12)
    np.testing.assert_allclose(sums.diagonal["shift"], again.diagonal["shift"], atol=1e-12)
    assert b[0, :CLASSES].any()
    assert a.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_other_logits_that_are_not_finite_are_refused(value):
    with pytest.raises(NonFiniteError, match="logit"):
        collect(Masked(value), [torch.randn(3, 4)])

    class Nothing(nn.Sequential):
        def forward(self, x):
            logits = super().forward(x)
            return torch.where(torch.arange(len(x))[:, None] == 1, -float("inf"), logits)

    with pytest.raises(NonFiniteError, match="all of a sample are masked"):
        collect(Nothing(nn.Linear(4, CLASSES)), [torch.randn(3, 4)])


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        ({"x": torch.ones(2, 4)}, "is a dict"),
        (({"x": torch.ones(2, 4)}, torch.zeros(2)), "tuple whose inputs are a dict"),
        (["x", "y"], "list whose inputs are a str"),
        ((), "is a tuple"),
    ],
)
def test_inputs_that_are_no_tensors_are_refused(batch, match):
    for forward in (None, lambda model, own: model(own["x"])):
        with pytest.raises(DataError, match=f"{match}.*inputs must be tensors"):
            collect(linear(), [batch], forward=forward)


def test_means_and_totals_for_whoever_needs_them():
    model, x = linear(), torch.randn(6, 4)
    run = FactorPass(model, cover(model).units, fisher="empirical", extended=True, generator=torch.Generator())
    y = torch.tensor([0, 1, 2, 0, 1, 1])
    layer = run.run([(x[:4], y[:4]), (x[4:], y[4:])]).layers["2"]
    hidden = np.concatenate([model[:2](x).detach().numpy(), np.ones((6, 1))], 1)
    np.testing.assert_allclose(layer.inputs.mean().numpy()[0], hidden.mean(0))
    g = model(x).softmax(1).detach().numpy() - np.eye(3)[y.numpy()]
    first, second = g[:4].sum(0), g[4:].sum(0)
    np.testing.assert_allclose(layer.totals.moment(1).numpy()[0], np.outer(first, first) + np.outer(second, second))


@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
def test_nothing_is_disturbed(fisher):
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, CLASSES))
    x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    F.cross_entropy(model(x), y).backward()
    model[1].eval()
    before = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()], torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    collect(model, [(x, y)], fisher=fisher)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before[0].items())
    assert all(torch.equal(g, p.grad) for g, p in zip(before[1], model.parameters(), strict=True))
    assert torch.equal(before[2], torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert not any(module._forward_hooks for module in model.modules())


def test_a_frozen_layer_has_factors_while_it_is_kept():
    model, x = linear(), torch.randn(5, 4)
    units = cover(model).units
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    run = FactorPass(model, units, fisher="exact")
    b = pair(run.run([x]), "0")[1]
    for parameter in model[0].parameters():
        parameter.requires_grad_(True)
    np.testing.assert_allclose(b, pair(collect(model, [x]), "0")[1])


def batch_normalised(plain=False):
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, CLASSES))
    if plain:
        model.register_parameter("scale", nn.Parameter(torch.ones(1)))
    return model


def test_exact_has_no_cross_terms_of_samples_on_average():
    """Where samples meet in BatchNorm, the sum of several samples' directions is no direction of one of them."""
    model, x = batch_normalised(), torch.randn(8, 4)
    expected = 0
    hidden = model[0](x).detach().requires_grad_()
    logits = model[1:](hidden)
    for n in range(8):
        j = np.stack([torch.autograd.grad(z, hidden, retain_graph=True)[0].numpy() for z in logits[n]])  # [c, 8, 6]
        p = softmax(logits[n].detach().numpy())
        expected = expected + np.einsum("cmi,cd,dmj->ij", j, np.diag(p) - np.outer(p, p), j)
    found = [pair(collect(model, [x], seed=seed), "0")[1][0] * 8 for seed in range(300)]
    spread = np.linalg.norm(np.std(found, axis=0)) / 300**0.5
    assert np.linalg.norm(np.mean(found, axis=0) - expected) < 4 * spread
    assert spread < 0.05 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("make", "batches", "error", "match"),
    [
        (linear, [], DataError, "no sample came"),
        (batch_normalised, [torch.ones(1, 4).double()], DataError, "one sample came, and layer '1'"),
        (lambda: batch_normalised(True), [torch.ones(4, 4).double()], ModelError, "parameter 'scale'.*layer '1'"),
        (
            lambda: nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (3, 2))),
            [torch.ones(2, 4).double()],
            ModelError,
            "logits",
        ),
        (linear, [torch.full((2, 4), float("inf")).double()], NonFiniteError, "logit"),
    ],
    ids=["no data", "a batch of one", "a plain parameter beside batch statistics", "no logits", "infinite"],
)
def test_refused_by_name(make, batches, error, match):
    with pytest.raises(error, match=match):
        collect(make(), batches)


def test_values_that_are_not_finite_name_the_layer():
    class Hidden(nn.Module):
        """A layer whose infinite input does not reach the logits."""

        def __init__(self):
            super().__init__()
            self.first, self.lost = nn.Linear(4, CLASSES), nn.Linear(4, 2)

        def forward(self, x):
            self.lost(x * float("inf"))
            return self.first(x)

    with pytest.raises(NonFiniteError, match=r"layer 'lost': its input"):
        collect(Hidden(), [torch.randn(3, 4)])

    class Steep(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.out = nn.Linear(4, 4), nn.Linear(4, CLASSES)

        def forward(self, x):
            return self.out(torch.sqrt(self.first(x).abs() * 0))

    with pytest.raises(NonFiniteError, match=r"layer 'first': its output's gradient"):
        collect(Steep(), [torch.randn(3, 4)])


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        (torch.ones(2, 4).double(), "true labels"),
        ((torch.ones(2, 4).double(), torch.tensor([0, 3])), "labels from 0 to 3"),
        ((torch.ones(2, 4).double(), torch.randn(2, 3)), "expected"),
    ],
)
def test_labels_refused(batch, match):
    with pytest.raises(DataError, match=match):
        collect(linear(), [batch], fisher="empirical")


class Squared(nn.CrossEntropyLoss):
    """A subclass that computes something else."""

    def forward(self, z, y):
        return super().forward(z, y) ** 2


class Named(nn.CrossEntropyLoss):
    """A subclass that computes the same."""


@pytest.mark.parametrize(
    ("criterion", "fisher", "accepted"),
    [
        (None, "sampled", True),
        (nn.CrossEntropyLoss(), "sampled", True),
        (nn.CrossEntropyLoss(label_smoothing=0.1), "exact", True),
        (F.cross_entropy, "exact", True),
        (nn.MSELoss(), "sampled", False),
        (nn.CrossEntropyLoss(reduction="sum"), "exact", False),
        (nn.CrossEntropyLoss(weight=torch.ones(3)), "sampled", False),
        (Squared(), "exact", False),
        (Squared(), "empirical", True),
        (Named(), "sampled", True),
        (nn.MSELoss(), "empirical", True),
        (nn.CrossEntropyLoss(reduction="none"), "empirical", False),
    ],
)
def test_losses(criterion, fisher, accepted):
    if accepted:
        check_criterion(criterion, fisher)
    else:
        with pytest.raises(ConfigurationError, match="criterion"):
            check_criterion(criterion, fisher)
