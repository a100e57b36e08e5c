"""Batches, order, random state and trained weights are those of Avalanche's loader."""

from typing import Any

import numpy as np
import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.utils import (
    AvalancheDataset,
    TransformGroups,
)
from avalanche.core import SupervisedPlugin
from torch.utils.data import DataLoader, TensorDataset

from avalanche_gradproj.plugins import tensors as tensors_module
from avalanche_gradproj.plugins.in_memory import InMemoryDataPlugin, TensorLoader
from tests.plugins.loading import (
    TEST,
    TRAIN,
    Lazy,
    Samples,
    X,
    Y,
    assert_runs_equal,
    class_incremental,
    concatenated,
    dataset,
    multi_task,
    replaced,
    run,
    task_aware,
    task_incremental,
    tensor_data,
)

LOADING: list[dict[str, Any]] = [
    {},
    {"drop_last": True},
    {"shuffle": False},
    {"mb_size": 13},
    {"mb_size": 500},
    {"mb_size": 500, "drop_last": True},
]


@pytest.mark.parametrize(("make", "loading"), [(tensor_data, one) for one in LOADING] + [(Samples, {}), (Lazy, {})])
@pytest.mark.parametrize("scenario", [task_incremental, class_incremental, multi_task, concatenated])
def test_training_is_bit_equal(scenario: Any, make: Any, loading: dict[str, Any]) -> None:
    loading = dict(loading)
    options = {"mb_size": loading.pop("mb_size", 32), "train_epochs": 2, "eval_every": 1}
    benchmark = scenario(make)
    reference = run(benchmark, [], options, **loading)
    ours = run(benchmark, [InMemoryDataPlugin()], options, **loading)
    assert all(isinstance(loader, TensorLoader) for loader in ours[0].loaders)
    assert not any(isinstance(loader, TensorLoader) for loader in reference[0].loaders)
    assert_runs_equal(reference, ours)


def test_batches_are_copies() -> None:
    class Vandal(SupervisedPlugin):
        def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
            strategy.mb_x.zero_()

    benchmark, options = task_incremental(), {"train_epochs": 2, "mb_size": 500}
    plain = run(benchmark, [Vandal()], options, shuffle=False)
    assert_runs_equal(plain, run(benchmark, [Vandal(), InMemoryDataPlugin()], options, shuffle=False))


# What is gathered, and what is read sample by sample.


@pytest.mark.parametrize(("make", "by_sample"), [(tensor_data, False), (Lazy, False), (Samples, True)])
@pytest.mark.parametrize("scenario", [task_incremental, multi_task, concatenated])
def test_only_plain_datasets_are_read_by_sample(
    scenario: Any, make: Any, by_sample: bool, materialised: list[int]
) -> None:
    benchmark = scenario(make)
    run(benchmark, [InMemoryDataPlugin()], {"eval_every": 0})
    sets = [len(one.dataset) for one in (*benchmark.train_stream, *benchmark.test_stream)]
    assert sorted(materialised) == (sorted(sets) if by_sample else [])


def test_wrong_as_tensors_is_found_out(materialised: list[int]) -> None:
    benchmark = task_incremental(lambda rows: Lazy(rows, shift=1.0))
    assert_runs_equal(run(benchmark, [], {}), run(benchmark, [InMemoryDataPlugin()], {}))
    assert materialised


def test_subclass_of_tensor_dataset_is_read_by_sample() -> None:
    class Negated(TensorDataset):
        def __getitem__(self, index: Any) -> tuple[torch.Tensor, ...]:
            x, y = super().__getitem__(index)
            return (-x if index == 7 else x), y  # not among the samples that are compared

    data = dataset(Negated(X[TRAIN], Y[TRAIN]), task=0)
    x, _, _ = next(iter(replaced(InMemoryDataPlugin(), data)))
    assert torch.equal(x[7], -X[7])
    assert torch.equal(x[8], X[8])


def test_unknown_layout_falls_back(monkeypatch: pytest.MonkeyPatch, materialised: list[int]) -> None:
    def unknown(data: Any) -> Any:
        raise tensors_module.LayoutError

    benchmark = class_incremental()
    reference = run(benchmark, [], {"eval_every": 0})
    monkeypatch.setattr(tensors_module, "walk", unknown)
    assert_runs_equal(reference, run(benchmark, [InMemoryDataPlugin()], {"eval_every": 0}))
    assert len(materialised) == 4


def test_more_fields_and_other_types() -> None:
    class Six(Samples):
        def __getitem__(self, index: int) -> tuple[Any, ...]:
            x, y = super().__getitem__(index)
            x = x.double() if index else torch.full((64,), torch.nan, dtype=torch.float64)
            return x, y, index * 0.5, np.float32(y), torch.tensor([y, index], dtype=torch.int16), y > 3

    data = dataset(Six(TRAIN), task=4)
    plain = DataLoader(data, batch_size=30)
    ours = list(replaced(InMemoryDataPlugin(), data, plain))
    assert len(ours[0]) == 7
    for mine, theirs in zip(ours, plain, strict=True):
        assert type(mine) is type(theirs)
        for one, two in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)


def test_collate_that_makes_tuples() -> None:
    data = AvalancheDataset([Samples(TRAIN)], collate_fn=lambda batch: tuple(torch.utils.data.default_collate(batch)))
    plain = DataLoader(data, batch_size=30, collate_fn=data.collate_fn)
    for mine, theirs in zip(replaced(InMemoryDataPlugin(), data, plain), plain, strict=True):
        assert type(mine) is type(theirs) is tuple
        assert all(torch.equal(one, two) for one, two in zip(mine, theirs, strict=True))


def test_deterministic_transforms_are_applied_once() -> None:
    calls = []

    def negate(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return -x

    def benchmark() -> Any:
        return task_aware(
            benchmark_from_datasets(
                train=[dataset(tensor_data(TRAIN), negate, task=0)],
                test=[dataset(tensor_data(TEST), negate, task=0)],
            )
        )

    options = {"train_epochs": 3, "eval_every": 1}
    reference = run(benchmark(), [], options)
    assert len(calls) >= 3 * (400 + 200)
    calls.clear()
    assert_runs_equal(reference, run(benchmark(), [InMemoryDataPlugin()], options))
    # A few samples more, of each set, for the comparison of two readings.
    assert 600 <= len(calls) <= 600 + 2 * 5


def test_nested_and_frozen_transforms() -> None:
    inner = dataset(tensor_data(TRAIN), lambda x: x + 1, task=0)
    groups = TransformGroups({"train": (lambda x: x * 3, None), "eval": (lambda x: x * 5, None)})
    outer = AvalancheDataset([inner.freeze_transforms()], transform_groups=groups)
    plugin = InMemoryDataPlugin()
    for data, factor in ((outer.train(), 3), (outer.eval(), 5)):
        x, _, _ = next(iter(replaced(plugin, data, DataLoader(data, batch_size=400))))
        assert torch.equal(x, (X[TRAIN] + 1) * factor)


# Loaders that are left alone.
