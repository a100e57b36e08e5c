"""A quadratic form all of whose products are formed in one call of several, and what changed since from a sample.

With C = sum of Kronecker products and X_0 where the products were last formed, the gradient at X is taken to be

    C X_0 + C~ (X - X_0)        C~ X = B X (L L^T + m R_j R_j^T)  for  C X = B X A

A = sum of s_i u_i u_i^T. The columns of L are its leading eigenvectors times the roots of their eigenvalues, the others
are dealt out to m blocks R_1 .. R_m, so that each has its share of large and small ones. The mean of C~ over the blocks
is C: nothing reacts late, and nothing is left out. (Stochastic gradients with a control variate: Johnson and Zhang,
NeurIPS 2013. Here the sum is over eigenvectors, not samples.) Every call takes the next block, and the first one after
all products were formed the block behind the one that it took the last time: each block meets every lag alike.

A block's curvature counts m times in its call. There are as many leading eigenvectors, and as large blocks, as it takes
for no direction to be stiffer by that than the stiffest one is: `m s <= s_1`, s the largest eigenvalue in a block.

Where B is larger than A, it is B whose eigenvectors are dealt out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from avalanche_gradproj.linalg.kronecker import Factor, KroneckerTerm
from avalanche_gradproj.linalg.products import product
from avalanche_gradproj.linalg.projection import OPERATION_COST

#: Part of the cost of a product that a call may take on average to be worth what it approximates.
_WORTH = 0.75
#: Leading eigenvectors and those of a block come in multiples of this.
_COLUMNS = 8


class SampledTerm:
    """C~ of one term, block after block.

    Of a thin factor the part that is a multiple of the identity is left out: its curvature is small, and what was kept
    of it reacts late. Memory: two to three times the factor whose eigenvectors are dealt out, as the leading ones are
    beside each block.

    Args:
        term: with or without the axis of blocks.
    """

    def __init__(self, term: KroneckerTerm) -> None:
        self._term = term
        self._on_right = term.right.size >= term.left.size
        values, vectors = _eigenpairs(term.right if self._on_right else term.left)
        self.leading, self.width = widths(values)
        self.count = -(-(values.shape[-1] - self.leading) // self.width) if self.width else 1
        roots = vectors * values.sqrt()[..., None, :]
        dealt = [roots[..., self.leading + j :: self.count] * self.count**0.5 for j in range(self.count)]
        self._columns = [torch.cat([roots[..., : self.leading], own], dim=-1).to(term.left.matrix) for own in dealt]

    def product(self, x: Tensor, call: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return C~ X (without damping) as two matrices whose product it is, and `<X, C~ X>`.

        Args:
            x: [.., out, d].
            call: counted from 0: which block.
        """
        columns = self._columns[call % self.count]
        if self._on_right:
            inner = product(x, columns)
            outer = self._term.left.on_left(inner)
            return outer, columns.mT, torch.dot(inner.flatten(), outer.flatten())
        inner = product(columns.mT, x)
        outer = self._term.right.on_right(inner)
        return columns, outer, torch.dot(inner.flatten(), outer.flatten())

    def cost(self) -> float:
        """Return the cost of a product in floating-point operations."""
        shape = self._term.left.matrix.shape
        out, d, r = self._term.left.size, self._term.right.size, self.leading + self.width
        return 2.0 * (shape[0] if len(shape) == 3 else 1) * r * (2 * out * d + min(out, d) ** 2) + 12 * OPERATION_COST


def widths(values: Tensor) -> tuple[int, int]:
    """Choose how many eigenvectors lead and how many make up a block, for the fewest products.

    Args:
        values: eigenvalues in descending order, [blocks, n] or [n].

    Returns:
        Multiples of 8 (or what there is): with 0 in a block, all lead.
    """
    size = values.shape[-1]
    relative = values / values[..., :1].clamp(min=torch.finfo(values.dtype).tiny)
    # Read at once: a round trip for each number would add up on an accelerator.
    shares: list[float] = (relative if relative.dim() == 1 else relative.amax(dim=0)).tolist()
    best, chosen = size, (size, 0)
    for leading in range(_COLUMNS, size, _COLUMNS):
        most = math.floor(1.0 / max(shares[leading], 1.0 / size))  # blocks that the stiffest in them allows
        width = _COLUMNS * math.ceil(math.ceil((size - leading) / most) / _COLUMNS)
        if leading + width < best:
            best, chosen = leading + width, (leading, width)
    return chosen


