"""Forms of which a part is kept for several calls, against dense matrices and their eigenvectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from avalanche_gradproj.linalg import kept
from avalanche_gradproj.linalg.kept import KeptForm, leading
from avalanche_gradproj.linalg.kronecker import Factor, KroneckerTerm, quadratic


@pytest.fixture(autouse=True)
def _small_is_cheap(monkeypatch):
    """Split the products of small matrices too."""
    monkeypatch.setattr(kept, "OPERATION_COST", 0)


def symmetric(draw, size, decay):
    turned = np.linalg.qr(draw.normal(size=(size, size)))[0]
    return turned @ np.diag(np.exp(-decay * np.arange(size))) @ turned.T


def term(seed, blocks=1, out=20, d=30, decay=0.5, damping=0.0):
    draw = np.random.default_rng(seed)
    left, right = (np.stack([symmetric(draw, n, decay) for _ in range(blocks)]) for n in (out, d))
    return KroneckerTerm(Factor(torch.from_numpy(left)), Factor(torch.from_numpy(right)), damping)


def dense(factor):
    matrix = factor.matrix.numpy()
    if factor.rest is None:
        return matrix
    return np.stack([m @ m.T + r * np.eye(len(m)) for m, r in zip(matrix, factor.rest.numpy(), strict=True)])


def stiff(matrix, share):
    """The part of [blocks, n, n] whose eigenvalues are at least a share of the largest."""
    result = []
    for own in matrix:
        values, vectors = np.linalg.eigh(own)
        chosen = values >= share * values.max()
        result.append(vectors[:, chosen] @ np.diag(values[chosen]) @ vectors[:, chosen].T)
    return np.stack(result)


def apply(left, right, x, damping):
    return np.einsum("bij,bjk,bkl->bil", left, x, right) + damping * x


@pytest.mark.parametrize("share", [0.5, 0.1, 0.01])
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("truncated", [False, True])
def test_the_leading_part_is_that_of_the_largest_eigenvalues(share, blocks, truncated):
    own = term(0, blocks, damping=0.3)
    if truncated:
        own = KroneckerTerm(own.left.truncated(0.999), own.right.truncated(0.999), 0.3)
    x = np.random.default_rng(1).normal(size=(blocks, 20, 30))
    lead = leading(own, share)
    assert lead.left.shape[-1] < 20
    expected = apply(stiff(dense(own.left), share), stiff(dense(own.right), share), x, 0.3)
    np.testing.assert_allclose(lead.product(torch.from_numpy(x)).numpy(), expected, rtol=1e-9, atol=1e-12)
    if blocks == 1:
        again = leading(own.squeezed(), share).product(torch.from_numpy(x[0]))
        np.testing.assert_allclose(again.numpy(), expected[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("out", "d"), [(6, 40), (40, 6)], ids=["left first", "right first"])
def test_both_orders_of_the_products(out, d):
    own = term(3, out=out, d=d, decay=0.3)
    x = np.random.default_rng(1).normal(size=(1, out, d))
    expected = apply(stiff(dense(own.left), 0.2), stiff(dense(own.right), 0.2), x, 0.0)
    np.testing.assert_allclose(leading(own, 0.2).product(torch.from_numpy(x)).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("every", [2, 8])
def test_what_is_not_leading_is_that_of_the_last_refresh(every):
    terms = [term(0, damping=0.1), term(1, decay=0.8)]
    form, draw = KeptForm(terms, every), np.random.default_rng(2)
    assert form.split == 2
    share, rest = 0.5 / every, None
    for call, refresh in enumerate([False, False, True, False, False]):
        x = draw.normal(size=(1, 20, 30))
        leads = sum(
            apply(stiff(dense(own.left), share), stiff(dense(own.right), share), x, own.damping) for own in terms
        )
        whole = sum(apply(dense(own.left), dense(own.right), x, own.damping) for own in terms)
        if call == 0 or refresh:
            rest = whole - leads
        value, gradient = form.quadratic(torch.from_numpy(x), refresh=refresh)
        np.testing.assert_allclose(gradient.numpy(), leads + rest, rtol=1e-9, atol=1e-12)
        assert value.item() == pytest.approx(0.5 * (x * (leads + rest)).sum())
        if call in (1, 3):  # what is kept makes a difference
            assert np.abs(gradient.numpy() - whole).max() > 1e-3


def test_where_nothing_would_be_saved_everything_is_formed():
    flat = KeptForm([term(0, decay=0.0)], 4)
    assert flat.split == 0
    x = torch.randn(1, 20, 30, dtype=torch.float64)
    for _ in range(3):
        x = x + 1
        value, gradient = flat.quadratic(x, refresh=False)
        expected = quadratic([term(0, decay=0.0)], x)
        assert torch.equal(gradient, expected[1])
        assert torch.equal(value, expected[0])


def test_a_step_that_is_not_finite_leaves_no_trace():
    form, x = KeptForm([term(0)], 4), torch.randn(1, 20, 30, dtype=torch.float64)
    spoiled = x.clone()
    spoiled[0, 3, 4] = torch.inf
    first, other = KeptForm([term(0)], 4), KeptForm([term(0)], 4)
    expected = other.quadratic(x, refresh=True), other.quadratic(2 * x, refresh=False)
    assert not torch.isfinite(form.quadratic(spoiled, refresh=True)[1]).all()  # of the step itself it is
    assert torch.isfinite(form.quadratic(x, refresh=False)[1]).all()  # from then on the leading part alone
    form.quadratic(x, refresh=True)
    form.quadratic(spoiled, refresh=True)
    assert torch.equal(form.quadratic(2 * x, refresh=False)[1], expected[1][1])
    torch.testing.assert_close(first.quadratic(x, refresh=True)[1], quadratic([term(0)], x)[1])


def test_a_gradient_that_is_kept_is_stable_where_all_of_it_kept_would_not_be():
    """Descent on the form itself, at half of the largest step size that is stable with fresh gradients."""
    own, every = term(5, decay=0.3), 8
    step = 1.0 / (np.linalg.eigvalsh(dense(own.left))[0, -1] * np.linalg.eigvalsh(dense(own.right))[0, -1])

    def descend(gradient):
        x = torch.ones(1, 20, 30, dtype=torch.float64)
        start = float(quadratic([own], x)[0])
        for call in range(400):
            x = x - step * gradient(x, call)
        return float(quadratic([own], x)[0]) / start

    form, held = KeptForm([own], every), []
    assert form.split == 1

    def all_kept(x, call):
        if call % every == 0:
            held[:] = [quadratic([own], x)[1]]
        return held[0]

    fresh = descend(lambda x, call: quadratic([own], x)[1])
    assert descend(lambda x, call: form.quadratic(x, refresh=call % every == 0)[1]) < 2 * fresh
    assert descend(all_kept) > 1e6
