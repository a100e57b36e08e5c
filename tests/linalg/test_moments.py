"""RowStatistics against sums of outer products, one row after the other."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avalanche_gradproj.linalg.moments import RowStatistics, accumulation_dtype

SETTINGS = settings(deadline=None, max_examples=25)


def outer_products(rows: torch.Tensor) -> np.ndarray:
    """C = sum of a a^T for rows [blocks, n, d], by loops."""
    blocks, n, d = rows.shape
    values = rows.double().numpy()
    moment = np.zeros((blocks, d, d))
    for block in range(blocks):
        for row in range(n):
            for i in range(d):
                for j in range(d):
                    moment[block, i, j] += values[block, row, i] * values[block, row, j]
    return moment


@SETTINGS
@given(
    chunks=st.lists(st.integers(0, 7), min_size=1, max_size=5).filter(any),
    blocks=st.integers(1, 3),
    features=st.integers(1, 5),
    keep_rows=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_any_chunking_gives_the_rows_or_their_moment(chunks, blocks, features, keep_rows, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(blocks, sum(chunks), features, generator=generator)
    statistics = RowStatistics(blocks, features, keep_rows=keep_rows)
    for chunk in rows.split(chunks, dim=1):
        statistics.update(chunk)

    assert statistics.count == sum(chunks)
    if keep_rows and sum(chunks) <= features:
        assert statistics.moment is None
        assert torch.equal(statistics.rows, rows)
    else:
        assert statistics.rows is None
        np.testing.assert_allclose(statistics.moment.numpy(), outer_products(rows), rtol=1e-12, atol=1e-12)


def test_nothing_came():
    statistics = RowStatistics(2, 3)
    assert statistics.rows is None
    assert statistics.moment is None
    assert statistics.count == 0


def test_rows_are_kept_up_to_d_and_folded_from_the_next_one():
    rows = torch.randn(1, 5, 4)
    statistics = RowStatistics(1, 4)
    for row in rows[:, :4].split(1, dim=1):
        statistics.update(row)
        assert statistics.moment is None
    assert torch.equal(statistics.rows, rows[:, :4])
    statistics.update(rows[:, 4:])
    assert statistics.rows is None
    np.testing.assert_allclose(statistics.moment.numpy(), outer_products(rows), rtol=1e-13)


def test_memory_stays_bounded():
    blocks, features = 2, 6
    statistics = RowStatistics(blocks, features)
    for _ in range(50):
        statistics.update(torch.randn(blocks, 5, features))
        held = [tensor for tensor in (statistics.rows, statistics.moment) if tensor is not None]
        assert len(held) == 1
        assert held[0].numel() <= blocks * features**2
    assert statistics.count == 250


def test_blocks_are_not_mixed():
    rows = torch.zeros(2, 3, 2)
    rows[0, :, 0], rows[1, :, 1] = 1.0, 2.0
    statistics = RowStatistics(2, 2, keep_rows=False)
    statistics.update(rows)
    assert statistics.moment.tolist() == [[[3, 0], [0, 0]], [[0, 0], [0, 12]]]


def test_kept_rows_are_a_copy_without_a_graph():
    rows = torch.randn(1, 2, 4)
    source = rows.clone().requires_grad_()
    statistics = RowStatistics(1, 4)
    statistics.update(source)
    with torch.no_grad():
        source.zero_()
    assert torch.equal(statistics.rows, rows)
    assert not statistics.rows.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(dtype):
    rows = torch.randn(1, 6, 3).to(dtype)
    few, many = RowStatistics(1, 3), RowStatistics(1, 3)
    few.update(rows[:, :3])
    many.update(rows)
    assert few.rows.dtype == torch.float32
    assert torch.equal(few.rows, rows[:, :3].float())
    assert many.moment.dtype == torch.float64
    np.testing.assert_allclose(many.moment.numpy(), outer_products(rows), rtol=1e-13)


def test_float32_rows_are_summed_in_float64():
    """In float32 the ones would vanish beside 1e8."""
    rows = torch.tensor([1.0e4] + [1.0] * 40, dtype=torch.float32).reshape(1, -1, 1)
    statistics = RowStatistics(1, 1)
    for chunk in rows.split(1, dim=1):
        statistics.update(chunk)
    assert statistics.moment.item() == 1.0e8 + 40
    assert statistics.moment.dtype == torch.float64


def test_accumulation_dtype():
    assert accumulation_dtype(torch.device("cpu")) == torch.float64
    assert accumulation_dtype(torch.device("cuda")) == torch.float64
    assert accumulation_dtype(torch.device("mps")) == torch.float32
