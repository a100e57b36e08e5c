"""Second moments, and if asked means, of rows that stream by: the raw material of Kronecker factors."""

from __future__ import annotations

import torch
from torch import Tensor

from avalanche_gradproj.linalg.moments import accumulation_dtype

#: Columns of a panel at least, and panels at most: smaller products would run slower.
_PANEL, _PANELS = 128, 6


class MomentSums:
    """Sum of a a^T, and of a, over rows a.

    Products run in the rows' own type (half precision is widened to float32) and are summed up in float64: unlike a
    basis, a factor is used as it is, never through its small singular values. Rows are held until there are d of them:
    adding d^2 numbers for each mini-batch of a few rows would cost as much as their product.

    Memory: 8 d^2 bytes a block, and up to twice d rows.

    Args:
        blocks: independent matrices (groups of a convolution).
        features: d, the length of a row.
    """

    def __init__(self, blocks: int, features: int) -> None:
        self.blocks, self.features = blocks, features
        #: Rows seen, in each block.
        self.count = 0
        self._moment: Tensor | None = None
        self._sum: Tensor | None = None
        self._held: list[Tensor] = []

    def update(self, rows: Tensor, *, mean: bool = False) -> None:
        """Add rows.

        Args:
            rows: [blocks, n, features], any floating-point type.
            mean: sum up the rows themselves too.
        """
        rows = rows.detach()
        rows = rows.float() if rows.element_size() < 4 else rows
        if rows.shape[1] == 0:
            return
        self.count += rows.shape[1]
        if self._moment is None:
            wide = accumulation_dtype(rows.device)
            self._moment = torch.zeros(self.blocks, self.features, self.features, dtype=wide, device=rows.device)
            self._sum = torch.zeros(self.blocks, self.features, dtype=wide, device=rows.device)
        if mean and self._sum is not None:
            self._sum += rows.sum(dim=1)
        if rows.shape[1] >= self.features:
            self._fold(rows)
            return
        self._held.append(rows.clone())
        if sum(held.shape[1] for held in self._held) >= self.features:
            self._fold_held()

    def _fold_held(self) -> None:
        held, self._held = self._held, []
        if held:
            self._fold(held[0] if len(held) == 1 else torch.cat(held, dim=1))

    def _fold(self, rows: Tensor) -> None:
        if self._moment is None:
            return
        if self.blocks > 1:
            self._moment += rows.mT @ rows
            return
        # Panels from the diagonal to the right leave out most of the lower half, which is its mirror image.
        matrix, total = rows[0], self._moment[0]
        step = self.features if self.features < 2 * _PANEL else max(_PANEL, -(-self.features // _PANELS))
        for begin in range(0, self.features, step):
            total[begin : begin + step, begin:] += matrix[:, begin : begin + step].T @ matrix[:, begin:]

    def moment(self, divisor: float) -> Tensor | None:
        """Return the sum of a a^T over `divisor` [blocks, features, features], exactly symmetric; None for no rows."""
        if self._moment is None:
            return None
        self._fold_held()
        return (self._moment.triu() + self._moment.triu(1).mT) / divisor

    def mean(self) -> Tensor | None:
        """Return the mean row [blocks, features], where `mean` was asked for with every update; None for no rows."""
        return None if self._sum is None else self._sum / self.count
