"""Matrices in the eigenbasis of a Kronecker product.

With A = U S U^T and B = V Q V^T, the form X -> B X A is diagonal in the coordinates

    Z = V^T X U                               X [out, d], V [out, out], U [d, d], both orthogonal

where it multiplies Z_ij by Q_i S_j: U (x) V has the eigenvectors of B (x) A as its columns, and is never formed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from avalanche_gradproj.linalg.kronecker import Factor
from avalanche_gradproj.linalg.products import product


@dataclass(frozen=True, eq=False)
class Eigenbasis:
    """The eigenvectors of a pair of factors, for each block.

    Matrices of one block may have more rows than V has: a layer that has grown since. Those are left as they are on
    that side: V then stands for V and an identity as diagonal blocks.

    Attributes:
        left: V [blocks, out, out], eigenvectors of B as columns, in ascending order of eigenvalues.
        right: U [blocks, d, d], those of A.
    """

    left: Tensor
    right: Tensor

    @staticmethod
    def of(left: Factor, right: Factor, *, apart: int = 0) -> Eigenbasis:
        """Find the eigenvectors, in float64.

        Args:
            left: B, whole or thin: thin ones are multiplied out.
            right: A.
            apart: last columns of X that are to be no part of a mixture: U has the eigenvectors of A without its last
                `apart` rows and columns, and an identity.
        """
        size = right.size - apart
        columns = _eigenvectors(right.whole()[:, :size, :size])
        if apart:
            columns = F.pad(columns, (0, apart, 0, apart))
            columns.diagonal(dim1=1, dim2=2)[:, size:] = 1
        return Eigenbasis(_eigenvectors(left.whole()), columns)

    def into(self, x: Tensor) -> Tensor:
        """Return the coordinates V^T X U, in the basis's type.

        Args:
            x: X [blocks, out, d], of any floating-point type.
        """
        return _product(self.left.mT, x, self.right)

    def back(self, z: Tensor) -> Tensor:
        """Return the matrix V Z U^T that has coordinates Z [blocks, out, d], in the basis's type."""
        return _product(self.left, z, self.right.mT)


def _eigenvectors(matrix: Tensor) -> Tensor:
    """Return the eigenvectors of symmetric matrices [blocks, n, n] as columns, in their type."""
    # Unlike a truncated factor, a basis does depend on small eigenvalues. MPS has no float64.
    wide = matrix.cpu().double() if matrix.device.type == "mps" else matrix.double()
    return torch.linalg.eigh(wide)[1].to(matrix).contiguous()


def _product(left: Tensor, x: Tensor, right: Tensor) -> Tensor:
    """Return left X right; rows of X that `left` has not are multiplied by `right` alone."""
    device = x.device.type
    if torch.is_autocast_enabled(device):  # half precision is for the network's own products
        with torch.autocast(device, enabled=False):
            return _product(left, x, right)
    rows, x = left.shape[1], x.to(left.dtype)
    if len(left) == 1:  # plain products are faster than batched ones
        left, x, right = left[0], x[0], right[0]
    x = product(x, right)
    result = product(left, x[..., :rows, :])
    if x.shape[-2] > rows:
        result = torch.cat([result, x[..., rows:, :]], dim=-2)
    return result if result.dim() == 3 else result[None]
