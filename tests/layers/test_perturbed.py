"""Both routes of a perturbed layer against torch's own layer with a weight that loops formed, gradients included."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from avalanche_gradproj.layers import perturbed as module
from avalanche_gradproj.layers.perturbed import Factors, canonical, formed_weight, perturbed, prefers_formed

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NAMES = ("rows", "columns", "left", "right", "bias")

#: layer, and shape of its input
CASES = {
    "linear, one sample": (lambda bias: nn.Linear(5, 3, bias), (5,)),
    "linear": (lambda bias: nn.Linear(5, 3, bias), (4, 5)),
    "linear, rank 3": (lambda bias: nn.Linear(3, 6, bias), (2, 4, 3)),
    "linear, rank 4": (lambda bias: nn.Linear(3, 2, bias), (2, 1, 3, 3)),
    "linear, no sample": (lambda bias: nn.Linear(3, 2, bias), (0, 3)),
    "linear to one": (lambda bias: nn.Linear(1, 1, bias), (4, 1)),
    "conv1d": (lambda bias: nn.Conv1d(3, 4, 3, bias=bias), (2, 3, 8)),
    "conv1d, unbatched": (lambda bias: nn.Conv1d(2, 4, 3, 2, 1, bias=bias), (2, 7)),
    "conv1d, kernel 1": (lambda bias: nn.Conv1d(4, 6, 1, groups=2, bias=bias), (2, 4, 5)),
    "conv2d, padded": (lambda bias: nn.Conv2d(3, 4, 3, padding=(1, 2), bias=bias), (2, 3, 5, 4)),
    "conv2d, all": (
        lambda bias: nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 2), (2, 3), groups=2, bias=bias, padding_mode="circular"),
        (2, 4, 7, 6),
    ),
    "conv2d, depthwise": (lambda bias: nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=bias), (2, 4, 5, 5)),
    "conv2d, depthwise, wider": (lambda bias: nn.Conv2d(3, 6, 3, 2, groups=3, bias=bias), (2, 3, 5, 5)),
    "conv2d, same": (lambda bias: nn.Conv2d(2, 3, (2, 4), padding="same", dilation=2, bias=bias), (2, 2, 6, 7)),
    "conv2d, valid": (lambda bias: nn.Conv2d(2, 3, 3, 2, padding="valid", bias=bias), (2, 2, 6, 7)),
    "conv2d, reflected": (lambda bias: nn.Conv2d(2, 3, 3, padding=2, padding_mode="reflect", bias=bias), (2, 2, 4, 5)),
    "conv2d, same, replicated": (
        lambda bias: nn.Conv2d(2, 3, (4, 3), padding="same", padding_mode="replicate", bias=bias),
        (2, 2, 4, 5),
    ),
    "conv2d, unbatched": (lambda bias: nn.Conv2d(2, 4, 3, groups=2, padding=1, bias=bias), (2, 4, 4)),
    "conv2d, unbatched, reflected": (
        lambda bias: nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect", bias=bias),
        (2, 4, 4),
    ),
    "conv2d, no sample": (lambda bias: nn.Conv2d(2, 4, 3, bias=bias), (0, 2, 4, 4)),
    "conv2d, kernel 1": (lambda bias: nn.Conv2d(3, 4, 1, bias=bias), (2, 3, 4, 4)),
    "conv2d, kernel 1, same": (lambda bias: nn.Conv2d(3, 4, 1, padding="same", bias=bias), (2, 3, 4, 4)),
    "conv2d, kernel 1, valid": (lambda bias: nn.Conv2d(3, 4, 1, padding="valid", bias=bias), (2, 3, 4, 4)),
    "conv2d, kernel 1, strided": (lambda bias: nn.Conv2d(3, 4, 1, (1, 2), bias=bias), (2, 3, 4, 4)),
    "conv2d, kernel 1, padded": (lambda bias: nn.Conv2d(3, 4, 1, padding=1, bias=bias), (2, 3, 4, 4)),
    "conv2d, kernel 1, wrapped": (
        lambda bias: nn.Conv2d(3, 4, 1, padding=(0, 1), padding_mode="circular", bias=bias),
        (2, 3, 4, 4),
    ),
    "conv2d, kernel 1, dilated": (lambda bias: nn.Conv2d(3, 4, 1, dilation=2, bias=bias), (2, 3, 4, 4)),
    "conv3d": (lambda bias: nn.Conv3d(2, 4, (2, 1, 3), (1, 2, 1), (1, 0, 1), groups=2, bias=bias), (2, 2, 3, 4, 3)),
    "conv3d, unbatched": (lambda bias: nn.Conv3d(2, 2, 2, padding="same", bias=bias), (2, 3, 3, 3)),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
biases = pytest.mark.parametrize("bias", [True, False])
routes = pytest.mark.parametrize("route", ["factored", "formed", "auto"])


def random_factors(layer, *, rank=2):
    """Factors without any symmetry, each of which takes gradients."""
    groups = getattr(layer, "groups", 1)
    out, into = layer.weight.shape[0], layer.weight.shape[1]
    shapes = {
        "rows": (out,),
        "columns": (groups * into,),
        "left": (groups, out // groups, rank),
        "right": (groups, rank, into),
        "bias": None if layer.bias is None else (out,),
    }
    return Factors(**{n: None if s is None else torch.randn(s, requires_grad=True) for n, s in shapes.items()})


def slow_weight(layer, factors):
    """The perturbed weight, entry by entry."""
    weight = layer.weight.detach()
    own, into = weight.shape[0] // getattr(layer, "groups", 1), weight.shape[1]
    entries = []
    for index in np.ndindex(*weight.shape):
        o, i = index[:2]
        group = o // own
        entry = factors.rows[o] * weight[index] * factors.columns[group * into + i]
        for k in range(factors.left.shape[2]):
            entry = entry + factors.left[group, o % own, k] * factors.right[group, k, i]
        entries.append(entry)
    return torch.stack(entries).view(weight.shape)


def slow_output(layer, x, factors):
    """The output of torch's layer with that weight."""
    values = {"weight": slow_weight(layer, factors)}
    if factors.bias is not None:
        values["bias"] = factors.bias
    return functional_call(layer, values, (x,))


