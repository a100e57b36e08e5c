"""Projections through outer products, against a dense projector in numpy's float64 made from the vectors themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from avalanche_gradproj.errors import ConfigurationError
from avalanche_gradproj.linalg import rank_one
from avalanche_gradproj.linalg.orthogonal import OrthonormalRows
from avalanche_gradproj.linalg.rank_one import FactoredRows, choose, outer_factors
from avalanche_gradproj.testing import no_host_round_trips

#: Two weights (one wider, one taller), between them a bias and a convolution; the last weight was used twice.
SHAPES = [(6, 30), (6,), (4, 2, 3, 3), (25, 3), (25,), (5, 7)]
OUTER = 6 * 30 + 25 * 3


def outer(shape, count, terms=1):
    return sum(torch.randn(count, shape[0], 1) * torch.randn(count, 1, shape[1]) for _ in range(terms)).flatten(1)


def vectors(count, *, common=0.0):
    """Vectors [count, p] in float64 with pieces as in SHAPES; of some, a piece is zero."""
    pieces = []
    for number, shape in enumerate(SHAPES):
        if len(shape) == 2:
            d, a = torch.randn(count, shape[0], 1) + common, torch.randn(count, 1, shape[1]) + common
            piece = (d * a).flatten(1) if number < 5 else outer(shape, count, 2)
        else:
            piece = torch.randn(count, *shape).flatten(1)
        piece[number] = 0
        pieces.append(piece)
    return torch.cat(pieces, dim=1)


def basis_of(rows, dtype=torch.float64):
    basis = OrthonormalRows(rows.shape[1], dtype=dtype)
    basis.add(rows)
    return basis


def dense(rows, x):
    """Return x without its part in the row space, from numpy's SVD."""
    right = np.linalg.svd(rows.double().numpy(), full_matrices=False)[2]
    wide = x.double().numpy()
    return wide - right.T @ (right @ wide)


def test_factors_give_back_pieces_of_rank_one_and_tell_others():
    """Rank one, zero, nearly rank one, rank two: the rest against numpy's singular values."""
    count = 12
    matrices = outer((9, 20), count).view(count, 9, 20)
    matrices[3] = 0
    matrices[5] += 1e-3 * outer((9, 20), 1).view(9, 20)
    matrices[7] += outer((9, 20), 1).view(9, 20)
    triangle = torch.randn(count, count).tril() + 4 * torch.eye(count)
    rows = torch.linalg.solve_triangular(triangle, matrices.flatten(1), upper=False).view(count, 9, 20)
    d, a, rest = outer_factors(triangle, rows)
    second = np.linalg.svd(matrices.numpy(), compute_uv=False)[:, 1:]
    second = np.linalg.norm(second, axis=1)
    good = [i for i in range(count) if i not in (5, 7)]
    np.testing.assert_allclose((d[:, :, None] * a[:, None, :])[good].numpy(), matrices[good].numpy(), atol=1e-11)
    assert float(rest[good].max()) < 1e-12
    assert 0.2 * second[5] < float(rest[5]) < 20 * second[5]
    assert 0.2 * second[7] < float(rest[7]) < 20 * second[7]


@pytest.mark.parametrize("shape", [(2, 40), (40, 2), (3, 3)])
def test_factors_of_small_matrices_of_rank_two_are_told(shape):
    rows = outer(shape, 30, 2).view(30, *shape)
    assert float(outer_factors(torch.eye(30), rows)[2].min()) > 1e-3


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.float64, 1e-13)])
def test_the_projection_is_that_of_the_vectors(dtype, tolerance):
    rows = vectors(20, common=0.5)
    basis = basis_of(rows.to(dtype), dtype)
    chosen = choose(basis, SHAPES, "factored")
    assert isinstance(chosen.projection, FactoredRows)
    assert chosen.note.startswith(f"factored ({100 * OUTER / rows.shape[1]:.1f} % of a vector")
    for direction in (torch.randn(rows.shape[1]), torch.randn(20) @ rows, rows[4] + 0.1 * torch.randn(rows.shape[1])):
        x = (direction / direction.norm()).to(dtype)
        before = x.clone()
        with no_host_round_trips():
            rest = chosen.projection.remove(x)
        assert rest.dtype == dtype
        assert torch.equal(x, before)
        np.testing.assert_allclose(rest.double().numpy(), dense(rows.to(dtype), x), atol=tolerance)


