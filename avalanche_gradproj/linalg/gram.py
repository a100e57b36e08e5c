"""What follows from small Gram matrices: orthonormal bases of few long vectors, as coefficients on those vectors.

K vectors D [K, p] with K much smaller than p are never decomposed themselves: a basis of their span is V = D^T B with
B [K, r] computed from S = D D^T alone. All functions work on batches of Gram matrices, stay on the device and take no
branch on values: a direction that does not count is a zero column.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Columns that are converted to float64 at a time: few enough to stay in the cache, many enough to keep it busy.
CHUNK = 16384

#: Rows of a Gram matrix that are formed at a time on the CPU, from the diagonal on: the lower half is not computed.
ROWS = 8

#: Squarings of a matrix: eigenvalues closer than a relative 2^-40 count as equal.
SQUARINGS = 40


def gram_matrix(vectors: Tensor) -> Tensor:
    """Return the inner products of vectors, products and sums in float64.

    Memory: the vectors are converted `CHUNK` columns at a time. Cost: between K^2 p and 2 K^2 p
    operations a block.

    Args:
        vectors: [..., K, p], any floating type.

    Returns:
        [..., K, K] in float64, symmetric.
    """
    *batch, count, length = vectors.shape
    total = torch.zeros(*batch, count, count, dtype=torch.float64, device=vectors.device)
    buffer = torch.empty(*batch, count, min(CHUNK, length), dtype=torch.float64, device=vectors.device)
    step = ROWS if vectors.device.type == "cpu" else max(1, count)
    for part in vectors.split(CHUNK, dim=-1) if length else ():
        wide = buffer[..., : part.shape[-1]]
        wide.copy_(part)
        for first in range(0, count, step):
            total[..., first : first + step, first:] += wide[..., first : first + step, :] @ wide[..., first:, :].mT
    return total.triu() + total.triu(1).mT


def orthonormal_coefficients(gram: Tensor, floor: Tensor) -> Tensor:
    """Return coefficients B of an orthonormal basis V = D^T B of the span of D, from S = D D^T.

    Symmetric elimination with pivots: each step takes the longest remaining vector and removes its direction from the
    others. A remainder whose squared length is not above `floor` is numerically dependent and gives a zero column.

    Args:
        gram: S [..., K, K], float64.
        floor: [...], squared length that counts as zero.

    Returns:
        B [..., K, K], with B^T S B = 1 on the columns that count and 0 elsewhere.
    """
    count = gram.shape[-1]
    rest = gram.clone()
    combined = torch.eye(count, dtype=gram.dtype, device=gram.device).expand(gram.shape).clone()
    columns = []
    for _ in range(count):
        squared, pivot = rest.diagonal(dim1=-2, dim2=-1).max(dim=-1)
        at = pivot[..., None, None].expand(*pivot.shape, 1, count)
        row, coefficients = rest.gather(-2, at), combined.gather(-2, at)
        inverse = torch.where(squared > floor, 1.0 / squared, 0.0)[..., None, None]
        columns.append((inverse.sqrt() * coefficients).squeeze(-2))
        factors = inverse * row.mT
        rest = rest - factors * row
        combined = combined - factors * coefficients
    return torch.stack(columns, dim=-1)


def principal_coefficients(gram: Tensor, count: int, floor: Tensor, *, on_device: bool | None = None) -> Tensor:
    """Return coefficients B of the leading principal directions V = D^T B of the rows of D, from S = D D^T.

    With S = U L U^T the directions are D^T U L^(-1/2), in descending order of L. On the CPU L and U come from `eigh`;
    elsewhere, where `eigh` waits for the device, from repeated squaring and deflation: S^(2^m), normalised, tends to
    the projection onto the leading eigenvector, any column of which is that vector.

    Args:
        gram: S [..., K, K], float64 and finite.
        count: how many directions; no more than K come back.
        floor: [...], an eigenvalue not above it gives a zero column.
        on_device: whether to use the second way; default: off the CPU.

    Returns:
        B [..., K, min(count, K)], with B^T S B = 1 on the columns that count and 0 elsewhere.
    """
    count = min(count, gram.shape[-1])
    if (gram.device.type != "cpu") if on_device is None else on_device:
        values, vectors = _leading_by_squaring(gram, count)
    else:
        values, vectors = torch.linalg.eigh(gram)
        values, vectors = values[..., -count:].flip(-1), vectors[..., -count:].flip(-1)
    kept = torch.where(values > floor[..., None], values, torch.inf)
    return vectors * kept.rsqrt()[..., None, :]


def _leading_by_squaring(gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the leading eigenvalues [..., count] and eigenvectors [..., K, count] of positive matrices."""
    rest, values, vectors = gram, [], []
    size = gram.shape[-1]
    for _ in range(count):
        power = rest
        for _ in range(SQUARINGS):
            largest = power.diagonal(dim1=-2, dim2=-1).amax(dim=-1)
            power = power * torch.where(largest > 0, 1.0 / largest, 0.0)[..., None, None]
            power = power @ power
        at = power.diagonal(dim1=-2, dim2=-1).argmax(dim=-1)[..., None, None]
        vector = power.gather(-1, at.expand(*at.shape[:-2], size, 1))
        length = vector.square().sum(dim=-2, keepdim=True)
        vector = vector * torch.where(length > 0, length, torch.inf).rsqrt()
        image = rest @ vector
        value = vector.mT @ image
        rest = rest - image @ vector.mT - vector @ image.mT + value * (vector @ vector.mT)
        values.append(value.reshape(value.shape[:-2]))
        vectors.append(vector.squeeze(-1))
    return torch.stack(values, dim=-1), torch.stack(vectors, dim=-1)
