"""LOGD inside Avalanche: streams of every kind, bad input, restarts."""

from __future__ import annotations

import inspect

import pytest
import torch
from avalanche.benchmarks.scenarios import benchmark_from_datasets, class_incremental_benchmark, with_classes_timeline
from avalanche.benchmarks.scenarios.online import split_online_stream
from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute
from avalanche.benchmarks.utils.classification_dataset import ClassificationDataset
from avalanche.benchmarks.utils.transform_groups import TransformGroups
from avalanche.models import IncrementalClassifier, MultiHeadClassifier, MultiTaskModule, avalanche_forward
from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin
from avalanche.training.supervised import Naive
from torch import nn
from torch.utils.data import TensorDataset

from avalanche_gradproj import ConfigurationError, DataError, NonFiniteError
from avalanche_gradproj.methods.logd import logd_update
from avalanche_gradproj.methods.logd_core import LayerwiseGradientDecomposition
from avalanche_gradproj.plugins.logd import LOGDPlugin
from avalanche_gradproj.testing import MethodCase, leftovers, strategy, stream

CASE = MethodCase("logd", lambda: LOGDPlugin(24))
HEADS = MethodCase("logd", lambda: LOGDPlugin(24), task_incremental=True)


class Watch(Naive.PLUGIN_CLASS):
    """Checks a method's update at every step against one written out from the memory's own losses."""

    def __init__(self, plugin, **kwargs):
        super().__init__()
        self.plugin, self.kwargs, self.steps, self.moved = plugin, kwargs, 0, 0.0

    def after_backward(self, strategy, *args, **kwargs):
        """Comes before the plugin in the list of plugins."""
        self.given = {n: p.grad.clone() for n, p in strategy.model.named_parameters() if p.grad is not None}

    def before_update(self, strategy, *args, **kwargs):
        model, memory = strategy.model, self.plugin.method.memory
        named = dict(model.named_parameters())
        if not len(memory):
            assert all(torch.equal(named[name].grad, value) for name, value in self.given.items())
            return
        statistics = {n: b.clone() for n, b in model.named_buffers()}
        old = []
        for k in range(len(memory)):
            x, y, t = memory[k]
            loss = strategy._criterion(avalanche_forward(model, x, t), y)
            found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            old.append([torch.zeros_like(p) if g is None else g for p, g in zip(named.values(), found, strict=True)])
        for name, buffer in model.named_buffers():
            buffer.copy_(statistics[name])
        for index, (name, parameter) in enumerate(named.items()):
            if name not in self.given:
                assert parameter.grad is None
                continue
            g_k = torch.stack([row[index].flatten() for row in old])
            update = logd_update(self.given[name].flatten(), g_k, **self.kwargs).view_as(parameter)
            size = self.given[name].norm() + g_k.norm()
            assert (parameter.grad - update).norm() < 1e-3 * size + 1e-7, name
            self.moved += float((update - self.given[name]).norm())
        self.steps += 1


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("case", [CASE, HEADS], ids=["domain-incremental", "task-incremental"])
def test_every_step_is_the_update(case, variant):
    """With one tensor a block: mini-batch gradients go in, those of the decomposition come out, old heads rest."""
    plugin = LOGDPlugin(24, variant=variant, blocks=1, n_components=1)
    watch = Watch(plugin, variant=variant, n_components=1)
    benchmark = stream(task_labels=case.task_incremental)
    learner = strategy(case, [watch, plugin], train_epochs=1)
    for experience in benchmark.train_stream:
        learner.train(experience)
    assert watch.steps == 2 * 48 / 8
    assert watch.moved > 0.1
    assert not leftovers(learner.model, learner)
    assert (plugin.method.memory[1][2] == (1 if case.task_incremental else 0)).all()


def test_the_first_experience_is_naive_bit_for_bit():
    benchmark = stream()
    learner, plain = strategy(CASE, [LOGDPlugin(24)]), strategy(CASE, [])
    for one in (learner, plain):
        torch.manual_seed(1)
        one.train(benchmark.train_stream[0])
    theirs = plain.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in learner.model.state_dict().items())
    for one in (learner, plain):
        torch.manual_seed(1)
        one.train(benchmark.train_stream[1])
    assert not torch.equal(learner.model.hidden.weight, plain.model.hidden.weight)


def class_incremental():
    torch.manual_seed(0)
    centres = 3 * torch.randn(6, 12)
    targets = torch.arange(240) % 6
    data = ClassificationDataset(
        [TensorDataset(centres[targets] + torch.randn(240, 12), targets)],
        data_attributes=[DataAttribute(targets.tolist(), "targets")],
    )
    order = list(range(6))
    return class_incremental_benchmark({"train": data, "test": data}, class_order=order, num_experiences=3)


def learn_classes(plugins):
    torch.manual_seed(0)
    benchmark = class_incremental()
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), IncrementalClassifier(16, 2))
    learner = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        train_mb_size=10,
        train_epochs=3,
        eval_mb_size=60,
        plugins=plugins,
        evaluator=EvaluationPlugin(),
    )
    for experience in benchmark.train_stream:
        learner.train(experience)
    data = benchmark.train_stream[0].dataset
    x, y = torch.stack([row[0] for row in data]), torch.tensor([row[1] for row in data])
    model.eval()
    return nn.functional.cross_entropy(model(x), y).item(), model