def _eigenpairs(factor: Factor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues [.., r], descending and not negative, and eigenvectors [.., n, r]; of a thin one, of M M^T."""
    if factor.rest is None:
        host = factor.matrix.cpu() if factor.matrix.device.type == "mps" else factor.matrix
        values, vectors = torch.linalg.eigh(host)
        return values.flip(-1).clamp(min=0).to(factor.matrix), vectors.flip(-1).to(factor.matrix)
    squares = factor.matrix.square().sum(dim=-2)  # eigenvectors are the columns, in descending order
    return squares, factor.matrix * torch.where(squares > 0, squares, torch.inf).rsqrt()[..., None, :]


def _cost(term: KroneckerTerm) -> float:
    """Return the cost of a term's product in floating-point operations."""
    blocks = term.left.matrix.shape[0] if term.left.matrix.dim() == 3 else 1
    widths = [factor.size if factor.rest is None else 2 * factor.rank for factor in (term.left, term.right)]
    return 2.0 * blocks * term.left.size * term.right.size * sum(widths) + 2 * OPERATION_COST


class KeptForm:
    """A quadratic form on X [blocks, out, d], or [out, d] with squeezed terms.

    Terms where a sample would not be cheaper are formed in every call. Memory, where a term is split: the sampled
    terms', and twice as many numbers as X has.

    Args:
        terms: the form.
        every: k, calls in one of which all products are formed.
    """

    def __init__(self, terms: Sequence[KroneckerTerm], every: int) -> None:
        self._exact: list[KroneckerTerm] = []
        self._split: list[tuple[KroneckerTerm, SampledTerm]] = []
        self._kept: Tensor | None = None
        self._there: Tensor | None = None
        self._value: Tensor | None = None
        self._window, self._lag = -1, 0
        for term in terms:
            whole = _cost(term)
            # Finding the eigenvectors costs something too.
            sampled = SampledTerm(term) if whole > 8 * OPERATION_COST else None
            if sampled is not None and sampled.cost() + whole / every < _WORTH * whole:
                self._split.append((term, sampled))
            else:
                self._exact.append(term)

    @property
    def split(self) -> int:
        """How many terms are sampled."""
        return len(self._split)

    def quadratic(self, x: Tensor, *, refresh: bool) -> tuple[Tensor, Tensor]:
        """Return value and gradient.

        Args:
            x: where.
            refresh: form all products; the first call does in any case.

        Returns:
            The form's value at X, and G, its gradient: as `linalg.kronecker.quadratic` gives them where all is formed,
            estimates whose mean over the blocks they are elsewhere.
        """
        value, gradient = None, None
        if self._split:
            value, gradient = self._all(x) if refresh or self._kept is None else self._sampled(x)
        for term in self._exact:
            own = term.product(x)
            half = 0.5 * torch.dot(x.flatten(), own.flatten())
            value, gradient = (half, own) if value is None or gradient is None else (value + half, gradient + own)
        if value is None or gradient is None:
            raise ValueError("a form without terms")
        return value, gradient

    def _all(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._window, self._lag = self._window + 1, 0
        gradient = self._split[0][0].product(x)
        for term, _ in self._split[1:]:
            gradient = gradient + term.product(x)
        value = 0.5 * torch.dot(x.flatten(), gradient.flatten())
        if self._kept is None or self._there is None or self._value is None:
            self._kept, self._there, self._value = (torch.zeros_like(own) for own in (x, x, value))
        # One step that is not finite must not spoil those that follow; nobody waits for the device here.
        finite = torch.isfinite(value)
        self._kept = torch.where(finite, gradient, self._kept)
        self._there = torch.where(finite, x, self._there)
        self._value = torch.where(finite, value, self._value)
        return value, gradient

    def _sampled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, value = self._kept, self._value
        if kept is None or value is None or self._there is None:
            raise ValueError("nothing is kept yet")
        moved, gradient = x - self._there, kept
        value = value + torch.dot(moved.flatten(), kept.flatten())
        for term, sampled in self._split:
            left, right, square = sampled.product(moved, self._window + self._lag)
            gradient, value = product(left, right, plus=gradient), value + 0.5 * square
            if term.damping:
                gradient = torch.add(gradient, moved, alpha=term.damping)
                value = value + 0.5 * term.damping * moved.square().sum()
        self._lag += 1
        return value, gradient
