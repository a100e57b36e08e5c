"""Every route of Projector against X - (X M) M^T, one row and one column at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avalanche_gradproj.linalg.projection import ROUTES, Projector
from avalanche_gradproj.linalg.subspace import Basis, complement

SETTINGS = settings(deadline=None, max_examples=25)


def random_basis(features, ranks, seed=0, dtype=torch.float64):
    """Orthonormal columns of a given rank in each block, padded with zeros."""
    generator = np.random.default_rng(seed)
    columns = np.zeros((len(ranks), features, max(ranks)))
    for block, rank in enumerate(ranks):
        columns[block, :, :rank] = np.linalg.qr(generator.normal(size=(features, features)))[0][:, :rank]
    return Basis(torch.from_numpy(columns).to(dtype), tuple(ranks))


def removed(x, basis):
    """x [blocks, n, d] minus its components along each column, by loops."""
    result = x.double().numpy().copy()
    for block, columns in enumerate(basis.per_block()):
        for row in range(x.shape[1]):
            old = x[block, row].double().numpy()
            for column in columns.double().numpy().T:
                result[block, row] -= (old @ column) * column
    return result


@SETTINGS
@given(data=st.data(), route=st.sampled_from([*ROUTES, "auto"]), blocks=st.integers(1, 3), d=st.integers(1, 7))
def test_all_routes_equal_the_formula(data, route, blocks, d):
    ranks = data.draw(st.lists(st.integers(0, d), min_size=blocks, max_size=blocks))
    n = data.draw(st.integers(1, 5))
    basis = random_basis(d, ranks, seed=data.draw(st.integers(0, 1000)))
    x = torch.randn(blocks, n, d)
    before = x.clone()
    projector = Projector(basis, route=route)
    got = projector.remove(x)
    assert got.shape == x.shape
    assert got.dtype == x.dtype
    np.testing.assert_allclose(got.numpy(), removed(x, basis), atol=1e-13)
    assert torch.equal(x, before)
    if blocks == 1:
        flat = projector.remove(x[0])
        assert flat.shape == x[0].shape
        np.testing.assert_allclose(flat.numpy(), removed(x, basis)[0], atol=1e-13)


@pytest.mark.parametrize("route", [*ROUTES, "auto"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_a_full_basis_leaves_nothing(route, blocks):
    projector = Projector(random_basis(6, [6] * blocks), route=route)
    assert projector.basis.full
    assert projector.remove(torch.randn(blocks, 4, 6)).abs().max() < 1e-14


def test_full_means_every_block():
    assert not Projector(random_basis(4, [4, 3])).basis.full
    assert not Projector(random_basis(4, [3])).basis.full
    assert not Projector(random_basis(4, [0])).basis.full


@pytest.mark.parametrize("route", [*ROUTES, "auto"])
def test_an_empty_basis_changes_nothing(route):
    x = torch.randn(1, 4, 6)
    torch.testing.assert_close(Projector(random_basis(6, [0]), route=route).remove(x), x, rtol=0, atol=1e-15)


@pytest.mark.parametrize("ranks", [[3], [1, 4]])
def test_inside_has_the_norm_of_what_is_removed(ranks):
    basis = random_basis(5, ranks)
    x = torch.randn(len(ranks), 3, 5)
    inside = Projector(basis).inside(x).numpy()
    gone = x.numpy() - removed(x, basis)
    np.testing.assert_allclose((inside**2).sum(), (gone**2).sum(), rtol=1e-12)
    expected = x[0].numpy() @ basis.per_block()[0].numpy()
    np.testing.assert_allclose(inside.reshape(len(ranks), 3, -1)[0, :, : ranks[0]], expected, atol=1e-14)


@pytest.mark.parametrize("route", ROUTES)
def test_float32(route):
    basis = random_basis(40, [15], dtype=torch.float32)
    x = torch.randn(1, 8, 40, dtype=torch.float32)
    got = Projector(basis, route=route).remove(x)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.double().numpy(), removed(x, basis), atol=3e-6)


@pytest.mark.parametrize("route", ROUTES)
def test_products_take_the_asked_type_and_results_the_type_of_x(route):
    basis = random_basis(12, [5], dtype=torch.float32)
    projector = Projector(basis, route=route, dtype=torch.float64)
    assert projector.inside(torch.randn(1, 3, 12)).dtype == torch.float64
    got = projector.remove(torch.randn(1, 3, 12, dtype=torch.bfloat16))
    assert got.dtype == torch.bfloat16


@pytest.mark.parametrize("route", ROUTES)
def test_a_matrix_that_is_not_contiguous(route):
    basis = random_basis(6, [2])
    x = torch.randn(6, 4).T
    got = Projector(basis, route=route).remove(x)
    np.testing.assert_allclose(got.numpy(), removed(x[None], basis)[0], atol=1e-14)


@pytest.mark.parametrize(
    ("n", "d", "ranks", "expected"),
    [
        (10, 20, [5], "dense"),
        (10, 20, [18], "dense"),
        (10, 50, [1], "dense"),
        (1000, 2000, [50], "factored"),
        (1000, 2000, [900], "factored"),
        (1000, 2000, [1100], "complement"),
        (1000, 2000, [1990], "complement"),
        (1000, 2000, [2000], "complement"),
        (100, 1000, [990, 990], "dense"),  # no complement for several blocks
        (100, 1000, [10, 10], "factored"),
    ],
)
def test_the_cheapest_route_is_taken(n, d, ranks, expected):
    # Zero columns are enough: the choice depends on sizes alone.
    basis = Basis(torch.zeros(len(ranks), d, max(ranks)), tuple(ranks))
    cost, route = Projector(basis).cost(n)
    assert route == expected
    r = max(ranks)
    products = {"dense": 2 * d * d, "factored": 4 * d * r, "complement": 4 * d * (d - r)}[expected]
    starts = {"dense": 1, "factored": 2, "complement": 2}[expected]
    assert 0 < starts * 1e4 < cost - len(ranks) * n * products < starts * 1e6


def test_a_forced_route_is_kept():
    basis = Basis(torch.zeros(1, 500, 490), (490,))
    assert [Projector(basis, route=route).cost(100)[1] for route in ROUTES] == list(ROUTES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [0, 1, 4, 7])
def test_complement_completes_the_basis(rank, dtype):
    basis = random_basis(7, [rank], dtype=dtype)
    free = complement(basis)
    assert free.shape == (7, 7 - rank)
    assert free.dtype == dtype
    both = torch.cat([basis.columns[0], free], dim=1).double()
    assert (both.T @ both - torch.eye(7)).norm() < 20 * torch.finfo(dtype).eps
