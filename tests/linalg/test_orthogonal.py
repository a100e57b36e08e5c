"""A growing orthonormal basis of long vectors, against a dense Gram-Schmidt in numpy and numpy's own rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from avalanche_gradproj.errors import ConfigurationError
from avalanche_gradproj.linalg import orthogonal
from avalanche_gradproj.linalg import orthogonal as module
from avalanche_gradproj.linalg.orthogonal import OrthonormalRows
from avalanche_gradproj.testing import no_host_round_trips


@pytest.fixture(autouse=True)
def _single():
    """float32 unless a test says otherwise."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def gram_schmidt(vectors):
    """Modified Gram-Schmidt, one entry of the basis after the other, in numpy's float64."""
    basis = []
    for vector in np.asarray(vectors, dtype=np.float64):
        rest = vector.copy()
        for _ in range(3):
            for other in basis:
                rest = rest - np.dot(other, rest) * other
        if np.linalg.norm(rest) > 1e-9 * np.linalg.norm(vector):
            basis.append(rest / np.linalg.norm(rest))
    return np.array(basis)


def distance(basis):
    rows = basis.rows.double().numpy()
    return np.linalg.norm(rows @ rows.T - np.eye(len(rows)), 2)


def test_rows_are_those_of_gram_schmidt_whatever_the_batches():
    vectors = torch.randn(23, 40, dtype=torch.float64)
    expected = gram_schmidt(vectors)
    for sizes in ([23], [1] * 23, [5, 0, 18]):
        basis = OrthonormalRows(40, dtype=torch.float64)
        assert sum(basis.add(batch) for batch in vectors.split(sizes)) == 23
        np.testing.assert_allclose(basis.rows.numpy(), expected, atol=1e-12)


def test_many_blocks_and_panels_change_nothing(monkeypatch):
    vectors = torch.randn(30, 50, dtype=torch.float64)
    monkeypatch.setattr(orthogonal, "WIDE_NUMBERS", 110)  # two vectors a block, panels of a few columns
    basis = OrthonormalRows(50, dtype=torch.float64)
    basis.add(vectors)
    np.testing.assert_allclose(basis.rows.numpy(), gram_schmidt(vectors), atol=1e-12)


def test_orthonormal_in_float32_after_hundreds_of_nearly_dependent_vectors():
    """Vectors with a large common part and slowly decaying rest: single Gram-Schmidt in float32 is far off."""
    basis, naive = OrthonormalRows(3000), []
    common = torch.randn(20, 3000)
    for batch in range(40):
        vectors = 30 * torch.randn(15, 20) @ common + 0.05 * torch.randn(15, 3000)
        assert basis.add(vectors) == 15
        if batch < 4:
            for vector in vectors:
                rest = vector.clone()
                if naive:
                    rest -= torch.stack(naive).T @ (torch.stack(naive) @ vector)
                naive.append(rest / rest.norm())
    assert basis.count == 600
    assert distance(basis) < 1e-5
    once = torch.stack(naive).double()
    assert (once @ once.T - torch.eye(60, dtype=torch.float64)).norm() > 1e-3  # what one pass would give


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dependent_vectors_are_dropped(dtype):
    first = torch.randn(6, 30, dtype=dtype)
    combinations = torch.randn(5, 6, dtype=dtype) @ first
    fresh = torch.randn(2, 30, dtype=dtype)
    basis = OrthonormalRows(30, dtype=dtype)
    assert basis.add(torch.cat([first, combinations, torch.zeros(1, 30, dtype=dtype)])) == 6
    assert basis.add(torch.cat([combinations, fresh, 2 * fresh, 1e-20 * first])) == 2
    assert basis.count == np.linalg.matrix_rank(torch.cat([first, fresh]).numpy()) == 8
    assert distance(basis) < (1e-6 if dtype == torch.float32 else 1e-13)


def test_scale_does_not_decide_what_is_dependent():
    tiny = 1e-15 * torch.randn(4, 30, dtype=torch.float64)
    basis = OrthonormalRows(30)
    assert basis.add(tiny.float()) == 4
    assert basis.add(1e12 * torch.randn(4, 30)) == 4


def test_never_more_than_the_space_has():
    basis = OrthonormalRows(12, dtype=torch.float64)
    assert basis.add(torch.randn(40, 12, dtype=torch.float64)) == 12
    assert float(basis.remove(torch.randn(12, dtype=torch.float64)).norm()) < 1e-13


@pytest.mark.parametrize("panel_bytes", [1, 2 * 20 * 8, 2**20])
def test_remove_and_coordinates_against_a_dense_projector(monkeypatch, panel_bytes):
    """However many of the five rows make a panel: one, two or all."""
    monkeypatch.setattr(module, "PANEL_BYTES", panel_bytes)
    vectors = torch.randn(5, 20, dtype=torch.float64)
    basis = OrthonormalRows(20, dtype=torch.float64)
    basis.add(vectors)
    projector = np.eye(20) - np.linalg.pinv(vectors.numpy()) @ vectors.numpy()
    x = torch.randn(3, 20, dtype=torch.float64)
    with no_host_round_trips():
        one, several = basis.remove(x[0]), basis.remove(x)
    np.testing.assert_allclose(one.numpy(), projector @ x[0].numpy(), atol=1e-13)
    np.testing.assert_allclose(several.numpy(), x.numpy() @ projector, atol=1e-13)
    assert float(basis.coordinates(x).norm()) == pytest.approx(np.linalg.norm(x.numpy() - x.numpy() @ projector))
    assert torch.allclose(basis.coordinates(x[0]), basis.coordinates(x)[0])


