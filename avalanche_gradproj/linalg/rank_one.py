"""Removing the span of vectors that are outer products in pieces: matrix products in place of passes over V.

A vector g_i [p] that is the gradient of one sample's logit has, in the weight of a linear layer that ran once, the
piece d_i a_i^T: the layer's output gradient and its input. With G [r, p] such vectors, V = T G their orthonormal rows,

    V^T V x = G^T T^T T G x,    G x = sum over weights of ((X A^T) * D^T)^T 1,    the piece of G^T c = (D^T * c) A,

where X [out, in] is the weight's piece of x, A [r, in], D [r, out] and c [r]. These are 4 r p operations as before, but
on r (in + out) numbers in place of r p: the speed of arithmetic bounds them, not that of memory. All other pieces
(biases, convolutions, a weight used more than once for a sample) stay what they are in V: their part of V x is added
to T (G x).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from avalanche_gradproj.errors import choice
from avalanche_gradproj.linalg.factor import FixedFactor
from avalanche_gradproj.linalg.orthogonal import WIDE_NUMBERS, OrthonormalRows

#: How a vector's part in the span is removed: chosen by cost and measured leak, by V itself, by outer products.
PROJECTIONS = ("auto", "dense", "factored")

#: Random directions through which a piece is seen, on either side.
SKETCHES = 8
#: A piece is an outer product where at most so many roundings of V's type are left of it (a vector's length is 1).
RANK_ONE_ROUNDINGS = 32
#: What outer products may leave of a vector in the span, in roundings of V's type of the vector's length: V itself
#: leaves up to 60 of them, and the leak over an experience is about a tenth of this.
LEAK_ROUNDINGS = 64
#: Random sums of vectors on which that is measured, and steps towards what T enlarges most.
PROBES, POWER_STEPS = 4, 20

#: Cost of a projection through outer products, in the time that the one through V takes for one of its numbers (0.2 ns
#: on one core, bound by memory): of a number of a piece of outer products in float32 and float64, of one in another
#: piece, which is read twice, of one of T.
OUTER_COST = {torch.float32: 0.25, torch.float64: 0.5}
OTHER_COST, TRIANGLE_COST = 2.0, 4.0
#: And of starting the operations of one piece of outer products, on the CPU and elsewhere: the first measured, the
#: second an estimate from the bandwidth of a GPU and the time that it takes to start a kernel.
PIECE_COST, PIECE_COST_DEVICE = 3e5, 2e7

#: Begin and end of a piece in a vector.
Place = tuple[int, int]


class Projection(Protocol):
    """What removes a span from a vector."""

    def remove(self, x: Tensor) -> Tensor:
        """Return x [length] without its part in the span, a new tensor."""
        ...


@dataclass(frozen=True)
class Choice:
    """What removes a span, and why.

    Attributes:
        projection: what removes it.
        note: which it is and why, for people.
    """

    projection: Projection
    note: str


class OuterProducts:
    """The pieces d_i a_i^T [out, in] of r vectors, in a type of choice.

    Memory: r (in + out) numbers, and twice the longer side's again where it is laid out for `FixedFactor`.

    Args:
        place: where the piece lies in a vector.
        d: D [r, out].
        a: A [r, in].
    """

    def __init__(self, place: slice, d: Tensor, a: Tensor) -> None:
        self.place = place
        self._shape = (d.shape[1], a.shape[1])
        #: The products run over the longer side, so that what lies between them is small.
        self._turned = d.shape[1] > a.shape[1]
        long, short = (d, a) if self._turned else (a, d)
        self._short = short.T.contiguous()
        self._forward, self._backward = FixedFactor(long.T), FixedFactor(long)

    def inner(self, x: Tensor) -> Tensor:
        """Return <d_i a_i^T, X> [r] for a vector x [length]."""
        return (self._forward(self._matrix(x)) * self._short).sum(0)

    def subtract(self, x: Tensor, c: Tensor) -> None:
        """Take sum c_i d_i a_i^T, c [r], from the piece of x [length] in place."""
        self._matrix(x).sub_(self._backward(self._short * c))

    def _matrix(self, x: Tensor) -> Tensor:
        matrix = x[self.place].view(self._shape)
        return matrix.T if self._turned else matrix


class FactoredRows:
    """x -> x - V^T V x through the outer products that V was made of.

    Products run in V's type, the sums over vectors (T, and what it is applied to) in float64.

    Memory: 8 r^2 bytes for T and what `OuterProducts` hold, beside V, whose other pieces are used in place.

    Args:
        rows: V [r, p]; must not change while this is used.
        triangle: B [r, r] in float64, with G = B V.
        found: D [r, out] and A [r, in] of each piece of outer products, by begin and end of its place in a vector.
    """

    def __init__(self, rows: Tensor, triangle: Tensor, found: Mapping[Place, tuple[Tensor, Tensor]]) -> None:
        self._dtype = rows.dtype
        #: T = B^-1.
        self._inverse = torch.linalg.solve_triangular(
            triangle, torch.eye(len(triangle), dtype=triangle.dtype, device=triangle.device), upper=False
        )
        self._outer = [OuterProducts(slice(*at), d.to(rows.dtype), a.to(rows.dtype)) for at, (d, a) in found.items()]
        self._others = [(slice(*at), rows[:, slice(*at)]) for at in _between(list(found), rows.shape[1])]

    def remove(self, x: Tensor) -> Tensor:
        """Return x - V^T (V x), in V's type, for x [p]; a new tensor."""
        rest = x.to(self._dtype, copy=True)
        inner = torch.stack([piece.inner(rest) for piece in self._outer]).to(self._inverse.dtype).sum(0)
        inside = self._inverse @ inner
        for place, rows in self._others:
            inside += rows @ rest[place]
        weights, inside = (self._inverse.T @ inside).to(self._dtype), inside.to(self._dtype)
        for piece in self._outer:
            piece.subtract(rest, weights)
        for place, rows in self._others:
            rest[place].addmv_(rows.T, inside, alpha=-1)
        return rest

    def leak(self, rows: Tensor, triangle: Tensor) -> float:
        """Return the largest ||V x'|| / ||x||, x' what is left of x, over vectors in and near the span.

        These are sums of the vectors that came, with equal and with random weights, such as gradients are, with and
        without as much outside the span, and what T enlarges most. They are always the same.
        """
        generator = torch.Generator().manual_seed(0)
        random = torch.randn(PROBES, len(triangle), generator=generator, dtype=triangle.dtype).to(triangle.device)
        sums = torch.cat([torch.ones_like(random[:1]), random]) @ triangle
        enlarged = random[0]
        for _ in range(POWER_STEPS):
            enlarged = self._inverse @ (self._inverse.T @ enlarged)
            enlarged = enlarged / enlarged.norm()
        inside = torch.cat([sums / sums.norm(dim=1, keepdim=True), enlarged[None]]).to(rows.dtype) @ rows
        outside = torch.randn(inside.shape, generator=generator, dtype=rows.dtype).to(rows.device)
        probes = torch.cat([inside, inside + outside / rows.shape[1] ** 0.5])
        left = torch.stack([self.remove(probe) for probe in probes]) @ rows.T
        return float((left.norm(dim=1) / probes.norm(dim=1)).max())


