"""What the in-memory loader leaves alone and what it refuses."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.utils import (
    AvalancheDataset,
    make_avalanche_dataset,
)
from avalanche.benchmarks.utils.data_loader import ReplayDataLoader, TaskBalancedDataLoader
from avalanche.training.plugins import ReplayPlugin
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import RandomCrop

from avalanche_gradproj.errors import ConfigurationError, DataError
from avalanche_gradproj.plugins import tensors as tensors_module
from avalanche_gradproj.plugins.in_memory import InMemoryDataPlugin, TensorLoader
from tests.plugins.loading import (
    TRAIN,
    Lazy,
    Samples,
    X,
    assert_runs_equal,
    assert_states_equal,
    dataset,
    random_states,
    replaced,
    run,
    strategy,
    task_aware,
    task_incremental,
    tensor_data,
)


@pytest.mark.parametrize("ours_first", [True, False])
def test_replay_is_left_alone(ours_first: bool) -> None:
    benchmark, options = task_incremental(), {"train_epochs": 2}

    def plugins(*first: Any, last: tuple[Any, ...] = ()) -> list[Any]:
        return [*first, ReplayPlugin(mem_size=40), *last]

    random.seed(0)
    reference = run(benchmark, plugins(), options)
    ours = InMemoryDataPlugin()
    random.seed(0)
    result = run(benchmark, plugins(ours) if ours_first else plugins(last=(ours,)), options)
    kinds = [type(loader) for loader in result[0].loaders if len(loader) > 4]
    assert kinds == [TensorLoader] * 2 + [ReplayDataLoader] * 2
    assert_runs_equal(reference, result)
    assert ours.bytes_held == 0 or ours_first


def test_other_loaders_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(DataLoader):
        pass

    data, plugin = dataset(tensor_data(TRAIN), task=0), InMemoryDataPlugin()
    same_size = dataset(tensor_data(TRAIN.flip(0)), task=0)
    transformed = dataset(data, lambda x: -x)
    others = [
        Mine(data, batch_size=8),
        DataLoader(same_size, batch_size=8),
        DataLoader(data, batch_size=None),
        TaskBalancedDataLoader(same_size, batch_size=8),
        TaskBalancedDataLoader(transformed, batch_size=8),
        TaskBalancedDataLoader(data.subset([0] * 400), batch_size=8),
    ]
    for loader in others:
        assert replaced(plugin, data, loader) is loader
        assert plugin.left_alone
    own = TaskBalancedDataLoader(data, batch_size=8)
    assert isinstance(replaced(plugin, data, own), TensorLoader)
    assert plugin.left_alone is None
    monkeypatch.setattr("avalanche.distributed.distributed_helper._DistributedHelperCls.is_distributed", True)
    assert replaced(plugin, data, own) is own
    assert "distributed" in (plugin.left_alone or "")


def test_data_for_ffcv_are_left_alone() -> None:
    source = tensor_data(TRAIN)
    data = dataset(source, lambda x: -x, task=0).subset(range(50))
    loader = TaskBalancedDataLoader(data, batch_size=8)
    assert replaced(InMemoryDataPlugin(), data, loader) is not loader
    source.ffcv_info = "what enable_ffcv leaves on the innermost dataset"
    assert replaced(InMemoryDataPlugin(), data, loader) is loader


def test_empty_dataset_is_left_alone() -> None:
    data = dataset(tensor_data(TRAIN), task=0).subset([])
    loader = DataLoader(data, batch_size=8)
    assert replaced(InMemoryDataPlugin(), data, loader) is loader


# Data that are refused.


def noisy_numpy(x: torch.Tensor) -> torch.Tensor:
    return x + float(np.random.rand())  # noqa: NPY002


def noisy_python(x: torch.Tensor) -> torch.Tensor:
    return x + random.random()


class Rarely:
    """Draws for one sample of many."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand(()) if torch.equal(x, X[101]) else x

    def __repr__(self) -> str:
        return "Rarely()"


@pytest.mark.parametrize(
    ("transform", "name"),
    [
        (lambda x: RandomCrop(8, padding=1)(x.view(1, 8, 8)), "lambda"),
        (nn.Sequential(nn.Unflatten(0, (1, 8, 8)), RandomCrop(8, padding=1)), "RandomCrop"),
        (noisy_numpy, "noisy_numpy"),
        (noisy_python, "noisy_python"),
        (Rarely(), "Rarely()"),
    ],
)
def test_random_transforms_are_refused(transform: Any, name: str) -> None:
    data = dataset(tensor_data(TRAIN), transform, task=0)
    benchmark = task_aware(benchmark_from_datasets(train=[data], test=[data]))
    learner = strategy([InMemoryDataPlugin()])
    before = random_states()
    with pytest.raises(DataError, match="deterministic") as caught:
        learner.train(benchmark.train_stream[0])
    assert name in str(caught.value)
    assert_states_equal(before, random_states())