def test_old_rows_stay_bit_for_bit_and_reserved_room_is_used():
    basis = OrthonormalRows(20)
    basis.reserve(8)
    basis.add(torch.randn(4, 20))
    held, place = basis.rows.clone(), basis.rows.data_ptr()
    basis.add(torch.randn(4, 20))
    assert basis.rows.data_ptr() == place
    assert basis.bytes_held == 8 * 20 * 4 + 8 * 8 * 8  # the triangle in float64
    basis.add(torch.randn(3, 20))
    assert torch.equal(basis.rows[:4], held)
    assert basis.rows.is_contiguous()
    assert (basis.count, basis.bytes_held) == (11, 11 * 20 * 4 + 11 * 11 * 8)
    basis.truncate(4)
    assert torch.equal(basis.rows, held)


def test_embedded_puts_entries_where_they_are_asked():
    basis = OrthonormalRows(3)
    basis.add(torch.eye(3)[:2])
    wider = basis.embedded(torch.tensor([4, 0, 2]), 5)
    assert wider.rows.tolist() == [[0, 0, 0, 0, 1], [1, 0, 0, 0, 0]]
    assert (wider.length, wider.count) == (5, 2)


def test_vectors_of_another_length_are_refused():
    with pytest.raises(ConfigurationError, match=r"\(2, 4\) came, expected \[k, 5\]"):
        OrthonormalRows(5).add(torch.ones(2, 4))


def unit(vectors):
    wide = vectors.double().numpy()
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("wide", [110, 2**22])
def test_the_triangle_gives_back_the_vectors_that_came(monkeypatch, dtype, wide):
    """Against numpy's QR decomposition of the kept vectors, whatever the blocks, with dependent ones among them."""
    monkeypatch.setattr(orthogonal, "WIDE_NUMBERS", wide)
    first, second = 5 * torch.randn(9, 50, dtype=dtype) + 3, torch.randn(12, 50, dtype=dtype)
    basis = OrthonormalRows(50, dtype=dtype)
    assert basis.triangle.shape == (0, 0)
    assert basis.add(torch.cat([first[:5], 2 * first[1:3] - first[:2], first[5:]])) == 9
    assert basis.add(torch.cat([first[:2] + first[3:5], second, torch.zeros(1, 50, dtype=dtype)])) == 12
    vectors, triangle = unit(torch.cat([first, second])), basis.triangle
    assert triangle.dtype == torch.float64
    assert torch.equal(triangle, triangle.tril())
    tolerance = 3e-7 if dtype == torch.float32 else 1e-14
    np.testing.assert_allclose(triangle.numpy() @ basis.rows.double().numpy(), vectors, atol=tolerance)
    upper = np.linalg.qr(vectors.T)[1]
    expected = (upper * np.sign(np.diag(upper))[:, None]).T
    np.testing.assert_allclose(triangle.numpy(), expected, atol=100 * tolerance)


def test_the_triangle_follows_the_vectors():
    vectors = torch.randn(8, 20, dtype=torch.float64)
    basis = OrthonormalRows(20, dtype=torch.float64)
    basis.add(vectors)
    whole = basis.triangle.clone()
    assert torch.equal(basis.to(dtype=torch.float32, device=torch.device("cpu")).triangle, whole)
    assert torch.equal(basis.embedded(torch.arange(3, 23), 30).triangle, whole)
    again = OrthonormalRows.of(basis.rows.clone(), whole.clone())
    basis.truncate(5)
    assert torch.equal(basis.triangle, whole[:5, :5])
    basis.add(vectors[5:])
    np.testing.assert_allclose(basis.triangle.numpy(), whole.numpy(), atol=1e-14)
    more = torch.randn(2, 20, dtype=torch.float64)
    again.add(more)
    np.testing.assert_allclose((again.triangle @ again.rows)[8:].numpy(), unit(more), atol=1e-14)


def test_vectors_of_unknown_making_have_no_triangle_and_get_none():
    basis = OrthonormalRows.of(torch.eye(4)[:2])
    assert basis.triangle is None
    assert basis.bytes_held == 2 * 4 * 4
    basis.add(torch.randn(1, 4))
    basis.truncate(2)
    assert basis.triangle is None
    assert OrthonormalRows.of(torch.empty(0, 4)).triangle is not None  # nothing is unknown of no vectors


def test_objects_pickled_before_there_was_a_triangle_have_none():
    basis = OrthonormalRows(4)
    basis.add(torch.randn(2, 4))
    state = {key: value for key, value in basis.__dict__.items() if key != "_triangle"}
    old = OrthonormalRows.__new__(OrthonormalRows)
    old.__dict__.update(state)
    assert old.triangle is None
    assert old.add(torch.randn(1, 4)) == 1
