"""Weight gradients from projected inputs, against autograd's gradient projected densely."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from avalanche_gradproj.layers.inputs import projected_inputs
from avalanche_gradproj.linalg.projection import ROUTES
from tests.layers.dense_projection import IN, OUT, backward, dense, gradients, taken_over


@pytest.mark.parametrize("route", [*ROUTES, "auto"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (2, 2, 3)])
@pytest.mark.parametrize("rank", [0, 1, 3, "all"])
def test_gradients_are_the_dense_projection(route, bias, lead, rank):
    layer = nn.Linear(IN, OUT, bias=bias)
    _, columns, inputs = taken_over(layer, rank=IN + bias if rank == "all" else rank, route=route)
    x = torch.randn(*lead, IN)
    plain_output, plain_input = backward(layer, x)
    expected = dense(gradients(layer), columns)
    with inputs.active():
        output, at_input = backward(layer, x)
        assert torch.equal(output, plain_output)
        torch.testing.assert_close(at_input, plain_input, rtol=0, atol=1e-13)
        np.testing.assert_allclose(gradients(layer), expected, atol=1e-12)
        assert inputs.is_projected()
    if rank == 3:
        assert np.abs(expected @ columns).max() < 1e-12 < np.abs(expected).max()


@pytest.mark.parametrize("route", ROUTES)
def test_float32(route):
    layer = nn.Linear(40, 30, dtype=torch.float32)
    _, columns, inputs = taken_over(layer, rank=20, route=route)
    x = torch.randn(8, 40, dtype=torch.float32)
    backward(layer, x)
    expected = dense(gradients(layer), columns)
    with inputs.active():
        backward(layer, x)
        np.testing.assert_allclose(gradients(layer), expected, atol=1e-5 * np.abs(expected).max())
        assert inputs.is_projected()


def test_an_activation_may_overwrite_the_output():
    layer = nn.Linear(IN, OUT)
    _, columns, inputs = taken_over(layer)
    x, relu = torch.randn(4, IN), nn.ReLU(inplace=True)
    plain = backward(layer, x, lambda x: layer(x).relu())
    expected = dense(gradients(layer), columns)
    with inputs.active():
        for one, other in zip(backward(layer, x, lambda x: relu(layer(x))), plain, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-13)
        np.testing.assert_allclose(gradients(layer), expected, atol=1e-12)
        assert inputs.is_projected()


def test_layers_behind_each_other():
    model = nn.Sequential(nn.Linear(IN, 8), nn.Tanh(), nn.Linear(8, 7, bias=False), nn.ReLU(True), nn.Linear(7, 2))
    taken = {index: taken_over(model[index], rank=index + 1) for index in (0, 2, 4)}
    x = torch.randn(5, IN)
    _, plain = backward(model, x)
    expected = {index: dense(gradients(model[index]), columns) for index, (_, columns, _) in taken.items()}
    with projected_inputs(inputs for _, _, inputs in taken.values()):
        _, at_input = backward(model, x)
        torch.testing.assert_close(at_input, plain)
        for index, (_, _, inputs) in taken.items():
            np.testing.assert_allclose(gradients(model[index]), expected[index], atol=1e-12)
            assert inputs.is_projected()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers(reentrant):
    layer = nn.Linear(IN, OUT)
    _, columns, inputs = taken_over(layer)
    x = torch.randn(4, IN)
    _, plain = backward(layer, x)
    expected = dense(gradients(layer), columns)
    with inputs.active():
        _, at_input = backward(layer, x, lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    torch.testing.assert_close(at_input, plain)
    np.testing.assert_allclose(gradients(layer), expected, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph")
@pytest.mark.parametrize("bias", [True, False])
def test_double_backward_is_right_after_projection(bias):
    """A gradient penalty reaches the weight through the graph of the first backward pass, unprojected."""
    layer = nn.Linear(IN, OUT, bias=bias)
    _, columns, inputs = taken_over(layer)

    def penalised():
        layer.zero_grad()
        x = torch.linspace(-1, 1, 4 * IN).reshape(4, IN).requires_grad_()
        loss = layer(x).pow(3).sum()
        (at_input,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + at_input.square().sum()).backward()
        return x.grad

    plain = penalised()
    expected = dense(gradients(layer), columns)
    with inputs.active():
        torch.testing.assert_close(penalised(), plain)
        assert not inputs.is_projected()
    # Whoever sees that projects what came; what was projected already stays as it is.
    np.testing.assert_allclose(dense(gradients(layer), columns), expected, atol=1e-10)


def test_create_graph_gives_differentiable_gradients():
    layer = nn.Linear(IN, OUT)
    _, columns, inputs = taken_over(layer)
    x = torch.randn(4, IN, requires_grad=True)
    with inputs.active():
        (of_weight,) = torch.autograd.grad(layer(x).square().sum(), layer.weight, create_graph=True)
        (second,) = torch.autograd.grad(of_weight.sum(), x)
    # The same by hand: D^T (A - (A M) M^T) without its last column, D = 2 (A W^T).
    A = torch.cat([x, torch.ones(4, 1)], dim=1)
    M = torch.from_numpy(columns)
    D = 2 * (x @ layer.weight.T + layer.bias)
    (expected,) = torch.autograd.grad((D.T @ (A - A @ M @ M.T))[:, :IN].sum(), x)
    torch.testing.assert_close(second, expected)


@pytest.mark.parametrize("frozen", ["bias", "input"])
def test_parts_that_take_no_gradient(frozen):
    layer = nn.Linear(IN, OUT)
    _, columns, inputs = taken_over(layer)
    x = torch.randn(4, IN, requires_grad=frozen != "input")
    layer(x).sum().backward()
    expected = dense(gradients(layer), columns)
    layer.zero_grad()
    layer.bias.requires_grad_(frozen != "bias")
    with inputs.active():
        layer(x).sum().backward()
        assert inputs.is_projected()
    np.testing.assert_allclose(layer.weight.grad.numpy(), expected[:, :IN], atol=1e-12)
    assert (layer.bias.grad is None) == (frozen == "bias")


def test_the_monitor_sees_rows_and_gradients():
    layer = nn.Linear(IN, OUT)
    _, _, inputs = taken_over(layer)
    seen = []
    inputs.monitor = lambda rows, at_output: seen.append((rows.detach().clone(), at_output.clone()))
    x = torch.randn(2, 3, IN)
    with inputs.active():
        layer(x).square().sum().backward()
    ((rows, at_output),) = seen
    assert torch.equal(rows, x.reshape(6, IN))
    torch.testing.assert_close(at_output, 2 * layer(x).detach().reshape(6, OUT))


def test_worth_it_for_few_rows_and_many_outputs_only():
    large = nn.Linear(1000, 1000, bias=False)
    _, _, inputs = taken_over(large, rank=500, forced=False)
    assert inputs.worthwhile()
    assert inputs.cheaper(10)
    assert not inputs.cheaper(1000)
    assert not inputs.cheaper(2000)
    _, _, small = taken_over(nn.Linear(6, 5), forced=False)
    assert not small.worthwhile()
    x = torch.randn(1000, 1000)
    with inputs.active():
        large(x).sum().backward()
        assert not inputs.is_projected()
        large.zero_grad()
        large(x[:10]).sum().backward()
        assert inputs.is_projected()
