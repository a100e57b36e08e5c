"""Merged units: a layer and the BatchNorm behind it as one matrix; what watches, holds and freezes BatchNorms."""

import copy
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from avalanche_gradproj.errors import DataError
from avalanche_gradproj.layers.merged import MergedUnit, affine, merge, merged_coverage, watch_entering
from avalanche_gradproj.layers.norm import batch_norms, batch_statistics, frozen, held_statistics
from avalanche_gradproj.layers.rules import units_of
from avalanche_gradproj.layers.select import cover

#: The layer's type, arguments and options; the BatchNorm; the shape of an input.
KINDS = {
    "linear": (nn.Linear, (3, 4), {}, nn.BatchNorm1d(4, 0.01), (7, 3)),
    "tokens": (nn.Linear, (3, 4), {}, nn.BatchNorm1d(4), (3, 5, 3)),
    "conv1d": (nn.Conv1d, (2, 4, 3), {"stride": 2}, nn.BatchNorm1d(4, 0.01), (4, 2, 7)),
    "conv2d": (nn.Conv2d, (3, 4, (2, 3)), {"padding": 1}, nn.BatchNorm2d(4, 0.01), (3, 3, 4, 3)),
    "groups": (nn.Conv2d, (4, 6, 2), {"groups": 2}, nn.BatchNorm2d(6), (3, 4, 3, 3)),
    "conv3d": (nn.Conv3d, (2, 4, 2), {"groups": 2}, nn.BatchNorm3d(4, 0.1), (2, 2, 3, 2, 3)),
}
OPERATIONS = {nn.Linear: F.linear, nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
every_kind = pytest.mark.parametrize("kind", KINDS)
both = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])


def live(norm):
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.3, 3.0)
    if norm.affine:
        nn.init.normal_(norm.weight).data[1] = 0  # and scales of both signs
        nn.init.normal_(norm.bias)
    return norm


def pair(kind, bias=True, affine=True):
    """A layer, a BatchNorm, their unit, an input, and the layer's operation; tokens are swapped behind it."""
    make, sizes, options, norm, shape = KINDS[kind]
    layer = make(*sizes, **options, bias=bias)
    norm = live(type(norm)(norm.num_features, norm.eps, affine=affine))
    unit = merge(units_of("layer", layer)[0], "norm", norm)

    def operation(x, weight, bias):
        y = OPERATIONS[make](x, weight, bias, **options)
        return y.transpose(1, 2) if kind == "tokens" else y

    return layer, norm, unit, torch.randn(shape) * 2 + 0.5, operation


@every_kind
@both
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_weights_are_those_of_torchs_fusion(kind, bias, affine, dtype):
    layer, norm, unit, _, _ = pair(kind, bias, affine)
    layer.to(dtype).eval(), norm.to(dtype).eval()
    full = type(norm)(norm.num_features, norm.eps, dtype=dtype).eval()  # torch fuses no Linear layer without a scale
    full.load_state_dict(norm.state_dict(), strict=affine)
    fused = (fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval)(layer, full)
    tolerance = {"rtol": 1e-12, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(unit.tensors(), (fused.weight.data, fused.bias.data), **tolerance)
    groups, matrix = getattr(layer, "groups", 1), unit.weights()
    columns = torch.cat([fused.weight.flatten(1), fused.bias[:, None]], dim=1).detach()
    torch.testing.assert_close(matrix.flatten(0, 1), columns, **tolerance)
    assert (matrix.requires_grad, unit.blocks, matrix.shape) == (False, groups, (groups, unit.out, unit.features))
    assert {id(p) for p in unit.parameters} == {id(p) for p in (*layer.parameters(), *norm.parameters())}


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv1, self.bn1 = nn.Conv2d(6, 6, 3, padding=1, groups=3, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6, affine=False)
        self.short, self.bn3 = nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.bn0(self.stem(x)))
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.bn3(self.short(x)))
        return self.fc(x.mean((2, 3)))


def mlp():
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6, bias=False), nn.BatchNorm1d(6))


def cnn():
    first = [nn.Conv1d(2, 4, 3, bias=False), nn.BatchNorm1d(4), nn.ReLU()]
    return nn.Sequential(*first, nn.Conv1d(4, 6, 2, groups=2), nn.BatchNorm1d(6))


RESIDUAL = {"stem": "bn0", "conv1": "bn1", "conv2": "bn2", "short": "bn3"}
NETS = [(mlp, (9, 5), {"0": "1", "3": "4"}), (cnn, (9, 2, 7), {"0": "1", "3": "4"}), (Residual, (9, 2, 6, 6), RESIDUAL)]


