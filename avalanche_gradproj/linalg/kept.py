"""A quadratic form whose products are formed in one call of several, its stiff directions in every call.

With C = sum of Kronecker products and L its leading part (the eigenvectors of each factor whose eigenvalues are not far
below the largest), the gradient at X is taken to be

    L X + (C - L) X_0        X_0 where the products were last formed

What is kept reacts late, which is harmless as long as its curvature is small: a gradient that is k steps old is stable
up to about 1/k of the step size that the largest curvature allows. The share of the largest eigenvalue from which on
directions are leading is therefore 1/(2k).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from avalanche_gradproj.linalg.kronecker import Factor, KroneckerTerm
from avalanche_gradproj.linalg.projection import OPERATION_COST

#: Part of the cost of a product that its leading part, and its own share in a call, may have to be worth it.
_WORTH = 0.75


@dataclass(frozen=True, eq=False)
class Leading:
    """The leading part of a term: X -> M M^T X N N^T + damping X.

    Attributes:
        left: M [blocks, out, r], leading eigenvectors times the roots of their eigenvalues.
        right: N [blocks, d, s], the same of the inputs' factor.
        damping: that of the term.
    """

    left: Tensor
    right: Tensor
    damping: float

    def product(self, x: Tensor) -> Tensor:
        """Return the product with X [blocks, out, d], or without the first axis where factors have none."""
        out, d, r, s = *x.shape[-2:], self.left.shape[-1], self.right.shape[-1]
        if r * d * (out + s) <= s * out * (d + r):
            result = self.left @ ((self.left.mT @ x @ self.right) @ self.right.mT)
        else:
            result = (self.left @ (self.left.mT @ (x @ self.right))) @ self.right.mT
        return torch.add(result, x, alpha=self.damping) if self.damping else result

    def cost(self) -> float:
        """Return the cost of a product in floating-point operations."""
        (out, r), (d, s) = self.left.shape[-2:], self.right.shape[-2:]
        blocks = self.left.shape[0] if self.left.dim() == 3 else 1
        return 4.0 * blocks * min(r * d * (out + s), s * out * (d + r)) + 4 * OPERATION_COST


def leading(term: KroneckerTerm, share: float) -> Leading:
    """Return the leading part of a term.

    Args:
        term: with or without the axis of blocks.
        share: eigenvectors of each factor whose eigenvalue is at least this share of the largest are leading.
    """
    return Leading(_leading_columns(term.left, share), _leading_columns(term.right, share), term.damping)


def _leading_columns(factor: Factor, share: float) -> Tensor:
    """Return eigenvectors times roots of eigenvalues [blocks, n, r]; zeros where a block has fewer."""
    if factor.rest is None:
        host = factor.matrix.cpu() if factor.matrix.device.type == "mps" else factor.matrix
        values, vectors = torch.linalg.eigh(host)
        values, vectors = values.flip(-1).clamp(min=0), vectors.flip(-1)
    else:  # eigenvectors are the columns, in descending order
        squares = factor.matrix.square().sum(dim=-2)
        rest = factor.rest[:, None] if isinstance(factor.rest, Tensor) else factor.rest
        vectors = factor.matrix * torch.where(squares > 0, squares, torch.inf).rsqrt()[..., None, :]
        values = torch.where(squares > 0, squares + rest, 0)
    leads = (values >= share * values[..., :1]) & (values > 0)
    count = max(1, int(leads.sum(dim=-1).max()))
    columns = vectors * torch.where(leads, values, 0).sqrt()[..., None, :]
    return columns[..., :count].contiguous().to(factor.matrix)


def _cost(term: KroneckerTerm, out: int, d: int) -> float:
    """Return the cost of a term's product in floating-point operations."""
    blocks = term.left.matrix.shape[0] if term.left.matrix.dim() == 3 else 1
    widths = [factor.size if factor.rest is None else 2 * factor.rank for factor in (term.left, term.right)]
    return 2.0 * blocks * out * d * sum(widths) + 2 * OPERATION_COST


class KeptForm:
    """A quadratic form on X [blocks, out, d], or [out, d] with squeezed terms.

    Terms of which the leading part would not be cheaper are formed in every call. Memory: the leading parts and as many
    numbers as X has, where a term is split.

    Args:
        terms: the form.
        every: k, calls for which what is not leading is kept.
    """

    def __init__(self, terms: Sequence[KroneckerTerm], every: int) -> None:
        self._exact: list[KroneckerTerm] = []
        self._split: list[tuple[KroneckerTerm, Leading]] = []
        self._kept: Tensor | None = None
        for term in terms:
            whole = _cost(term, term.left.size, term.right.size)
            lead = leading(term, 0.5 / every) if whole > 8 * OPERATION_COST else None
            if lead is not None and lead.cost() + whole / every < _WORTH * whole:
                self._split.append((term, lead))
            else:
                self._exact.append(term)

    @property
    def split(self) -> int:
        """How many terms have a part that is kept."""
        return len(self._split)

    def quadratic(self, x: Tensor, *, refresh: bool) -> tuple[Tensor, Tensor]:
        """Return value and gradient.

        Args:
            x: where.
            refresh: form all products; the first call does in any case.

        Returns:
            `<X, G> / 2`, a scalar, and G, as `linalg.kronecker.quadratic` gives them where all is formed.
        """
        parts = [term.product(x) for term in self._exact]
        if self._split:
            leads = sum((lead.product(x) for _, lead in self._split[1:]), self._split[0][1].product(x))
            if refresh or self._kept is None:
                whole = sum((term.product(x) for term, _ in self._split[1:]), self._split[0][0].product(x))
                rest, before = whole - leads, leads.new_zeros(()) if self._kept is None else self._kept
                # One step that is not finite must not spoil those that follow; nobody waits for the device here.
                self._kept = torch.where(torch.isfinite(rest).all(), rest, before)
            parts.append(leads + self._kept)
        gradient = parts[0]
        for part in parts[1:]:
            gradient = gradient + part
        return 0.5 * torch.dot(x.flatten(), gradient.flatten()), gradient
