"""Linear layers as matrices, against loops over the leading indices."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from avalanche_gradproj.layers.rules import units_of

SETTINGS = settings(deadline=None, max_examples=25)


def matrix_of(weight, bias):
    """W [out, in (+ 1)] of numpy arrays, entry by entry."""
    out, features = weight.shape
    matrix = np.zeros((out, features + (bias is not None)))
    for i, j in itertools.product(range(out), range(features)):
        matrix[i, j] = weight[i, j]
    for i in range(out if bias is not None else 0):
        matrix[i, features] = bias[i]
    return matrix


@SETTINGS
@given(
    lead=st.lists(st.integers(1, 3), max_size=3),
    inputs=st.integers(1, 4),
    outputs=st.integers(1, 4),
    bias=st.booleans(),
)
def test_rows_weights_and_gradients(collect, lead, inputs, outputs, bias):
    layer = nn.Linear(inputs, outputs, bias=bias, dtype=torch.float64)
    (unit,) = units_of("fc", layer)
    assert (unit.name, unit.blocks, unit.out, unit.features) == ("fc", 1, outputs, inputs + bias)
    x = torch.randn(*lead, inputs, dtype=torch.float64)
    found = collect(layer, [unit], lambda: layer(x))

    rows = found.rows("fc")[0].numpy()
    expected = []
    for index in np.ndindex(*lead):
        expected.append([*x.numpy()[index], 1.0] if bias else list(x.numpy()[index]))
    np.testing.assert_array_equal(rows, np.array(expected))

    weight = layer.weight.detach().numpy()
    matrix = matrix_of(weight, layer.bias.detach().numpy() if bias else None)
    np.testing.assert_array_equal(unit.weights()[0].numpy(), matrix)
    output_rows = unit.output_rows(found.output)[0].detach().numpy()
    assert output_rows.shape == (len(rows), outputs)
    for row, index in enumerate(np.ndindex(*lead)):
        np.testing.assert_array_equal(output_rows[row], found.output.detach().numpy()[index])
    np.testing.assert_allclose(rows @ matrix.T, output_rows, atol=1e-13)

    gradient = matrix_of(layer.weight.grad.numpy(), layer.bias.grad.numpy() if bias else None)
    np.testing.assert_allclose(found.summed("fc")[0].numpy(), gradient, atol=1e-13)
    np.testing.assert_array_equal(unit.gradient()[0].numpy(), gradient)


def test_a_layer_used_twice_is_recorded_twice(collect):
    layer = nn.Linear(3, 3)
    (unit,) = units_of("fc", layer)
    x = torch.randn(4, 3)
    found = collect(layer, [unit], lambda: layer(torch.tanh(layer(x))))
    assert len(found.inputs["fc"]) == len(found.gradients["fc"]) == 2
    np.testing.assert_allclose(
        found.summed("fc")[0].numpy(), matrix_of(layer.weight.grad.numpy(), layer.bias.grad.numpy()), atol=1e-13
    )


def test_what_takes_no_gradient_stays_part_of_the_matrix():
    """The matrix is the same one whether its parameters are frozen now or not; what is frozen is never written."""
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    (unit,) = units_of("fc", layer)
    assert unit.features == 4
    before = layer.bias.clone()
    unit.write_weights(torch.ones(1, 2, 4))
    assert torch.equal(layer.weight, torch.ones(2, 3))
    assert torch.equal(layer.bias, before)
    layer.weight.requires_grad_(False)
    assert len(units_of("fc", layer)) == 1


def test_a_nameless_layer_has_plain_parameter_names():
    (unit,) = units_of("", nn.Linear(3, 2))
    assert [part.name for part in unit.slices] == ["weight", "bias"]


@pytest.mark.parametrize("bias", [True, False])
def test_written_weights_and_gradients_come_back(bias):
    layer = nn.Linear(3, 2, bias=bias)
    (unit,) = units_of("fc", layer)
    assert unit.gradient() is None
    matrix, gradient = torch.randn(1, 2, 3 + bias), torch.randn(1, 2, 3 + bias)
    parameters = list(layer.parameters())
    unit.write_weights(matrix)
    unit.write_gradient(gradient)
    assert all(a is b for a, b in zip(parameters, layer.parameters(), strict=True))
    assert torch.equal(layer.weight.detach(), matrix[0, :, :3])
    assert torch.equal(layer.weight.grad, gradient[0, :, :3])
    if bias:
        assert torch.equal(layer.bias.detach(), matrix[0, :, 3])
        assert torch.equal(layer.bias.grad, gradient[0, :, 3])
    assert torch.equal(unit.weights(), matrix)
    assert torch.equal(unit.gradient(), gradient)


def test_a_part_without_gradient_counts_as_zero():
    layer = nn.Linear(3, 2)
    (unit,) = units_of("fc", layer)
    layer.weight.grad = torch.randn(2, 3)
    assert torch.equal(unit.gradient()[0], torch.cat([layer.weight.grad, torch.zeros(2, 1)], dim=1))
    assert unit.matrix(lambda part: part.parameter.grad) is None
