"""Orthonormal long vectors in one contiguous matrix that grows: the subspace side of OGD (arXiv 1910.07104).

The vectors v_1 .. v_r of length p are the rows of V [r, p], so that removing what they span from g costs two passes
over V, `g - V^T (V g)`, and nothing has to be known on the host.

Beside them is kept how the vectors that came are made of them, G = B V with a lower triangular B [r, r]: their
structure can then be found again, which makes removing their span cheaper (`linalg/rank_one.py`).
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

    Memory: count^2 numbers in float64 besides the matrix, for the triangle.

    Args:
        length: p, numbers in a vector.
        dtype: type of the matrix, float32 or float64.
        device: where it lives.
    """

    #: B, or None; also of objects pickled before there was one.
    _triangle: Tensor | None = None

    def __init__(self, length: int, *, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> None:
        self.count = 0
        self._matrix = torch.empty(0, length, dtype=dtype, device=device)
        self._triangle = _no_triangle(self._matrix.device)

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
        """Bytes of the matrix, rows without a vector among them, and of the triangle."""
        triangle = 0 if self._triangle is None else self._triangle.numel() * self._triangle.element_size()
        return self._matrix.numel() * self._matrix.element_size() + triangle

    @property
    def triangle(self) -> Tensor | None:
        """B [count, count], lower triangular with a positive diagonal, in float64; None where it is not known.

        The vectors that were added, each divided by its length, dropped ones left out, are the rows of B V: the QR
        decomposition of those vectors as columns, with R = B^T. They are met up to the rounding of V's last rows.
        """
        return self._triangle

    def reserve(self, capacity: int) -> None:
        """Make room for so many vectors in all: while it copies, old and new matrix exist at once."""
        if capacity > self._matrix.shape[0]:
            grown = self._matrix.new_empty(capacity, self.length)
            grown[: self.count] = self.rows
            self._matrix = grown

    def truncate(self, count: int) -> None:
        """Drop the vectors behind the first `count`."""
        self.count = min(self.count, count)
        if self._triangle is not None:
            self._triangle = self._triangle[: self.count, : self.count].clone()

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
            fresh, inside, among = self._orthonormalised(block)
            self._matrix[self.count : self.count + len(fresh)] = fresh
            if self._triangle is not None:
                above = torch.cat([self._triangle, self._triangle.new_zeros(self.count, len(fresh))], dim=1)
                self._triangle = torch.cat([above, torch.cat([inside, among], dim=1)])
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
        wider.count, wider._triangle = self.count, self._triangle
        return wider

    def to(self, *, dtype: torch.dtype, device: torch.device) -> OrthonormalRows:
        """Return the vectors in another type or on another device; the same object where nothing changes."""
        if (self._matrix.dtype, self._matrix.device) == (dtype, device):
            return self
        return OrthonormalRows.of(self.rows.to(dtype=dtype, device=device), self._triangle)

    @staticmethod
    def of(rows: Tensor, triangle: Tensor | None = None) -> OrthonormalRows:
        """Return the basis whose vectors are given.

        Args:
            rows: V [count, length], orthonormal; the tensor is taken over.
            triangle: B [count, count]; None where it is not known, and then not known for vectors added later either.
        """
        basis = OrthonormalRows(rows.shape[1], dtype=rows.dtype, device=rows.device)
        basis._matrix, basis.count = rows.contiguous(), rows.shape[0]
        if triangle is not None:
            basis._triangle = triangle.to(dtype=accumulation_dtype(rows.device), device=rows.device)
        elif basis.count:
            basis._triangle = None
        return basis

    def _orthonormalised(self, block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return Q [k, length], what is left of the k vectors that are kept, and B's new rows in two parts.

        These are `inside` [k, count] and `among` [k, k]: the kept vectors, of length 1, are inside V + among Q.
        """
        fresh = block.to(accumulation_dtype(block.device), copy=True)
        lengths = fresh.norm(dim=1, keepdim=True)
        fresh /= torch.where(lengths > 0, lengths, torch.ones_like(lengths))
        tolerance = DEPENDENT_ROUNDINGS * torch.finfo(self._matrix.dtype).eps
        inside = fresh.new_zeros(len(fresh), self.count)
        among = torch.eye(len(fresh), dtype=fresh.dtype, device=fresh.device)
        for _ in range(2):  # what cancels leaves a trace of the old vectors that one pass does not see
            removed = self._remove_wide(fresh)
            weights = fresh.new_zeros(len(fresh), len(fresh))
            kept: list[int] = []
            for place, vector in enumerate(fresh):
                earlier = fresh[: len(kept)]
                along = earlier @ vector
                rest = vector - along @ earlier
                left = float(rest.norm())
                weights[place, : len(kept)] = along
                if left > tolerance:
                    weights[place, len(kept)] = left
                    fresh[len(kept)] = rest / left
                    kept.append(place)
            # The vectors of this pass are removed V + weights Q.
            inside = (inside + among @ removed)[kept]
            among = (among @ weights)[kept, : len(kept)]
            fresh = fresh[: len(kept)]
        return fresh, inside, among

    def _remove_wide(self, fresh: Tensor) -> Tensor:
        """Remove the span of V from float64 rows X in place, a panel of V at a time, and return X V^T [k, count]."""
        step = max(1, WIDE_NUMBERS // max(1, self.count))
        inside = fresh.new_zeros(len(fresh), self.count)
        for begin in range(0, self.length, step):
            inside.addmm_(fresh[:, begin : begin + step], self.rows[:, begin : begin + step].to(fresh.dtype).T)
        for begin in range(0, self.length, step):
            panel = self.rows[:, begin : begin + step].to(fresh.dtype)
            fresh[:, begin : begin + step].addmm_(inside, panel, alpha=-1)
        return inside


def _no_triangle(device: torch.device) -> Tensor | None:
    return torch.zeros(0, 0, dtype=accumulation_dtype(device), device=device)
