"""What HALRP refuses, when, in which words, and that nothing has changed then; in Avalanche and in plain loops."""

from __future__ import annotations

import copy

import pytest
import torch
from avalanche.models import IncrementalClassifier
from avalanche.training.plugins import ReplayPlugin
from torch import nn

from avalanche_gradproj.errors import ConfigurationError, DataError, ModelError, NonFiniteError, StateError
from avalanche_gradproj.methods.halrp import LowRankPerturbation
from tests.plugins.halrp_setup import (
    CLASSES,
    FEATURES,
    all_outputs,
    assert_same,
    benchmark,
    learner,
    network,
    outputs,
    sgd,
    stale,
    train,
)

LABELS = (5, 2, 9)
X = torch.randn(12, FEATURES, generator=torch.Generator().manual_seed(1))
BATCHES = [(X, torch.arange(12) % CLASSES)]


def flat(*layers):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 6), *layers, nn.Linear(6, CLASSES))


def refused(error, match, stream=None, model=None, *, experiences=slice(0, 1), **settings):
    """Train on what must be refused; weights are as before."""
    model = network() if model is None else model
    strategy = learner(model, **settings)
    before = copy.deepcopy([*model.parameters(), *model.buffers()])
    with pytest.raises(error, match=match):
        train(strategy, (stream or benchmark()).train_stream[experiences])
    after = [value for name, value in [*model.named_parameters(), *model.named_buffers()] if not name.endswith("first")]
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
    assert strategy.plugin.method.tasks == []
    return strategy


@pytest.mark.parametrize(
    ("tasks", "match"),
    [
        ((0, 0, 0), "all 3 experiences of the stream have task label 0.*return_task_id=True"),
        (((0, 1), 2), r"experience 0 has task labels \[0, 1\]: every experience has to have one"),
    ],
)
def test_streams_without_one_label_an_experience(tasks, match):
    strategy = refused(DataError, match, benchmark(tasks))
    assert isinstance(strategy.model, nn.Sequential)


def test_an_experience_without_labels_and_a_stream_of_one():
    stream = benchmark((4,))
    del stream.train_stream[0].task_labels
    refused(DataError, r"experience 0 has task labels \[\].*with_task_labels", stream)
    strategy = learner(network(), max_growth=0)
    train(strategy, benchmark((4,)).train_stream)  # no task is to come, nothing needs room
    assert strategy.plugin.method.tasks == [4]


@pytest.mark.parametrize("kind", ["plain", "heads"])
def test_too_little_room_is_said_before_the_first_experience_trains(kind):
    refused(ConfigurationError, r"max_growth=1\.0 leaves \d+ numbers.*are \d+: give max_growth=1\.\d+ or more",
            model=network(kind), max_growth=1.0)  # fmt: skip
    train(learner(network(kind), max_growth=1.0), benchmark((0, 1)).train_stream)


def test_a_model_that_was_refused_room_can_be_given_to_another_plugin():
    model = network()
    refused(ConfigurationError, "max_growth=0.1", model=model, max_growth=0.1)
    train(learner(model), benchmark().train_stream)


@pytest.mark.parametrize(
    ("model", "settings", "error", "match"),
    [
        (lambda: nn.Sequential(nn.Linear(6, 7), IncrementalClassifier(7)), {}, ModelError, "'1'.*MultiHeadClassifier"),
        (lambda: flat(nn.Bilinear(6, 6, 6)), {}, ModelError, r"'1' is a Bilinear.*exclude=\['1'\]"),
        (lambda: flat(nn.LSTM(6, 6)), {}, ModelError, r"'1' is a LSTM.*exclude=\['1'\]"),
        (lambda: flat(nn.MultiheadAttention(6, 2)), {}, ModelError, "'1' is a MultiheadAttention"),
        (lambda: flat(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))), {}, ModelError, "'1'"),
        (lambda: flat(nn.LazyLinear(6)), {}, ModelError, r"'1\.weight' is lazy"),
        (lambda: nn.Sequential(nn.Linear(6, 3)), {}, ModelError, "no layer is left to be perturbed"),
        (lambda: nn.Linear(6, 3), {}, ModelError, "put it into an nn.Sequential"),
        (flat, {"exclude": ["0.bias"]}, ConfigurationError, r"'0\.bias' and not all of layer '0'"),
        (flat, {"exclude": ["body"]}, ConfigurationError, "body"),
        (flat, {"include": ["hidden"]}, ConfigurationError, "hidden"),
        (flat, {"head": "out"}, ConfigurationError, r"head='out' is no Linear layer.*'0', '1'"),
    ],
)
def test_models_that_cannot_be_perturbed(model, settings, error, match):
    strategy = learner(model(), optimizer=lambda m: torch.optim.SGD([torch.zeros(1)], lr=0.1), **settings)
    names = [name for name, _ in strategy.model.named_modules()]
    with pytest.raises(error, match=match):
        train(strategy, benchmark().train_stream[:1])
    assert [name for name, _ in strategy.model.named_modules()] == names


