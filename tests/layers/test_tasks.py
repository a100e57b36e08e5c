"""Layers with parameters for every task: what is selected, what is stored, and that a saved state comes back."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import nn

from avalanche_gradproj.layers.perturbed import Factors, perturbed
from avalanche_gradproj.layers.tasks import OwnLayer, PackedPerturbation, Perturbation, PerturbedLayer, Selection

X = np.random.default_rng(0).normal(size=(5, 4, 6, 6))
#: Labels as a stream may give them: neither in order nor from 0.
FIRST, OTHERS = 3, (0, 12, 7)


class Net(nn.Module):
    """Convolutions with groups and without a bias, norm layers, two Linear layers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, 2, 1, groups=2)
        self.norm = nn.BatchNorm2d(6)
        self.deep = nn.Conv2d(6, 5, 2, bias=False)
        self.plain = nn.BatchNorm2d(5, affine=False)
        self.fc = nn.Linear(20, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.relu(self.fc(self.plain(self.deep(self.norm(self.conv(x)))).flatten(1))))


def randomised(layer):
    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 1.5)
    return layer


def wrapped():
    """A new model whose layers have a place for tasks, and no task."""
    net, selection = Net(), Selection()
    for name, layer in list(net.named_children()):
        kind = PerturbedLayer if name in ("conv", "deep", "fc") else OwnLayer
        setattr(net, name, kind(layer, selection))
    return net.eval()


