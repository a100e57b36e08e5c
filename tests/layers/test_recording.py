"""Recording contexts: what they report, and that nothing of them remains."""

import functools
import random

import numpy as np
import pytest
import torch
from torch import nn

from avalanche_gradproj.layers.record import record, undisturbed, watch
from avalanche_gradproj.layers.select import cover


class Net(nn.Module):
    """Attention, a layer used twice, a layer called by keyword, in-place activations."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, dropout=0.1)
        self.twice = nn.Linear(4, 4)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        x = self.attention(x, x, x)[0]
        x = nn.functional.relu_(self.twice(x))
        x = self.twice(input=x).mul_(2)
        return self.drop(self.norm(self.conv(x.transpose(1, 2)).relu_()))


def hooks_of(model):
    """How many hooks of any kind a model's modules and parameters have, and which forwards are patched."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)
    parameters = sum(len(parameter._backward_hooks or ()) for parameter in model.parameters())
    patched = [module for module in model.modules() if "forward" in module.__dict__]
    return modules + parameters, patched


def traces(model):
    return hooks_of(model), torch.backends.mha.get_fastpath_enabled(), torch.nn.functional.linear


@pytest.fixture(params=[True, False], ids=["fused", "not fused"])
def _fast_path(request):
    torch.backends.mha.set_fastpath_enabled(request.param)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.usefixtures("_fast_path")
def test_nothing_remains():
    model = Net()
    before = traces(model)
    assert before[0] == (0, [])
    with record(cover(model).units, inputs=lambda unit, x: None):
        assert not torch.backends.mha.get_fastpath_enabled()
        assert hooks_of(model)[0] > 0
        model(torch.randn(2, 3, 4)).sum().backward()
    assert traces(model) == before


@pytest.mark.usefixtures("_fast_path")
@pytest.mark.parametrize("layer", ["attention.q_proj", "attention.out_proj", "twice"])
def test_nothing_remains_after_an_exception_inside(layer):
    model = Net()
    before = traces(model)

    def sink(unit, x):
        if unit.name == layer:
            raise KeyError(layer)

    with pytest.raises(KeyError), record(cover(model).units, inputs=sink):
        model(torch.randn(2, 3, 4))
    assert traces(model) == before


def test_nothing_remains_when_entering_fails():
    model = Net()
    units = cover(model).units
    units.insert(1, type("Broken", (), {"module": property(lambda self: 1 / 0)})())
    before = traces(model)
    with pytest.raises(ZeroDivisionError), record(units):
        pass
    assert traces(model) == before


def test_a_forward_of_the_instance_comes_back():
    layer = nn.MultiheadAttention(4, 2)
    mine = layer.forward = functools.partial(layer.forward, need_weights=False)
    with record(cover(nn.ModuleList([layer])).units):
        assert layer.forward is not mine
    assert layer.forward is mine


def test_contexts_nest():
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    outer, inner = [], []
    with record(cover(model).units, inputs=lambda unit, x: outer.append(x)):
        with record(cover(model).units, inputs=lambda unit, x: inner.append(x)):
            model(x)
        model(x)
    model(x)
    assert (len(outer), len(inner)) == (2, 1)


def test_recording_changes_neither_values_nor_gradients():
    model, x = Net().eval(), torch.randn(2, 3, 4)

    def run():
        model.zero_grad()
        output = model(x)
        output.square().sum().backward()
        return [output.detach(), *(parameter.grad.clone() for parameter in model.parameters())]

    plain = run()
    with record(cover(model).units, inputs=lambda unit, x: None, gradients=lambda unit, g: None):
        watched = run()
    for one, other in zip(plain, watched, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_calls_by_keyword_repeated_calls_and_in_place_activations(collect):
    """The gradient is the one at the layer's output, not behind the activation that overwrote it."""
    model, x = Net().eval(), torch.randn(2, 3, 4)
    units = [unit for unit in cover(model).units if unit.name in ("twice", "conv")]
    found = collect(model, units, lambda: model(x))
    assert len(found.inputs["twice"]) == 2
    for name, layer in (("twice", model.twice), ("conv", model.conv)):
        expected = torch.cat([layer.weight.grad.flatten(1), layer.bias.grad[:, None]], dim=1)
        torch.testing.assert_close(found.summed(name)[0], expected)


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph")
def test_recorded_tensors_have_no_graph():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4, requires_grad=True)
    seen = []
    with record(cover(model).units, inputs=lambda unit, x: seen.append(x), gradients=lambda unit, g: seen.append(g)):
        model(x).sum().backward(create_graph=True)
    assert len(seen) == 4
    assert not any(tensor.requires_grad for tensor in seen)


def test_gradients_are_not_asked_for_where_there_are_none():
    model = nn.Sequential(nn.Linear(4, 4))
    seen = []
    with torch.no_grad(), record(cover(model).units, gradients=lambda unit, g: seen.append(g)):
        model(torch.randn(2, 4))
    assert seen == []


def test_watch_tells_unit_input_output_and_columns():
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4)
    calls = []
    with watch(cover(model).units, lambda *call: calls.append(call)):
        output = model(x)
    ((unit, given, result, columns),) = calls
    assert unit.name == "0"
    assert given is x
    assert result is output
    assert columns == slice(None)


def disturbing(model, x):
    model(x)
    torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002


@pytest.mark.parametrize("fails", [True, False])
def test_undisturbed(fails):
    model, x = Net().train(), torch.randn(2, 3, 4)
    model(x).sum().backward()
    model.drop.eval()
    model.conv.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    gradients = {name: (p.grad, p.grad.clone()) for name, p in model.named_parameters()}
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        with undisturbed(model):
            assert not any(module.training for module in model.modules())
            assert not torch.is_grad_enabled()
            disturbing(model, x)
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert torch.is_grad_enabled()
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    for name, parameter in model.named_parameters():
        held, value = gradients[name]
        assert parameter.grad is held
        assert torch.equal(held, value)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), states[1], strict=True))  # noqa: NPY002
    assert random.getstate() == states[2]
