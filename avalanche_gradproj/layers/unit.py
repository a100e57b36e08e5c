"""A matrix layer in its canonical shape, whatever module it lives in.

Methods see only units: rows at the input [blocks, n, features], gradients at the output [blocks, n, out], the weight
(with the bias as last column) and its gradient [blocks, out, features]. They never test for layer types.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class ParameterSlice:
    """The rows `start:stop` of a parameter that a unit owns (all of it, but for packed projections).

    Attributes:
        name: the parameter's full name in the model.
        parameter: the parameter.
        start: first row.
        stop: one behind the last row.
    """

    name: str
    parameter: nn.Parameter
    start: int
    stop: int

    @staticmethod
    def whole(name: str, parameter: Tensor) -> ParameterSlice:
        """Return the slice that holds every row of an `nn.Parameter`."""
        return ParameterSlice(name, cast(nn.Parameter, parameter), 0, parameter.shape[0])

    @property
    def is_whole(self) -> bool:
        """Whether the unit owns the parameter alone."""
        return self.stop - self.start == self.parameter.shape[0]

    def of(self, tensor: Tensor) -> Tensor:
        """Return the slice's view of a tensor shaped like the parameter."""
        return tensor if self.is_whole else tensor[self.start : self.stop]


@dataclass(frozen=True, eq=False)
class Unit:
    """One matrix of a model.

    Attributes:
        name: the layer's name in the model (with `.q_proj` and the like for attention).
        module: the module that computes it.
        weight: where the weight lives.
        bias: where the bias lives, None where there is none (or where it takes no gradient).
        blocks: independent matrices (groups of a convolution).
        out: rows of one matrix.
        features: columns of one matrix, the bias among them.
        bare_rows: layer input -> chunks [blocks, n, features], samples in order; without the last feature where that is
            `constant`.
        output_rows: tensor shaped like the layer's output -> [blocks, n, out].
        input_route: whether the module is a plain linear map of its only argument, so that the weight's gradient
            can be formed from projected inputs.
        batch_dimension: dimension of the input that counts the samples.
    """

    name: str
    module: nn.Module
    weight: ParameterSlice
    bias: ParameterSlice | None
    blocks: int
    out: int
    features: int
    bare_rows: Callable[[Tensor], Iterator[Tensor]]
    output_rows: Callable[[Tensor], Tensor]
    input_route: bool = False
    batch_dimension: int = 0

    @property
    def constant(self) -> bool:
        """Whether the last feature is the constant 1 that a bias sees."""
        return self.bias is not None

    def rows(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the rows of a layer input in chunks [blocks, n, features], samples in order, the constant with them."""
        for part in self.bare_rows(x):
            yield _with_constant(part) if self.constant else part

    @property
    def slices(self) -> tuple[ParameterSlice, ...]:
        """The parameters that the unit is made of."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """Every parameter that the matrix depends on."""
        return tuple(part.parameter for part in self.slices)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the live tensors that make up the matrix: the weight [blocks * out, ...] and possibly the bias."""
        return tuple(part.of(part.parameter) for part in self.slices)

    @property
    def is_whole(self) -> bool:
        """Whether the unit shares none of its parameters with another one."""
        return all(part.is_whole for part in self.slices)

    def matrix(self, pick: Callable[[ParameterSlice], Tensor | None]) -> Tensor | None:
        """Assemble [blocks, out, features] from tensors shaped like the parameters.

        Args:
            pick: gives the tensor that belongs to a parameter (its value, gradient, or a stored copy).

        Returns:
            The matrix, a view where there is no bias; None where `pick` gives None for a part.
        """
        weight = pick(self.weight)
        if weight is None:
            return None
        matrix = self.weight.of(weight).reshape(self.blocks, self.out, -1)
        if self.bias is None:
            return matrix
        bias = pick(self.bias)
        if bias is None:
            return None
        return torch.cat([matrix, self.bias.of(bias).reshape(self.blocks, self.out, 1)], dim=2)

    def weights(self) -> Tensor:
        """Return the present weight [blocks, out, features], bias last, detached."""
        matrix = self.matrix(lambda part: part.parameter.detach())
        return matrix if matrix is not None else torch.empty(0)

    def gradient(self) -> Tensor | None:
        """Return the present gradient [blocks, out, features], or None where there is none at all."""
        return self.gather(lambda part: part.parameter.grad)

    def gather(self, pick: Callable[[ParameterSlice], Tensor | None]) -> Tensor | None:
        """Like `matrix`, with zeros for a part that has no tensor while another has one."""
        if self.bias is None:
            return self.matrix(pick)
        parts = [pick(part) for part in self.slices]
        if all(tensor is None for tensor in parts):
            return None
        filled = {
            part.name: torch.zeros_like(part.parameter) if tensor is None else tensor
            for part, tensor in zip(self.slices, parts, strict=True)
        }
        return self.matrix(lambda part: filled[part.name])

    def write(self, matrix: Tensor, pick: Callable[[ParameterSlice], Tensor]) -> None:
        """Copy a matrix [blocks, out, features] into tensors shaped like the parameters."""
        column = 0
        for part in self.slices:
            target = part.of(pick(part))
            width = target.numel() // (self.blocks * self.out)
            if not part.parameter.requires_grad:  # what the user froze is not ours to write
                column += width
                continue
            target.copy_(matrix[:, :, column : column + width].reshape(target.shape))
            column += width

    def write_weights(self, matrix: Tensor) -> None:
        """Overwrite the parameters with a matrix [blocks, out, features]."""
        self.write(matrix, lambda part: part.parameter.detach())

    def write_gradient(self, matrix: Tensor) -> None:
        """Overwrite the gradients with a matrix [blocks, out, features].

        A weight that the unit owns alone gets the new tensor itself: no second pass over the memory.
        """
        if self.bias is None and self.weight.is_whole:
            parameter = self.weight.parameter
            parameter.grad = matrix.view(parameter.shape)
        else:
            self.write(matrix, _gradient_of)


#: `on_call(unit, input, output, columns)`: a unit mapped `input` to the columns `columns` of `output`; what it returns,
#: if anything, takes the output's place.
OnCall = Callable[[Unit, Tensor, Tensor, slice], Tensor | None]


def _gradient_of(part: ParameterSlice) -> Tensor:
    if part.parameter.grad is None:
        part.parameter.grad = torch.zeros_like(part.parameter)
    return part.parameter.grad


def _with_constant(rows: Tensor) -> Tensor:
    """Append the constant 1 that the bias sees to rows [.., n, d]."""
    return torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], dim=-1)
