"""Gram matrices against dense float64 products, across the borders of the panels they are computed in."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from avalanche_gradproj.linalg import gram as module
from avalanche_gradproj.linalg.gram import gram_matrix, orthonormal_coefficients, principal_coefficients


@pytest.mark.parametrize("length", [0, 1, module.CHUNK - 1, module.CHUNK, 2 * module.CHUNK + 3])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 20])
def test_inner_products_whatever_the_panels(count, length):
    vectors = np.random.default_rng(count).normal(size=(count, length)).astype(np.float32)
    found = gram_matrix(torch.from_numpy(vectors)).numpy()
    wide = vectors.astype(np.float64)
    np.testing.assert_allclose(found, wide @ wide.T, rtol=0, atol=1e-11 * max(1, length))
    np.testing.assert_array_equal(found, found.T)


def test_a_direction_that_float32_products_would_lose():
    """Two vectors that differ by 1e-5 of their length: sums in float32 would see nothing of it."""
    generator = np.random.default_rng(0)
    base, extra = generator.normal(size=30_000), generator.normal(size=30_000)
    vectors = torch.from_numpy(np.stack([base, base + 1e-5 * extra])).float()
    gram = gram_matrix(vectors)
    wide = vectors.double().numpy()
    expected = ((wide[1] - wide[0]) ** 2).sum()
    found = gram[0, 0] - 2 * gram[0, 1] + gram[1, 1]
    assert abs(float(found) - expected) < 1e-3 * expected


def test_batches_of_blocks_are_computed_each_by_itself():
    vectors = torch.randn(2, 3, 5, 40, generator=torch.Generator().manual_seed(0))
    found = gram_matrix(vectors)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(found[i, j], gram_matrix(vectors[i, j]))


def test_bases_are_orthonormal_and_span_the_vectors():
    generator = np.random.default_rng(1)
    vectors = generator.normal(size=(4, 30))
    vectors = np.vstack([vectors, vectors[0] - 2 * vectors[3], np.zeros(30)])  # rank 4 of 6
    gram, floor = torch.from_numpy(vectors @ vectors.T), torch.tensor(1e-10)
    for coefficients, rank in ((orthonormal_coefficients(gram, floor), 4), (principal_coefficients(gram, 6, floor), 4)):
        basis = coefficients.numpy().T @ vectors
        kept = basis[np.linalg.norm(basis, axis=1) > 0.5]
        assert len(kept) == rank
        np.testing.assert_allclose(kept @ kept.T, np.eye(rank), atol=1e-10)
        np.testing.assert_allclose(vectors @ kept.T @ kept, vectors, atol=1e-9)
