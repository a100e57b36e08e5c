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

from avalanche_gradproj.layers.unit import ParameterSlice
from avalanche_gradproj.linalg.kept import KeptForm
from avalanche_gradproj.linalg.kronecker import KroneckerTerm, quadratic
from avalanche_gradproj.methods.kfac_accumulate import accumulate, add_vector, watched


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
        slices: where the tensors live, if they are parameters: `add_gradient` needs to know.
    """

    tensors: Callable[[], tuple[Tensor, ...]]
    forms: Sequence[Form]
    refresh_every: int = 1
    slices: Sequence[ParameterSlice] = ()
    _buffers: list[Tensor] = field(default_factory=list, init=False)
    _views: list[list[tuple[Tensor, Tensor]]] = field(default_factory=list, init=False)
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
        value, sums = self._sums(tensors, refresh)
        return value, [_like(part, tensor) for part, tensor in zip(_parts(sums, tensors), tensors, strict=True)]

    def add_gradient(self, *, refresh: bool = True) -> Tensor:
        """Add the gradient to that of the parameters in `slices`; return the value."""
        tensors = [part.of(part.parameter.detach()) for part in self.slices]
        value, sums = self._sums(tensors, refresh)
        for part, target in zip(_parts(sums, tensors), self.slices, strict=True):
            accumulate(part, target)
        return value

    def _sums(self, tensors: Sequence[Tensor], refresh: bool) -> tuple[Tensor, Tensor]:
        """Return the value, and the gradient of the matrix, [.., rows, d]."""
        value, sums = None, None
        if not self._views:  # shapes stay for an experience, and for small layers every operation counts
            both = zip(self.forms, self._buffers, strict=True)
            self._views = [
                list(zip(_parts(form.centre, tensors), _parts(buffer, tensors), strict=True)) for form, buffer in both
            ]
        for index, (form, buffer) in enumerate(zip(self.forms, self._buffers, strict=True)):
            for tensor, (centre, out) in zip(tensors, self._views[index], strict=True):
                torch.sub(tensor if tensor.shape == centre.shape else _rows_of(tensor, centre), centre, out=out)
            if self._kept:
                own, gradient = self._kept[index].quadratic(buffer, refresh=refresh)
            else:
                own, gradient = quadratic(form.terms, buffer)
            value = own if value is None else value + own
            sums = gradient if sums is None else _add(sums, gradient)
        if value is None or sums is None:
            raise ValueError("a site without forms")
        return value, sums


def _parts(matrix: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the columns of [.., rows, d] that belong to each tensor, of its shape where they have it: views."""
    parts, column = [], 0
    for tensor in tensors:
        width = tensor.shape[1:].numel()
        if tensor.dim() == 1 and matrix.dim() == 2 and matrix.shape[0] == tensor.shape[0]:
            parts.append(matrix[:, column])
        else:
            parts.append(matrix.narrow(-1, column, width))
        column += width
    return parts


def _rows_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor as [.., rows, width], as many of its first rows as another has."""
    part = tensor.reshape(*like.shape[:-2], -1, like.shape[-1])
    return part.narrow(-2, 0, like.shape[-2]) if part.shape[-2] > like.shape[-2] else part


def _add(one: Tensor, other: Tensor) -> Tensor:
    """Return the sum of [.., rows, d], one of which may lack the last rows; the larger is overwritten."""
    larger, smaller = (one, other) if one.shape[-2] >= other.shape[-2] else (other, one)
    larger[..., : smaller.shape[-2], :] += smaller
    return larger


def _like(part: Tensor, tensor: Tensor) -> Tensor:
    """Return a part [.., rows, width] in a tensor's shape and type, zeros in the rows that it does not have."""
    missing = tensor.numel() - part.numel()
    if missing:  # then it is of two dimensions
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

    parameters: Sequence[nn.Parameter]
    curvatures: Sequence[Tensor]
    centres: Sequence[Tensor]

    def evaluate(self) -> tuple[Tensor, list[Tensor]]:
        """Return the value, and the gradient of each parameter."""
        value, sums = self._sums()
        parts = sums.split([p.numel() for p in self.parameters])
        return value, [part.view(p.shape).to(p.dtype) for part, p in zip(parts, self.parameters, strict=True)]

    def add_gradient(self) -> Tensor:
        """Add the gradient to that of the parameters; return the value."""
        value, sums = self._sums()
        add_vector(sums, self.parameters)
        return value

    def _sums(self) -> tuple[Tensor, Tensor]:
        vector = torch.cat([p.detach().reshape(-1) for p in self.parameters]).to(self.centres[0].dtype)
        value, sums = None, None
        for curvature, centre in zip(self.curvatures, self.centres, strict=True):
            difference = vector - centre
            gradient = curvature * difference
            own = 0.5 * torch.dot(difference, gradient)
            value, sums = (own, gradient) if value is None or sums is None else (value + own, sums + gradient)
        if value is None or sums is None:
            raise ValueError("a site without forms")
        return value, sums


class QuadraticPenalty:
    """The sum of all sites as a differentiable scalar.

    Args:
        matrices: sites of matrices.
        diagonal: site of the other parameters, if there are any.
        refresh_every: k: sites that sample their products form all of them in calls 0, 1, 2, 4, 8, ... up to k
            (the first one is at the centre, where there is nothing to keep), then in every k-th.
    """

    def __init__(
        self, matrices: Sequence[MatrixSite], diagonal: DiagonalSite | None = None, refresh_every: int = 1
    ) -> None:
        self._matrices, self._diagonal = list(matrices), diagonal
        self._refresh_every, self._calls = refresh_every, 0
        first = matrices[0].forms[0].centre if matrices else None if diagonal is None else diagonal.centres[0]
        self._device_type = "cpu" if first is None else first.device.type

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
        device = self._device_type
        if torch.is_autocast_enabled(device):  # half precision is for the network's own products
            with torch.autocast(device, enabled=False):
                return self.evaluate(counts, tensors)
        value, gradients, begin, refresh = None, [], 0, self._count()
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

    @property
    def adds(self) -> bool:
        """Whether `add_gradient` can be used: all matrices are parameters, whose gradients nobody watches."""
        sliced = all(site.slices for site in self._matrices)
        own = [part.parameter for site in self._matrices for part in site.slices]
        return sliced and not watched(own if self._diagonal is None else [*own, *self._diagonal.parameters])

    @torch.no_grad()
    def add_gradient(self) -> Tensor:
        """Add the gradient to that of the parameters, and return the value, a constant."""
        device = self._device_type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self.add_gradient()
        value, refresh = None, self._count()
        for site in self._matrices:
            own = site.add_gradient(refresh=refresh)
            value = own if value is None else value + own.to(value.device)
        if self._diagonal is not None:
            own = self._diagonal.add_gradient()
            value = own if value is None else value + own.to(value.device)
        if value is None:
            raise ValueError("a penalty without sites")
        return value

    def _count(self) -> bool:
        """Count a call; return whether it forms all products."""
        calls, self._calls = self._calls, self._calls + 1
        return calls % self._refresh_every == 0 or (calls < self._refresh_every and calls & (calls - 1) == 0)


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
