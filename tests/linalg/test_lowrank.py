"""Scaled low-rank fits against loops and dense SVDs, choices against brute force and sorting."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avalanche_gradproj.linalg.lowrank import choose_ranks, fit, largest, scales

#: [blocks, out, in, taps]
SHAPES = {
    "wide": (1, 3, 7, 1),
    "tall": (1, 7, 3, 1),
    "square": (1, 4, 4, 1),
    "wide taps": (1, 3, 6, 4),
    "tall taps": (1, 6, 2, 9),
    "groups": (3, 4, 2, 1),
    "groups with taps": (2, 3, 5, 3),
    "depthwise": (4, 1, 1, 9),
    "one row": (1, 1, 5, 2),
    "one column": (1, 5, 1, 2),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def draw(shape, *, zeros=False):
    """A free weight and a base; with `zeros` the base's first row and last column of the first block are 0."""
    generator = np.random.default_rng(sum(shape))
    free, base = generator.normal(size=shape), generator.normal(size=shape)
    if zeros:
        base[0, 0] = 0
        base[0, :, -1] = 0
    return free, base


def slow_scales(free, base):
    blocks, out, into, taps = free.shape
    rows, columns = np.zeros((blocks, out)), np.zeros((blocks, into))
    for b in range(blocks):
        for j in range(out):
            above = sum(free[b, j, i, p] * base[b, j, i, p] for i in range(into) for p in range(taps))
            below = sum(base[b, j, i, p] ** 2 for i in range(into) for p in range(taps))
            rows[b, j] = above / below if below else 0.0
        for i in range(into):
            above = sum(free[b, j, i, p] * rows[b, j] * base[b, j, i, p] for j in range(out) for p in range(taps))
            below = sum((rows[b, j] * base[b, j, i, p]) ** 2 for j in range(out) for p in range(taps))
            columns[b, i] = above / below if below else 0.0
    return rows, columns


def slow_residual(free, base):
    """Per tap, [blocks, out, in, taps]."""
    rows, columns = slow_scales(free, base)
    result = np.zeros_like(free)
    for b, j, i, p in np.ndindex(*free.shape):
        result[b, j, i, p] = free[b, j, i, p] - rows[b, j] * base[b, j, i, p] * columns[b, i]
    return result


def fitted(free, base):
    found = fit(torch.from_numpy(free), torch.from_numpy(base))
    return {name: getattr(found, name).numpy() for name in ("rows", "columns", "left", "right", "energies")}


@shapes
@pytest.mark.parametrize("zeros", [False, True])
def test_scales_are_those_of_loops(shape, zeros):
    free, base = draw(shape, zeros=zeros)
    expected = slow_scales(free, base)
    for found in (scales(torch.from_numpy(free), torch.from_numpy(base)), fit(*map(torch.from_numpy, (free, base)))):
        rows, columns = found if isinstance(found, tuple) else (found.rows, found.columns)
        np.testing.assert_allclose(rows.numpy(), expected[0], rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(columns.numpy(), expected[1], rtol=1e-10, atol=1e-12)
        if zeros:
            assert rows[0, 0] == 0
            assert columns[0, -1] == 0


@shapes
@pytest.mark.parametrize("zeros", [False, True])
def test_leading_directions_are_the_best_approximation_of_the_mean_residual(shape, zeros):
    free, base = draw(shape, zeros=zeros)
    blocks, out, into, taps = shape
    residual = slow_residual(free, base).mean(3)
    dense = [np.linalg.svd(residual[b], full_matrices=False) for b in range(blocks)]
    sigmas = np.array([s for _, s, _ in dense])
    found = fitted(free, base)
    rank = min(out, into)
    assert found["left"].shape == (blocks, out, rank)
    assert found["right"].shape == (blocks, rank, into)
    np.testing.assert_allclose(found["energies"], taps * (sigmas**2).sum(0), rtol=1e-9, atol=1e-13)
    for b, (u, s, v) in enumerate(dense):
        for k in range(1, rank + 1):
            best = u[:, :k] * s[:k] @ v[:k]
            np.testing.assert_allclose(found["left"][b, :, :k] @ found["right"][b, :k], best, atol=1e-9)
    # Both halves carry the root of the singular value.
    np.testing.assert_allclose(np.linalg.norm(found["left"], axis=1), np.sqrt(sigmas), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found["right"], axis=2), np.sqrt(sigmas), atol=1e-6)