def test_class_incremental_with_a_growing_head():
    """The head grows before training, so that the memory sees it whole; the first classes are forgotten less."""
    plugin = LOGDPlugin(20)
    held, model = learn_classes([plugin])
    free, _ = learn_classes([])
    assert held < 0.7 * free
    assert model[2].classifier.out_features == 6
    report = plugin.report()
    assert report["2.classifier.weight"].layer == "2.classifier"
    assert "one pass over all of them" in str(report)


def test_multi_head_models_take_one_pass_each_or_one():
    plugin = LOGDPlugin(24)
    learner = strategy(HEADS, [plugin])
    for experience in list(stream(task_labels=True).train_stream)[:2]:
        learner.train(experience)
    assert "one pass each (BatchNorm in training mode)" in str(plugin.report())
    assert plugin.report()["head.classifiers.1.classifier.weight"].treatment == "decomposed"


class Seen(Naive.PLUGIN_CLASS):
    """Notes every sample that training sees."""

    def __init__(self):
        super().__init__()
        self.x, self.y = [], []

    def before_backward(self, strategy, *args, **kwargs):
        self.x += list(strategy.mb_x.clone())
        self.y += strategy.mb_y.tolist()


def transformed():
    x, y = torch.randn(48, 12), torch.arange(48) // 12
    groups = TransformGroups({"train": (lambda x: x + 100, None), "eval": (lambda x: x + 1, None)})
    data = ClassificationDataset(
        [TensorDataset(x, y)], transform_groups=groups, data_attributes=[DataAttribute(y.tolist(), "targets")]
    )
    return x, with_classes_timeline(benchmark_from_datasets(train=[data, data], test=[data]))