@torch.no_grad()
def choose(basis: OrthonormalRows, shapes: Sequence[tuple[int, ...]], projection: str = "auto") -> Choice:
    """Choose what removes the span of a basis, once for as long as the basis stays.

    Outer products are taken where they cost less (by their sizes alone, so that a restart chooses the same) and leave
    no more in the span than `LEAK_ROUNDINGS`. What they leave grows with the condition of the vectors that came,
    `||T||`, and is measured on vectors in the span, those that T enlarges most among them.

    Args:
        basis: V [r, p].
        shapes: of the pieces that make up a vector, in order.
        projection: `"dense"`, or `"factored"` to ask for neither cost nor leak, for tests; V itself is taken all the
            same where no piece consists of outer products.

    Raises:
        ConfigurationError: for an unknown projection.
    """
    choice("projection", projection, PROJECTIONS)
    forced, triangle, rows = projection == "factored", basis.triangle, basis.rows
    if projection == "dense":
        return Choice(basis, "dense (asked for)")
    if triangle is None or triangle.dtype != torch.float64 or not basis.count:
        return Choice(basis, "dense (the vectors that came are not known, or float64 is not)")
    places = {at: shape for at, shape in _places(shapes).items() if forced or _worthwhile(at, rows)}
    if not forced and not _cheaper(list(places), rows):
        return Choice(basis, "dense (cheaper here)")
    found, tolerance = {}, RANK_ONE_ROUNDINGS * torch.finfo(rows.dtype).eps
    for at, shape in places.items():
        d, a, rest = outer_factors(triangle, rows[:, slice(*at)].view(-1, *shape))
        if float(rest.max()) <= tolerance:
            found[at] = d, a
    if not found or not (forced or _cheaper(list(found), rows)):
        return Choice(basis, "dense (too few numbers are outer products)")
    factored = FactoredRows(rows, triangle, found)
    share = 100 * sum(end - begin for begin, end in found) / basis.length
    left = factored.leak(rows, triangle) / torch.finfo(rows.dtype).eps
    if forced or left <= LEAK_ROUNDINGS:
        return Choice(factored, f"factored ({share:.1f} % of a vector are outer products; {left:.1f} roundings leak)")
    return Choice(basis, f"dense (outer products would leak {left:.1f} roundings)")