def test_dropped_vectors_have_no_part():
    rows = vectors(10)
    basis = basis_of(torch.cat([rows[:5], rows[2:3] - rows[:1], 3 * rows[4:5], rows[5:]]))
    assert basis.count == 10
    chosen, x = choose(basis, SHAPES, "factored"), torch.randn(rows.shape[1])
    assert isinstance(chosen.projection, FactoredRows)
    np.testing.assert_allclose(chosen.projection.remove(x).numpy(), dense(rows, x), atol=1e-12)


def test_choosing_is_repeatable_and_leaves_the_random_state():
    basis, state, x = basis_of(vectors(10)), torch.get_rng_state(), torch.ones(sum(map(np.prod, SHAPES)))
    first, second = choose(basis, SHAPES, "factored"), choose(basis, SHAPES, "factored")
    assert torch.equal(torch.get_rng_state(), state)
    assert first.note == second.note
    assert torch.equal(first.projection.remove(x), second.projection.remove(x))


def large_family(nearness, count=40, dtype=torch.float32):
    """Pairs of vectors of outer products, near to each other, large enough for outer products to pay."""
    d, a = torch.randn(count, 50), torch.randn(count, 1200)
    d[1::2] = d[::2] + nearness * d[1::2]
    a[1::2] = a[::2]
    return basis_of((d[:, :, None] * a[:, None]).flatten(1).to(dtype), dtype), [(50, 1200)]


@pytest.mark.parametrize("nearness", [1.0, 3e-2, 1e-3])
def test_what_is_said_to_leak_does(nearness):
    """Within a factor, on vectors in the span that had no part in the measurement."""
    basis, shapes = large_family(nearness)
    forced = choose(basis, shapes, "factored")
    assert isinstance(forced.projection, FactoredRows)
    said = float(forced.note.split("; ")[1].split(" ")[0]) * torch.finfo(torch.float32).eps
    rows, found = basis.rows.double(), []
    for _ in range(40):
        x = (torch.randn(basis.count) @ rows).float()
        left = rows.numpy() @ forced.projection.remove(x).double().numpy()
        found.append(np.linalg.norm(left) / float(x.norm()))
    assert said / 50 < max(found) < 3 * said
    assert (said > rank_one.LEAK_ROUNDINGS * torch.finfo(torch.float32).eps) == (nearness == 1e-3)


def test_what_would_leak_is_not_taken():
    chosen = choose(*large_family(1.0))
    assert isinstance(chosen.projection, FactoredRows)
    basis, shapes = large_family(2e-4)
    chosen = choose(basis, shapes)
    assert chosen.projection is basis
    assert "dense (outer products would leak" in chosen.note


def test_what_costs_more_is_not_taken(monkeypatch):
    basis, shapes = large_family(1.0)
    assert isinstance(choose(basis, shapes).projection, FactoredRows)
    # A convolution of the same size; few vectors; another device, where starting an operation costs more.
    assert "cheaper here" in choose(basis, [(50, 12, 10, 10)]).note
    few = OrthonormalRows.of(basis.rows[:3].clone(), basis.triangle[:3, :3])
    assert "cheaper here" in choose(few, shapes).note
    monkeypatch.setattr(rank_one, "PIECE_COST", rank_one.PIECE_COST_DEVICE)
    assert choose(basis, shapes).projection is basis


def test_pieces_of_higher_rank_stay_dense_however_large():
    d, a = torch.randn(2, 40, 50, 1), torch.randn(2, 40, 1, 1200)
    rows = (d * a).sum(0).flatten(1).float()
    basis = basis_of(rows, torch.float32)
    for projection in ("auto", "factored"):
        chosen = choose(basis, [(50, 1200)], projection)
        assert chosen.projection is basis
        assert "too few numbers are outer products" in chosen.note


def test_dense_where_asked_for_or_where_the_vectors_are_not_known():
    basis, shapes = large_family(1.0)
    assert choose(basis, shapes, "dense").projection is basis
    unknown = OrthonormalRows.of(basis.rows)
    chosen = choose(unknown, shapes, "factored")
    assert chosen.projection is unknown
    assert "not known" in chosen.note
    with pytest.raises(ConfigurationError, match="projection='sparse'"):
        choose(basis, shapes, "sparse")