@pytest.mark.parametrize(("make", "shape", "pairs"), NETS, ids=["mlp", "cnn", "residual"])
def test_merged_and_unmerged_networks_agree_in_evaluation(make, shape, pairs):
    model = make()
    _ = [live(norm) for norm in batch_norms(model).values()]
    model.float().eval()
    replaced = copy.deepcopy(model)
    for unit in merged_coverage(cover(model), model, pairs.items()).units:
        if isinstance(unit, MergedUnit):
            layer, matrix = replaced.get_submodule(unit.name), unit.weights()
            layer.weight = nn.Parameter(matrix[:, :, :-1].reshape(layer.weight.shape))
            layer.bias = nn.Parameter(matrix[:, :, -1].reshape(-1))
            replaced.set_submodule(unit.norm_name, nn.Identity())
    assert not batch_norms(replaced)
    x = torch.randn(shape, dtype=torch.float32)
    output = model(x)
    assert (output - replaced(x)).abs().max() <= 1e-6 * max(1, output.abs().max())


@every_kind
@both
@pytest.mark.parametrize("training", [True, False], ids=["mini-batch", "running"])
def test_gradients_are_those_of_the_formula_written_out(kind, bias, training):
    layer, norm, unit, x, operation = pair(kind, bias)
    x.requires_grad_()
    inputs = [layer.weight, norm.weight, norm.bias, *[x] * training, *[layer.bias] * bias]
    weight, shift = unit.tensors(operation(x, layer.weight, layer.bias) if training else None)
    c, d = torch.randn_like(weight), torch.randn_like(shift)
    found = torch.autograd.grad((c * weight.sin()).sum() + (d * shift.square()).sum(), inputs)

    h = operation(x, layer.weight, None).movedim(1, -1).flatten(0, -2)  # a bias cancels
    mean, s = norm.running_mean - (layer.bias if bias else 0), (norm.running_var + norm.eps).sqrt()
    if training:
        mean = sum(h) / len(h)
        s = (sum((row - mean) ** 2 for row in h) / len(h) + norm.eps).sqrt()
    rows = (norm.weight / s)[:, None] * layer.weight.flatten(1)
    value = (c.flatten(1) * rows.sin()).sum() + (d * (norm.bias - norm.weight * mean / s) ** 2).sum()
    expected = torch.autograd.grad(value, inputs, allow_unused=True)
    for tensor, one, other in zip(inputs, found, expected, strict=True):
        assert (other is None) == (training and tensor is layer.bias)
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other)


@every_kind
@both
def test_in_training_it_is_what_the_batch_norm_computes(kind, bias):
    layer, norm, unit, x, operation = pair(kind, bias)
    norm.train()
    output = norm(operation(x, layer.weight, layer.bias))
    torch.testing.assert_close(operation(x, *unit.tensors(operation(x, layer.weight, layer.bias))), output)
    assert (operation(x, *unit.tensors()) - output).abs().max() > 1e-2


def test_statistics_of_narrow_types_are_taken_in_float32():
    norm, h = live(nn.BatchNorm1d(3)).float(), (torch.randn(200, 3) * 0.5 + 20).bfloat16()
    expected = norm.weight.double() / (h.double().var(0, correction=0) + norm.eps).sqrt()
    torch.testing.assert_close(affine(norm, h)[0].double(), expected, rtol=1e-5, atol=0)


@every_kind
@both
def test_rows_and_output_rows_are_those_of_the_matrix(kind, bias):
    layer, norm, unit, x, operation = pair(kind, bias)
    with torch.no_grad():
        rows = torch.cat(list(unit.rows(x)), dim=1)
        y = norm.eval()(operation(x, layer.weight, layer.bias))
    assert rows.shape[::2] == (unit.blocks, unit.features)
    assert bool((rows[:, :, -1] == 1).all())
    torch.testing.assert_close(rows @ unit.weights().mT, unit.output_rows(y))
    (weight, shift), delta = (tensor.detach().requires_grad_() for tensor in unit.tensors()), torch.randn_like(y)
    gradients = torch.autograd.grad(operation(x, weight, shift), (weight, shift), delta)
    found = unit.output_rows(delta).mT @ rows
    torch.testing.assert_close(found[:, :, :-1].reshape(weight.shape), gradients[0])
    torch.testing.assert_close(found[:, :, -1].reshape(-1), gradients[1])