def named(stream):
    """Let the experiences know their benchmark, as those of Avalanche's older benchmarks do."""
    stream.train_stream.benchmark = stream
    return stream


def test_importance_by_the_name_of_a_stream():
    found = []
    for by_name in (True, False):
        stream = named(benchmark(samples=16))
        strategy = learner(network(), importance="test" if by_name else stream.test_stream)
        train(strategy, stream.train_stream)
        found.append(all_outputs(strategy.model, range(3)))
    assert_same(*found)


@pytest.mark.parametrize(
    ("stream", "importance", "match"),
    [
        (benchmark, "valid", "importance='valid': there is no such stream.*not known.*valid_stream"),
        (lambda: named(benchmark()), "valid", "importance='valid'.*has the streams 'train', 'test'"),
        (benchmark, benchmark((0, 1)).test_stream[:0], "importance: the stream has 0 experiences, and number 0"),
    ],
)
def test_importance_streams_that_are_not_there(stream, importance, match):
    refused(ConfigurationError, match, stream(), importance=importance)


def test_an_importance_stream_that_is_too_short():
    stream = benchmark()
    strategy = learner(network(), importance=benchmark((0, 1)).test_stream)
    train(strategy, stream.train_stream[:2])
    before = all_outputs(strategy.model, (0, 1))
    with pytest.raises(ConfigurationError, match="the stream has 2 experiences, and number 2 is asked for"):
        train(strategy, stream.train_stream[2:])
    assert_same(before, all_outputs(strategy.model, (0, 1)))


@pytest.mark.parametrize("norm", [True, False])
def test_a_warm_up_that_diverges_names_a_layer_and_leaves_old_tasks(norm):
    model = network() if norm else flat(nn.ReLU())
    strategy, stream = learner(model, max_growth=None), benchmark()
    train(strategy, stream.train_stream[:2])
    before = all_outputs(strategy.model, (0, 1))
    strategy.optimizer.param_groups[0]["lr"] = 1e30
    with pytest.raises(NonFiniteError, match=f"layer '{int(norm)}': the weight of the warm-up.*learning rate"):
        train(strategy, stream.train_stream[2:])
    assert_same(before, all_outputs(strategy.model, (0, 1)))
    assert stale(strategy) == []
    strategy.optimizer.param_groups[0]["lr"] = 0.05
    train(strategy, stream.train_stream[2:])
    assert_same(before, all_outputs(strategy.model, (0, 1)))


def test_a_model_of_another_plugin_is_refused():
    stream, one = benchmark(), learner(network())
    train(one, stream.train_stream[:1])
    before = all_outputs(one.model, (0,))
    for model in (one.model, one.model.model):
        other = learner(model)
        with pytest.raises(StateError, match="another HALRP: load its state"):
            train(other, stream.train_stream[1:])
    assert_same(before, all_outputs(one.model, (0,)))
    train(one, stream.train_stream[1:])