def inputs_of(factors, x):
    return {**{name: getattr(factors, name) for name in NAMES if getattr(factors, name) is not None}, "x": x}


def check(layer, x, factors, route):
    """Compare output and all gradients."""
    layer.weight.requires_grad_(False)
    expected, found = slow_output(layer, x, factors), perturbed(layer, x, factors, route)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found.detach(), expected.detach(), rtol=1e-10, atol=1e-10)
    inputs, cotangent = inputs_of(factors, x), torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, list(inputs.values()), cotangent)
    got = torch.autograd.grad(found, list(inputs.values()), cotangent)
    for name, one, other in zip(inputs, got, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-10, err_msg=name)


@cases
@biases
@routes
def test_output_and_gradients(case, bias, route):
    make, shape = case
    layer = make(bias)
    check(layer, torch.randn(shape, requires_grad=True), random_factors(layer), route)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), space=st.sampled_from([1, 1, 2, 2, 3]), route=st.sampled_from(["factored", "formed"]))
def test_any_convolution(data, space, route):
    def each(low, high):
        return tuple(data.draw(st.lists(st.integers(low, high), min_size=space, max_size=space)))

    sizes, kernel, dilation = each(3, 6 - space), each(1, 3), each(1, 2)
    padding = data.draw(st.sampled_from(["same", "valid", None]))
    stride = (1,) * space if padding == "same" else each(1, 2)
    padding = each(0, 2) if padding is None else padding
    mode = data.draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    for a in range(space):
        window = dilation[a] * (kernel[a] - 1)
        around = window - window // 2 if padding == "same" else 0 if padding == "valid" else padding[a]
        assume(around < sizes[a])
        assume(padding == "same" or sizes[a] + 2 * around > window)
    groups, into, out, rank = (data.draw(st.integers(1, n)) for n in (3, 2, 2, 3))
    options = {"padding_mode": mode, "bias": data.draw(st.booleans())}
    layer = CONVOLUTIONS[space](groups * into, groups * out, kernel, stride, padding, dilation, groups, **options)
    batch = data.draw(st.sampled_from([(), (1,), (2,)]))
    x = torch.randn(*batch, groups * into, *sizes, requires_grad=True)
    check(layer, x, random_factors(layer, rank=rank), route)


@cases
@pytest.mark.parametrize("route", ["factored", "formed"])
def test_in_single_precision(case, route):
    make, shape = case
    layer, x = make(True), torch.randn(shape)
    factors = random_factors(layer, rank=3)
    expected = slow_output(layer, x, factors).detach()
    single = Factors(**{name: getattr(factors, name).detach().float() for name in NAMES})
    found = perturbed(copy.deepcopy(layer).float(), x.float(), single, route).detach()
    assert found.dtype == torch.float32
    scale = expected.abs().max().item() if expected.numel() else 1.0
    np.testing.assert_allclose(found.double() / scale, expected / scale, rtol=0, atol=1e-5)


