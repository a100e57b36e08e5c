"""Curvature of the summed cross-entropies of a mini-batch, samples coupled by BatchNorm: dense, float64, no factors.

Everything is a Jacobian J_n [classes, numbers] of the logits of sample n, by torch alone, and F_n = diag(p) - p p^T of
its softmax p. The Gauss-Newton matrix of a mini-batch, a sample, is the mean over n of J_n^T F_n J_n.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.func import functional_call


def softmax_hessians(logits):
    p = torch.exp(logits - logits.amax(1, keepdim=True))
    p = p / p.sum(1, keepdim=True)
    return torch.stack([torch.diag(own) - torch.outer(own, own) for own in p])


def curvature(run, matrices):
    """The Gauss-Newton matrix of logits `run(*matrices)` [n, classes] in each of the matrices, rows one after another.

    The Jacobian of all logits of the mini-batch is in the same matrix: nothing says that a sample depends on its own
    row alone.
    """
    logits = run(*matrices).detach()
    f = softmax_hessians(logits)
    jacobians = torch.autograd.functional.jacobian(run, tuple(matrices), vectorize=True)
    return [torch.einsum("nci,ncd,ndj->ij", j.flatten(2), f, j.flatten(2)) / len(f) for j in jacobians]


def blocks(model, x, names, training=True):
    """The blocks [out (d + 1), out (d + 1)] of layers' [weight, bias] [out, d + 1] in training or evaluation mode."""
    model = copy.deepcopy(model).train(training)
    layers = [model.get_submodule(name) for name in names]
    matrices = [torch.cat([own.weight.flatten(1), own.bias[:, None]], 1).detach() for own in layers]

    def run(*own):
        parts = {}
        for name, layer, matrix in zip(names, layers, own, strict=True):
            parts[f"{name}.weight"] = matrix[:, :-1].reshape(layer.weight.shape)
            parts[f"{name}.bias"] = matrix[:, -1]
        return functional_call(model, parts, (x,))

    return dict(zip(names, curvature(run, matrices), strict=True))


def output_moments(model, x, name):
    """Sum over samples of J^T F J, a sample, J of the logits in a layer's output rows (its second axis their columns).

    Returns:
        For each row alone, summed over rows; and for J summed over rows.
    """
    model = copy.deepcopy(model).train()
    shapes = []
    model.get_submodule(name).register_forward_hook(lambda *args: shapes.append(args[-1].shape))
    logits = model(x).detach()
    shift = []
    model.get_submodule(name).register_forward_hook(lambda *args: args[-1] + shift[-1])

    def run(value):
        shift.append(value)
        return model(x)

    j = torch.autograd.functional.jacobian(run, torch.zeros(shapes[0]), vectorize=True)  # [n, classes, m, out, ...]
    j = j.movedim(3, -1).flatten(2, -2)
    f = softmax_hessians(logits)
    within = torch.einsum("ncmi,ncd,ndmj->ij", j, f, j) / len(x)
    return within, torch.einsum("nci,ncd,ndj->ij", j.sum(2), f, j.sum(2)) / len(x)


def folded(model, x, name, norm_name):
    """The model in which a layer and its BatchNorm are the layer alone, by the statistics of this mini-batch."""
    model = copy.deepcopy(model).train()
    layer, norm = model.get_submodule(name), model.get_submodule(norm_name)
    entered = []
    norm.register_forward_pre_hook(lambda module, args: entered.append(args[0].detach()))
    wanted = model(x)
    columns = entered[0].movedim(1, 0).flatten(1)
    mean = columns.mean(1)
    scale = norm.weight.detach() / ((columns - mean[:, None]).square().mean(1) + norm.eps).sqrt()
    with torch.no_grad():
        layer.weight.copy_(layer.weight * scale.reshape(-1, *[1] * (layer.weight.dim() - 1)))
        layer.bias.copy_(scale * (layer.bias - mean) + norm.bias)
    model.set_submodule(norm_name, nn.Identity())
    torch.testing.assert_close(model(x), wanted)
    return model
