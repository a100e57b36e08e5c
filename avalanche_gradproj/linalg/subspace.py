"""Orthonormal bases that grow with the data: the subspace side of GPM (arXiv 2103.09762, equations 5 to 9).

All functions work on blocks at once: a basis is [blocks, d, r] with the blocks' ranks beside it; columns beyond a
block's rank are zero, so that products with the padded tensor are products with each block's own basis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from avalanche_gradproj.errors import choice
from avalanche_gradproj.linalg.moments import RowStatistics

RANK_RULES = ("paper", "official")


@dataclass(frozen=True)
class Basis:
    """Orthonormal columns of each block.

    Attributes:
        columns: [blocks, d, r], r the largest rank; columns beyond a block's rank are zero.
        ranks: rank of each block.
    """

    columns: Tensor
    ranks: tuple[int, ...]

    @staticmethod
    def empty(blocks: int, features: int, dtype: torch.dtype, device: torch.device) -> Basis:
        """Return a basis without columns."""
        return Basis(torch.zeros(blocks, features, 0, dtype=dtype, device=device), (0,) * blocks)

    @staticmethod
    def from_blocks(blocks: Sequence[Tensor]) -> Basis:
        """Return the basis of blocks given as one [d, r] tensor each, as `per_block` gives them."""
        ranks = tuple(block.shape[1] for block in blocks)
        columns = blocks[0].new_zeros(len(blocks), blocks[0].shape[0], max(ranks))
        for index, block in enumerate(blocks):
            columns[index, :, : ranks[index]] = block
        return Basis(columns, ranks)

    @property
    def features(self) -> int:
        """d, the dimension of the space."""
        return self.columns.shape[1]

    @property
    def rank(self) -> int:
        """The largest rank of the blocks."""
        return self.columns.shape[2]

    @property
    def full(self) -> bool:
        """Whether every block's columns span its whole space."""
        return min(self.ranks) == self.features

    @property
    def free_share(self) -> float:
        """Share of the input dimensions, over all blocks, that no column occupies yet (between 0 and 1)."""
        return 1.0 - sum(self.ranks) / (len(self.ranks) * self.features)

    def per_block(self) -> list[Tensor]:
        """Return one [d, r] tensor a block, without the padding."""
        return [block[:, :rank] for block, rank in zip(self.columns, self.ranks, strict=True)]


def grow_basis(statistics: RowStatistics, basis: Basis, threshold: float, *, rank_rule: str = "paper") -> Basis:
    """Extend a basis until it explains a share of the energy of the rows (GPM, equations 5, 8 and 9).

    With R the rows as columns, E = ||R||_F^2 and R' = R - M M^T R, the leading left singular vectors of R' are
    added until (||M^T R||_F^2 + sum of their squared singular values) / E >= threshold; none where that holds
    already. Directions whose energy is below the rounding of E are never added, so a threshold of 1 means
    "every direction that the data has".

    The old columns are kept bit for bit; the new ones are orthogonalised against them (twice) in float64.

    Args:
        statistics: rows or second moment of the layer.
        basis: the present basis, possibly empty.
        threshold: between 0 and 1.
        rank_rule: `"paper"` adds the smallest number of directions that reaches the threshold; `"official"` does
            as the authors' code where the basis is empty: one direction fewer, the one that crosses the
            threshold is not added. With a basis that already has columns the two rules agree.

    Returns:
        The grown basis, in the type and on the device of the old one; the same object where nothing was added.
    """
    choice("rank_rule", rank_rule, RANK_RULES)
    spectrum = _residual_spectrum(statistics, basis)
    if spectrum is None or threshold <= 0:
        return basis
    directions, energies, total, rounding = spectrum
    # What directions i, i + 1, ... still hold, summed from the small end: the explained part would round it away.
    left = energies.flip(1).cumsum(1).flip(1)
    if rank_rule == "official" and basis.rank == 0:
        left = torch.cat([left[:, 1:], torch.zeros_like(left[:, :1])], dim=1)
    wanted = left > (1 - threshold) * total[:, None]
    # The old columns are known to the precision of their type: what they miss by that is no new direction.
    rounding = basis.features * max(rounding, torch.finfo(basis.columns.dtype).eps ** 2)
    wanted &= energies > rounding * total[:, None]
    room = basis.features - torch.tensor(basis.ranks, device=wanted.device)
    added = torch.minimum(wanted.cumprod(1).sum(1), room)
    return _append(basis, directions, [int(count) for count in added.tolist()])


