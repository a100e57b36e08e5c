"""Kronecker-factored quadratic forms on matrices, by products of the factors alone.

A symmetric positive semi-definite form on matrices X [out, d] is given by one or several terms

    X -> B X A + damping X                    B [out, out], A [d, d]

which is the matrix B (x) A + damping I acting on the rows of X written one after the other; it has (out d)^2 numbers
and is never formed. A factor is whole, or thin: M M^T + rest I with M [n, r]. Everything is batched over independent
blocks: [blocks, out, d], and the axis may be left out where there is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from avalanche_gradproj.linalg.products import product
from avalanche_gradproj.linalg.projection import OPERATION_COST

#: Columns of a thin factor come in multiples of this in products.
_COLUMNS = 8


@dataclass(frozen=True, eq=False)
class Factor:
    """A symmetric positive semi-definite matrix for each block.

    Attributes:
        matrix: [blocks, n, n]; of a thin one M [blocks, n, r].
        rest: None; of a thin one [blocks], what is added to M M^T times the identity. A number where the axis of blocks
            is left out.
    """

    matrix: Tensor
    rest: Tensor | float | None = None

    @property
    def size(self) -> int:
        """Rows and columns n."""
        return self.matrix.shape[-2]

    @property
    def rank(self) -> int:
        """Columns that are kept: n of a whole factor, r of a thin one."""
        return self.matrix.shape[-1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the factor is made of."""
        return (self.matrix, self.rest) if isinstance(self.rest, Tensor) else (self.matrix,)

    @property
    def trace(self) -> Tensor:
        """Trace of each block [blocks]."""
        if self.rest is None:
            return self.matrix.diagonal(dim1=1, dim2=2).sum(dim=1)
        return self.matrix.square().sum(dim=(1, 2)) + self.size * self.rest

    def on_left(self, x: Tensor) -> Tensor:
        """Return the factor times X [blocks, n, m]."""
        if self.rest is None:
            return product(self.matrix, x)
        inner = product(self.matrix.mT, x)
        if isinstance(self.rest, float):
            return product(self.matrix, inner, plus=x, beta=self.rest)
        return torch.addcmul(self.matrix @ inner, x, self.rest[:, None, None])

    def on_right(self, x: Tensor) -> Tensor:
        """Return X [blocks, m, n] times the factor."""
        if self.rest is None:
            return product(x, self.matrix)
        inner = product(x, self.matrix)
        if isinstance(self.rest, float):
            return product(inner, self.matrix.mT, plus=x, beta=self.rest)
        return torch.addcmul(inner @ self.matrix.mT, x, self.rest[:, None, None])

    def scaled(self, weight: float) -> Factor:
        """Return the factor times a number that is not negative."""
        if self.rest is None:
            return Factor(self.matrix * weight)
        return Factor(self.matrix * weight**0.5, self.rest * weight)

    def to(self, device: torch.device, dtype: torch.dtype) -> Factor:
        """Return the factor on a device, in a floating-point type."""
        return Factor(*(part.to(device=device, dtype=dtype) for part in self.tensors))

    def squeezed(self) -> Factor:
        """Return the only block, without its axis; waits for the device."""
        if not isinstance(self.rest, Tensor):
            return Factor(self.matrix[0], self.rest)
        # Products with a few columns run up to a third faster when these fill whole vectors of the processor.
        return Factor(F.pad(self.matrix[0], (0, -self.rank % _COLUMNS)), self.rest[0].item())

    def truncated(self, share: float) -> Factor:
        """Keep the leading eigenvectors, and the trace.

        Kept are the fewest leading eigenpairs that hold `share` of the squared Frobenius norm, as M; `rest` spreads
        what is then missing of the trace over all other directions, so that nothing that counted becomes nothing::

            M M^T + rest (I - V V^T)  =  V (S - rest) V^T + rest I,      V the kept eigenvectors, S their eigenvalues

        A share of 0.99 leaves out at most 0.1 of the norm, which can be a larger part of the trace; with 1 nothing but
        null vectors is left out. Blocks are padded with zeros to the largest rank.

        Args:
            share: in (0, 1].
        """
        # In the factor's own type: unlike a basis, a factor does not depend on its small eigenvalues.
        host = self.matrix.cpu() if self.matrix.device.type == "mps" else self.matrix
        values, vectors = torch.linalg.eigh(host)
        values = values.double().flip(1).clamp(min=0)
        energies = values.square()
        sums = energies.cumsum(1)
        # Kept is what those before leave missing of the share; nothing of a factor that is zero.
        kept = ((sums - energies) < share * sums[:, -1:]) & (values > 0)
        count, rank = kept.sum(1), max(1, int(kept.sum(1).max()))
        left_out = torch.where(kept, 0, values).sum(1)
        rest = left_out / (self.size - count).clamp(min=1)
        above = torch.where(kept, values - rest[:, None], 0).clamp(min=0)[:, None, :rank]
        matrix = vectors[:, :, -rank:].flip(2) * above.sqrt().to(vectors.dtype)
        return Factor(matrix.to(self.matrix.device), rest.to(self.matrix))

    def cheaper(self, share: float | None, columns: int) -> Factor:
        """Return the truncated factor where its products cost less, else the whole one.

        Args:
            share: see `truncated`; None truncates nothing.
            columns: of the matrices that it will multiply.
        """
        if share is None or self.rest is not None:
            return self
        whole = 2.0 * self.size**2 * columns + OPERATION_COST

        def is_cheaper(rank: int) -> bool:
            return 4.0 * self.size * rank * columns + 2 * OPERATION_COST < whole

        if not is_cheaper(1):  # small factors: known without their eigenvectors
            return self
        thin = self.truncated(share)
        return thin if is_cheaper(thin.rank) else self

    def plus(self, other: Factor) -> Factor:
        """Return the sum with another factor of as many rows; thin if both are and if that takes less memory."""
        if (
            isinstance(self.rest, Tensor)
            and isinstance(other.rest, Tensor)
            and 2 * (self.rank + other.rank) <= self.size
        ):
            return Factor(torch.cat([self.matrix, other.matrix], dim=2), self.rest + other.rest)
        return Factor(self.whole() + other.whole())

    def whole(self) -> Tensor:
        """Return the matrix that the factor is [blocks, n, n]."""
        if not isinstance(self.rest, Tensor):
            return self.matrix
        identity = torch.eye(self.size, device=self.matrix.device, dtype=self.matrix.dtype)
        return self.matrix @ self.matrix.mT + self.rest[:, None, None] * identity

    def state(self) -> dict[str, Tensor | None]:
        """Return copies on the host."""
        rest = self.rest.detach().cpu().clone() if isinstance(self.rest, Tensor) else None
        return {"matrix": self.matrix.detach().cpu().clone(), "rest": rest}

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> Factor:
        """Rebuild a factor.

        Raises:
            ValueError: if the tensors make up none.
        """
        matrix, rest = state["matrix"], state["rest"]
        parts = [matrix] if rest is None else [matrix, rest]
        if not all(isinstance(part, Tensor) and part.is_floating_point() for part in parts) or matrix.dim() != 3:
            raise ValueError("a factor is no tensor [blocks, n, n or rank]")
        if (rest is None and matrix.shape[1] != matrix.shape[2]) or (
            rest is not None and rest.shape != matrix.shape[:1]
        ):
            raise ValueError("a factor is neither square nor thin with a rest for each block")
        if not all(bool(torch.isfinite(part).all()) for part in parts):
            raise ValueError("a factor holds an infinity or a NaN")
        return Factor(*parts)


