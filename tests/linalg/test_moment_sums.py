"""MomentSums against dense float64 products of all rows at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from avalanche_gradproj.linalg.moment_sums import MomentSums


def reference(rows, *, constant):
    """Sum of a a^T [blocks, d, d] and of a [blocks, d], for rows [blocks, n, d or d - 1], in float64."""
    rows = rows.double().numpy()
    if constant:
        rows = np.concatenate([rows, np.ones((*rows.shape[:2], 1))], axis=2)
    return np.einsum("bni,bnj->bij", rows, rows, optimize=True), rows.sum(axis=1)


def pieces(rows, sizes):
    """Consecutive pieces of rows, of sizes that are taken again and again."""
    begin, found = 0, []
    while begin < rows.shape[1]:
        size = sizes[len(found) % len(sizes)]
        found.append(rows[:, begin : begin + size])
        begin += size
    return found


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize(
    ("blocks", "features", "count", "sizes"),
    [
        (1, 2, 9001, [9001]),  # more rows at once than are held
        (1, 5, 9001, [1, 4095, 17, 4888]),
        (1, 63, 300, [64]),
        (1, 64, 9000, [9000]),  # one block, many at once
        (1, 65, 300, [7, 100]),
        (1, 160, 5000, [319, 2]),  # several panels, more rows than are held, and than are summed up in their own type
        (1, 1015, 40, [16]),  # held at multiples of 1040 numbers
        (1, 192, 9000, [1, 4500]),  # several panels, many at once, and some between
        (3, 4, 9001, [9001]),
        (3, 70, 5000, [3, 40, 4097]),
        (500, 3, 1200, [500, 9]),  # so many blocks that few rows are held
    ],
)
def test_any_pieces_of_rows_give_the_dense_moment(constant, blocks, features, count, sizes):
    draw = np.random.default_rng(0)
    rows = torch.from_numpy(draw.normal(size=(blocks, count, features - constant)) + 0.5)
    sums = MomentSums(blocks, features, constant=constant)
    for piece in pieces(rows, sizes):
        sums.update(piece, mean=True)
    moment, total = reference(rows, constant=constant)
    found = sums.moment(count)
    np.testing.assert_allclose(found.numpy(), moment / count, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(sums.mean().numpy(), total / count, rtol=1e-11, atol=1e-12)
    assert torch.equal(found, found.mT)
    assert sums.count == count
    assert sums.is_finite()


@pytest.mark.parametrize("features", [1, 40, 200])
def test_float32_rows_are_summed_as_exactly_as_some_thousand_of_them(features):
    draw = np.random.default_rng(1)
    rows = torch.from_numpy(draw.uniform(0.5, 1.5, size=(1, 60_000, features))).float()  # no sum cancels
    sums = MomentSums(1, features)
    for piece in pieces(rows, [60_000] if features == 40 else [1000]):
        sums.update(piece)
    moment, _ = reference(rows, constant=False)
    found = sums.moment(1)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), moment, rtol=2e-6)


@pytest.mark.parametrize("constant", [False, True])
def test_rows_of_several_types_and_after_a_moment_was_asked_for(constant):
    draw = np.random.default_rng(2)
    parts = [
        torch.from_numpy(draw.integers(-8, 9, size=(1, 30, 6 - constant))).to(dtype)
        for dtype in (torch.float16, torch.float64, torch.float32, torch.bfloat16)
    ]
    sums, seen = MomentSums(1, 6, constant=constant), []
    for part in parts:
        sums.update(part, mean=True)
        seen.append(part.double())
        moment, total = reference(torch.cat(seen, dim=1), constant=constant)
        if len(seen) != 2:  # so that float64 rows are held when others come
            np.testing.assert_array_equal(sums.moment(1.0).numpy(), moment)
            np.testing.assert_allclose(sums.mean().numpy(), total / (30 * len(seen)))


def test_rows_that_change_after_they_were_given_count_as_they_were():
    rows = torch.full((1, 3, 5), 2.0, requires_grad=True)
    sums = MomentSums(1, 5)
    sums.update(rows)
    with torch.no_grad():
        rows.zero_()
    assert (sums.moment(1) == 12.0).all()
    assert not sums.moment(1).requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize(("blocks", "constant"), [(1, False), (1, True), (2, False)])
def test_values_and_squares_that_are_not_finite_are_seen(bad, blocks, constant):
    sums = MomentSums(blocks, 70, constant=constant)
    assert sums.is_finite()
    rows = torch.ones(blocks, 200, 70 - constant, dtype=torch.float32)
    sums.update(rows)
    assert sums.is_finite()
    rows[-1, 17, 66] = bad
    sums.update(rows)
    assert not sums.is_finite()


@pytest.mark.parametrize(("blocks", "features"), [(1, 10), (1, 785), (1, 1024), (1000, 10), (64, 300)])
def test_what_is_held_is_half_as_much_as_the_moment_or_a_megabyte_and_let_go_of(blocks, features):
    sums = MomentSums(blocks, features)
    held = 0
    for _ in range(3):
        sums.update(torch.ones(blocks, 5, features, dtype=torch.float32))
        tensors = [value for value in vars(sums).values() if isinstance(value, torch.Tensor) and value._base is None]
        held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    moment = 8 * blocks * features**2
    # Padding takes a twentieth more here.
    assert moment <= held <= moment + 1.05 * max(moment / 2, 2**20) + 8 * blocks * features
    sums.moment(1)
    assert sum(v.numel() for v in vars(sums).values() if isinstance(v, torch.Tensor)) == blocks * features * (
        features + 1
    )


@pytest.mark.parametrize(("blocks", "features"), [(1, 40), (1, 300), (2, 40)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_nothing(blocks, features, dtype):
    """A pass over the data may run the model under autocast, and rows come inside of it."""
    rows = torch.from_numpy(np.random.default_rng(3).normal(size=(blocks, 5000, features)) * 30).float()
    sums = MomentSums(blocks, features)
    with torch.autocast("cpu", dtype):
        for piece in pieces(rows, [700]):
            sums.update(piece)
        found = sums.moment(1)
    moment, _ = reference(rows, constant=False)
    assert np.linalg.norm(found.numpy() - moment) < 1e-6 * np.linalg.norm(moment)


def test_no_more_rows_than_some_thousand_are_summed_up_in_float32():
    """Beside 2^32, whose neighbours in float32 are 512 away, each further sum of some hundred ones would be rounded."""
    rows = torch.ones(1, 60_000, 200, dtype=torch.float32)
    rows[0, 0] = 2.0**16
    sums = MomentSums(1, 200)
    for piece in pieces(rows, [500]):
        sums.update(piece)
    assert (sums.moment(1) - (2.0**32 + 59_999)).abs().max() < 1500
