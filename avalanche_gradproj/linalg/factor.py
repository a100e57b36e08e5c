"""Products with a matrix that stays the same for a whole experience."""

from __future__ import annotations

import torch
from torch import Tensor

#: Numbers in the fixed matrix from which packing pays on a processor: below, starting the operation costs more.
PACKED_NUMBERS = 30_000


class FixedFactor:
    """X -> X B (+ b) for a fixed matrix B.

    On the CPU in float32, larger matrices are laid out once for oneDNN, which then multiplies few rows by them up to
    twice as fast as a plain product, whose time goes into laying the matrix out each time. The operations that do this
    are torch's own, made for its compiler; they are checked against the plain product when the layout is made, and
    anything unexpected falls back to that product. Differentiable products are always plain ones.

    Memory: one more copy of B where it is laid out.

    Args:
        matrix: B [d, k].
        bias: b [k], added to every row.
    """

    def __init__(self, matrix: Tensor, bias: Tensor | None = None) -> None:
        self.matrix = matrix
        self.bias = bias
        large = matrix.numel() >= PACKED_NUMBERS
        self._packable = large and matrix.device.type == "cpu" and matrix.dtype == torch.float32
        self._packed: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Return X B (+ b) for X [n, d]."""
        if self._packable and not torch.is_grad_enabled():
            if self._packed is None:
                self._pack(x.shape[0])
            if self._packed is not None:
                return _multiply(x, self._packed, self.bias)
        return self._plain(x)

    def _plain(self, x: Tensor) -> Tensor:
        return x @ self.matrix if self.bias is None else torch.addmm(self.bias, x, self.matrix)

    def _pack(self, rows: int) -> None:
        try:
            packed = torch.ops.mkldnn._reorder_linear_weight(self.matrix.T.contiguous(), rows)
            probe = torch.linspace(-1, 1, 2 * self.matrix.shape[0]).view(2, -1)
            good = torch.allclose(_multiply(probe, packed, self.bias), self._plain(probe), rtol=1e-4, atol=1e-4)
        except (RuntimeError, AttributeError, TypeError):
            good = False
        self._packable = good
        self._packed = packed if good else None


def _multiply(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return result