def _residual_spectrum(statistics: RowStatistics, basis: Basis) -> tuple[Tensor, Tensor, Tensor, float] | None:
    """Decompose what the basis does not explain.

    Returns:
        Directions [blocks, d, k], their energies [blocks, k] in descending order and the total energy [blocks], all
        in float64, and the relative rounding of an energy (a second moment squares it); None without rows.
    """
    rows, moment = statistics.rows, statistics.moment
    rounding = torch.finfo(torch.float64).eps
    if rows is not None:
        rounding = rounding**2
        wide = _widen(rows)
        columns = _widen(basis.columns).to(wide.device)
        total = wide.square().sum((1, 2))
        residual = wide - (wide @ columns) @ columns.transpose(1, 2)
        directions, values, _ = torch.linalg.svd(residual.transpose(1, 2), full_matrices=False)
        energies = values.square()
    elif moment is not None:
        wide = _widen(moment)
        columns = _widen(basis.columns).to(wide.device)
        total = wide.diagonal(dim1=1, dim2=2).sum(1)
        # (I - M M^T) C (I - M M^T), one side after the other
        residual = wide - (wide @ columns) @ columns.transpose(1, 2)
        residual = residual - columns @ (columns.transpose(1, 2) @ residual)
        residual = (residual + residual.transpose(1, 2)) / 2
        values, vectors = torch.linalg.eigh(residual)
        directions, energies = vectors.flip(2), values.flip(1).clamp_min(0)
    else:
        return None
    # A block without energy has nothing to explain: a total of 1 makes its share 0 and its energies negligible.
    silent = total == 0
    return directions, energies, torch.where(silent, torch.ones_like(total), total), rounding


def _widen(tensor: Tensor) -> Tensor:
    """Return the tensor in float64, on the host where its device has no float64."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def _append(basis: Basis, directions: Tensor, added: list[int]) -> Basis:
    """Put the first `added[b]` directions of block b behind its columns, orthonormal to them."""
    most = max(added)
    if most == 0:
        return basis
    old = _widen(basis.columns).to(directions.device)
    fresh = directions[:, :, :most]
    for _ in range(2):
        # Where little energy is left the decomposition leaves a trace of the old columns: once is not enough.
        fresh = fresh - old @ (old.transpose(1, 2) @ fresh)
        fresh = fresh / fresh.norm(dim=1, keepdim=True).clamp_min(torch.finfo(fresh.dtype).tiny)
    fresh = torch.linalg.qr(fresh).Q
    fresh = fresh.to(basis.columns.dtype).to(basis.columns.device)
    ranks = tuple(rank + count for rank, count in zip(basis.ranks, added, strict=True))
    columns = basis.columns.new_zeros(len(ranks), basis.features, max(ranks))
    for block, (rank, count) in enumerate(zip(basis.ranks, added, strict=True)):
        columns[block, :, :rank] = basis.columns[block, :, :rank]
        columns[block, :, rank : rank + count] = fresh[block, :, :count]
    return Basis(columns, ranks)


def complement(basis: Basis) -> Tensor:
    """Return an orthonormal basis of the orthogonal complement of a single block.

    Args:
        basis: a basis of one block.

    Returns:
        N [d, d - r] in the type of the basis, such that [M N] is orthogonal; computed in float64.
    """
    full = torch.linalg.qr(_widen(basis.columns[0]), mode="complete").Q
    return full[:, basis.rank :].to(basis.columns.dtype).to(basis.columns.device)
