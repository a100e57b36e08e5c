"""What is kept of a layer's rows while data streams by: the rows themselves, or their second moment.

A layer's rows are the columns of R [d, n] in the papers' notation. Everything that a basis needs follows from
R itself or from C = R R^T [d, d]. Few rows (n <= d) are kept as they are, since a thin decomposition of R is
then cheaper and does not square the condition number; from the first row beyond that the rows are folded into
C, whose size does not grow with the data.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Columns of a panel of the second moment at least, and panels at most: smaller products would run slower.
_PANEL, _PANELS = 128, 6


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """Return the floating-point type in which second moments are summed on a device.

    Args:
        device: where the rows live.

    Returns:
        float64, because forming C squares the condition number of R; float32 on devices without float64
        (Apple's MPS), where the decomposition is still done in float64, on the host.
    """
    return torch.float32 if device.type == "mps" else torch.float64


class RowStatistics:
    """Streaming rows of one layer, as rows while they are few and as a second moment afterwards.

    Memory: at most `blocks * features**2` numbers (rows in their own type, or the moment in float64) besides
    the rows handed to `update`.

    Args:
        blocks: number of independent matrices in the layer (groups of a convolution).
        features: d, the length of a row.
        keep_rows: keep up to `features` rows a block before folding; False folds at once.
    """

    def __init__(self, blocks: int, features: int, *, keep_rows: bool = True) -> None:
        self.blocks = blocks
        self.features = features
        self.count = 0
        self._capacity = features if keep_rows else 0
        self._rows: list[Tensor] = []
        self._moment: Tensor | None = None

    def update(self, rows: Tensor) -> None:
        """Add rows.

        Args:
            rows: [blocks, n, features], any floating-point type; half precision is widened to float32.
        """
        rows = rows.detach()
        if rows.shape[1] == 0:
            return
        if rows.dtype in (torch.float16, torch.bfloat16):
            rows = rows.float()
        self.count += rows.shape[1]
        if self._moment is None and self.count <= self._capacity:
            self._rows.append(rows.clone())
            return
        for held in self._rows:
            self._fold(held)
        self._rows = []
        self._fold(rows)

    def _fold(self, rows: Tensor) -> None:
        wide = rows.to(accumulation_dtype(rows.device))
        if self._moment is None:
            self._moment = wide.new_zeros(self.blocks, self.features, self.features)
        if self.blocks > 1:
            self._moment.baddbmm_(wide.transpose(1, 2), wide)
            return
        # A plain product is several times faster than a batched one, and panels from the diagonal to the right leave
        # out most of the lower half.
        matrix, total = wide[0], self._moment[0]
        step = self.features if self.features < 2 * _PANEL else max(_PANEL, -(-self.features // _PANELS))
        for begin in range(0, self.features, step):
            total[begin : begin + step, begin:].addmm_(matrix[:, begin : begin + step].T, matrix[:, begin:])

    @property
    def rows(self) -> Tensor | None:
        """All rows [blocks, n, features], or None when they have been folded (or none came)."""
        return torch.cat(self._rows, dim=1) if self._rows else None

    @property
    def moment(self) -> Tensor | None:
        """The second moment C = R R^T [blocks, features, features], or None while the rows are kept."""
        if self._moment is None:
            return None
        return self._moment.triu() + self._moment.triu(1).transpose(1, 2)
