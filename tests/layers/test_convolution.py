"""Convolutions as matrices, against loops over samples, positions, channels and kernel taps."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from avalanche_gradproj.layers import conv
from avalanche_gradproj.layers.rules import units_of

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def outside(index, size, mode):
    """Where a padded position reads: an index, or None for a zero."""
    if 0 <= index < size:
        return index
    if mode == "zeros":
        return None
    if mode == "reflect":
        return -index if index < 0 else 2 * (size - 1) - index
    if mode == "replicate":
        return 0 if index < 0 else size - 1
    return index % size


def explicit_rows(x, layer):
    """Rows [groups, n, features] of a batch x [n, channels, *space] of numpy, tap by tap, and the positions."""
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    sizes = x.shape[2:]
    before, after = [], []
    for axis in range(len(kernel)):
        if layer.padding == "same":
            total = dilation[axis] * (kernel[axis] - 1)
            before.append(total // 2)
            after.append(total - total // 2)
        else:
            both = 0 if layer.padding == "valid" else layer.padding[axis]
            before.append(both)
            after.append(both)
    positions = tuple(
        (sizes[a] + before[a] + after[a] - dilation[a] * (kernel[a] - 1) - 1) // stride[a] + 1
        for a in range(len(kernel))
    )
    own = layer.in_channels // layer.groups
    groups = []
    for group in range(layer.groups):
        rows = []
        for sample in range(len(x)):
            for position in np.ndindex(*positions):
                row = []
                for channel in range(group * own, (group + 1) * own):
                    for tap in np.ndindex(*kernel):
                        at = [
                            outside(
                                position[a] * stride[a] + tap[a] * dilation[a] - before[a],
                                sizes[a],
                                layer.padding_mode,
                            )
                            for a in range(len(kernel))
                        ]
                        row.append(0.0 if None in at else x[(sample, channel, *at)])
                rows.append([*row, 1.0] if layer.bias is not None else row)
        groups.append(rows)
    return np.array(groups), positions


def explicit_matrix(weight, bias, groups):
    """[groups, out/groups, features (+ 1)] from a kernel [out, in/groups, *kernel]."""
    own = len(weight) // groups
    blocks = []
    for group in range(groups):
        rows = []
        for out in range(group * own, (group + 1) * own):
            row = [weight[(out, *index)] for index in np.ndindex(*weight.shape[1:])]
            rows.append(row if bias is None else [*row, bias[out]])
        blocks.append(rows)
    return np.array(blocks)


def check(collect, layer, x):
    """Compare everything that a unit says about a layer with the loops."""
    (unit,) = units_of("conv", layer)
    found = collect(layer, [unit], lambda: layer(x))
    batch = x if x.dim() == len(layer.kernel_size) + 2 else x[None]
    output = found.output if x is batch else found.output[None]
    expected, positions = explicit_rows(batch.numpy(), layer)
    assert tuple(output.shape[2:]) == positions
    rows = found.rows("conv").numpy()
    assert rows.shape == (unit.blocks, len(batch) * math.prod(positions), unit.features)
    np.testing.assert_array_equal(rows, expected)

    bias = layer.bias is not None
    weights = explicit_matrix(
        layer.weight.detach().numpy(), layer.bias.detach().numpy() if bias else None, layer.groups
    )
    assert (unit.blocks, unit.out) == weights.shape[:2]
    np.testing.assert_array_equal(unit.weights().numpy(), weights)
    own = layer.out_channels // layer.groups
    output_rows = unit.output_rows(found.output).detach().numpy()
    for group in range(layer.groups):
        row = 0
        for sample in range(len(batch)):
            for position in np.ndindex(*positions):
                channels = slice(group * own, (group + 1) * own)
                at = output.detach().numpy()[(sample, channels, *position)]
                np.testing.assert_array_equal(output_rows[group, row], at)
                np.testing.assert_allclose(weights[group] @ expected[group, row], at, atol=1e-12)
                row += 1
        assert row == output_rows.shape[1]
    gradient = explicit_matrix(layer.weight.grad.numpy(), layer.bias.grad.numpy() if bias else None, layer.groups)
    np.testing.assert_allclose(found.summed("conv").numpy(), gradient, atol=1e-12)
    np.testing.assert_array_equal(unit.gradient().numpy(), gradient)


@settings(deadline=None, max_examples=50)
@given(data=st.data(), space=st.sampled_from([1, 1, 2, 2, 3]), bias=st.booleans())
def test_any_convolution(collect, data, space, bias):
    def each(low, high):
        return tuple(data.draw(st.lists(st.integers(low, high), min_size=space, max_size=space)))

    sizes, kernel = each(3, 6 - space), each(1, 3)
    dilation = each(1, 2)
    padding = data.draw(st.sampled_from(["same", "valid", None]))
    stride = (1,) * space if padding == "same" else each(1, 2)
    padding = each(0, 2) if padding is None else padding
    mode = data.draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    for a in range(space):
        window = dilation[a] * (kernel[a] - 1)
        around = window - window // 2 if padding == "same" else 0 if padding == "valid" else padding[a]
        assume(around < sizes[a])
        assume(padding == "same" or sizes[a] + 2 * around > window)
    groups, in_each, out_each = (data.draw(st.integers(1, n)) for n in (3, 2, 2))
    layer = CONVOLUTIONS[space](
        groups * in_each,
        groups * out_each,
        kernel,
        stride,
        padding,
        dilation,
        groups,
        bias,
        mode,
        dtype=torch.float64,
    )
    batch = data.draw(st.sampled_from([(), (1,), (2,)]))
    check(collect, layer, torch.randn(*batch, groups * in_each, *sizes, dtype=torch.float64))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(("kernel", "dilation"), [((2, 4), 1), ((4, 3), (1, 2)), ((2, 2), 3)])
def test_same_padding_of_even_kernels_is_longer_behind(collect, kernel, dilation, mode):
    layer = nn.Conv2d(2, 4, kernel, padding="same", dilation=dilation, groups=2, padding_mode=mode)
    check(collect, layer, torch.randn(2, 2, 5, 6))


def test_a_depthwise_strided_and_dilated_convolution(collect):
    layer = nn.Conv2d(4, 8, (3, 2), stride=(2, 3), padding=(2, 1), dilation=(2, 1), groups=4)
    check(collect, layer, torch.randn(3, 4, 6, 7))


@pytest.mark.parametrize("numbers", [1, 100, 1000])
def test_rows_in_chunks_are_the_same_rows(monkeypatch, numbers):
    layer = nn.Conv2d(4, 6, 3, padding=1, groups=2)
    (unit,) = units_of("conv", layer)
    x = torch.randn(5, 4, 4, 4)
    monkeypatch.setattr(conv, "CHUNK_NUMBERS", numbers)
    chunks = list(unit.rows(x))
    assert (len(chunks) > 1) or numbers == 1000
    np.testing.assert_array_equal(torch.cat(chunks, dim=1).numpy(), explicit_rows(x.numpy(), layer)[0])


def test_written_weights_and_gradients_come_back():
    layer = nn.Conv2d(4, 6, (2, 3), groups=2)
    (unit,) = units_of("conv", layer)
    matrix, gradient = torch.randn(2, 3, 13), torch.randn(2, 3, 13)
    unit.write_weights(matrix)
    unit.write_gradient(gradient)
    for value, parts in ((matrix, (layer.weight.detach(), layer.bias.detach())), (gradient, None)):
        weight, bias = parts or (layer.weight.grad, layer.bias.grad)
        np.testing.assert_array_equal(explicit_matrix(weight.numpy(), bias.numpy(), 2), value.numpy())


def test_without_bias_the_gradient_tensor_is_handed_over():
    layer = nn.Conv2d(2, 3, 2, bias=False)
    (unit,) = units_of("conv", layer)
    gradient = torch.randn(1, 3, 8)
    unit.write_gradient(gradient)
    assert layer.weight.grad.data_ptr() == gradient.data_ptr()
    np.testing.assert_array_equal(explicit_matrix(layer.weight.grad.numpy(), None, 1), gradient.numpy())


def test_an_empty_batch_has_no_rows():
    (unit,) = units_of("conv", nn.Conv2d(2, 3, 3, padding=1))
    assert sum(rows.shape[1] for rows in unit.rows(torch.randn(0, 2, 5, 5))) == 0
