"""Packed tensors: the entries that are not 0, a bit for each place, and back without a change."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avalanche_gradproj.linalg.packed import pack, unpack

SHAPES = [(), (1,), (7,), (8,), (9,), (16,), (3, 5), (2, 4), (4, 1, 6), (1, 257), (2, 3, 2, 2), (0,), (3, 0, 2)]
DTYPES = [torch.float32, torch.float64]


def bits_of(tensor):
    """Each entry's bytes, so that NaN is NaN and 0 is not -0."""
    return tensor.detach().contiguous().numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip(shape, share, dtype):
    generator = np.random.default_rng(len(shape))
    array = np.array(generator.normal(size=shape))
    array[generator.random(shape) >= share] = 0
    tensor = torch.from_numpy(array).to(dtype)
    values, bits = pack(tensor)
    assert values.dtype == dtype
    assert values.tolist() == [value for value in tensor.flatten().tolist() if value != 0]
    assert bits.dtype == torch.uint8
    assert bits.shape == (math.ceil(tensor.numel() / 8),)
    assert sum(byte.bit_count() for byte in bits.tolist()) == len(values)
    again = unpack(values, bits, shape)
    assert again.shape == shape
    assert again.dtype == dtype
    assert bits_of(again) == bits_of(tensor)


def test_every_byte_is_told_apart():
    patterns = torch.tensor([[(pattern >> place) & 1 for place in range(8)] for pattern in range(256)])
    tensor = patterns * torch.arange(1.0, 2049).view(256, 8)
    values, bits = pack(tensor)
    assert len(set(bits.tolist())) == 256
    assert torch.equal(unpack(values, bits, (256, 8)), tensor)
    for row in tensor:
        assert torch.equal(unpack(*pack(row), (8,)), row)


@settings(deadline=None)
@given(values=st.lists(st.floats(width=32), max_size=40))
def test_any_numbers_but_the_sign_of_zeros(values):
    tensor = torch.tensor(values, dtype=torch.float32)
    expected = torch.where(tensor == 0, torch.tensor(0.0, dtype=torch.float32), tensor)
    assert bits_of(unpack(*pack(tensor), tuple(tensor.shape))) == bits_of(expected)


@pytest.mark.parametrize(("size", "kept"), [(1000, 10), (1001, 0), (64, 64), (0, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_are_those_of_the_entries_and_an_eighth_for_each_place(size, kept, dtype):
    tensor = torch.zeros(size, dtype=dtype)
    tensor[torch.randperm(size)[:kept]] = 1.5
    values, bits = pack(tensor)
    stored = sum(part.untyped_storage().nbytes() for part in (values, bits))
    assert stored == kept * (4 if dtype == torch.float32 else 8) + -(-size // 8)


def test_of_a_transposed_parameter_in_its_own_order():
    tensor = torch.nn.Parameter(torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 4.0]])).T
    values, bits = pack(tensor)
    assert values.tolist() == [1.0, 3.0, 2.0, 4.0]
    assert not values.requires_grad
    assert torch.equal(unpack(values, bits, (3, 2)), tensor.detach())


def test_neither_shares_memory_with_what_it_came_from():
    tensor = torch.tensor([1.0, 0.0, 2.0])
    values, bits = pack(tensor)
    again = unpack(values, bits, (3,))
    tensor.fill_(9.0)
    assert values.tolist() == [1.0, 2.0]
    again.fill_(8.0)
    assert values.tolist() == [1.0, 2.0]