def test_recorded_rows_give_the_gradient_of_the_merged_weight(collect):
    model = Residual().eval()
    _ = [live(norm) for norm in batch_norms(model).values()]
    units = merged_coverage(cover(model), model, RESIDUAL.items()).units
    found = collect(model, units, lambda: model(torch.randn(3, 2, 5, 5)))
    for unit in units[:-1]:
        scale = (unit.norm.running_var + unit.norm.eps).rsqrt() * (1 if unit.norm.weight is None else unit.norm.weight)
        expected = scale.view(-1, 1) * found.summed(unit.name)[:, :, :-1].reshape(len(scale), -1)
        torch.testing.assert_close(unit.module.weight.grad.flatten(1), expected.detach())


@pytest.mark.parametrize("uncovered", ["freeze", "train"])
def test_coverage_of_pairs(uncovered):
    model = Residual()
    model.bn1.requires_grad_(False)
    coverage = cover(model, exclude=["short"], heads=["fc"], uncovered=uncovered)
    before = copy.copy(coverage.units), copy.copy(coverage.frozen), dict(coverage.alone)
    found = merged_coverage(coverage, model, [("stem", "bn0"), ("conv1", "bn1"), ("short", "bn3"), ("conv2", "fc")])
    assert (coverage.units, coverage.frozen, coverage.alone) == before
    assert found.parameters is coverage.parameters
    assert [(unit.name, unit.norm_name) for unit in found.units[:2]] == [("stem", "bn0"), ("conv1", "bn1")]
    assert found.units[2:] == coverage.units[2:]  # conv2: its norm is no BatchNorm
    rest = ["bn3.weight", "bn3.bias"]  # its layer is not covered
    assert found.frozen == (rest if uncovered == "freeze" else [])
    alone = {"short.weight", "fc.weight", "fc.bias", *(rest if uncovered == "train" else [])}
    assert found.alone == {name: coverage.alone[name] for name in alone}


def state_of(model):
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    return [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()], hooks


def moved(model, before):
    after = model.state_dict()
    return [key for key, value in before.items() if key not in after or not torch.equal(value, after[key])]


def test_watch_entering():
    model, entered, wanted = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), {}, False
    unit, x, before = merge(units_of("0", model[0])[0], "1", model[1]), torch.randn(4, 2), state_of(model)
    with watch_entering([unit], entered, lambda name: wanted and name == "1"):
        model(x)
        wanted = True
        model.eval()(x), model(x[:1])
        with torch.no_grad():
            model.train()(x)
        assert not entered
        model(x + 1)
        model[1](input=model[0](x))
        assert torch.equal(entered["1"], model[0](x))
        entered["1"].sum().backward()
        assert torch.equal(model[0].weight.grad, x.sum(0).expand(3, 2))
        with pytest.raises(DataError, match=r"BatchNorm '1'.*one sample"):
            model(x[:1])
        model[1](torch.randn(1, 3, 2))  # one sample with positions has a variance
    with suppress(KeyError), watch_entering([unit], entered, lambda name: True):
        raise KeyError
    assert state_of(model) == before


def test_batch_statistics_and_held_statistics_restore_everything():
    model = nn.Sequential(live(nn.BatchNorm1d(3)), live(nn.BatchNorm1d(3, momentum=None)), nn.BatchNorm1d(3))
    statistics, x = copy.deepcopy(model.state_dict()), torch.randn(9, 3) * 3 + 1
    normal = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
    with suppress(KeyError), batch_statistics([model[0], model[0], model[1]]):
        torch.testing.assert_close(model[0].eval()(x), normal * model[0].weight + model[0].bias)
        assert not torch.equal(model[2].eval()(x), normal)
        raise KeyError
    model[:2].train()
    before = state_of(model)
    with suppress(KeyError), held_statistics(model, [model[0], model[2]]):
        model[0](x)
        assert [norm.training for norm in model] == [False, True, False]
        raise KeyError
    assert state_of(model) == before
    assert not moved(model, statistics)


@pytest.mark.parametrize("zeroed", [False, True])
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad"])
def test_no_optimizer_moves_what_is_frozen(name, zeroed):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3), nn.BatchNorm1d(3))
    model[4].bias.requires_grad_(False)
    momentum = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1, weight_decay=0.1, **momentum)

    def step():
        before = copy.deepcopy(model.state_dict())
        optimizer.zero_grad(set_to_none=not zeroed)
        model(torch.randn(8, 3)).square().sum().backward()
        optimizer.step()
        return [key for key in moved(model, before) if "num" not in key]

    everything, before = [key for key in model.state_dict() if key != "4.bias" and "num" not in key], state_of(model)
    assert step() == step() == everything
    optimizer.zero_grad(set_to_none=not zeroed)
    with suppress(KeyError), frozen(model, [model[1], model[4]]):
        model.train()
        assert [step() for _ in range(3)] == [["0.weight", "0.bias", "3.weight", "3.bias"]] * 3
        raise KeyError
    assert state_of(model) == before
    assert step() == everything
