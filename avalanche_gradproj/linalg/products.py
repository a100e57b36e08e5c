"""Products of two large matrices, none of which stays: by the fastest of what torch has.

On the CPU in float32 torch multiplies by the BLAS that it was built with, whose code for processors of other makers
than its own can be twice as slow as that of oneDNN, which torch has too: on an AMD processor with AVX-512 products of
more than two million multiplications took half the time, and smaller ones more. (For a matrix that stays and meets
few rows see `linalg.factor`.)
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

#: Multiplications from which it pays, and rows of X and columns of Y: below, starting the operation costs more.
_LARGE, _LEAST = 2_000_000, 8
#: Subclasses of tensors may stand for anything.
_KINDS = (Tensor, nn.Parameter)


def product(x: Tensor, y: Tensor, plus: Tensor | None = None, *, beta: float = 1.0) -> Tensor:
    """Return X Y, or beta Z + X Y, in the matrices' own type whatever autocast says.

    A plain `x @ y` but for rounding. oneDNN takes part where the matrices are large, of float32, on the CPU, and where
    no gradient is to flow. The operation is torch's own, made for its compiler, and is checked once against the plain
    product: should it be missing or do anything unexpected, all products are plain ones.

    Args:
        x: X [m, k], or with leading axes, which are always multiplied plainly.
        y: Y [k, n], with as many axes.
        plus: Z [m, n].
        beta: factor of Z.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return product(x, y, plus, beta=beta)
    if _is_large(x, y) and _fits(x, y, plus) and not _recorded(x, y, plus) and _has_onednn():
        return _by_onednn(x, y, plus if plus is None or beta == 1 else plus * beta)
    if plus is None:
        return x @ y
    return torch.addmm(plus, x, y, beta=beta) if plus.dim() == 2 else torch.baddbmm(plus, x, y, beta=beta)


def _is_large(x: Tensor, y: Tensor) -> bool:
    return (
        x.dim() == y.dim() == 2
        and x.shape[0] * y.numel() >= _LARGE
        and min(x.shape[0], y.shape[1]) >= _LEAST
        and x.dtype == y.dtype == torch.float32
        and x.device.type == y.device.type == "cpu"
        and bool(torch.backends.mkldnn.enabled)
    )


def _fits(x: Tensor, y: Tensor, plus: Tensor | None) -> bool:
    """Whether kinds, shapes, types and layouts are what the operation, which does not look, can take."""
    parts = (x, y) if plus is None else (x, y, plus)
    dense = all(type(p) in _KINDS and p.layout == torch.strided and not p.is_neg() for p in parts)
    same = plus is None or (
        plus.shape == (x.shape[0], y.shape[1]) and plus.dtype == x.dtype and plus.device == x.device
    )
    return dense and same and x.shape[1] == y.shape[0]


def _recorded(*parts: Tensor | None) -> bool:
    """Whether somebody differentiates or compiles what is computed: the operation has no rule for that."""
    backwards = torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in parts)
    return backwards or getattr(forward_ad, "_current_level", -1) >= 0 or torch.compiler.is_compiling()


def _by_onednn(x: Tensor, y: Tensor, plus: Tensor | None) -> Tensor:
    operation = torch.ops.mkldnn._linear_pointwise
    if not (y.is_contiguous() or y.T.is_contiguous()):
        y = y.contiguous()  # otherwise oneDNN would take its reference code, a thousand times slower
    result: Tensor
    if plus is not None and plus.is_contiguous():
        result = operation.binary(x, plus, y.T, None, "add")
    else:
        result = operation.default(x, y.T, None, "none", [], "")
        result = result if plus is None else result.add_(plus)
    return result


@cache
def _has_onednn() -> bool:
    """Whether the operation is there and agrees with the plain product, with and without a sum, and for views."""
    # Whatever the default type and device are.
    x = torch.linspace(-1, 1, 6 * 40, dtype=torch.float32, device="cpu").sin().view(6, 40)
    y, plus = x.cos().flatten().view(40, 6).repeat(1, 4), x[:, :10].exp()
    left, right = x.T.contiguous().T[:, 2:32], y[2:32, 4:14]
    before = plus.clone()
    try:
        alone, summed = _by_onednn(left, right, None), _by_onednn(left, right, plus)
        good = torch.allclose(alone, left @ right, rtol=1e-4, atol=1e-4)
        good = good and torch.allclose(summed, plus + left @ right, rtol=1e-4, atol=1e-4)
        return bool(good and torch.equal(plus, before))
    except (RuntimeError, AttributeError, TypeError, NotImplementedError):
        return False