@cases
@pytest.mark.parametrize("route", ["factored", "formed"])
@pytest.mark.parametrize("zero", ["low rank", "scales", "left", "everything"])
def test_with_factors_that_are_all_zeros(case, zero, route):
    make, shape = case
    layer, x = make(True), torch.randn(shape, requires_grad=True)
    factors = random_factors(layer, rank=1)
    none = {
        "low rank": ("left", "right"),
        "scales": ("rows", "columns"),
        "left": ("left",),
        "everything": ("rows", "columns", "left", "right"),
    }
    with torch.no_grad():
        for name in none[zero]:
            getattr(factors, name).zero_()
    check(layer, x, factors, route)


@pytest.mark.parametrize("route", ["factored", "formed"])
@pytest.mark.parametrize("case", ["linear", "conv2d, all", "conv2d, depthwise", "conv2d, kernel 1"])
def test_what_perturbs_nothing_gives_the_layer(case, route):
    make, shape = CASES[case]
    layer, x = make(True), torch.randn(shape)
    groups = getattr(layer, "groups", 1)
    out, into = layer.weight.shape[:2]
    left, right = torch.zeros(groups, out // groups, 1), torch.zeros(groups, 1, into)
    factors = Factors(torch.ones(out), torch.ones(groups * into), left, right, layer.bias.detach())
    np.testing.assert_allclose(perturbed(layer, x, factors, route).detach(), layer(x).detach(), rtol=1e-12, atol=1e-12)


@cases
def test_formed_weight_and_canonical_shape(case):
    layer = case[0](False)
    factors = random_factors(layer, rank=3)
    found = formed_weight(layer, layer.weight, factors)
    np.testing.assert_allclose(found.detach(), slow_weight(layer, factors).detach(), rtol=1e-12, atol=1e-12)
    blocks = canonical(layer, layer.weight)
    groups, own = getattr(layer, "groups", 1), layer.weight.shape[0] // getattr(layer, "groups", 1)
    assert blocks.shape == (groups, own, layer.weight.shape[1], math.prod(layer.weight.shape[2:]))
    assert blocks.data_ptr() == layer.weight.data_ptr()
    for group in range(groups):
        for o in range(own):
            assert torch.equal(blocks[group, o].flatten(), layer.weight[group * own + o].flatten())


@cases
def test_the_factored_route_forms_no_weight(case, monkeypatch):
    monkeypatch.setattr(module, "formed_weight", None)
    layer, x = case[0](True), torch.randn(case[1], requires_grad=True)
    assert perturbed(layer, x, random_factors(layer), "factored").requires_grad


#: layer, input's shape, whether the weight is formed where gradients go through: in each * taps * 2 per output,
#: against 600 per number of input and output.
PREFERENCES = {
    "linear": (lambda: nn.Linear(4, 4), (2, 4), False),
    "wide linear": (lambda: nn.Linear(2000, 1), (2, 2000), False),
    "66 channels": (lambda: nn.Conv2d(66, 66, 3, padding=1), (2, 66, 2, 2), True),
    "67 channels": (lambda: nn.Conv2d(67, 67, 3, padding=1), (2, 67, 2, 2), False),
    "a tie": (lambda: nn.Conv1d(200, 200, 3, padding=1), (1, 200, 4), False),
    "depthwise": (lambda: nn.Conv2d(67, 67, 3, padding=1, groups=67), (2, 67, 2, 2), True),
    "few groups": (lambda: nn.Conv2d(132, 132, 3, padding=1, groups=2), (2, 132, 2, 2), True),
    "many outputs": (lambda: nn.Conv1d(400, 1199, 1), (1, 400, 4), True),  # 800 * 1199 < 600 * 1599
    "more outputs": (lambda: nn.Conv1d(400, 1200, 1), (1, 400, 4), False),
    "stride": (lambda: nn.Conv2d(166, 166, 3, 2, padding=1), (1, 166, 4, 4), True),  # 9 * 166 < 1500
    "stride, more": (lambda: nn.Conv2d(167, 167, 3, 2, padding=1), (1, 167, 4, 4), False),
}


@pytest.mark.parametrize("case", PREFERENCES.values(), ids=PREFERENCES)
@pytest.mark.parametrize("gradients", ["through", "not at the input", "off"])
def test_preferred_route(case, gradients, monkeypatch):
    make, shape, formed = case
    monkeypatch.setattr(module, "PASSES", 600)
    layer, x = make(), torch.randn(shape, requires_grad=gradients != "not at the input")
    if gradients != "through":
        formed = not isinstance(layer, nn.Linear)
    calls = []
    monkeypatch.setattr(module, "formed_weight", lambda *args: calls.append(args) or formed_weight(*args))
    with torch.set_grad_enabled(gradients != "off"):
        assert prefers_formed(layer, x) is formed
        perturbed(layer, x, random_factors(layer), "auto")
    assert len(calls) == formed