def test_what_the_core_s_start_needs():
    model, core = network(), LowRankPerturbation(max_growth=None)
    optimizer = sgd(model)
    with pytest.raises(StateError, match="none was yet"):
        core.select(0)
    for call in (core.finish, lambda: core.active().__enter__()):
        with pytest.raises(StateError, match="call start first"):
            call()
    with pytest.raises(ConfigurationError, match=r"heads=.*give a dict"):
        core.start(model, heads=["8"])
    core.start(model, optimizer, task=5)
    core.finish()
    for settings in ({}, {"optimizer": optimizer}, {"batches": BATCHES}):
        with pytest.raises(StateError, match="task 2 is new: start needs its batches and the optimizer"):
            core.start(model, task=2, **settings)
    with pytest.raises(StateError, match="task 7 was never learned: learned are 5"):
        core.select(7)
    with pytest.raises(DataError, match="no mini-batch"):
        core.start(model, optimizer, task=2, batches=[])
    with pytest.raises(NonFiniteError, match="layer '1'"):
        core.start(model, optimizer, task=2, batches=[(X * float("nan"), BATCHES[0][1])])
    core.warmup_epochs = 2
    with pytest.raises(ConfigurationError, match="batches is an iterator"):
        core.start(model, optimizer, task=2, batches=iter(BATCHES))
    assert core.tasks == [5]
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_an_iterator_of_batches_is_called_one():
    model, core = network(), LowRankPerturbation(max_growth=None)
    optimizer = sgd(model)
    core.start(model, optimizer)
    core.finish()
    with pytest.raises(ConfigurationError, match="iterator"):
        core.start(model, optimizer, batches=iter(BATCHES))


@pytest.mark.parametrize("settings", [{"exclude": ["0"]}, {}])
def test_what_the_user_holds_stays_held(settings):
    model = flat(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    held = (weight := model[0].weight.requires_grad_(False)).clone()
    train(learner(model, **settings), benchmark().train_stream)
    assert torch.equal(weight, held)


class Centre(nn.Module):
    """Subtracts a running mean: a buffer that training moves, and no parameter."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.3)
        return x - self.mean


@pytest.mark.parametrize(
    ("layer", "settings"),
    [
        (lambda: nn.BatchNorm1d(6), {"exclude": ["1"]}),
        (Centre, {}),
        (lambda: nn.BatchNorm1d(6), {"plugins": [ReplayPlugin(24)], "train_mb_size": 24}),
    ],
)
def test_statistics_of_layers_that_are_not_a_task_s_own_stay(layer, settings):
    strategy, stream = learner(flat(layer()), **settings), benchmark()
    train(strategy, stream.train_stream[:1])
    before = all_outputs(strategy.model, (0,))
    train(strategy, stream.train_stream[1:])
    assert_same(before, all_outputs(strategy.model, (0,)))


@pytest.mark.parametrize("kind", ["plain", "heads"])
def test_a_task_that_was_never_learned(kind):
    stream = benchmark(LABELS)
    strategy = learner(network(kind))
    train(strategy, stream.train_stream[:2])
    for call in (lambda: strategy.eval(stream.test_stream), lambda: outputs(strategy.model, 9)):
        with pytest.raises(StateError, match="task label 9, which was never learned: learned are 5, 2"):
            call()
    with pytest.raises(StateError, match="task label 9"):
        outputs(strategy.model, torch.tensor([5, 2, 9] * 3 + [5]))
    strategy.eval(stream.test_stream[:2])


@pytest.mark.parametrize("kind", ["plain", "heads"])  # fmt: skip
def test_the_base_stands_in_for_tasks_that_were_never_learned(kind):
    stream = benchmark(LABELS)
    strategy = learner(network(kind), unseen="base")
    train(strategy, stream.train_stream[:2])
    assert torch.equal(outputs(strategy.model, 9), outputs(strategy.model, 5))
    mixed = outputs(strategy.model, torch.tensor([5, 2, 9] * 3 + [5]))
    torch.testing.assert_close(mixed[2], outputs(strategy.model, 5)[2])
    strategy.eval(stream.test_stream)
    assert torch.equal(outputs(strategy.model, 9), outputs(strategy.model, 5))


def test_experiences_need_no_classes_timeline():
    stream = benchmark()
    for experience in stream.train_stream:
        del experience.classes_in_this_experience
    train(learner(network()), stream.train_stream)