@shapes
def test_a_direction_takes_its_energy_off_the_squared_error(shape):
    free, base = draw(shape)
    found, residual = fitted(free, base), slow_residual(free, base)
    errors = []
    for k in range(len(found["energies"]) + 1):
        low = found["left"][:, :, :k] @ found["right"][:, :k]
        errors.append(sum((residual[b, j, i, p] - low[b, j, i]) ** 2 for b, j, i, p in np.ndindex(*shape)))
    np.testing.assert_allclose(-np.diff(errors), found["energies"], rtol=1e-9, atol=1e-12)
    if shape[3] == 1:
        assert errors[-1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("taps", [1, 4])
@pytest.mark.parametrize("size", [(5, 7), (7, 5)])
def test_known_scales_and_rank_are_recovered(size, taps, rank):
    """Of a base s t^T w, to whose rows and columns u v^T is orthogonal if v is to t and u to r s."""
    out, into = size
    generator = np.random.default_rng(rank)
    s, t, w = (generator.uniform(0.5, 2, n) * generator.choice([-1, 1], n) for n in (out, into, taps))
    r, c = generator.normal(size=out), generator.uniform(0.5, 2, into)
    c *= (t**2).sum() / (c * t**2).sum()  # what of a common factor belongs to r
    u = np.linalg.qr(np.column_stack([r * s, generator.normal(size=(out, rank))]))[0][:, 1:]
    v = np.linalg.qr(np.column_stack([t, generator.normal(size=(into, rank))]))[0][:, 1:]
    sigmas = np.array([3.0, 1.0, 0.1])[:rank]
    low = u * sigmas @ v.T
    base = np.einsum("j,i,p->jip", s, t, w)
    free = r[:, None, None] * base * c[:, None] + low[:, :, None]
    found = fitted(free[None], base[None])
    np.testing.assert_allclose(found["rows"][0], r, rtol=1e-10)
    np.testing.assert_allclose(found["columns"][0], c, rtol=1e-10)
    np.testing.assert_allclose(found["energies"][:rank], taps * sigmas**2, rtol=1e-9)
    assert found["energies"][rank:].max(initial=0) < 1e-12
    np.testing.assert_allclose(found["left"][0, :, :rank] @ found["right"][0, :rank], low, atol=1e-10)


@pytest.mark.parametrize("shape", [(1, 5, 6, 1), (1, 6, 4, 3), (2, 4, 5, 2)])
def test_what_is_orthogonal_to_every_row_and_column_of_the_base_is_all_residual(shape):
    blocks, out, into, taps = shape
    generator = np.random.default_rng(8)
    base = generator.normal(size=shape)
    low = np.zeros((blocks, out, into))
    for b in range(blocks):
        summed = base[b].sum(2)
        constraints = np.zeros((out + into, out, into))
        for j, i in np.ndindex(out, into):
            constraints[j, j, i] = constraints[out + i, j, i] = summed[j, i]
        null = np.linalg.svd(constraints.reshape(out + into, -1))[2][out + into :]
        low[b] = (generator.normal(size=len(null)) @ null).reshape(out, into)
    found = fitted(base + low[..., None], base)
    np.testing.assert_allclose(found["rows"], 1, rtol=1e-10)
    np.testing.assert_allclose(found["columns"], 1, rtol=1e-10)
    np.testing.assert_allclose(found["left"] @ found["right"], low, atol=1e-10)
    np.testing.assert_allclose(found["energies"], taps * (np.linalg.svd(low)[1] ** 2).sum(0), rtol=1e-9, atol=1e-14)


@shapes
@pytest.mark.parametrize("base", ["random", "zero"])
def test_no_residual_gives_zeros(shape, base):
    base = draw(shape)[1] * (base == "random")
    found = fitted(2 * base, base)  # a power of 2, so that nothing is rounded
    np.testing.assert_array_equal(found["rows"], 2.0 if base.any() else 0.0)
    np.testing.assert_array_equal(found["columns"], 1.0 if base.any() else 0.0)
    for name in ("left", "right", "energies"):
        assert np.isfinite(found[name]).all()
    assert not (found["left"] @ found["right"]).any()
    assert not found["energies"].any()


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_halves_of_directions_that_one_group_lacks_stay_small(seed, flipped):
    """Both halves are rounded to the weight's precision afterwards: they must not leave its range."""
    generator = np.random.default_rng(seed)
    base = generator.normal(size=(2, 4, 6, 1))
    base[1, 2:], base[1, :, 3:] = 0, 0
    free = base + 0.1 * generator.normal(size=base.shape) * np.array([1, 0])[:, None, None, None]
    low = np.outer(generator.normal(size=2), generator.normal(size=3))
    free[1, 2:, 3:, 0] = low
    if flipped:
        free, base = free.transpose(0, 2, 1, 3).copy(), base.transpose(0, 2, 1, 3).copy()
    found = fitted(free, base)
    assert np.linalg.norm(found["left"][1], axis=0).max() <= 1.0001 * np.linalg.norm(low) ** 0.5
    assert np.linalg.norm(found["right"][1], axis=1).max() <= 1.0001 * np.linalg.norm(low) ** 0.5
    product = found["left"].astype(np.float32) @ found["right"].astype(np.float32)
    np.testing.assert_allclose(product, slow_residual(free, base).mean(3), atol=1e-5)


def test_fitted_in_double_precision_and_detached():
    free, base = (torch.nn.Parameter(torch.from_numpy(value).float()) for value in draw((1, 4, 3, 2)))
    found, expected = fit(free, base), fit(free.detach().double(), base.detach().double())
    for name in ("rows", "columns", "left", "right", "energies"):
        value = getattr(found, name)
        assert value.dtype == torch.float64
        assert not value.requires_grad
        assert torch.equal(value, getattr(expected, name))


def ranks_by_brute_force(scores, rate, maximum):
    """Every admissible answer: of the smallest subsets that reach the share, those with the largest sum."""
    every = [(layer, Fraction(score)) for layer, own in enumerate(scores) for score in own]
    wanted = rate * sum(score for _, score in every)
    for size in range(len(every) + 1):
        reaching = [subset for subset in combinations(every, size) if sum(score for _, score in subset) >= wanted]
        if reaching:
            break
    best = max(sum(score for _, score in subset) for subset in reaching)
    answers = set()
    for subset in reaching:
        if sum(score for _, score in subset) == best:
            counts = [sum(owner == layer for owner, _ in subset) for layer in range(len(scores))]
            pairs = zip(counts, scores, strict=True)
            answers.add(tuple(min(max(1, count), len(own), maximum) for count, own in pairs))
    return answers


@settings(deadline=None, max_examples=300)
@given(
    scores=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), min_size=1, max_size=3),
    eighths=st.integers(1, 8),
    maximum=st.integers(1, 5),
)
def test_ranks_are_the_fewest_directions_that_reach_the_share(scores, eighths, maximum):
    scores = [sorted(own, reverse=True) for own in scores]
    tensors = [torch.tensor(own, dtype=torch.float32) for own in scores]
    found = choose_ranks(tensors, eighths / 8, maximum)
    assert tuple(found) in ranks_by_brute_force(scores, Fraction(eighths, 8), maximum)


