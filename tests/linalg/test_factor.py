"""A product with a fixed matrix is that product, however the matrix is laid out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from avalanche_gradproj.linalg import factor as module
from avalanche_gradproj.linalg.factor import FixedFactor

torch.manual_seed(0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("d", "k"), [(5, 3), (300, 200), (784, 150)])
@pytest.mark.parametrize("transposed", [False, True])
def test_equals_numpy(d, k, transposed, bias):
    matrix = torch.randn(k, d).T if transposed else torch.randn(d, k)
    shift = torch.randn(k) if bias else None
    product = FixedFactor(matrix, shift)
    with torch.no_grad():
        for rows in (10, 1, 64, 10):  # laid out for ten, right for any
            x = torch.randn(rows, d)
            expected = x.double().numpy() @ matrix.double().numpy() + (0 if shift is None else shift.double().numpy())
            np.testing.assert_allclose(product(x).numpy(), expected, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(product(x.T.contiguous().T).numpy(), expected, rtol=1e-4, atol=1e-4)


def test_double_precision_is_never_rounded():
    matrix, x = torch.randn(300, 200, dtype=torch.float64), torch.randn(4, 300, dtype=torch.float64)
    with torch.no_grad():
        np.testing.assert_allclose(FixedFactor(matrix)(x).numpy(), x.numpy() @ matrix.numpy(), rtol=1e-12, atol=1e-12)


def test_differentiable_products_stay_so():
    matrix, x = torch.randn(300, 200), torch.randn(4, 300, requires_grad=True)
    product = FixedFactor(matrix)
    with torch.no_grad():
        product(x)
    (gradient,) = torch.autograd.grad(product(x).sum(), x)
    assert torch.allclose(gradient, matrix.sum(1).expand(4, 300), atol=1e-4)


@pytest.mark.parametrize("fault", ["raises", "wrong"])
def test_anything_unexpected_falls_back(monkeypatch, fault):
    def multiply(x, packed, bias):
        if fault == "raises":
            raise RuntimeError("no such operation")
        return torch.zeros(x.shape[0], 200)

    monkeypatch.setattr(module, "_multiply", multiply)
    matrix, x = torch.randn(300, 200), torch.randn(4, 300)
    with torch.no_grad():
        product = FixedFactor(matrix)
        assert torch.equal(product(x), x @ matrix)
        assert torch.equal(product(x), x @ matrix)
