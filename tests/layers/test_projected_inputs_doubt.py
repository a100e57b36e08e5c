"""is_projected: true in the ordinary step, false as soon as anything else reached the weight."""

import pytest
import torch
from torch import nn

from tests.layers.dense_projection import IN, OUT, backward, dense, gradients, taken_over


def penalty(layer):
    return sum(parameter.square().sum() for parameter in layer.parameters())


def ordinary(layer, x):
    layer(x).square().sum().backward()


def ordinary_later(layer, x):
    """Several steps, gradients set to None between them, an evaluation in between."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            layer(x)
    optimizer.zero_grad()
    layer(x).square().sum().backward()


def two_forwards_one_used(layer, x):
    layer(x)
    layer(x).square().sum().backward()


def measured(layer, x):
    layer(x).square().sum().backward()
    torch.nn.utils.get_total_norm([parameter.grad for parameter in layer.parameters()])


ORDINARY = [ordinary, ordinary_later, two_forwards_one_used, measured]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("step", ORDINARY, ids=lambda step: step.__name__)
def test_true_in_the_ordinary_step(step, bias):
    layer = nn.Linear(IN, OUT, bias=bias)
    _, columns, inputs = taken_over(layer)
    with inputs.active():
        step(layer, torch.randn(4, IN))
        assert inputs.is_projected()
        assert abs(gradients(layer) @ columns).max() < 1e-12
        assert not inputs.is_projected(), "it forgets, so that nothing old is trusted"


def an_extra_term(layer, x):
    (layer(x).sum() + penalty(layer)).backward()


def an_extra_term_first(layer, x):
    (penalty(layer) + layer(x).sum()).backward()


def an_extra_term_on_the_weight(layer, x):
    (layer(x).sum() + layer.weight.square().sum()).backward()


def only_an_extra_term(layer, x):
    layer(x)
    penalty(layer).backward()


def a_separate_backward(layer, x):
    layer(x).sum().backward()
    penalty(layer).backward()


def a_separate_backward_first(layer, x):
    penalty(layer).backward()
    layer(x).sum().backward()


def used_twice(layer, x):
    (layer(x).square().sum() + layer(2 * x).sum()).backward()


def accumulated(layer, x):
    layer(x).square().sum().backward()
    layer(x + 1).square().sum().backward()


def accumulated_into_zeros(layer, x):
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    layer(x).square().sum().backward()


def replaced(layer, x):
    layer(x).square().sum().backward()
    layer.weight.grad = layer.weight.grad * 2


def replaced_by_data(layer, x):
    layer(x).square().sum().backward()
    layer.weight.grad.data = torch.randn(OUT, IN)


def changed_in_place(layer, x):
    layer(x).square().sum().backward()
    layer.weight.grad.add_(layer.weight.detach(), alpha=0.1)


def changed_bias_in_place(layer, x):
    layer(x).square().sum().backward()
    list(layer.parameters())[-1].grad.mul_(2)


def clipped(layer, x):
    layer(x).square().sum().backward()
    torch.nn.utils.clip_grad_norm_(layer.parameters(), 1e-3)


def set_to_none(layer, x):
    layer(x).square().sum().backward()
    layer.zero_grad()


def by_keyword(layer, x):
    layer(input=x).square().sum().backward()


def functional(layer, x):
    (layer(x).sum() + nn.functional.linear(x, layer.weight).square().sum()).backward()


DOUBTFUL = [
    an_extra_term,
    an_extra_term_first,
    an_extra_term_on_the_weight,
    only_an_extra_term,
    a_separate_backward,
    a_separate_backward_first,
    used_twice,
    accumulated,
    accumulated_into_zeros,
    replaced,
    replaced_by_data,
    changed_in_place,
    changed_bias_in_place,
    clipped,
    set_to_none,
    by_keyword,
    functional,
]
#: What these make of a projected gradient is not the projection of what they make of a plain one.
NOT_ADDITIVE = [replaced, replaced_by_data, changed_bias_in_place, clipped]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("step", DOUBTFUL, ids=lambda step: step.__name__)
def test_false_when_anything_else_reached_the_weight(step, bias):
    layer = nn.Linear(IN, OUT, bias=bias)
    x = torch.randn(4, IN)
    _, columns, inputs = taken_over(layer)
    torch.manual_seed(1)
    step(layer, x)
    expected = dense(gradients(layer), columns) if layer.weight.grad is not None else None
    layer.zero_grad()
    torch.manual_seed(1)
    with inputs.active():
        step(layer, x)
        assert not inputs.is_projected()
        if expected is not None and step not in NOT_ADDITIVE:
            assert abs(dense(gradients(layer), columns) - expected).max() < 1e-11
        # The next ordinary step is trusted again.
        layer.zero_grad()
        ordinary(layer, x)
        assert inputs.is_projected()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_falls_back(dtype):
    layer = nn.Linear(IN, OUT, dtype=torch.float32)
    _, _, inputs = taken_over(layer)
    x = torch.randn(4, IN, dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        plain = backward(layer, x)
        expected = gradients(layer)
        with inputs.active():
            taken = backward(layer, x)
            assert not inputs.is_projected()
    assert all(torch.equal(one, other) for one, other in zip(taken, plain, strict=True))
    assert (gradients(layer) == expected).all()


def test_nothing_happens_without_gradients():
    layer = nn.Linear(IN, OUT)
    _, _, inputs = taken_over(layer)
    with inputs.active(), torch.no_grad():
        output = layer(torch.randn(4, IN))
        assert output.grad_fn is None
        assert not output.requires_grad
        assert not inputs.is_projected()


def test_nothing_is_trusted_after_the_context():
    layer = nn.Linear(IN, OUT)
    _, _, inputs = taken_over(layer)
    with inputs.active():
        ordinary(layer, torch.randn(4, IN))
    assert not inputs.is_projected()


def test_a_backward_pass_after_the_context_is_projected_all_the_same():
    """The way back was laid inside the context; the proof needs no hook."""
    layer = nn.Linear(IN, OUT)
    _, columns, inputs = taken_over(layer)
    with inputs.active():
        loss = layer(torch.randn(4, IN)).square().sum()
    loss.backward()
    assert inputs.is_projected()
    assert abs(gradients(layer) @ columns).max() < 1e-12


@pytest.mark.parametrize("bias", [True, False])
def test_memory_that_is_used_again_is_no_proof(bias):
    """A gradient is formed and dropped (say, for an adversarial input); the one that stays comes another way."""
    for _ in range(40):  # until the allocator does it
        layer = nn.Linear(200, 100, bias=bias)
        _, columns, inputs = taken_over(layer)
        with inputs.active():
            x = torch.randn(4, 200, requires_grad=True)
            (step,) = torch.autograd.grad(layer(x).sum(), x)
            layer(input=(x + step).detach()).square().sum().backward()  # as in a batch with too many rows
            assert abs(gradients(layer) @ columns).max() > 1e-3
            assert not inputs.is_projected()


def test_a_gradient_put_where_the_old_one_lay_is_no_proof():
    layer = nn.Linear(200, 100, bias=False)
    _, _, inputs = taken_over(layer)
    with inputs.active():
        for _ in range(200):
            ordinary(layer, torch.randn(4, 200))
            address, layer.weight.grad = layer.weight.grad.data_ptr(), None
            others = [torch.ones_like(layer.weight) for _ in range(20)]
            for other in others:
                if other.data_ptr() == address:
                    layer.weight.grad = other
                    assert not inputs.is_projected()
            layer.zero_grad()


def test_a_change_through_data_goes_unseen():
    """The documented limit: `.grad.data` moves no version count; `trusted=False` is there to say so."""
    layer = nn.Linear(IN, OUT)
    _, _, inputs = taken_over(layer)
    with inputs.active():
        ordinary(layer, torch.randn(4, IN))
        layer.weight.grad.data.add_(layer.weight.data)
        assert inputs.is_projected()
