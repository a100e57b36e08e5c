"""A quadratic penalty on matrices, value and gradient from one pass of products, inside an ordinary loss.

Of matrices W (a layer's weight with its bias as last column, or any differentiable function of weights) and of
parameters without a matrix:

    1/2 sum_l sum_t <W_l - W_lt*, C_lt (W_l - W_lt*)>  +  1/2 sum_j sum_t f_jt (theta_j - theta_jt*)^2

where C_lt is a sum of Kronecker products (`linalg.kronecker`). Everything stays on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from avalanche_gradproj.layers.unit import Unit
from avalanche_gradproj.linalg.kept import KeptForm
from avalanche_gradproj.linalg.kronecker import KroneckerTerm, quadratic


@dataclass(frozen=True, eq=False)
class Form:
    """One quadratic form on a matrix, and its centre.

    Attributes:
        terms: the form; every weight is folded into them.
        centre: W* [blocks, out, d]; with fewer `out` than the matrix has, the form is on its first rows (a layer that
            has grown since).
    """

    terms: Sequence[KroneckerTerm]
    centre: Tensor


@dataclass(eq=False)
class MatrixSite:
    """A matrix under penalty.

    Attributes:
        tensors: gives the tensors that make up the matrix: the weight, [blocks * out, ...], and possibly the bias
            [blocks * out]. They may be parameters or differentiable functions of some.
        forms: the forms on it, each with as many blocks and columns.
        refresh_every: see `linalg.kept.KeptForm`; 1 forms all products each time.
    """

    tensors: Callable[[], tuple[Tensor, ...]]
    forms: Sequence[Form]
    refresh_every: int = 1
    _buffers: list[Tensor] = field(default_factory=list, init=False)
    _kept: list[KeptForm] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        squeezed = []
        for form in self.forms:
            one = form.centre.shape[0] == 1
            centre = (form.centre[0] if one else form.centre).contiguous()
            squeezed.append(Form([term.squeezed() for term in form.terms], centre))
        self.forms = squeezed
        self._buffers = [torch.empty_like(form.centre) for form in squeezed]
        if self.refresh_every > 1:
            self._kept = [KeptForm(form.terms, self.refresh_every) for form in squeezed]

    def evaluate(self, tensors: Sequence[Tensor], *, refresh: bool = True) -> tuple[Tensor, list[Tensor]]:
        """Return the value, and the gradient of each tensor.

        Args:
            tensors: what `tensors()` gave.
            refresh: form all products, where some may be kept.
        """
        value, sums = None, None
        for index, (form, buffer) in enumerate(zip(self.forms, self._buffers, strict=True)):
            _subtract(tensors, form.centre, buffer)
            if self._kept:
                own, gradient = self._kept[index].quadratic(buffer, refresh=refresh)
            else:
                own, gradient = quadratic(form.terms, buffer)
            value = own if value is None else value + own
            sums = gradient if sums is None else _add(sums, gradient)
        if value is None or sums is None:
            raise ValueError("a site without forms")
        widths = [tensor.shape[1:].numel() for tensor in tensors]
        return value, [_like(part, tensor) for part, tensor in zip(sums.split(widths, dim=-1), tensors, strict=True)]


def _subtract(tensors: Sequence[Tensor], centre: Tensor, out: Tensor) -> None:
    """Write W - W* into a buffer: weight and bias are not concatenated first."""
    column = 0
    for tensor in tensors:
        width = tensor.shape[1:].numel()
        part = tensor if tensor.dim() == centre.dim() == 2 else tensor.reshape(*centre.shape[:-2], -1, width)
        if part.shape[-2] > centre.shape[-2]:
            part = part.narrow(-2, 0, centre.shape[-2])
        torch.sub(part, centre.narrow(-1, column, width), out=out.narrow(-1, column, width))
        column += width


def _add(one: Tensor, other: Tensor) -> Tensor:
    """Return the sum of [.., rows, d], one of which may lack the last rows; the larger is overwritten."""
    larger, smaller = (one, other) if one.shape[-2] >= other.shape[-2] else (other, one)
    larger[..., : smaller.shape[-2], :] += smaller
    return larger


def _like(part: Tensor, tensor: Tensor) -> Tensor:
    """Return a part [.., rows, width] in a tensor's shape and type, zeros in the rows that it does not have."""
    missing = tensor.numel() - part.numel()
    if missing:
        filler = part.new_zeros(*part.shape[:-2], missing // part.shape[-1], part.shape[-1])
        part = torch.cat([part, filler], dim=-2)
    part = part.reshape(tensor.shape)
    return part if part.dtype == tensor.dtype else part.to(tensor.dtype)


@dataclass(eq=False)
class DiagonalSite:
    """Parameters under a diagonal penalty, all of them as one vector.

    Attributes:
        parameters: the parameters.
        curvatures: one vector f a form, over all of them.
        centres: the centre theta* of each form.
    """

    parameters: Sequence[Tensor]
    curvatures: Sequence[Tensor]
    centres: Sequence[Tensor]

    def evaluate(self) -> tuple[Tensor, list[Tensor]]:
        """Return the value, and the gradient of each parameter."""
        vector = torch.cat([p.reshape(-1) for p in self.parameters]).to(self.centres[0].dtype)
        value, sums = None, None
        for curvature, centre in zip(self.curvatures, self.centres, strict=True):
            difference = vector - centre
            gradient = curvature * difference
            own = 0.5 * torch.dot(difference, gradient)
            value, sums = (own, gradient) if value is None or sums is None else (value + own, sums + gradient)
        if value is None or sums is None:
            raise ValueError("a site without forms")
        parts = sums.split([p.numel() for p in self.parameters])
        return value, [part.view(p.shape).to(p.dtype) for part, p in zip(parts, self.parameters, strict=True)]


class QuadraticPenalty:
    """The sum of all sites as a differentiable scalar.

    Args:
        matrices: sites of matrices.
        diagonal: site of the other parameters, if there are any.
        refresh_every: k: sites that keep a part of their products form all of them in calls 0, 1, 2, 4, 8, ... up to k
            (the first one is at the centre, where there is nothing to keep), then in every k-th.
    """

    def __init__(
        self, matrices: Sequence[MatrixSite], diagonal: DiagonalSite | None = None, refresh_every: int = 1
    ) -> None:
        self._matrices, self._diagonal = list(matrices), diagonal
        self._refresh_every, self._calls = refresh_every, 0

    def value(self) -> Tensor:
        """Return the penalty at the present weights: a scalar, to be added to a loss.

        Its gradient is computed with it, from the same products; it can be differentiated once.
        """
        groups = [site.tensors() for site in self._matrices]
        flat = [tensor for group in groups for tensor in group]
        others = [] if self._diagonal is None else list(self._diagonal.parameters)
        result: Tensor = _Fused.apply(self, [len(group) for group in groups], *flat, *others)
        return result

    def evaluate(self, counts: Sequence[int], tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return the value and the gradient of every tensor, in the order of `value`."""
        device = tensors[0].device.type
        if torch.is_autocast_enabled(device):  # half precision is for the network's own products
            with torch.autocast(device, enabled=False):
                return self.evaluate(counts, tensors)
        value, gradients, begin = None, [], 0
        calls, self._calls = self._calls, self._calls + 1
        refresh = calls % self._refresh_every == 0 or (calls < self._refresh_every and calls & (calls - 1) == 0)
        for site, count in zip(self._matrices, counts, strict=True):
            own, found = site.evaluate(tensors[begin : begin + count], refresh=refresh)
            value = own if value is None else value + own.to(value.device)
            gradients += found
            begin += count
        if self._diagonal is not None:
            own, found = self._diagonal.evaluate()
            value = own if value is None else value + own.to(value.device)
            gradients += found
        if value is None:
            raise ValueError("a penalty without sites")
        return value, gradients


@dataclass
class TrainingExperience:
    """The experience in training.

    Attributes:
        penalty: None where there is none.
        zero: a scalar on the model's device.
        model: the model.
        units: its covered layers.
        entered: what entered BatchNorms in the last training step, for those who need it.
    """

    penalty: QuadraticPenalty | None
    zero: Tensor
    model: nn.Module
    units: Sequence[Unit]
    entered: dict[str, Tensor] = field(default_factory=dict)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, penalty: QuadraticPenalty, counts: Sequence[int], *tensors: Tensor) -> Tensor:
        value, gradients = penalty.evaluate(counts, tensors)
        ctx.gradients = gradients
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        # A scalar of no dimension does not widen what it is multiplied by.
        found = [g * outer[0].to(g.device) if need else None for g, need in zip(ctx.gradients, needed, strict=True)]
        return (None, None, *found)