def random_factors(layer, *, rank=3, zeros=0.6):
    """Factors of which many entries of the low-rank part, and all of the second direction's left half, are 0."""
    groups, (out, into) = getattr(layer, "groups", 1), layer.weight.shape[:2]
    left, right = torch.randn(groups, out // groups, rank), torch.randn(groups, rank, into)
    left, right = (t * (torch.rand_like(t) >= zeros) for t in (left, right))
    left[:, :, 1] = 0
    bias = None if layer.bias is None else torch.randn(out)
    return Factors(torch.randn(out), torch.randn(groups * into), left, right, bias)


FORMS = {
    "free": lambda layer: randomised(copy.deepcopy(layer)),
    "in training": lambda layer: Perturbation(random_factors(layer)),
    "packed": lambda layer: PackedPerturbation(random_factors(layer)),
}


def learn(net, tasks=OTHERS, turn=0):
    """Give a model tasks; what a layer holds for one is of each form in turn."""
    for layer in net.children():
        layer.first.fill_(FIRST)
        randomised(layer.base)
    for i, task in enumerate(tasks):
        for j, layer in enumerate(net.children()):
            make = list(FORMS.values())[0 if isinstance(layer, OwnLayer) else (i + j + turn) % 3]
            layer.tasks[str(task)] = make(layer.base).eval()
    net.conv.selection.tasks = [FIRST, *tasks]
    return net


def outputs(net, tasks=(FIRST, *OTHERS)):
    return {task: (net.conv.selection.choose(task), net(torch.from_numpy(X)).detach())[1] for task in tasks}


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def reloaded(net, into):
    into.load_state_dict(torch.load(io.BytesIO(saved(net.state_dict())), weights_only=True))
    return into


COPIES = {
    "state": lambda net: reloaded(net, wrapped()),
    "state into a model with tasks": lambda net: reloaded(net, learn(wrapped(), (5, OTHERS[0]), turn=1)),
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
}


@pytest.mark.parametrize("turn", range(3))
@pytest.mark.parametrize("again", COPIES.values(), ids=COPIES)
def test_every_task_of_a_copy_has_bit_equal_outputs(again, turn):
    net = learn(wrapped(), turn=turn)
    expected = outputs(net)
    assert not any(torch.equal(expected[one], expected[other]) for one, other in combinations(expected, 2))
    net.conv.selection.choose(OTHERS[0])  # what is unpacked must not go along
    twin = again(net)
    for task, value in outputs(twin).items():
        assert torch.equal(value, expected[task]), task
    for one, other in zip(twin.children(), net.children(), strict=True):
        assert one.selection is twin.conv.selection is not net.conv.selection
        assert [type(own) for own in one.tasks.values()] == [type(own) for own in other.tasks.values()]
    assert twin.conv.selection.tasks == [FIRST, *OTHERS]
    assert net.conv.selection.task == OTHERS[0]
    for tensor in (*twin.parameters(), *twin.buffers()):
        tensor.data.zero_()
    for task, value in outputs(net).items():
        assert torch.equal(value, expected[task])


def test_loading_drops_tasks_that_the_state_lacks():
    few, many = learn(wrapped(), OTHERS[:1]), learn(wrapped(), turn=2)
    expected = outputs(few, (FIRST, OTHERS[0]))
    many.load_state_dict(few.state_dict())
    assert many.conv.selection.tasks == [FIRST, OTHERS[0]]
    assert all(list(layer.tasks) == [str(OTHERS[0])] for layer in many.children())
    for task, value in outputs(many).items():
        assert torch.equal(value, expected.get(task, expected[FIRST]))
    many.load_state_dict(wrapped().state_dict())
    assert many.conv.selection.tasks == []
    assert not any(layer.tasks for layer in many.children())


def test_loading_lets_go_of_what_was_unpacked():
    one, other = learn(wrapped()), learn(wrapped())
    expected = outputs(other)
    for task in OTHERS:
        one.conv.selection.choose(task)
        one(torch.from_numpy(X))
        one.load_state_dict(other.state_dict())
        one.conv.selection.choose(task)
        assert torch.equal(one(torch.from_numpy(X)), expected[task])


@pytest.mark.parametrize("turn", range(3))
def test_a_state_of_another_precision_becomes_that_of_the_model(turn):
    net, fresh = learn(wrapped(), turn=turn), wrapped().float()
    fresh.load_state_dict(net.state_dict())
    assert {t.dtype for t in fresh.state_dict().values() if t.is_floating_point()} == {torch.float32}
    for task, expected in outputs(net).items():
        fresh.conv.selection.choose(task)
        found = fresh(torch.from_numpy(X).float()).detach()
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


PARTS = {
    "free": ("weight", "bias"),
    "in training": ("rows", "columns", "left", "right", "bias"),
    "packed": ("rows", "columns", "left_values", "left_bits", "left_shape", "right_values", "right_bits", "bias"),
}


@pytest.mark.parametrize(("form", "part"), [(form, part) for form, parts in PARTS.items() for part in parts])
def test_a_state_that_lacks_a_part_of_a_task_is_refused(form, part):
    net = wrapped()
    net.conv.tasks["1"] = FORMS[form](net.conv.base)
    state = net.state_dict()
    del state[f"conv.tasks.1.{part}"]
    with pytest.raises((RuntimeError, KeyError)):
        wrapped().load_state_dict(state)


@pytest.mark.parametrize("kind", [Perturbation, PackedPerturbation])
@pytest.mark.parametrize("route", ["auto", "factored", "formed"])
def test_a_perturbed_layer_computes_with_its_tasks_weight(kind, route):
    layer, x = PerturbedLayer(nn.Linear(4, 3), Selection()), torch.randn(2, 4)
    one = random_factors(layer.base)
    layer.tasks["2"], layer.route = kind(one), route
    layer.selection.choose(2)
    weight = one.rows.diag() @ layer.base.weight @ one.columns.diag() + one.left[0] @ one.right[0]
    np.testing.assert_allclose(layer(x).detach(), (x @ weight.T + one.bias).detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("task", [None, FIRST, 99])
def test_without_parameters_of_its_own_a_task_gets_the_first_ones_outputs(task):
    net = learn(wrapped())
    net.conv.selection.choose(task)
    assert torch.equal(net.conv(torch.from_numpy(X)), net.conv.base(torch.from_numpy(X)))


def test_own_layers_pass_all_arguments():
    layer, x, y = OwnLayer(nn.Bilinear(2, 3, 1), Selection()), torch.randn(4, 2), torch.randn(4, 3)
    layer.tasks["1"] = nn.Bilinear(2, 3, 1)
    assert torch.equal(layer(x, input2=y), layer.base(x, y))
    layer.selection.choose(1)
    assert torch.equal(layer(x, input2=y), layer.tasks["1"](x, y))


def by_hand():
    """4 x 3; 3 of the left numbers are 0, and of the right ones 2."""
    left = torch.tensor([[[1.0, 0.0, 2.0], [0.0, 3.0, 4.0], [5.0, 0.0, 6.0], [7.0, 8.0, 9.0]]])
    right = torch.tensor([[[1.0, 0.0, 2.0], [3.0, 4.0, 5.0], [6.0, 0.0, 7.0]]])
    return left, right


@pytest.mark.parametrize("bias", [True, False])
def test_numbers_by_hand(bias):
    left, right = by_hand()
    factors = Factors(torch.ones(4), torch.zeros(3), left, right, torch.zeros(4) if bias else None)
    for one in (Perturbation(factors), PackedPerturbation(factors)):
        assert one.rank == 3
        assert one.pruned_numbers() == 9 + 7
        assert one.numbers() == 9 + 7 + 4 + 3 + 4 * bias  # zeros of the low-rank factors alone are left out
    left[:, :, 1] = 0
    assert Perturbation(factors).pruned_numbers() == 7 + 7
    assert PackedPerturbation(factors).pruned_numbers() == 7 + 4  # the other half of a dead direction goes too
    assert PackedPerturbation(factors).numbers() == 7 + 4 + 4 + 3 + 4 * bias


@pytest.mark.parametrize(("dead", "rank"), [("", 3), ("l1", 2), ("r0 l2", 1), ("l0 l1 r2", 1)])
@pytest.mark.parametrize("groups", [1, 2])
def test_dead_directions_are_dropped_and_the_product_stays(dead, rank, groups):
    layer, x = nn.Conv1d(3 * groups, 4 * groups, 2, groups=groups), torch.randn(2, 3 * groups, 5)
    left, right = (torch.cat([half] * groups) for half in by_hand())
    for half, direction in dead.split():
        (left.mT if half == "l" else right)[0, int(direction)] = 0
    factors = Factors(torch.ones(4 * groups), torch.ones(3 * groups), left, right, None)
    packed = PackedPerturbation(factors)
    assert packed.rank == (rank if groups == 1 else 3)  # the other group's directions live
    again = packed.factors()
    np.testing.assert_allclose(again.left @ again.right, left @ right, atol=1e-12)
    found, expected = (perturbed(layer, x, one, "factored").detach() for one in (again, factors))
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("kind", [Perturbation, PackedPerturbation])
def test_factors_are_copied_and_trained_only_where_they_are_in_training(kind):
    factors = random_factors(nn.Linear(4, 3), rank=2, zeros=0.0)
    before, one = copy.deepcopy(factors), kind(factors)
    names = {"rows", "columns", "left", "right", "bias"}
    assert {name for name, _ in one.named_parameters()} == (names if kind is Perturbation else set())
    for name in names:
        getattr(factors, name).fill_(9.0)
    found = one.factors()
    for name in ("rows", "columns", "bias"):
        assert torch.equal(getattr(found, name), getattr(before, name))
    assert torch.equal(found.left @ found.right, before.left @ before.right)


def test_unpacked_once_for_as_long_as_a_task_is_selected():
    selection, packed = Selection(), PackedPerturbation(random_factors(nn.Linear(6, 5)))
    selection.choose(1)
    held = selection.dense(packed)
    assert selection.dense(packed) is held
    selection.choose(1)
    assert selection.dense(packed) is held
    assert selection.dense(PackedPerturbation(random_factors(nn.Linear(6, 5)))) is not held
    assert len(pickle.dumps(selection)) < len(pickle.dumps(Selection())) + 20  # without what is unpacked
    seen = weakref.ref(held.left)
    del held
    selection.choose(2)
    gc.collect()
    assert seen() is None
    assert selection.dense(packed).left.dtype == torch.float64
    assert selection.dense(packed.float()).left.dtype == torch.float32


def test_attributes_that_a_place_has_not_are_the_layers():
    place = PerturbedLayer(nn.Linear(6, 5), Selection())
    place.base.bias.requires_grad_(False)
    assert (place.in_features, place.out_features) == (6, 5)
    assert place.weight is place.base.weight
    assert isinstance(place.tasks, nn.ModuleDict)
    assert not hasattr(place, "nothing")
    with pytest.raises(AttributeError, match="nothing"):
        _ = place.nothing
    assert OwnLayer(place.base, Selection()).held == {"bias"}
    assert PerturbedLayer(nn.Conv2d(2, 3, (4, 5)), Selection()).kernel_size == (4, 5)


def test_a_pruned_perturbation_takes_little_space_when_saved():
    left, right = torch.zeros(1, 256, 16), torch.zeros(1, 16, 256)
    left[0, :16], right[0, :, :16] = torch.randn(16, 16), torch.randn(16, 16)
    factors = Factors(torch.ones(256), torch.ones(256), left, right, torch.ones(256))
    packed = PackedPerturbation(factors)
    assert packed.numbers() == 2 * 256 + 3 * 256
    size = len(saved(packed.state_dict()))
    assert size <= 8 * packed.numbers() + 2 * 256 * 16 // 8 + 5000  # entries, bits, and what a file of 9 tensors adds
    assert size < 0.25 * len(saved(Perturbation(factors).state_dict()))