def test_random_samples_have_evaluation_transforms():
    x, benchmark = transformed()
    plugin = LOGDPlugin(10)
    chosen = plugin.method.draw(48)
    strategy(CASE, [plugin], train_epochs=1).train(benchmark.train_stream[0])
    inputs, targets, labels = plugin.method.memory[0]
    torch.testing.assert_close(inputs, x[chosen] + 1)
    assert torch.equal(targets, chosen // 12)
    assert labels is None
    assert plugin.method.bytes_held == 10 * (12 * 4 + 8)


@pytest.mark.parametrize("size", [1, 8, 10, 48])
def test_the_last_samples_are_those_seen_last_in_training(size):
    """Whatever the size of the batches (8), and of each experience its own."""
    _, benchmark = transformed()
    plugin, seen = LOGDPlugin(size, selection="last"), Seen()
    learner = strategy(CASE, [plugin, seen], train_epochs=2)
    for k in range(2):
        seen.x.clear(), seen.y.clear()
        learner.train(benchmark.train_stream[k])
        inputs, targets, _ = plugin.method.memory[k]
        assert len(seen.x) == 96
        assert torch.equal(inputs, torch.stack(seen.x[-size:]))
        assert targets.tolist() == seen.y[-size:]
    assert plugin.method.bytes_held == 2 * size * (12 * 4 + 8)


def test_samples_that_training_did_not_see_come_from_the_dataset():
    """Without a single epoch nothing is seen: the memory is whole nevertheless."""
    x, benchmark = transformed()
    plugin = LOGDPlugin(10, selection="last")
    strategy(CASE, [plugin], train_epochs=0).train(benchmark.train_stream[0])
    torch.testing.assert_close(plugin.method.memory[0][0], x[38:] + 1)


def test_what_an_abandoned_experience_showed_is_forgotten():
    """Ten samples were seen before it was broken off; the next one, without an epoch, shows none."""
    x, benchmark = transformed()
    plugin = LOGDPlugin(10, selection="last")
    learner = strategy(CASE, [plugin], train_epochs=0)
    plugin.method.observe((torch.full((10, 12), 7.0), torch.zeros(10, dtype=torch.long)))
    assert plugin.method.bytes_held == 10 * (12 * 4 + 8)
    learner.train(benchmark.train_stream[0])
    torch.testing.assert_close(plugin.method.memory[0][0], x[38:] + 1)


def test_the_last_samples_of_an_online_stream_span_its_pieces():
    """Pieces of 16 samples, 20 kept: the last ones of the whole experience, and none of the one before."""
    benchmark = stream()
    online = split_online_stream(benchmark.train_stream, experience_size=16, access_task_boundaries=True)
    plugin, seen = LOGDPlugin(20, selection="last"), Seen()
    learner = strategy(CASE, [plugin, seen], train_epochs=1)
    for piece in online:
        if piece.is_first_subexp:
            seen.x.clear()
        learner.train(piece)
        if len(plugin.method.memory) and len(seen.x) == 48:
            assert torch.equal(plugin.method.memory[-1][0], torch.stack(seen.x[-20:]))
    assert len(plugin.method.memory) == 3


@pytest.mark.parametrize("selection", ["random", "last"])
def test_a_restart_between_the_pieces_of_an_experience(selection):
    """Every experience is learned, and training is bit for bit the same."""
    found = []
    for restart in (False, True):
        torch.manual_seed(0)
        pieces = {"experience_size": 16, "shuffle": False, "access_task_boundaries": True}
        online = split_online_stream(stream().train_stream, **pieces)
        plugin = LOGDPlugin(20, selection=selection)
        learner = strategy(CASE, [plugin], train_epochs=1)
        for index, piece in enumerate(online):
            if restart and index in (2, 4):
                fresh = LOGDPlugin(20, selection=selection)
                fresh.load_state_dict(plugin.state_dict())
                learner.plugins[learner.plugins.index(plugin)] = plugin = fresh
            learner.train(piece)
        assert plugin.method.experiences == len(plugin.method.memory) == 3
        found.append([*learner.model.state_dict().values(), *(plugin.method.memory[k][0] for k in range(3))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_last_samples_beside_replay_are_refused_before_any_step():
    learner = strategy(CASE, [ReplayPlugin(mem_size=20), LOGDPlugin(10, selection="last")])
    benchmark = stream()
    learner.train(benchmark.train_stream[0])
    before = learner.model.hidden.weight.clone()
    with pytest.raises(ConfigurationError, match="selection='last': another plugin mixes samples"):
        learner.train(benchmark.train_stream[1])
    assert torch.equal(learner.model.hidden.weight, before)


class Overwriting(nn.Module):
    """Writes into its input, as a dropout in place does."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(12, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.out(torch.relu(self.hidden(x.mul_(0.5))))


@pytest.mark.parametrize("selection", ["random", "last"])
def test_a_model_that_writes_into_its_input_leaves_the_memory(selection):
    """Training is that with a model which computes the same and writes nowhere."""

    class Reading(Overwriting):
        def forward(self, x):
            return self.out(torch.relu(self.hidden(x * 0.5)))

    found = []
    for kind in (Overwriting, Reading):
        torch.manual_seed(0)
        model, plugin = kind(), LOGDPlugin(10, selection=selection)
        learner = Naive(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            train_mb_size=8,
            train_epochs=2,
            plugins=[plugin],
            evaluator=EvaluationPlugin(),
        )
        for experience in stream().train_stream:
            held = [plugin.method.memory[k][0].clone() for k in range(len(plugin.method.memory))]
            learner.train(experience)
            assert all(torch.equal(plugin.method.memory[k][0], kept) for k, kept in enumerate(held))
        found.append([*model.state_dict().values(), *(plugin.method.memory[k][0] for k in range(3))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_held_mini_batches_are_copies():
    memory = LOGDPlugin(4, selection="last").method.memory
    buffer = torch.zeros(2, 12)
    for value in range(3):
        memory.observe((buffer.fill_(value), torch.zeros(2, dtype=torch.long)))
    buffer.fill_(99)
    memory.add([])
    assert memory[0][0][:, 0].tolist() == [1, 1, 2, 2]


def test_memory_larger_than_an_experience():
    learner = strategy(CASE, [LOGDPlugin(49)])
    before = learner.model.hidden.weight.clone()
    with pytest.raises(DataError, match="experience 0 has 48 samples and patterns_per_exp=49"):
        learner.train(stream().train_stream[0])
    assert torch.equal(learner.model.hidden.weight, before)


def test_blocks_that_do_not_fit():
    with pytest.raises(ConfigurationError, match="blocks=12: the model has 9"):
        strategy(CASE, [LOGDPlugin(10, blocks=12)]).train(stream().train_stream[0])


class TwoHeads(MultiTaskModule):
    def __init__(self):
        super().__init__()
        self.head = MultiHeadClassifier(12, 4)

    def forward(self, x, task_labels):
        return self.head(x, task_labels)


def test_a_model_that_needs_task_labels_and_gets_none():
    data = AvalancheDataset(
        [TensorDataset(torch.randn(20, 12), torch.zeros(20, dtype=torch.long))],
        data_attributes=[DataAttribute([0] * 20, "targets")],
    )
    model = nn.Linear(12, 4)
    experience = benchmark_from_datasets(train=[data]).train_stream[0]
    experience.classes_in_this_experience = [0]
    learner = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        plugins=[LOGDPlugin(10)],
        evaluator=EvaluationPlugin(),
    )
    learner.train(experience)  # without heads, labels are not needed
    learner.model = TwoHeads()
    with pytest.raises(DataError, match="the forward of TwoHeads needs task labels and experience 0 has none"):
        learner.train(experience)


def test_divergence_is_named():
    learner = strategy(CASE, [LOGDPlugin(10)])
    benchmark = stream()
    learner.train(benchmark.train_stream[0])
    with torch.no_grad():
        learner.model.out.bias.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="block"):
        learner.train(benchmark.train_stream[1])


def test_the_plugin_has_the_arguments_of_the_core():
    core = inspect.signature(LayerwiseGradientDecomposition.__init__).parameters
    plugin = inspect.signature(LOGDPlugin.__init__).parameters
    assert set(core) - set(plugin) == {"criterion", "forward"}
    assert all(core[name].default == parameter.default for name, parameter in plugin.items())
