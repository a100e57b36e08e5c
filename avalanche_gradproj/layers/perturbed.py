"""Outputs of a layer whose weight is a scaled and low-rank perturbed copy of a fixed one.

W[g] = diag(rows) W0[g] diag(columns) + left[g] right[g] for each of a layer's groups, the second term being the same at
every kernel position. Two routes give the same outputs:

- `"factored"`: inputs and outputs are scaled around the fixed layer, and the low-rank term is a map to few channels, a
  sum over the kernel's window, and a map to the outputs. No full weight is formed, and none gets a gradient.
- `"formed"`: W is formed, and the layer computes with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avalanche_gradproj.layers.conv import Convolution, padded

ROUTES = ("auto", "factored", "formed")

#: Operations of a convolution that take the time of the factored route's passes over one number, forwards and backwards
#: (float32, measured on a CPU with AVX-512: 5 to 7 ns against 60 operations a ns; `python -m benchmarks speed`).
PASSES = 600

_CONVOLVE = (F.conv1d, F.conv2d, F.conv3d)


@dataclass(frozen=True)
class Factors:
    """What makes one task's weight of a fixed one.

    Attributes:
        rows: [out channels of all groups].
        columns: [in channels of all groups].
        left: [groups, out channels of one, rank].
        right: [groups, rank, in channels of one].
        bias: [out channels of all groups], or None.
    """

    rows: Tensor
    columns: Tensor
    left: Tensor
    right: Tensor
    bias: Tensor | None


def canonical(layer: nn.Module, weight: Tensor) -> Tensor:
    """Return a Linear or Conv layer's weight as [groups, out, in, taps], a view."""
    groups = getattr(layer, "groups", 1)
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


def formed_weight(layer: nn.Module, weight: Tensor, factors: Factors) -> Tensor:
    """Return the perturbed weight, shaped and laid out in memory like `weight`."""
    groups, taps = getattr(layer, "groups", 1), (1,) * (weight.dim() - 2)
    columns = factors.columns.view(groups, 1, weight.shape[1])
    if groups > 1:
        columns = columns.expand(-1, weight.shape[0] // groups, -1).reshape(weight.shape[:2])
    low = (factors.left @ factors.right).reshape(*weight.shape[:2], *taps)
    return weight * factors.rows.view(-1, 1, *taps) * columns.view(-1, weight.shape[1], *taps) + low


def perturbed(layer: nn.Linear | Convolution, x: Tensor, factors: Factors, route: str = "auto") -> Tensor:
    """Return the output of a layer with a task's weight and bias.

    Args:
        layer: the fixed layer; of its bias nothing is used.
        x: its input, with or without a batch dimension.
        factors: the task's.
        route: `"factored"`, `"formed"`, or `"auto"` for the one that is expected to take less time
            (`prefers_formed`).
    """
    weight = layer.weight
    if route == "formed" or (route == "auto" and prefers_formed(layer, x)):
        weight = formed_weight(layer, weight, factors)
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, factors.bias)
        return _convolve(layer, x, weight, factors.bias, layer.groups)
    if isinstance(layer, nn.Linear):
        low = F.linear(F.linear(x, factors.right[0]), factors.left[0], factors.bias)
        return torch.addcmul(low, F.linear(x * factors.columns, weight), factors.rows.to(low.dtype))
    space = len(layer.kernel_size)
    ones = (1,) * space
    main = _convolve(layer, x * factors.columns.view(-1, *ones), weight, None, layer.groups)
    rank = factors.right.shape[1]
    few = _CONVOLVE[space - 1](x, factors.right.reshape(-1, factors.right.shape[2], *ones), groups=layer.groups)
    few = _summed(layer, few, layer.groups * rank)
    left = factors.left.reshape(-1, rank, *ones)
    low = _CONVOLVE[space - 1](few, left, factors.bias, groups=layer.groups)
    return torch.addcmul(low, main, factors.rows.view(-1, *ones).to(low.dtype))


def _convolve(layer: Convolution, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """Convolve as the layer does, with another weight and number of groups."""
    convolve = _CONVOLVE[len(layer.kernel_size) - 1]
    if layer.padding_mode == "zeros":
        return convolve(x, weight, bias, layer.stride, layer.padding, layer.dilation, groups)
    return convolve(padded(x, layer), weight, bias, layer.stride, 0, layer.dilation, groups)


def _summed(layer: Convolution, x: Tensor, channels: int) -> Tensor:
    """Sum every channel over the layer's window at each of its output positions."""
    if math.prod(layer.kernel_size) == 1 and layer.stride == (1,) * len(layer.stride) and not _pads(layer):
        return x
    window = x.new_ones(channels, 1, *layer.kernel_size)
    return _convolve(layer, x, window, None, channels)


def _pads(layer: Convolution) -> bool:
    return not isinstance(layer.padding, str) and any(layer.padding)


def prefers_formed(layer: nn.Linear | Convolution, x: Tensor) -> bool:
    """Whether forming the weight is expected to take less time than the factored route.

    The factored route saves the gradient of the full weight, which takes as much arithmetic as the forward pass, and
    for a Linear layer forming the weight costs more than all that it could save. For a convolution, whose weight is
    small, it costs some passes over inputs and outputs instead, and where no gradient is needed at the input it needs
    one all the same (for `columns`).
    """
    if isinstance(layer, nn.Linear):
        return False
    if not torch.is_grad_enabled() or not x.requires_grad:
        return True
    outputs = x.numel() // layer.in_channels * layer.out_channels // math.prod(layer.stride)
    return 2 * layer.weight[0].numel() * outputs < PASSES * (x.numel() + outputs)
