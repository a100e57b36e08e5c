"""Removing a subspace from the last axis of a matrix, by the cheapest of several equal routes.

With M [d, r] an orthonormal basis and N [d, d - r] one of its complement, for X [n, d]:

    dense       X (I - M M^T)         2 n d^2 operations
    factored    X - (X M) M^T         4 n d r
    complement  (X N) N^T             4 n d (d - r)

X is a layer's gradient (n = outputs), or the rows at its input (n = rows in the batch): see docs/gpm.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from avalanche_gradproj.linalg.factor import FixedFactor
from avalanche_gradproj.linalg.subspace import Basis, complement

ROUTES = ("dense", "factored", "complement")

#: What starting one more operation costs, in floating-point operations of a matrix product: a few microseconds on
#: a processor core. It makes small layers take the route with the fewest operations.
OPERATION_COST = 2.0e5


class Projector:
    """X -> X - (X M) M^T for one layer, with every constant computed when it is first needed.

    Args:
        basis: orthonormal columns of each block.
        route: one of `ROUTES`, or `"auto"` for the cheapest at each size of X.
        dtype: type of the products; half precision is widened to float32 by the caller.
    """

    def __init__(self, basis: Basis, *, route: str = "auto", dtype: torch.dtype | None = None) -> None:
        self.basis = basis
        self.route = route
        columns = basis.columns if dtype is None else basis.columns.to(dtype)
        self._columns = columns[0] if len(basis.ranks) == 1 else columns
        self._costs: dict[int, tuple[float, str]] = {}
        self._fixed: dict[tuple[str, bool], tuple[FixedFactor, FixedFactor | None]] = {}
        self._dense: Tensor | None = None
        self._complement: Tensor | None = None

    def cost(self, n: int) -> tuple[float, str]:
        """Return the cost of the cheapest route for X with n rows, in floating-point operations, and its name."""
        if n not in self._costs:
            self._costs[n] = self._cheapest(n)
        return self._costs[n]

    def _cheapest(self, n: int) -> tuple[float, str]:
        blocks, d, r = len(self.basis.ranks), self.basis.features, self.basis.rank
        costs = {
            "dense": 2.0 * blocks * n * d * d + OPERATION_COST,
            "factored": 4.0 * blocks * n * d * r + 2 * OPERATION_COST,
        }
        if blocks == 1:
            costs["complement"] = 4.0 * n * d * (d - r) + 2 * OPERATION_COST
        if self.route in costs:
            return costs[self.route], self.route
        best = min(costs, key=lambda name: costs[name])
        return costs[best], best

    @property
    def dense(self) -> Tensor:
        """I - M M^T, [d, d] or [blocks, d, d]; formed in float64."""
        if self._dense is None:
            wide = self._columns if self._columns.device.type == "mps" else self._columns.double()
            identity = torch.eye(self.basis.features, dtype=wide.dtype, device=wide.device)
            self._dense = (identity - wide @ wide.mT).to(self._columns.dtype)
        return self._dense

    @property
    def complement(self) -> Tensor:
        """N [d, d - r] of a single block."""
        if self._complement is None:
            self._complement = complement(self.basis).to(self._columns.dtype)
        return self._complement

    def remove(self, x: Tensor) -> Tensor:
        """Return X - (X M) M^T.

        Args:
            x: [blocks, n, d], or [n, d] for a single block.

        Returns:
            A new tensor of the same shape and type.
        """
        columns = self._columns
        if x.dim() != columns.dim() or x.dtype != columns.dtype:
            matrix = x.reshape(-1, x.shape[-1]) if columns.dim() == 2 else x
            return self.remove(matrix.to(columns.dtype)).to(x.dtype).view(x.shape)
        _, route = self.cost(x.shape[-2])
        if columns.dim() == 3:
            return x @ self.dense if route == "dense" else torch.baddbmm(x, x @ columns, columns.mT, alpha=-1)
        first, second = self._factors(route, constant=False)
        if second is None:
            return first(x)
        return second(first(x)) if route == "complement" else x - second(first(x))

    def remove_with_constant(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return [X, 1] - ([X, 1] M) M^T of a single block, the constant's column apart.

        Args:
            x: [n, d - 1], rows without the constant that the bias sees.

        Returns:
            The projected rows [n, d - 1] and the projected constant [n].
        """
        d = x.shape[1]
        _, route = self.cost(x.shape[0])
        first, second = self._factors(route, constant=True)
        if second is None:
            return first(x), torch.addmv(self.dense[d, d].expand(len(x)), x, self.dense[:d, d])
        inside = first(x)
        if route == "complement":
            return second(inside), inside @ self.complement[d]
        return x - second(inside), 1 - inside @ self._columns[d]

    def inside(self, x: Tensor) -> Tensor:
        """Return the coordinates X M of what would be removed: [.., n, r], of Frobenius norm ||X M M^T||."""
        if len(self.basis.ranks) == 1:
            x = x.reshape(-1, x.shape[-1])
        return x.to(self._columns.dtype) @ self._columns

    def _factors(self, route: str, *, constant: bool) -> tuple[FixedFactor, FixedFactor | None]:
        """Return the one or two fixed matrices of a route, for rows with or without a constant 1 behind them."""
        if (route, constant) not in self._fixed:
            d = self.basis.features - constant
            factors: tuple[FixedFactor, FixedFactor | None]
            if route == "dense":
                factors = FixedFactor(self.dense[:d, :d], self.dense[d, :d] if constant else None), None
            else:
                columns = self.complement if route == "complement" else self._columns
                bias = columns[d] if constant else None
                factors = FixedFactor(columns[:d], bias), FixedFactor(columns[:d].T)
            self._fixed[route, constant] = factors
        return self._fixed[route, constant]
