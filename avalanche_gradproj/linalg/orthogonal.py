"""Orthonormal long vectors in one contiguous matrix that grows: the subspace side of OGD (arXiv 1910.07104).

The vectors v_1 .. v_r of length p are the rows of V [r, p], so that removing what they span from g costs two passes
over V, `g - V^T (V g)`, and nothing has to be known on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from avalanche_gradproj.errors import ConfigurationError
from avalanche_gradproj.linalg.moments import accumulation_dtype

#: Numbers in a temporary copy in float64 at most (32 MB): of the new vectors, and of a panel of V.
WIDE_NUMBERS = 2**22
#: Bytes of V at a time when a vector is projected on the CPU: read once from memory, the second time from the cache.
PANEL_BYTES = 3 * 2**19
#: New vectors orthogonalised at once at most: against V by matrix products, among themselves one by one.
BLOCK_VECTORS = 64
#: A vector is numerically dependent where less than this many roundings of its own length is left of it.
DEPENDENT_ROUNDINGS = 1e3


class OrthonormalRows:
    """Orthonormal vectors, one a row of a contiguous matrix [capacity, length].

    `||V V^T - I||` stays near the rounding of the matrix's type however often vectors are added: all sums are in
    float64, every vector is orthogonalised twice, and only the result is rounded.

    Args:
        length: p, numbers in a vector.
        dtype: type of the matrix, float32 or float64.
        device: where it lives.
    """

    def __init__(self, length: int, *, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> None:
        self.count = 0
        self._matrix = torch.empty(0, length, dtype=dtype, device=device)

    @property
    def rows(self) -> Tensor:
        """V [count, length], a view."""
        return self._matrix[: self.count]

    @property
    def length(self) -> int:
        """p, numbers in a vector."""
        return self._matrix.shape[1]

    @property
    def bytes_held(self) -> int:
        """Bytes of the matrix, rows without a vector among them."""
        return self._matrix.numel() * self._matrix.element_size()

    def reserve(self, capacity: int) -> None:
        """Make room for so many vectors in all: while it copies, old and new matrix exist at once."""
        if capacity > self._matrix.shape[0]:
            grown = self._matrix.new_empty(capacity, self.length)
            grown[: self.count] = self.rows
            self._matrix = grown

    def truncate(self, count: int) -> None:
        """Drop the vectors behind the first `count`."""
        self.count = min(self.count, count)

    def add(self, vectors: Tensor) -> int:
        """Orthonormalise vectors against the rows and among themselves, in order, and append them.

        Of each vector what lies in the span of those before it is removed twice. A vector of which less than
        `DEPENDENT_ROUNDINGS` times the type's rounding is left (relative to its own length), or a zero one, is
        dropped: what is left of it is noise.

        Args:
            vectors: [k, length], finite; room beyond the capacity is made for all of them.

        Returns:
            How many were appended.

        Raises:
            ConfigurationError: for vectors of another length.
        """
        if vectors.dim() != 2 or vectors.shape[1] != self.length:
            raise ConfigurationError(f"vectors of shape {tuple(vectors.shape)} came, expected [k, {self.length}]")
        before = self.count
        self.reserve(before + len(vectors))
        for block in vectors.split(max(1, min(BLOCK_VECTORS, WIDE_NUMBERS // max(1, self.length)))):
            fresh = self._orthonormalised(block)
            self._matrix[self.count : self.count + len(fresh)] = fresh
            self.count += len(fresh)
        return self.count - before

    def coordinates(self, x: Tensor) -> Tensor:
        """Return V x for x [length], or X V^T [n, count] for X [n, length]."""
        return self.rows @ x if x.dim() == 1 else x @ self.rows.T

    def remove(self, x: Tensor) -> Tensor:
        """Return x - V^T (V x), in the matrix's type, for x [length] or [n, length]; a new tensor."""
        rows, x = self.rows, x.to(self._matrix.dtype)
        if x.dim() == 1 and x.device.type == "cpu":
            rest = x.clone()
            # Rows are orthogonal to each other, so that they can be removed panel by panel.
            for panel in rows.split(max(1, PANEL_BYTES // max(1, self.length * rows.element_size()))):
                rest.addmv_(panel.T, panel @ rest, alpha=-1)
            return rest
        if x.dim() == 1:
            return torch.addmv(x, rows.T, rows @ x, alpha=-1)
        return torch.addmm(x, x @ rows.T, rows, alpha=-1)

    def embedded(self, positions: Tensor, length: int) -> OrthonormalRows:
        """Return the same vectors within a longer one: entry i goes to `positions[i]`, all others are zero.

        Args:
            positions: [self.length], different from each other.
            length: of the new vectors.
        """
        wider = OrthonormalRows(length, dtype=self._matrix.dtype, device=self._matrix.device)
        wider._matrix = self._matrix.new_zeros(self.count, length)
        wider._matrix[:, positions.to(self._matrix.device)] = self.rows
        wider.count = self.count
        return wider

    def to(self, *, dtype: torch.dtype, device: torch.device) -> OrthonormalRows:
        """Return the vectors in another type or on another device; the same object where nothing changes."""
        if (self._matrix.dtype, self._matrix.device) == (dtype, device):
            return self
        return OrthonormalRows.of(self.rows.to(dtype=dtype, device=device))

    @staticmethod
    def of(rows: Tensor) -> OrthonormalRows:
        """Return the basis whose vectors are the given orthonormal rows [count, length]; the tensor is taken over."""
        basis = OrthonormalRows(rows.shape[1], dtype=rows.dtype, device=rows.device)
        basis._matrix, basis.count = rows.contiguous(), rows.shape[0]
        return basis

    def _orthonormalised(self, block: Tensor) -> Tensor:
        fresh = block.to(accumulation_dtype(block.device), copy=True)
        lengths = fresh.norm(dim=1, keepdim=True)
        fresh /= torch.where(lengths > 0, lengths, torch.ones_like(lengths))
        tolerance = DEPENDENT_ROUNDINGS * torch.finfo(self._matrix.dtype).eps
        for _ in range(2):  # what cancels leaves a trace of the old vectors that one pass does not see
            self._remove_wide(fresh)
            kept = 0
            for vector in fresh:
                earlier = fresh[:kept]
                rest = vector - (earlier @ vector) @ earlier
                left = float(rest.norm())
                if left > tolerance:
                    fresh[kept] = rest / left
                    kept += 1
            fresh = fresh[:kept]
        return fresh

    def _remove_wide(self, fresh: Tensor) -> None:
        """Remove the span of V from float64 rows in place, a panel of V at a time in float64."""
        step = max(1, WIDE_NUMBERS // max(1, self.count))
        inside = fresh.new_zeros(len(fresh), self.count)
        for begin in range(0, self.length, step):
            inside.addmm_(fresh[:, begin : begin + step], self.rows[:, begin : begin + step].to(fresh.dtype).T)
        for begin in range(0, self.length, step):
            panel = self.rows[:, begin : begin + step].to(fresh.dtype)
            fresh[:, begin : begin + step].addmm_(inside, panel, alpha=-1)
