"""New coordinates leave the network's function as it was, and start BatchNorms from the new data; the balance."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from avalanche_gradproj.errors import DataError, NonFiniteError
from avalanche_gradproj.layers.merged import MergedUnit, merged_coverage
from avalanche_gradproj.layers.norm import batch_norms
from avalanche_gradproj.layers.select import cover
from avalanche_gradproj.methods.xkfac_balance import Balance
from avalanche_gradproj.methods.xkfac_reparameterise import ChannelMoments, reparameterise

PAIRS = [("0", "1"), ("3", "4")]
SIZES = [5, 11, 2, 17, 1]


def mlp():
    hidden = [nn.Linear(4, 6), nn.BatchNorm1d(6, 1e-3), nn.Tanh(), nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5, 0.1)]
    return nn.Sequential(*hidden, nn.ReLU(), nn.Linear(5, 3)), (4,)


def cnn():
    """Convolutions without biases, the second one grouped."""
    first = [nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)]
    second = [nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6, momentum=None), nn.ReLU(inplace=True)]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(96, 3)), (2, 6, 6)


NETS = pytest.mark.parametrize("make", [mlp, cnn])


def trained(make, dtype=torch.float64):
    """A network with statistics, scales and shifts of its own; old data and new data of another distribution."""
    torch.manual_seed(0)
    model, shape = make()
    model = model.to(dtype)
    for norm in batch_norms(model).values():
        for tensor in (norm.running_mean, norm.weight, norm.bias):
            nn.init.normal_(tensor)
        nn.init.uniform_(norm.running_var, 0.3, 3.0)
        norm.num_batches_tracked.fill_(7)
    old, new = torch.randn(20, *shape, dtype=dtype), torch.randn(sum(SIZES), *shape, dtype=dtype) * 2 + 1.5
    return model, old, new


def units_of(model, pairs=PAIRS):
    return [unit for unit in merged_coverage(cover(model), model, pairs).units if isinstance(unit, MergedUnit)]


def outputs(model, *data):
    with torch.no_grad():
        return torch.cat([model.eval()(x) for x in data])


def behind(model, name, x):
    """What the BatchNorm of a Sequential gives in evaluation, [channels, n]."""
    return outputs(model[: int(name) + 1], x).double().movedim(1, 0).flatten(1)


def state(model):
    return copy.deepcopy(model.state_dict())


def changed(model, before):
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


#: What changes of a pair without a bias.
CHANGES = {
    layer: {f"{layer}.weight", *(f"{norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var"))}
    for layer, norm in PAIRS
}


@NETS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
def test_the_function_is_unchanged_and_statistics_are_the_new_datas(make, dtype, tolerance):
    model, old, new = trained(make, dtype)
    before, wanted = outputs(model, old, new), {name: behind(model, name, new) for name in "14"}
    assert reparameterise(model, units_of(model), new.split(SIZES), model) == ["0", "3"]
    assert (outputs(model, old, new) - before).abs().max() <= tolerance * max(1, before.abs().max())
    for name, y in wanted.items():
        norm = model[int(name)]
        mean = y.sum(1) / y.shape[1]
        variance = (y - mean[:, None]).square().sum(1) / y.shape[1]
        close = {"rtol": 100 * tolerance, "atol": tolerance}
        torch.testing.assert_close(norm.bias.double(), mean, **close)
        torch.testing.assert_close(norm.weight.double(), (variance + norm.eps).sqrt(), **close)
        torch.testing.assert_close(norm.running_var.double(), variance, **close)
        assert norm.num_batches_tracked == (7 if norm.momentum else 0)
    # All the new data as one mini-batch: it is normalised, and training computes what evaluation does.
    for name, y in wanted.items():
        norm, got = model[int(name)], model.train()[: int(name) + 1](new).detach().double().movedim(1, 0).flatten(1)
        normal = (got - norm.bias.detach()[:, None]) / norm.weight.detach()[:, None]
        variance = y.var(1, correction=0)
        torch.testing.assert_close(normal.mean(1), torch.zeros_like(variance), rtol=0, atol=100 * tolerance)
        torch.testing.assert_close(normal.var(1, correction=0), variance / (variance + norm.eps), **close)
    assert (model(new) - before[len(old) :]).abs().max() <= 10 * tolerance * before.abs().max()


@NETS
def test_twice_in_a_row_is_once(make):
    model, _, new = trained(make)
    reparameterise(model, units_of(model), new.split(SIZES), model)
    before = state(model)
    assert reparameterise(model, units_of(model), new.split(9), model) == ["0", "3"]
    torch.testing.assert_close(state(model), before, rtol=1e-11, atol=1e-11)


def test_channels_without_scale_or_variance():
    model, old, new = trained(mlp)
    model[1].weight.data[1] = model[0].weight.data[2] = 0
    before, y = outputs(model, old, new), behind(model, "1", new)[1:3]
    assert y.var(1).max() < 1e-20
    reparameterise(model, units_of(model), new.split(SIZES), model)
    torch.testing.assert_close(outputs(model, old, new), before, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model[1].weight[1:3].detach(), torch.tensor([1e-3**0.5] * 2).double())
    torch.testing.assert_close(model[1].bias[1:3].detach(), y[:, 0])
    torch.testing.assert_close(model.train()(new).detach(), before[len(old) :], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.weight", "1.bias", "affine"])
def test_what_takes_no_gradient_is_left_alone(name):
    model, old, new = trained(mlp)
    if name == "affine":
        model[1] = nn.BatchNorm1d(6, affine=False).double()
    else:
        model.get_parameter(name).requires_grad_(False)
    before, function = state(model), outputs(model, old, new)
    assert reparameterise(model, units_of(model), new.split(SIZES), model) == ["3"]
    assert changed(model, before) == CHANGES["3"]
    torch.testing.assert_close(outputs(model, old, new), function, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_an_optimizer_forgets_changed_parameters_alone(name):
    model, _, new = trained(mlp)
    model[4].weight.requires_grad_(False)  # the second pair is left
    options = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01, **options)

    def step():
        F.cross_entropy(model(new), torch.arange(len(new)) % 3).backward()
        optimizer.step()

    step()
    before = {id(p): copy.deepcopy(remembered) for p, remembered in optimizer.state.items()}
    assert reparameterise(model, units_of(model, PAIRS[::-1]), new.split(SIZES), model, optimizer) == ["0"]
    dropped = {id(p) for p in (*model[0].parameters(), *model[1].parameters())}
    assert {id(p) for p in optimizer.state} == before.keys() - dropped
    assert len(before) - len(optimizer.state) == 4
    for parameter, remembered in optimizer.state.items():
        torch.testing.assert_close(remembered, before[id(parameter)], rtol=0, atol=0)
    step()
    assert len(optimizer.state) == len(before)


SPOILED = {
    "data": (lambda model, new: new[3].fill_(math.nan), "0"),
    "weight": (lambda model, new: model[3].weight.data[2].fill_(math.inf), "3"),
    "no variance": (lambda model, new: model[4].running_var.fill_(-model[4].eps), "3"),
}


@pytest.mark.parametrize(("spoil", "layer"), SPOILED.values(), ids=SPOILED)
def test_infinite_values_are_refused_and_nothing_changes(spoil, layer):
    model, _, new = trained(mlp)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    model(new).sum().backward()
    optimizer.step()
    spoil(model, new)
    before = {name: value.nan_to_num() for name, value in state(model).items()}
    with pytest.raises(NonFiniteError, match=f"layer '{layer}' merged with BatchNorm '{int(layer) + 1}'"):
        reparameterise(model, units_of(model), new.split(SIZES), model, optimizer)
    assert all(torch.equal(value.nan_to_num(), before[name]) for name, value in model.state_dict().items())
    assert len(optimizer.state) == len(list(model.parameters()))


def test_a_mini_batch_without_samples_adds_nothing():
    (model, _, new), (other, _, _) = trained(mlp), trained(mlp)
    reparameterise(model, units_of(model), new.split(SIZES), model)
    reparameterise(other, units_of(other), [new[:0], *new.split(SIZES), new[:0]], other)
    assert not changed(model, state(other))


def test_without_samples_nothing_changes():
    model, _, new = trained(mlp)
    before = state(model)
    with pytest.raises(DataError, match=r"layer '0' saw no sample.*BatchNorm '1'"):
        reparameterise(model, units_of(model), [], model)
    assert not changed(model, before)
    assert reparameterise(model, units_of(model), new.split(SIZES), model[:3]) == ["0"]
    assert changed(model, before) == CHANGES["0"] | {"0.bias"}


@pytest.mark.parametrize("fails", [False, True])
def test_everything_else_is_as_it_was(fails):
    model, _, new = trained(cnn)
    model.append(nn.BatchNorm1d(3).double())  # of no unit
    model.train()[4].eval()
    model[7].weight.grad = torch.ones_like(model[7].weight)
    before, modes, random = state(model), [m.training for m in model.modules()], torch.get_rng_state()
    calls = []

    def run(batch):
        assert not any(m.training for m in model.modules())
        assert not torch.is_grad_enabled()
        calls.append(len(batch[0]))
        model(batch[0] + 0.1 * torch.rand_like(batch[0]))
        if fails and len(calls) == 3:
            raise KeyError("broken")

    batches = ((x, "label") for x in new.split(SIZES))
    with pytest.raises(KeyError, match="broken") if fails else nullcontext():
        reparameterise(model, units_of(model), batches, run)
    assert changed(model, before) == (set() if fails else CHANGES["0"] | CHANGES["3"] | {"4.num_batches_tracked"})
    assert calls == SIZES[: 3 if fails else None]
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert [p.grad is None for p in model.parameters()].count(False) == 1


def test_moments_far_from_zero():
    moments, y = ChannelMoments(), torch.randn(36, 3, 2, dtype=torch.float64) + 1e7
    for part in y.split(SIZES):
        moments.update(part)
    expected = y.mean((0, 2)), (y - y.mean((0, 2), keepdim=True)).square().mean((0, 2))
    torch.testing.assert_close(moments.result(), expected, rtol=1e-6, atol=0)


def scalars(*values, dtype=torch.float64):
    return [torch.tensor(value, dtype=dtype) for value in values]


def test_scales_by_hand():
    balance, keep = Balance(time_constant=4), 0.75
    of_loss = of_penalty = None
    for loss, penalty in [(3.0, 1.0), (0.5, 2.5), (7.0, 0.25)]:
        of_loss = loss if of_loss is None else keep * of_loss + (1 - keep) * loss
        of_penalty = penalty if of_penalty is None else keep * of_penalty + (1 - keep) * penalty
        got = [scale.item() for scale in balance.scales(*scalars(loss, penalty))]
        total = of_loss + of_penalty
        assert got == pytest.approx([2 * of_loss / total, 2 * of_penalty / total], rel=1e-12)
        assert sum(got) == pytest.approx(2, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scales_of_equal_and_of_zero_terms(dtype):
    assert Balance().scales(*scalars(0.7, 0.7, dtype=dtype)) == (1.0, 1.0)
    assert Balance().scales(*scalars(0.7, 0.0, dtype=dtype)) == (2.0, 0.0)
    assert Balance().scales(*scalars(0.0, 1e-30, dtype=dtype)) == (0.0, 2.0)
    balance = Balance()
    for value in (0.0, math.nan, math.inf):
        assert balance.scales(*scalars(value, value, dtype=dtype)) == (1.0, 1.0)
    assert balance.scales(*scalars(0.0, 3.0, dtype=dtype)) == (0.0, 2.0)


def test_no_gradient_flows_through_scales():
    loss, penalty = (value.requires_grad_() for value in scalars(3.0, 1.0))
    sum(scale * term for scale, term in zip(Balance().scales(loss, penalty), (loss, penalty), strict=True)).backward()
    assert (loss.grad.item(), penalty.grad.item()) == (1.5, 0.5)


@pytest.mark.parametrize(("shared", "ratio"), [(False, 1.1), (True, 6.0)])
def test_terms_tend_to_similar_values(shared, ratio):
    """Two quadratics, of a weight each or both of one: 100 apart without scales."""

    def ratio_after(balance):
        w = torch.tensor([1.0, 0.1], dtype=torch.float64)
        for _ in range(400):
            w.requires_grad_()
            first, second = (10 * (w[0] - 1) ** 2, 0.1 * (w[0] + 1) ** 2) if shared else w.square()
            scales = (1.0, 1.0) if balance is None else balance.scales(first, second)
            (gradient,) = torch.autograd.grad(scales[0] * first + scales[1] * second, w)
            w = (w - 0.01 * gradient).detach()
        return max(first / second, second / first)

    assert ratio_after(Balance()) < ratio
    assert ratio_after(None) > 90