def outer_factors(triangle: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Write one piece of the vectors B V as outer products, without forming it.

    It is seen through random directions from either side, M_i R [out, s] and L^T M_i [s, in] for s directions, which
    takes one pass over V and 2 r^2 s (out + in) operations: of rank one, M_i R has columns along d_i, which with
    L^T M_i gives a_i; of a higher rank, M_i R is of a higher rank too, whatever M_i is, but for a set of directions
    of probability zero. The directions are always the same.

    Args:
        triangle: B [r, r] in float64.
        rows: the piece of V [r, out, in].

    Memory: about 200 r (out + in) bytes while it runs.

    Returns:
        D [r, out] with rows of length 1 (or 0), A [r, in], and [r] an estimate of the Frobenius norm of
        M_i - d_i a_i^T; all in float64.
    """
    _, outputs, inputs = rows.shape
    generator = torch.Generator().manual_seed(0)
    right = torch.randn(inputs, min(SKETCHES, inputs), generator=generator, dtype=torch.float64).to(rows.device)
    left = torch.randn(outputs, min(SKETCHES, outputs), generator=generator, dtype=torch.float64).to(rows.device)
    from_right, from_left = [], []
    for panel in rows.split(max(1, WIDE_NUMBERS // (outputs * inputs))):
        matrices = panel.to(torch.float64)
        from_right.append(matrices @ right)
        from_left.append(left.T @ matrices)
    seen_right = (triangle @ torch.cat(from_right).flatten(1)).view(-1, outputs, right.shape[1])
    seen_left = (triangle @ torch.cat(from_left).flatten(1)).view(-1, left.shape[1], inputs)
    # The row of largest norm is a multiple of R^T a: it weighs the directions by what they say.
    largest = seen_right.norm(dim=2).argmax(dim=1)
    weights = seen_right[torch.arange(len(largest), device=rows.device), largest]
    d = torch.einsum("ros,rs->ro", seen_right, weights)
    d = d / _or_one(d.norm(dim=1, keepdim=True))
    seen_d = d @ left
    a = torch.einsum("rsi,rs->ri", seen_left, seen_d) / _or_one(seen_d.square().sum(1, keepdim=True))
    rest = seen_right - d[:, :, None] * (a @ right)[:, None, :]
    return d, a, rest.flatten(1).norm(dim=1) / right.shape[1] ** 0.5


def _or_one(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.ones_like(x))


def _places(shapes: Sequence[tuple[int, ...]]) -> dict[Place, tuple[int, ...]]:
    """Return the places of the pieces that may be outer products, and their shapes."""
    found: dict[Place, tuple[int, ...]] = {}
    begin = 0
    for shape in shapes:
        end = begin + torch.Size(shape).numel()
        if len(shape) == 2 and min(shape) > 1:
            found[begin, end] = shape
        begin = end
    return found


def _worthwhile(at: Place, rows: Tensor) -> bool:
    """Return whether a piece costs less as outer products than as a part of V beside others that are."""
    return len(rows) * (at[1] - at[0]) * (OTHER_COST - OUTER_COST[rows.dtype]) > _starting(rows)


def _cheaper(places: Sequence[Place], rows: Tensor) -> bool:
    """Return whether a projection costs less with outer products at some places than with V alone."""
    count, length = rows.shape
    outer = sum(end - begin for begin, end in places)
    one = OUTER_COST[rows.dtype] * outer + OTHER_COST * (length - outer)
    return count * one + TRIANGLE_COST * count**2 + _starting(rows) * len(places) < count * length


def _starting(rows: Tensor) -> float:
    return PIECE_COST if rows.device.type == "cpu" else PIECE_COST_DEVICE


def _between(places: Sequence[Place], length: int) -> list[Place]:
    """Return what disjoint places, in order, leave of a vector."""
    ends, begins = [0, *(end for _, end in places)], [*(begin for begin, _ in places), length]
    return [(end, begin) for end, begin in zip(ends, begins, strict=True) if begin > end]
