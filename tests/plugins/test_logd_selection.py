"""What LOGD keeps of an experience: which samples, as training saw them, through restarts."""

from __future__ import annotations

import pytest
import torch
from avalanche.benchmarks.scenarios import benchmark_from_datasets, with_classes_timeline
from avalanche.benchmarks.scenarios.online import split_online_stream
from avalanche.benchmarks.utils import DataAttribute
from avalanche.benchmarks.utils.classification_dataset import ClassificationDataset
from avalanche.benchmarks.utils.transform_groups import TransformGroups
from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin
from avalanche.training.supervised import Naive
from torch import nn
from torch.utils.data import TensorDataset

from avalanche_gradproj import ConfigurationError, DataError
from avalanche_gradproj.plugins.logd import LOGDPlugin
from avalanche_gradproj.testing import MethodCase, strategy, stream

CASE = MethodCase("logd", lambda: LOGDPlugin(24))


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
