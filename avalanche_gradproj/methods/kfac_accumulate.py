"""Gradients that are added to those of a backward pass, without autograd between."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from avalanche_gradproj.layers.unit import ParameterSlice


def accumulate(part: Tensor, target: ParameterSlice) -> None:
    """Add to the gradient of a parameter's rows, where the parameter takes one.

    Args:
        part: [.., rows, width], as many numbers as the slice has, or fewer: then those of its first rows.
        target: whose gradient.
    """
    parameter = target.parameter
    if not parameter.requires_grad:
        return
    own = target.of(dense_gradient(parameter))
    rows = part.numel() // own.shape[1:].numel()
    own = own if rows == own.shape[0] else own[:rows]
    own.add_(part if part.shape == own.shape else part.reshape(own.shape))


def dense_gradient(parameter: nn.Parameter) -> Tensor:
    """Return the gradient of a parameter, made of zeros where there is none, and dense where it is sparse."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    elif parameter.grad.layout != torch.strided:
        parameter.grad = parameter.grad.to_dense()
    return parameter.grad


def watched(parameters: Iterable[Tensor]) -> bool:
    """Whether somebody watches, or changes, gradients as the backward pass makes them: these must be whole then."""
    return any(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None) for p in parameters)


def add_vector(vector: Tensor, parameters: Sequence[nn.Parameter]) -> None:
    """Add to the gradients of parameters, laid out one behind the other in one vector; not where one takes none."""
    begin = 0
    for parameter in parameters:
        part = vector[begin : begin + parameter.numel()]
        if parameter.requires_grad:
            dense_gradient(parameter).add_(part.view(parameter.shape))
        begin += parameter.numel()
