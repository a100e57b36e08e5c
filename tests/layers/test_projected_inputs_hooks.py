"""ProjectedInputs beside other hooks, and that its own are gone afterwards."""

import pytest
import torch
from torch import nn

from avalanche_gradproj.layers.inputs import projected_inputs
from avalanche_gradproj.layers.rules import units_of
from tests.layers.dense_projection import IN, OUT, backward, dense, gradients, taken_over


def ordinary(layer, x):
    layer(x).square().sum().backward()


@pytest.mark.parametrize("before", [True, False], ids=["registered before", "registered inside"])
@pytest.mark.parametrize("change", [lambda g: 2 * g, lambda g: g.mul_(2), torch.sign], ids=["new", "in place", "sign"])
def test_false_when_a_hook_changes_the_gradient(before, change):
    layer = nn.Linear(IN, OUT, bias=False)
    _, _, inputs = taken_over(layer)
    if before:
        layer.weight.register_hook(change)
    with inputs.active():
        if not before:
            layer.weight.register_hook(change)
        ordinary(layer, torch.randn(4, IN))
        assert not inputs.is_projected()


def test_a_hook_that_only_looks_is_no_reason_for_doubt():
    layer = nn.Linear(IN, OUT)
    norms = []
    layer.weight.register_hook(lambda g: norms.append(g.norm().item()))
    _, _, inputs = taken_over(layer)
    with inputs.active():
        ordinary(layer, torch.randn(4, IN))
        assert inputs.is_projected()
    assert len(norms) == 1


@pytest.mark.parametrize("fails", [True, False])
def test_hooks_are_gone_afterwards(fails):
    layers = [nn.Linear(IN, IN), nn.Linear(IN, OUT)]
    taken = [taken_over(layer)[2] for layer in layers]
    x = torch.randn(4, IN)
    backward(layers[0], x)
    expected = gradients(layers[0])
    try:
        with projected_inputs(taken):
            assert all(layer._forward_hooks for layer in layers)
            ordinary(layers[0], x)
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    for layer in layers:
        assert not layer._forward_hooks
        assert not any(parameter._backward_hooks for parameter in layer.parameters())
    backward(layers[0], x)
    assert (gradients(layers[0]) == expected).all()
    assert not taken[0].is_projected()


def test_hooks_are_gone_when_entering_fails():
    layer = nn.Linear(IN, OUT)
    _, _, inputs = taken_over(layer)
    with pytest.raises(AttributeError), projected_inputs([inputs, None]):
        pass
    assert not layer._forward_hooks
    assert not layer.weight._backward_hooks


def test_another_hook_on_the_layer_keeps_its_effect():
    layer = nn.Linear(IN, OUT)
    layer.register_forward_hook(lambda module, args, output: 3 * output)
    x = torch.randn(4, IN)
    output, at_input = backward(layer, x)
    _, columns, inputs = taken_over(layer)
    expected = dense(gradients(layer), columns)
    with inputs.active():
        taken_output, taken_input = backward(layer, x)
    torch.testing.assert_close(taken_output, output)
    torch.testing.assert_close(taken_input, at_input)
    assert abs(dense(gradients(layer), columns) - expected).max() < 1e-12


@pytest.mark.parametrize("kind", ["pre", "behind", "full backward"])
def test_hooks_of_other_kinds_keep_their_effect(kind):
    layer = nn.Linear(IN, OUT)
    _, columns, inputs = taken_over(layer)
    x = torch.randn(4, IN)

    def hooked():
        if kind == "pre":
            return layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        if kind == "behind":
            return layer.register_forward_hook(lambda module, args, output: 3 * output)
        return layer.register_full_backward_hook(lambda module, at_input, at_output: (2 * at_input[0],))

    handle = hooked()
    output, at_input = backward(layer, x)
    expected = dense(gradients(layer), columns)
    handle.remove()
    with inputs.active():
        hooked()
        taken_output, taken_input = backward(layer, x)
        assert inputs.is_projected()
    torch.testing.assert_close(taken_output, output)
    torch.testing.assert_close(taken_input, at_input)
    assert abs(gradients(layer) - expected).max() < 1e-12


def test_units_for_this_route_are_linear_layers_only():
    assert units_of("fc", nn.Linear(2, 2))[0].input_route
    assert not units_of("conv", nn.Conv1d(2, 2, 1))[0].input_route
    assert not any(unit.input_route for unit in units_of("att", nn.MultiheadAttention(4, 2)))
