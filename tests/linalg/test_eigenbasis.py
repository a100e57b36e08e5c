"""Coordinates in which a Kronecker product is diagonal, against the dense matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avalanche_gradproj.linalg.eigenbasis import Eigenbasis
from avalanche_gradproj.linalg.kronecker import Factor
from tests.linalg.test_kronecker import dense, matrices


@given(blocks=st.integers(1, 3), out=st.integers(1, 5), d=st.integers(1, 6), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_dense_product_is_diagonal_there(blocks, out, d, seed):
    draw = np.random.default_rng(seed)
    left, right = Factor(matrices(draw, blocks, out)), Factor(matrices(draw, blocks, d))
    basis, x = Eigenbasis.of(left, right), torch.from_numpy(draw.normal(size=(blocks, out, d)))
    z = basis.into(x)
    torch.testing.assert_close(basis.back(z), x, rtol=1e-12, atol=1e-12)
    for block in range(blocks):
        matrix = np.kron(left.matrix[block].numpy(), right.matrix[block].numpy())
        own = np.kron(basis.left[block].numpy(), basis.right[block].numpy())
        np.testing.assert_allclose(own.T @ own, np.eye(out * d), atol=1e-12)
        turned = own.T @ matrix @ own
        np.testing.assert_allclose(turned, np.diag(np.diag(turned)), atol=1e-11)
        np.testing.assert_allclose(z[block].numpy().reshape(-1), own.T @ x[block].numpy().reshape(-1), atol=1e-12)


def test_more_rows_than_the_factor_has_are_turned_on_the_other_side_alone():
    draw = np.random.default_rng(0)
    basis = Eigenbasis.of(Factor(matrices(draw, 1, 3)), Factor(matrices(draw, 1, 4)))
    x = torch.randn(1, 5, 4)
    left = np.eye(5)
    left[:3, :3] = basis.left[0].numpy()
    expected = left.T @ x[0].numpy() @ basis.right[0].numpy()
    np.testing.assert_allclose(basis.into(x)[0].numpy(), expected, atol=1e-13)
    torch.testing.assert_close(basis.back(basis.into(x)), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("blocks", [1, 2])
def test_columns_apart_are_mixed_with_no_other(blocks):
    draw = np.random.default_rng(0)
    right = matrices(draw, blocks, 5)
    basis = Eigenbasis.of(Factor(matrices(draw, blocks, 3)), Factor(right), apart=1)
    for block in range(blocks):
        own = basis.right[block].numpy()
        assert np.array_equal(own[-1], np.eye(5)[-1])
        assert np.array_equal(own[:, -1], np.eye(5)[-1])
        turned = own[:-1, :-1].T @ right[block, :-1, :-1].numpy() @ own[:-1, :-1]
        np.testing.assert_allclose(turned, np.diag(np.diag(turned)), atol=1e-12)


def test_thin_factors_are_multiplied_out():
    draw = np.random.default_rng(0)
    thin = Factor(matrices(draw, 2, 6, decay=1.0)).truncated(0.9)
    assert thin.rank < 6
    basis = Eigenbasis.of(thin, Factor(matrices(draw, 2, 3)))
    for matrix, own in zip(dense(thin), basis.left.numpy(), strict=True):
        turned = own.T @ matrix @ own
        np.testing.assert_allclose(turned, np.diag(np.diag(turned)), atol=1e-12)


def test_products_are_formed_in_the_type_of_the_basis():
    """Half precision in, autocast around: neither makes them coarser."""
    draw = np.random.default_rng(0)
    basis = Eigenbasis.of(Factor(matrices(draw, 1, 3).float()), Factor(matrices(draw, 1, 4).float()))
    x = torch.randn(1, 3, 4).bfloat16()
    expected = basis.left[0].double().T @ x[0].double() @ basis.right[0].double()
    with torch.autocast("cpu", torch.bfloat16):
        found = basis.into(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-6, atol=1e-6)
