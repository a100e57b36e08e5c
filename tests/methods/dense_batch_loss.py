"""Networks with BatchNorm, and the curvature of a mini-batch's summed cross-entropies, samples coupled by it.

By brute force: dense, in float64, without factors. Everything is a Jacobian J_n [classes, numbers] of the logits of
sample n, by torch alone, and F_n = diag(p) - p p^T of its softmax p. The Gauss-Newton matrix of a mini-batch, a sample,
is the mean over n of J_n^T F_n J_n.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

CLASSES = 3


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
    if layer.bias is None:
        layer.bias = nn.Parameter(torch.zeros(len(layer.weight)))
    columns = entered[0].movedim(1, 0).flatten(1)
    mean = columns.mean(1)
    scale = norm.weight.detach() / ((columns - mean[:, None]).square().mean(1) + norm.eps).sqrt()
    with torch.no_grad():
        layer.weight.copy_(layer.weight * scale.reshape(-1, *[1] * (layer.weight.dim() - 1)))
        layer.bias.copy_(scale * (layer.bias - mean) + norm.bias)
    model.set_submodule(norm_name, nn.Identity())
    torch.testing.assert_close(model(x), wanted)
    return model


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
    for norm in [m for m in model.modules() if isinstance(m, _BatchNorm)]:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    return model


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
    "merged linear, no bias": lambda: Beside(nn.Linear(2, 4, bias=False), nn.BatchNorm1d(4), nn.BatchNorm1d(4)),
    "merged convolution": lambda: Beside(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)),
}


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
    "no scale, one patch an image, no bias": (
        lambda: alone(nn.Conv2d(2, 4, 3, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(4, CLASSES), scale=0),
        lambda: [torch.randn(5, 2, 3, 3)],
    ),
    "all samples alike": (
        lambda: alone(4, nn.Tanh(), nn.Linear(5, CLASSES)),
        lambda: [torch.randn(1, 4).expand(6, 4).clone()],
    ),
}


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


def with_statistics_of(model, x):
    """Make the running statistics of a network in evaluation mode those of a mini-batch."""

    def hook(norm, args):
        columns = args[0].movedim(1, 0).flatten(1)
        norm.running_mean.copy_(columns.mean(1))
        norm.running_var.copy_((columns - norm.running_mean[:, None]).square().mean(1))

    handles = [m.register_forward_pre_hook(hook) for m in model.modules() if isinstance(m, _BatchNorm)]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