@dataclass(frozen=True, eq=False)
class KroneckerTerm:
    """One term of a quadratic form.

    Attributes:
        left: B, of the outputs.
        right: A, of the inputs.
        damping: what is added to every eigenvalue of B (x) A.
    """

    left: Factor
    right: Factor
    damping: float = 0.0

    def product(self, x: Tensor) -> Tensor:
        """Return B X A + damping X.

        Args:
            x: [blocks, out, d], or without the first axis where the term is `squeezed`.
        """
        result = self.left.on_left(self.right.on_right(x))
        return torch.add(result, x, alpha=self.damping) if self.damping else result

    def scaled(self, weight: float, damping: float = 0.0) -> KroneckerTerm:
        """Return `weight` times (the term + damping I), neither of them negative."""
        return KroneckerTerm(self.left.scaled(weight), self.right, (self.damping + damping) * weight)

    def squeezed(self) -> KroneckerTerm:
        """Return the term without the axis of blocks where there is one: plain products are faster than batched."""
        if self.left.matrix.dim() == 2 or self.left.matrix.shape[0] != 1:
            return self
        return KroneckerTerm(self.left.squeezed(), self.right.squeezed(), self.damping)

    def cheaper(self, share: float | None) -> KroneckerTerm:
        """Return the term with those factors truncated whose products get cheaper by it."""
        left, right = self.left.cheaper(share, self.right.size), self.right.cheaper(share, self.left.size)
        return KroneckerTerm(left, right, self.damping)

    def to(self, device: torch.device, dtype: torch.dtype) -> KroneckerTerm:
        """Return the term on a device, in a floating-point type."""
        return KroneckerTerm(self.left.to(device, dtype), self.right.to(device, dtype), self.damping)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the term is made of."""
        return self.left.tensors + self.right.tensors

    def state(self) -> dict[str, Any]:
        """Return tensors and numbers."""
        return {"left": self.left.state(), "right": self.right.state(), "damping": self.damping}

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> KroneckerTerm:
        """Rebuild a term.

        Raises:
            ValueError: if the tensors make up none.
        """
        left, right = Factor.from_state(state["left"]), Factor.from_state(state["right"])
        if left.matrix.shape[0] != right.matrix.shape[0]:
            raise ValueError(f"factors of {left.matrix.shape[0]} and {right.matrix.shape[0]} blocks")
        return KroneckerTerm(left, right, float(state["damping"]))


def quadratic(terms: Sequence[KroneckerTerm], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the value and the gradient of a quadratic form, from one pass of products.

    Args:
        terms: the form.
        x: where, [blocks, out, d] (or [out, d] with squeezed terms).

    Returns:
        `<X, P> / 2`, a scalar, and P, the sum of B X A + damping X over the terms, shaped like X.
    """
    gradient = terms[0].product(x)
    for term in terms[1:]:
        gradient = gradient + term.product(x)
    return 0.5 * torch.dot(x.flatten(), gradient.flatten()), gradient
