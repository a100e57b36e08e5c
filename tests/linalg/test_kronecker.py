"""Kronecker-factored forms against the dense matrix, which exists in these tests alone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avalanche_gradproj.linalg.cross_entropy import logit_directions
from avalanche_gradproj.linalg.kronecker import Factor, KroneckerTerm, quadratic
from avalanche_gradproj.linalg.moment_sums import MomentSums


def matrices(draw, blocks, size, *, decay=0.0):
    """Random positive semi-definite matrices [blocks, size, size], eigenvalues falling as exp(-decay i)."""
    result = []
    for _ in range(blocks):
        turned = np.linalg.qr(draw.normal(size=(size, size)))[0]
        values = np.exp(-decay * np.arange(size)) * draw.uniform(0.5, 1.5, size)
        result.append(turned @ np.diag(values) @ turned.T)
    return torch.from_numpy(np.stack(result))


def term(draw, blocks, out, d, *, decay=0.0):
    left, right = matrices(draw, blocks, out, decay=decay), matrices(draw, blocks, d, decay=decay)
    return KroneckerTerm(Factor(left), Factor(right))


def dense(factor):
    """[blocks, n, n]; a thin factor multiplied out."""
    if factor.rest is None:
        return factor.matrix.numpy()
    pairs = zip(factor.matrix.numpy(), factor.rest.numpy(), strict=True)
    return np.stack([m @ m.T + rest * np.eye(len(m)) for m, rest in pairs])


@given(
    blocks=st.integers(1, 3),
    out=st.integers(1, 5),
    d=st.integers(1, 6),
    count=st.integers(1, 3),
    seed=st.integers(0, 99),
    thin=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_value_and_gradient_are_those_of_the_dense_matrix(blocks, out, d, count, seed, thin):
    draw = np.random.default_rng(seed)
    terms = [term(draw, blocks, out, d, decay=0.7) for _ in range(count)]
    if thin:
        terms[0] = KroneckerTerm(terms[0].left.truncated(0.9), terms[0].right)
        terms[-1] = KroneckerTerm(terms[-1].left, terms[-1].right.truncated(0.9))
    matrix = 0
    for i, own in enumerate(terms):
        pairs = zip(dense(own.left), dense(own.right), strict=True)
        matrix = matrix + (1 + i) * np.stack([np.kron(b, a) + 0.1 * i * np.eye(out * d) for b, a in pairs])
    scaled = [own.scaled(1.0 + i, 0.1 * i) for i, own in enumerate(terms)]
    x = draw.normal(size=(blocks, out, d))
    vectors = x.reshape(blocks, -1)
    expected = np.einsum("bij,bj->bi", matrix, vectors)
    value, gradient = quadratic(scaled, torch.from_numpy(x))
    np.testing.assert_allclose(gradient.numpy().reshape(blocks, -1), expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(value.item(), 0.5 * (vectors * expected).sum(), rtol=1e-9, atol=1e-12)
    if blocks == 1:
        again, gradient = quadratic([own.squeezed() for own in scaled], torch.from_numpy(x[0]))
        np.testing.assert_allclose(gradient.numpy().reshape(-1), expected[0], rtol=1e-9, atol=1e-12)
        assert again.item() == pytest.approx(value.item())


def test_truncation_keeps_the_trace_and_converges():
    factor = Factor(matrices(np.random.default_rng(2), 2, 8, decay=0.5))
    reference, errors, ranks = dense(factor), [], []
    for share in (0.5, 0.8, 0.95, 0.99, 1.0):
        thin = factor.truncated(share)
        matrix = dense(thin)
        np.testing.assert_allclose(np.trace(matrix, axis1=1, axis2=2), np.trace(reference, axis1=1, axis2=2))
        np.testing.assert_allclose(thin.trace.numpy(), factor.trace.numpy())
        assert np.linalg.eigvalsh(matrix).min() > 0  # what counted still does
        errors.append(np.linalg.norm(matrix - reference) / np.linalg.norm(reference))
        assert errors[-1] <= (1 - share) ** 0.5 + 1e-12
        ranks.append(thin.rank)
    assert all(later < earlier for earlier, later in pairwise(errors))
    assert errors[-1] < 1e-12
    assert ranks == sorted(ranks)
    assert ranks[0] < ranks[-1] == 8


@pytest.mark.parametrize(("share", "kept"), [(0.3, 1), (0.69, 1), (0.7, 2), (0.94, 2), (0.95, 3), (1.0, 4)])
def test_as_many_eigenvectors_as_reach_the_share(share, kept):
    values = [5.0, 3.0, 1.0, 1.0]  # squares: 25, 9, 1, 1 of 36
    thin = Factor(torch.diag(torch.tensor(values)[[2, 0, 1, 3]])[None]).truncated(share)
    assert thin.rank == kept
    rest = sum(values[kept:]) / (4 - kept) if kept < 4 else 0.0
    assert thin.rest.item() == pytest.approx(rest)
    expected = sorted([*values[:kept], *[rest] * (4 - kept)])
    np.testing.assert_allclose(np.linalg.eigvalsh(dense(thin)[0]), expected)


def test_null_directions_are_dropped_and_zero_factors_stay_zero():
    root = torch.from_numpy(np.random.default_rng(3).normal(size=(1, 6, 2)))
    assert Factor(root @ root.mT).truncated(1.0 - 1e-9).rank == 2
    zero = Factor(torch.zeros(1, 5, 5)).truncated(0.9)
    assert not zero.on_left(torch.randn(1, 5, 4)).any()


def test_truncated_only_where_products_get_cheaper():
    draw = np.random.default_rng(4)
    flat, steep = term(draw, 1, 80, 80), term(draw, 1, 80, 80, decay=1.0)
    one = KroneckerTerm(steep.left, flat.right)
    assert one.cheaper(None).left is steep.left
    chosen = one.cheaper(0.99)
    assert chosen.right is flat.right
    assert chosen.left.rank < 8
    assert KroneckerTerm(flat.left, steep.right).cheaper(0.99).right.rank < 8
    assert steep.left.cheaper(0.99, 1) is steep.left  # so little to multiply that two products cost more than one


def test_state_of_a_term():
    one = term(np.random.default_rng(5), 2, 4, 5, decay=1.0)
    one = KroneckerTerm(one.left.truncated(0.9), one.right, 0.5)
    again = KroneckerTerm.from_state(one.state())
    x = torch.randn(2, 4, 5)
    assert torch.equal(one.product(x), again.product(x))
    left, right = one.state()["left"], one.state()["right"]
    for change, match in (
        ({"left": {**left, "matrix": left["matrix"][0]}}, "no tensor"),
        ({"left": {**left, "rest": torch.ones(3)}}, "neither square nor thin"),
        ({"right": {**right, "matrix": right["matrix"][:, :3]}}, "neither square nor thin"),
        ({"left": {**left, "rest": torch.tensor([0.0, float("nan")])}}, "NaN"),
        ({"right": {**right, "matrix": right["matrix"][:1]}}, "2 and 1 blocks"),
    ):
        with pytest.raises(ValueError, match=match):
            KroneckerTerm.from_state({**one.state(), **change})


@pytest.mark.parametrize("features", [3, 300])
@pytest.mark.parametrize("blocks", [1, 2])
def test_moment_sums_are_loops_over_rows(blocks, features):
    draw = np.random.default_rng(6)
    rows = draw.normal(size=(blocks, 9, features))
    sums = MomentSums(blocks, features)
    for part in (rows[:, :4], rows[:, 4:4], rows[:, 4:]):
        sums.update(torch.from_numpy(part), mean=True)
    expected = np.zeros((blocks, features, features))
    for block in range(blocks):
        for row in rows[block]:
            expected[block] += np.outer(row, row)
    np.testing.assert_allclose(sums.moment(9).numpy(), expected / 9, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(sums.mean().numpy(), rows.mean(1), rtol=1e-12, atol=1e-12)
    assert sums.count == 9
    assert torch.equal(sums.moment(9), sums.moment(9).mT)


def test_moment_sums_in_half_precision_are_wide_and_empty_ones_none():
    sums = MomentSums(1, 2)
    assert sums.moment(1) is None
    assert sums.mean() is None
    rows = torch.full((1, 1000, 2), 20.0, dtype=torch.float16)
    for _ in range(200):
        sums.update(rows)  # 8e7 in all, beyond half precision
    assert sums.moment(1)[0, 0, 1].item() == 400 * 200_000


def fisher(z):
    p = np.exp(z - z.max())
    p /= p.sum()
    return np.diag(p) - np.outer(p, p)


def test_exact_directions_make_up_the_fisher_matrix():
    z = torch.randn(5, 4) * 3
    z[2, 1] = -1e11  # masked
    z[:, 3] = -1e11
    found = list(logit_directions(z, "exact"))
    assert len(found) == 3  # a class that is masked everywhere needs no pass
    for row in range(5):
        total = sum(np.outer(g[row], g[row]) for g in found)
        np.testing.assert_allclose(total, fisher(z[row].numpy()), atol=1e-12)


def test_sampled_directions_converge_as_one_over_the_root_of_draws():
    generator, z = torch.Generator().manual_seed(0), torch.tensor([[1.0, 0.0, -1.0, -1e11]])
    expected, before = fisher(z[0].numpy()), torch.get_rng_state()
    errors = {}
    for draws in (50, 5000):
        squares = []
        for _ in range(20):
            (found,) = logit_directions(z.expand(draws, 4), "sampled", generator=generator)
            squares.append(np.sum((found.numpy().T @ found.numpy() / draws - expected) ** 2))
        errors[draws] = np.sqrt(np.mean(squares))
    assert 7 < errors[50] / errors[5000] < 14  # 10 but for the spread of 20 repetitions
    assert errors[5000] < 0.02
    assert torch.equal(before, torch.get_rng_state())


def test_empirical_direction_is_the_gradient_of_the_loss():
    z, y = torch.randn(6, 3, requires_grad=True), torch.tensor([0, 1, 2, 0, 1, 2])
    torch.nn.functional.cross_entropy(z, y, reduction="sum").backward()
    (found,) = logit_directions(z, "empirical", labels=y)
    torch.testing.assert_close(found, z.grad)
    with pytest.raises(TypeError, match="labels"):
        list(logit_directions(z, "empirical"))


def test_eigenvectors_are_not_formed_where_no_rank_would_be_cheaper(monkeypatch):
    small = Factor(torch.ones(1, 10, 10))
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: pytest.fail("eigenvectors of a factor that stays whole"))
    assert small.cheaper(0.99, 101) is small
