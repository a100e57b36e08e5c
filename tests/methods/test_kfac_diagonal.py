"""Diagonal terms of norm layers, embeddings and plain parameters, against curvature by brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from avalanche_gradproj.errors import ModelError
from avalanche_gradproj.layers.scale import Scale
from tests.methods.dense_sample_loss import CLASSES, gauss_newton
from tests.methods.kfac_factors_setup import collect

pytestmark = pytest.mark.usefixtures("double")


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