def test_random_dataset_is_refused_by_name() -> None:
    class Shaky(Samples):
        def __getitem__(self, index: int) -> tuple[Any, ...]:
            return torch.rand(3), 0

    data = dataset(Shaky(TRAIN), task=0)
    with pytest.raises(DataError, match=r"draws from torch .*Shaky"):
        next(iter(replaced(InMemoryDataPlugin(), data)))


def test_reading_stops_at_the_first_chunk_that_draws() -> None:
    source = Samples(TRAIN)
    with pytest.raises(DataError, match="Rarely"):
        next(iter(replaced(InMemoryDataPlugin(), dataset(source, Rarely(), task=0))))
    assert source.reads <= tensors_module.CHUNK + 5


def test_random_as_tensors_is_refused() -> None:
    class Shuffled(Lazy):
        def as_tensors(self) -> tuple[torch.Tensor, ...]:
            torch.randperm(3)
            return super().as_tensors()

    with pytest.raises(DataError, match=r"draws from torch .*Shuffled"):
        next(iter(replaced(InMemoryDataPlugin(), dataset(Shuffled(TRAIN), task=0))))


def test_private_generator_is_found_out() -> None:
    own = np.random.default_rng(0)
    data = dataset(tensor_data(TRAIN), lambda x: x + float(own.random()), task=0)
    with pytest.raises(DataError, match="two readings"):
        next(iter(replaced(InMemoryDataPlugin(), data)))


def test_random_states_survive_an_error_of_the_data() -> None:
    def failing(x: torch.Tensor) -> torch.Tensor:
        noisy_numpy(x), noisy_python(x), torch.rand(1)
        raise KeyError("broken")

    data = dataset(tensor_data(TRAIN), failing, task=0)
    loader = replaced(InMemoryDataPlugin(), data)
    before = random_states()
    with pytest.raises(KeyError, match="broken"):
        next(iter(loader))
    assert_states_equal(before, random_states())


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (lambda i: (X[i][: 10 + (i == 270)], 0), r"samples 256 to 399.*cannot be joined.*tuple\(Tensor\[10\]"),
        (lambda i: (X[i][: 10 + i // 256], 0), r"samples 0, 100, 200, 300, 399.*cannot be joined"),
        (lambda i: (X[i], "label"), r"list\(Tensor\[5, 64\], (list|tuple)"),
        (lambda i: (X[i], object()), "cannot be joined"),
        (lambda i: {"x": X[i]}, "make a batch of dict"),
        (lambda i: (X[i], (X[i], 1)), "make a batch of list"),
    ],
)
def test_data_that_make_no_rows_are_refused(item: Any, message: str) -> None:
    class Odd(Samples):
        def __getitem__(self, index: int) -> Any:
            return item(index)

    data = make_avalanche_dataset(Odd(TRAIN))
    with pytest.raises(DataError, match=message) as caught:
        next(iter(replaced(InMemoryDataPlugin(), data)))
    assert "leave InMemoryDataPlugin out" in str(caught.value)


def test_fields_that_change_between_chunks_are_refused() -> None:
    class Growing(Samples):
        def __getitem__(self, index: int) -> Any:
            return torch.zeros(3), index if index < 256 else float(index)

    data = make_avalanche_dataset(Growing(TRAIN[:257]))
    with pytest.raises(DataError, match="those before"):
        tensors_module._read(data, torch.utils.data.default_collate, torch.device("cpu"), lambda: None)


def centred(batch: list[Any]) -> list[torch.Tensor]:
    x, y = torch.utils.data.default_collate(batch)
    return [x - x.mean(0), y]


def padded(batch: list[Any]) -> list[torch.Tensor]:
    xs, ys = zip(*batch, strict=True)
    return [
        nn.utils.rnn.pad_sequence([x[: 5 + y] for x, y in zip(xs, ys, strict=True)], True),
        torch.tensor(ys),
    ]


@pytest.mark.parametrize("collate", [centred, padded])
def test_collate_that_mixes_samples_is_refused(collate: Any) -> None:
    data = AvalancheDataset([Samples(TRAIN)], collate_fn=collate)
    loader = DataLoader(data, batch_size=8, collate_fn=collate)
    with pytest.raises(DataError, match=f"{collate.__name__}.* rest of its batch"):
        next(iter(replaced(InMemoryDataPlugin(), data, loader)))


@pytest.mark.parametrize("arguments", [{"device": "gpu"}, {"max_bytes": -1}, {"max_bytes": 1.5}, {"max_bytes": True}])
def test_arguments_are_checked(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(arguments))):
        InMemoryDataPlugin(**arguments)


# What is held, and for how long.
