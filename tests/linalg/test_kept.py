"""Forms of which a part is kept for several calls, against dense matrices and their eigenvectors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from avalanche_gradproj.linalg import kept
from avalanche_gradproj.linalg.kept import KeptForm, widths
from avalanche_gradproj.linalg.kronecker import Factor, KroneckerTerm, quadratic


@pytest.fixture(autouse=True)
def _small_is_cheap(monkeypatch):
    """Split the products of small matrices too."""
    monkeypatch.setattr(kept, "OPERATION_COST", 0)
    monkeypatch.setattr(kept, "_COLUMNS", 1)
    monkeypatch.setattr(kept, "_WORTH", 10.0)


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


def dealt(matrix, leading, count, block):
    """[blocks, n, n] with the leading eigenvalues as they are and those of one block times the number of blocks."""
    result = []
    for own in matrix:
        values, vectors = np.linalg.eigh(own)
        values, vectors = values[::-1], vectors[:, ::-1]
        weights = np.zeros(len(values))
        weights[:leading] = 1
        weights[leading + block :: count] = count
        result.append(vectors @ np.diag(weights * values) @ vectors.T)
    return np.stack(result)


def apply(left, right, x, damping):
    return np.einsum("bij,bjk,bkl->bil", left, x, right) + damping * x


def brute_force(values):
    """All pairs of multiples of 8, the cheapest of those in which no direction gets stiffer than the first."""
    size, best = len(values), (len(values), len(values), 0)
    for leading in range(8, size, 8):
        for width in range(8, size, 8):
            count = -(-(size - leading) // width)
            if leading + width < best[0] and count * values[leading] <= values[0] * (1 + 1e-12):
                best = leading + width, leading, width
    return best[0]


@pytest.mark.parametrize("decay", [0.0, 0.003, 0.02, 0.1, 1.0])
@pytest.mark.parametrize("size", [7, 8, 40, 100])
def test_no_direction_gets_stiffer_than_the_stiffest(decay, size, monkeypatch):
    monkeypatch.setattr(kept, "_COLUMNS", 8)
    values = np.exp(-decay * np.arange(size))
    leading, width = widths(torch.from_numpy(values))
    assert leading + width == brute_force(values)
    if width:
        assert -(-(size - leading) // width) * values[leading] <= values[0] * (1 + 1e-12)
    # Of several blocks, the one with the flattest spectrum decides.
    both = torch.from_numpy(np.stack([3 * np.exp(-2.0 * np.arange(size)), 0.1 * values]))
    assert widths(both) == (leading, width)


SHAPES = pytest.mark.parametrize(("out", "d"), [(20, 60), (60, 20)], ids=["of inputs", "of outputs"])


@SHAPES
@pytest.mark.parametrize("blocks", [1, 3])
def test_a_call_takes_the_leading_eigenvectors_and_one_block(out, d, blocks):
    own, draw = term(0, blocks, out, d, decay=0.3, damping=0.3), np.random.default_rng(2)
    form = KeptForm([own], 8)
    (_, sampled) = form._split[0]
    assert sampled.count > 2
    start, held, window, lag = None, None, -1, 0
    for call, refresh in enumerate([False, False, False, True, False, False]):
        x = draw.normal(size=(blocks, out, d))
        value, gradient = form.quadratic(torch.from_numpy(x), refresh=refresh)
        left, right = dense(own.left), dense(own.right)
        if call == 0 or refresh:
            start, held, window, lag = x, apply(left, right, x, 0.3), window + 1, 0
            expected = held
            half = 0.5 * (x * held).sum()
        else:
            block = (window + lag) % sampled.count
            if d > out:
                right = dealt(right, sampled.leading, sampled.count, block)
            else:
                left = dealt(left, sampled.leading, sampled.count, block)
            change = apply(left, right, x - start, 0.3)
            expected = held + change
            half = 0.5 * (start * held).sum() + ((x - start) * held).sum() + 0.5 * ((x - start) * change).sum()
            lag += 1
        np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-8, atol=1e-10)
        assert value.item() == pytest.approx(half, rel=1e-9)


@SHAPES
@pytest.mark.parametrize("squeezed", [False, True])
def test_the_mean_over_all_blocks_is_exact(out, d, squeezed):
    """Value and gradient, of a sum of two terms."""
    terms = [term(seed, 1, out, d, decay=0.3, damping=0.1 * seed) for seed in (0, 1)]
    draw = np.random.default_rng(3)
    start, x = (torch.from_numpy(draw.normal(size=(1, out, d))) for _ in range(2))
    if squeezed:
        terms, start, x = [own.squeezed() for own in terms], start[0], x[0]
    form = KeptForm(terms, 8)
    assert form.split == 2
    count = math.lcm(*(sampled.count for _, sampled in form._split))
    form.quadratic(start, refresh=True)
    found = [form.quadratic(x, refresh=False) for _ in range(count)]
    value, gradient = quadratic(terms, x)
    assert max((own - gradient).norm() / gradient.norm() for _, own in found) > 0.05
    torch.testing.assert_close(sum(own for _, own in found) / count, gradient, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(sum(own for own, _ in found) / count, value, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("every", [2, 3, 4, 5, 7, 8, 9])
@pytest.mark.parametrize("decay", [0.1, 0.15, 0.3])
def test_on_a_steady_way_every_direction_counts_alike(every, decay):
    """Whatever the numbers of blocks and of calls have in common: no block may meet early or late calls alone."""
    values = torch.exp(-decay * torch.arange(60.0, dtype=torch.float64))
    own = KroneckerTerm(Factor(torch.eye(20, dtype=torch.float64)[None]), Factor(torch.diag(values)[None]))
    form = KeptForm([own], every)
    count, way = form._split[0][1].count, torch.ones(1, 20, 60, dtype=torch.float64)
    assert count > 3
    seen, true = torch.zeros(60, dtype=torch.float64), torch.zeros(60, dtype=torch.float64)
    for call in range(every * count):
        x = call * way
        if call % every == 0:
            start = x
        gradient = form.quadratic(x, refresh=call % every == 0)[1]
        seen += (gradient - start * values)[0, 0]
        true += ((x - start) * values)[0, 0]
    torch.testing.assert_close(seen / true, torch.ones_like(true), rtol=1e-9, atol=0)


def test_of_a_thin_factor_the_multiple_of_the_identity_reacts_late():
    own = term(0, 1, 20, 200, decay=0.04)
    thin = KroneckerTerm(own.left, own.right.truncated(0.999))
    assert 40 < thin.right.rank < 150
    draw = np.random.default_rng(3)
    start, x = (draw.normal(size=(1, 20, 200)) for _ in range(2))
    form = KeptForm([thin], 8)
    form.quadratic(torch.from_numpy(start), refresh=True)
    (_, sampled) = form._split[0]
    mean = sum(form.quadratic(torch.from_numpy(x), refresh=False)[1] for _ in range(sampled.count)) / sampled.count
    left, right = dense(own.left), dense(thin.right)
    above = right - thin.right.rest.numpy()[:, None, None] * np.eye(200)
    expected = apply(left, right, start, 0.0) + apply(left, above, x - start, 0.0)
    np.testing.assert_allclose(mean.numpy(), expected, rtol=1e-8, atol=1e-10)


def test_where_nothing_would_be_saved_everything_is_formed(monkeypatch):
    monkeypatch.setattr(kept, "_WORTH", 0.75)
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
    for _ in range(3):
        other.quadratic(x, refresh=True)
    expected = other.quadratic(2 * x, refresh=False)
    assert not torch.isfinite(form.quadratic(spoiled, refresh=True)[1]).all()  # of the step itself it is
    assert torch.isfinite(form.quadratic(x, refresh=False)[1]).all()  # from then on the sampled part alone
    form.quadratic(x, refresh=True)
    form.quadratic(spoiled, refresh=True)
    assert torch.equal(form.quadratic(2 * x, refresh=False)[1], expected[1])
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
