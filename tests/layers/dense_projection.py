"""A Linear layer under ProjectedInputs, and what its gradients should be: autograd's, projected entry by entry."""

import numpy as np
import torch

from avalanche_gradproj.layers.inputs import ProjectedInputs
from avalanche_gradproj.layers.rules import units_of
from avalanche_gradproj.linalg.projection import Projector
from avalanche_gradproj.linalg.subspace import Basis

IN, OUT = 6, 5


def taken_over(layer, *, rank=3, route="auto", forced=True):
    """Return the layer's unit, the columns of a random basis, and its projected inputs."""
    (unit,) = units_of("fc", layer)
    turned = np.linalg.qr(np.random.default_rng(7).normal(size=(unit.features, unit.features)))[0]
    columns = torch.from_numpy(turned[:, :rank].copy()).to(layer.weight.dtype)
    projector = Projector(Basis(columns[None], (rank,)), route=route)
    return unit, columns.double().numpy(), ProjectedInputs(unit, projector, forced=forced)


def gradients(layer):
    """The gradient [out, in (+ 1)] as it stands in the parameters."""
    parts = [layer.weight.grad.double().numpy()]
    if layer.bias is not None:
        parts.append(layer.bias.grad.double().numpy()[:, None])
    return np.concatenate(parts, axis=1)


def dense(gradient, columns):
    """G - G M M^T, entry by entry."""
    result = gradient.copy()
    for row in range(gradient.shape[0]):
        for column in columns.T:
            result[row] -= sum(gradient[row, i] * column[i] for i in range(len(column))) * column
    return result


def backward(layer, x, run=None):
    """Run, go back from a fixed combination of the outputs; return the output and the gradient at the input."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    output = layer(x) if run is None else run(x)
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).reshape(output.shape)
    (output * weights).sum().backward()
    return output.detach(), x.grad