@pytest.mark.parametrize(
    ("scores", "rate", "maximum", "expected"),
    [
        ([[9, 8, 1], [7, 1]], 0.9, 9, [2, 1]),
        ([[9, 8, 1], [7, 1]], 0.93, 9, [3, 1]),  # 24 of 26 reach 0.923, one more is needed, the first of two
        ([[9, 8, 1], [7, 1]], 1.0, 9, [3, 2]),
        ([[9, 8, 1], [7, 1]], 1.0, 2, [2, 2]),
        ([[9, 8, 1], [7, 1]], 1.0, 1, [1, 1]),
        ([[100, 100], [1, 1]], 0.5, 9, [2, 1]),  # a layer that no direction was chosen of has one
        ([[5, 0, 0], [0, 0]], 1.0, 9, [1, 1]),  # zeros add nothing to the share
        ([[0, 0], [0]], 1.0, 9, [1, 1]),
        ([[0, 0], [0]], 0.1, 9, [1, 1]),
        ([[2, 2, 2, 2]], 0.5, 9, [2]),
        ([[2, 2, 2, 2]], 0.51, 9, [3]),
        ([[4], [4, 4]], 0.6, 9, [1, 1]),
    ],
)
def test_ranks_by_hand(scores, rate, maximum, expected):
    assert choose_ranks([torch.tensor(own, dtype=torch.float64) for own in scores], rate, maximum) == expected


def marked(tensors, count, threshold):
    """Masks in the tensors' shapes; and all magnitudes with their marks, in one list."""
    masks = largest(tensors, count, threshold)
    assert [mask.shape for mask in masks] == [tensor.shape for tensor in tensors]
    assert all(mask.dtype == torch.bool for mask in masks)
    pairs = zip(tensors, masks, strict=True)
    return [(abs(v), m) for x, y in pairs for v, m in zip(x.flatten().tolist(), y.flatten().tolist(), strict=True)]


@settings(deadline=None, max_examples=200)
@given(
    data=st.data(),
    ties=st.booleans(),
    count=st.sampled_from([-1, 0, 1, 2, 4, 8, 30]),
    threshold=st.sampled_from([0.0, 1.0, 2.5]),
)
def test_largest_are_the_first_of_all_magnitudes_sorted(data, ties, count, threshold):
    sizes = data.draw(st.lists(st.sampled_from([(), (3,), (2, 3), (0,), (1, 2, 2)]), min_size=1, max_size=4))
    generator = np.random.default_rng(data.draw(st.integers(0, 999)))
    tensors = [
        torch.as_tensor(generator.integers(-4, 5, size) if ties else 3 * generator.normal(size=size)).double()
        for size in sizes
    ]
    entries = marked(tensors, count, threshold)
    reference = [value for value in sorted((value for value, _ in entries), reverse=True) if value > threshold]
    kept = sorted((value for value, mark in entries if mark), reverse=True)
    assert kept == reference[: max(0, count)]


def test_largest_of_transposed_parameters_with_gradients():
    one = torch.nn.Parameter(torch.tensor([[1.0, -6.0], [3.0, 4.0], [-5.0, 2.0]])).T
    masks = largest([one, torch.tensor([-7.0, 0.5])], 4, 0.0)
    assert masks[0].tolist() == [[False, False, True], [True, True, False]]
    assert masks[1].tolist() == [True, False]
