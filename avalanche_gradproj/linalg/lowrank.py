"""One weight as a scaled and low-rank perturbed copy of another: the fit, the choice of ranks, what pruning keeps.

Weights are in canonical shape [blocks, out, in, taps]: taps are kernel positions, 1 for a linear layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Below this squared norm a row or column of the base says nothing: its scale is 0 (arXiv 2311.15161's code does so).
_VANISHING = 1e-20

#: Eigenvalues of a Gram matrix below this share of the largest are rounding: both halves of the direction are 0 then.
_ROUNDING = 1e-14


@dataclass(frozen=True)
class ScaledFit:
    """`free ~ diag(rows) base diag(columns) + left right`, the low-rank term being the same at every tap.

    Attributes:
        rows: [blocks, out].
        columns: [blocks, in].
        left: [blocks, out, m], direction i scaled by the root of its singular value, largest first.
        right: [blocks, m, in], likewise.
        energies: [m], what direction i (of all blocks together) takes off the squared error, in float64: taps times
            its squared singular values.
    """

    rows: Tensor
    columns: Tensor
    left: Tensor
    right: Tensor
    energies: Tensor


def scales(free: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """Fit row scales, then column scales given those, by least squares.

    `rows_j = <free_j, base_j> / <base_j, base_j>` over row j; `columns` likewise with `diag(rows) base` in place of
    `base`. The two are not fitted jointly (arXiv 2311.15161 does not either).

    Args:
        free: [blocks, out, in, taps].
        base: of the same shape.

    Returns:
        Rows [blocks, out] and columns [blocks, in].
    """
    rows = _ratio((free * base).sum((2, 3)), base.square().sum((2, 3)))
    scaled = rows[:, :, None, None] * base
    return rows, _ratio((free * scaled).sum((1, 3)), scaled.square().sum((1, 3)))


def _ratio(product: Tensor, square: Tensor) -> Tensor:
    return product / square.clamp(min=_VANISHING)


def fit(free: Tensor, base: Tensor) -> ScaledFit:
    """Fit a weight by a base, in float64 (arXiv 2311.15161, section on low-rank perturbation).

    The residual's mean over the taps is decomposed. Its singular vectors come from the Gram matrix of the smaller side,
    which is several times cheaper than an SVD and as good for directions that matter: singular values are exact to the
    root of float64's rounding, relative to the largest.

    Args:
        free: [blocks, out, in, taps], what is to be fitted.
        base: of the same shape.
    """
    free, base = free.detach().double(), base.detach().double()
    rows, columns = scales(free, base)
    residual = (free - rows[:, :, None, None] * base * columns[:, None, :, None]).mean(3)
    wide = residual.shape[1] <= residual.shape[2]
    matrix = residual if wide else residual.mT
    values, vectors = torch.linalg.eigh(matrix @ matrix.mT)
    vectors = vectors.flip(-1)  # eigenvalues come in ascending order
    coefficients = vectors.mT @ matrix  # rows of length sigma
    values = values.flip(-1)
    sigmas = torch.where(values > _ROUNDING * values[:, :1], values, 0.0).clamp(min=0).sqrt()
    inverse = torch.where(sigmas > 0, 1.0 / sigmas.sqrt(), 0.0)
    left, right = vectors * sigmas.sqrt()[:, None, :], coefficients * inverse[:, :, None]
    if not wide:
        left, right = right.mT, left.mT
    return ScaledFit(rows, columns, left, right, free.shape[3] * sigmas.square().sum(0))


def choose_ranks(scores: Sequence[Tensor], rate: float, maximum: int) -> list[int]:
    """Choose the rank of every layer: the best directions of all layers together, until their share suffices.

    Fewest directions whose scores sum up to at least `rate` of the total, best first; then each layer gets at least one
    and at most `maximum`. Directions beyond `maximum` count towards the share, as in the official code.

    Args:
        scores: of each layer's directions, [m] each, in descending order.
        rate: share of the total, in (0, 1].
        maximum: directions of a layer.

    Returns:
        A rank for each layer, from 1 to `min(m, maximum)`.
    """
    every = torch.cat([score.double() for score in scores])
    owner = torch.cat([torch.full((len(score),), layer) for layer, score in enumerate(scores)]).to(every.device)
    ordered, order = every.sort(descending=True, stable=True)
    reached = ordered.cumsum(0)
    needed = int((reached < rate * reached[-1]).sum()) + 1
    chosen = torch.bincount(owner[order[:needed]], minlength=len(scores)).tolist()
    return [min(max(1, count), len(score), maximum) for count, score in zip(chosen, scores, strict=True)]


def largest(tensors: Sequence[Tensor], count: int, threshold: float) -> list[Tensor]:
    """Mark the entries that pruning by magnitude keeps, over all tensors together.

    Args:
        tensors: of any shapes.
        count: at most so many are kept, the largest.
        threshold: what is not above it goes anyway.

    Returns:
        A mask for each tensor; together they mark at most `count` entries, also where magnitudes are equal.
    """
    magnitudes = torch.cat([tensor.detach().reshape(-1).abs() for tensor in tensors])
    kept = torch.zeros_like(magnitudes, dtype=torch.bool)
    if count > 0:
        values, positions = magnitudes.topk(min(count, len(magnitudes)), sorted=False)
        kept[positions[values > threshold]] = True
    parts = kept.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
