"""What the in-memory loader keeps, and for how long."""

import copy
import importlib
from typing import Any

import pytest
import torch
from avalanche.benchmarks.utils import (
    TransformGroups,
    make_avalanche_dataset,
)
from avalanche.benchmarks.utils.data_attribute import ConstantSequence, TaskLabels
from avalanche.benchmarks.utils.data_loader import ReplayDataLoader
from avalanche.checkpointing.checkpoint import maybe_load_checkpoint, save_checkpoint
from avalanche.training.supervised import Naive
from torch.utils.data import DataLoader, TensorDataset

from avalanche_gradproj.plugins.in_memory import InMemoryDataPlugin
from tests.plugins.loading import (
    TRAIN,
    Samples,
    X,
    dataset,
    replaced,
    strategy,
    task_incremental,
    tensor_data,
)


def size_of(experience: Any) -> int:
    return len(experience.dataset) * (64 * 4 + 8 + 8)


def test_evaluation_sets_stay_and_training_sets_go(materialised: list[int]) -> None:
    benchmark, plugin = task_incremental(Samples), InMemoryDataPlugin()
    learner = strategy([plugin])
    first, second = benchmark.train_stream
    tests = list(benchmark.test_stream)
    for experience in (first, second):
        learner.train(experience)
        learner.eval(benchmark.test_stream)
        assert plugin.bytes_held == size_of(experience) + sum(map(size_of, tests))
    learner.train(second)
    assert materialised == [len(one.dataset) for one in (first, *tests, second)]
    learner.eval(benchmark.train_stream[1:])  # the training set that is still held
    assert plugin.bytes_held == size_of(second) + sum(map(size_of, tests))
    learner.train(first)
    assert materialised[4:] == [len(first.dataset)]
    plugin.clear()
    assert plugin.bytes_held == 0


def test_training_set_goes_before_the_next_is_read() -> None:
    plugin, data = InMemoryDataPlugin(), dataset(tensor_data(TRAIN), task=0)
    for next_loader in (None, ReplayDataLoader(data, data, batch_size=8)):
        next(iter(replaced(plugin, data)))
        assert plugin.bytes_held > 0
        replaced(plugin, data.subset(range(9)), next_loader)
        assert plugin.bytes_held == 0


def test_cache_is_bounded(materialised: list[int]) -> None:
    parts = [dataset(Samples(rows), task=0) for rows in TRAIN.split(100)]
    plugin = InMemoryDataPlugin(max_bytes=2 * 100 * (64 * 4 + 16))

    def evaluate(number: int) -> int:
        before = len(materialised)
        next(iter(replaced(plugin, parts[number].eval(), training=False)))
        assert plugin.bytes_held <= plugin.max_bytes
        return len(materialised) - before

    assert [evaluate(number) for number in (0, 1, 0, 2, 0, 1, 0, 2)] == [1, 1, 0, 1, 0, 1, 0, 1]
    plugin = InMemoryDataPlugin(max_bytes=100)
    assert [evaluate(number) for number in (0, 0)] == [1, 1]
    assert plugin.bytes_held == 0


def test_cache_is_not_stale() -> None:
    source = tensor_data(TRAIN)
    whole = dataset(source, task=0)
    evens, odds = list(range(0, 400, 2)), list(range(1, 400, 2))
    variants = [
        (whole, X[TRAIN], 0),
        (whole.subset(evens), X[TRAIN][evens], 0),
        (whole.subset(odds), X[TRAIN][odds], 0),
        (whole.replace_current_transform_group(lambda x: -x), -X[TRAIN], 0),
        (whole.replace_current_transform_group(lambda x: 2 * x), 2 * X[TRAIN], 0),
        (
            whole.update_data_attribute("targets_task_labels", TaskLabels(ConstantSequence(9, 400))),
            X[TRAIN],
            9,
        ),
    ]
    plugin = InMemoryDataPlugin()
    for _ in range(2):
        for data, expected, task in variants:
            x, _, t = next(iter(replaced(plugin, data, DataLoader(data, batch_size=400), training=False)))
            assert torch.equal(x, expected)
            assert bool((t == task).all())
    assert len(plugin._evaluation) == len(variants)
    source.tensors[0].add_(1)
    x, _, _ = next(iter(replaced(plugin, whole, DataLoader(whole, batch_size=400), training=False)))
    assert torch.equal(x, X[TRAIN] + 1)


def test_cache_is_not_fooled_by_reused_addresses() -> None:
    plugin = InMemoryDataPlugin()
    for shift in range(30):  # without references of the plugin, most would lie where the last one lay
        data = make_avalanche_dataset(TensorDataset(torch.full((10, 2), float(shift)), torch.zeros(10)))
        x, _ = next(iter(replaced(plugin, data.eval(), training=False)))
        assert bool((x == shift).all())
        del data, x


def test_subsets_that_are_rebuilt_do_not_pile_up() -> None:
    data, plugin = dataset(tensor_data(TRAIN), task=0), InMemoryDataPlugin()
    for _ in range(3):
        next(iter(replaced(plugin, data.subset(list(range(50))).eval(), training=False)))
    assert plugin.bytes_held == 50 * (64 * 4 + 16)


def test_transform_groups_are_told_apart() -> None:
    groups = TransformGroups({"train": (lambda x: x + 1, None), "eval": (lambda x: x - 1, None)})
    data = make_avalanche_dataset(tensor_data(TRAIN), transform_groups=groups)
    plugin = InMemoryDataPlugin()
    for part, shift in ((data.train(), 1), (data.eval(), -1), (data.train(), 1)):
        x, _ = next(iter(replaced(plugin, part, DataLoader(part, batch_size=400), training=False)))
        assert torch.equal(x, X[TRAIN] + shift)


# Checkpoints.


def test_checkpoint_round_trip(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch deletes this name, so that dill copies SGD's code, which typing_extensions 4.16 has made impossible.
    monkeypatch.setattr(torch.optim, "sgd", importlib.import_module("torch.optim.sgd"), raising=False)
    benchmark = task_incremental(Samples)
    first, second = benchmark.train_stream

    def fresh() -> Naive:
        return strategy([InMemoryDataPlugin(max_bytes=10**9)], train_epochs=2)

    straight = fresh()
    straight.train(first)
    straight.eval(benchmark.test_stream)
    plugin = next(one for one in straight.plugins if isinstance(one, InMemoryDataPlugin))
    assert plugin.bytes_held > 400 * 64
    file = tmp_path / "checkpoint"
    save_checkpoint(straight, str(file))
    assert file.stat().st_size < plugin.bytes_held
    torch.manual_seed(7)
    straight.train(second)

    resumed, done = maybe_load_checkpoint(fresh(), str(file))
    assert done == 1
    loaded = next(one for one in resumed.plugins if isinstance(one, InMemoryDataPlugin))
    assert (loaded.bytes_held, loaded.max_bytes) == (0, 10**9)
    torch.manual_seed(7)
    resumed.train(second)
    assert loaded.bytes_held == size_of(second)
    weights = resumed.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in straight.model.state_dict().items())


def test_copies_hold_nothing() -> None:
    plugin, data = InMemoryDataPlugin(), dataset(tensor_data(TRAIN), task=0)
    next(iter(replaced(plugin, data)))
    assert copy.deepcopy(plugin).bytes_held == 0
    assert plugin.bytes_held > 0
