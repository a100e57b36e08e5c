"""Kronecker factors against curvature by brute force: one logit, one sample at a time, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests.methods.dense_sample_loss import CLASSES, as_matrix_first, gauss_newton, linear, softmax
from tests.methods.kfac_factors_setup import collect, pair

pytestmark = pytest.mark.usefixtures("double")


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
