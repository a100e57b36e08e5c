"""Second moments, and if asked means, of rows that stream by: the raw material of Kronecker factors."""

from __future__ import annotations

import torch
from torch import Tensor

from avalanche_gradproj.linalg.moments import accumulation_dtype
from avalanche_gradproj.linalg.products import product

#: Columns of a panel: at least that many, and as many as make six panels; smaller products run slower.
_PANEL, _PANELS = 128, 6
#: Rows whose products are summed up in the rows' type, at most where d are fewer: more would be less exact. And numbers
#: (1 MB in float32) up to which so many rows are held, though d would do.
_ROWS, _HELD = 4096, 2**18
#: Numbers that are held of a feature come in multiples of the first (64 bytes in float32), and not in multiples of the
#: second (4 KB): the processor's caches would put those of all features in the same places, which takes twice the time.
_ALIGN, _ALIAS = 16, 1024


class MomentSums:
    """Sum of a a^T, and of a, over rows a.

    Products run in the rows' own type (half precision is widened to float32), whatever autocast says, and are summed up
    in it over 4096 rows, or as many as are held if that is more, and beyond that in float64: unlike a basis, a factor
    is used as it is, never through its small singular values. Rows are copied to where they are held until there are d
    of them, or more where d is small: to go over d^2 numbers for each mini-batch of a few rows would cost as much as
    their product. They are held transposed, a feature's numbers side by side, as products read them.

    Memory: 8 d^2 bytes a block; while rows come, 4 d^2 more for those that are held, but at least 1 MB, and 8 d^2 for
    products (3 d^2 where there is one block of 256 features or more). The last rows are copied once, as much as is held
    of them. Twice as much while rows in float64 come.

    Args:
        blocks: independent matrices (groups of a convolution).
        features: d, the length of a row.
        constant: whether the last feature is the constant 1, which `update` is not given.
    """

    def __init__(self, blocks: int, features: int, *, constant: bool = False) -> None:
        self.blocks, self.features = blocks, features
        #: Rows seen, in each block.
        self.count = 0
        self._given = features - constant
        # Room for as many rows as make 1 MB in float32, but at least d.
        self._capacity = max(features, min(_ROWS, _HELD // (blocks * features)))
        if self._capacity >= 4 * _ALIGN:
            self._capacity += -self._capacity % _ALIGN
            self._capacity += 0 if self._capacity % _ALIAS else _ALIGN
        self._moment: Tensor | None = None
        self._sum: Tensor | None = None
        # [blocks, d, capacity], the constant in place.
        self._held: Tensor | None = None
        self._used = 0
        # What is not yet in the moment: panels [step, d - begin] of the sum, in the rows' type, and of how many rows.
        self._panels: list[Tensor] = []
        self._pending = 0

    def update(self, rows: Tensor, *, mean: bool = False) -> None:
        """Add rows.

        Args:
            rows: [blocks, n, features], without the constant, any floating-point type.
            mean: sum up the rows themselves too.
        """
        rows, count = rows.detach(), rows.shape[1]
        if count == 0:
            return
        dtype = torch.float32 if rows.element_size() < 4 else rows.dtype
        if self._moment is None:
            wide = accumulation_dtype(rows.device)
            self._moment = torch.zeros(self.blocks, self.features, self.features, dtype=wide, device=rows.device)
            self._sum = torch.zeros(self.blocks, self.features, dtype=wide, device=rows.device)
        if mean and self._sum is not None:
            self._sum[:, : self._given] += rows.sum(dim=1, dtype=dtype)
            self._sum[:, self._given :] += count
        self.count += count
        # Many rows of many blocks are not held first: that would gain nothing.
        if self.blocks > 1 and count >= self._capacity:
            for part in rows.split(max(_ROWS, self.features), dim=1):
                self._fold(self._completed(part.to(dtype)).mT)
        else:
            self._hold(rows, dtype)

    def _completed(self, rows: Tensor) -> Tensor:
        """Return rows with the constant, if there is one."""
        if self._given == self.features:
            return rows
        return torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], dim=2)

    def _hold(self, rows: Tensor, dtype: torch.dtype) -> None:
        begin = 0
        while begin < rows.shape[1]:
            if self._held is None or self._held.dtype != dtype:
                self._fold_held()
                self._held = rows.new_empty(self.blocks, self.features, self._capacity, dtype=dtype)
                self._held[:, self._given :] = 1
            count = min(rows.shape[1] - begin, self._capacity - self._used)
            part = rows if count == rows.shape[1] else rows.narrow(1, begin, count)
            self._held[:, : self._given, self._used : self._used + count] = part.mT
            self._used += count
            begin += count
            if self._used == self._capacity:
                self._fold_held()

    def _fold_held(self) -> None:
        if self._held is not None and self._used:
            # Of a few columns a copy, once, as products read them.
            self._fold(self._held[:, :, : self._used].contiguous())
        self._used = 0

    @property
    def _step(self) -> int:
        """Columns of a panel."""
        return self.features if self.features < 2 * _PANEL else max(_PANEL, -(-self.features // _PANELS))

    def _fold(self, columns: Tensor) -> None:
        """Add the products of rows that come as columns [blocks, d, n]."""
        if self._moment is None:
            return
        if self.blocks > 1:
            self._moment += product(columns, columns.mT)
            return
        # Panels from the diagonal to the right leave out most of the lower half, which is its mirror image.
        matrix, step, begins = columns[0], self._step, range(0, self.features, self._step)
        count = matrix.shape[1]
        other_type = bool(self._panels) and self._panels[0].dtype != matrix.dtype
        if other_type or self._pending + count > max(_ROWS, self._capacity):
            self._add_panels()
        if not self._pending:
            self._panels = []
        for index, begin in enumerate(begins):
            left, right = matrix[begin : begin + step], matrix[begin:].T
            if self._pending:
                self._panels[index] = product(left, right, plus=self._panels[index])
            else:
                self._panels.append(product(left, right))
        self._pending += count

    def _add_panels(self) -> None:
        """Add to the moment what is not yet in it."""
        if self._moment is not None and self._pending:
            for index, panel in enumerate(self._panels):
                begin = index * self._step
                self._moment[0, begin : begin + len(panel), begin:] += panel
        self._pending = 0

    def moment(self, divisor: float) -> Tensor | None:
        """Return the sum of a a^T over `divisor` [blocks, features, features], exactly symmetric; None for no rows.

        Those that are held are let go of.
        """
        if self._moment is None:
            return None
        self._fold_held()
        self._add_panels()
        self._held, self._panels = None, []
        result, step = self._moment / divisor, self._step
        # Block by block: to read a large matrix by columns costs several times as much as to form it by rows.
        for begin in range(0, self.features, step):
            end = begin + step
            corner = result[:, begin:end, begin:end]
            corner.copy_(corner.triu() + corner.triu(1).mT)
            result[:, end:, begin:end] = result[:, begin:end, end:].mT
        return result

    def is_finite(self) -> bool:
        """Return whether no row held an infinity or a NaN, nor numbers whose squares are too large; True for no rows.

        Waits for the device.
        """
        if self._moment is None:
            return True
        self._fold_held()
        self._add_panels()
        # Of the diagonal, since no entry is larger than the two that it shares a row or a column with.
        return bool(torch.isfinite(self._moment.diagonal(dim1=1, dim2=2)).all())

    def mean(self) -> Tensor | None:
        """Return the mean row [blocks, features], where `mean` was asked for with every update; None for no rows."""
        return None if self._sum is None else self._sum / self.count
