"""The in-memory loader gives what Avalanche's loader gives: batches, order, random state, trained weights."""

import copy
import importlib
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets, task_incremental_benchmark, with_task_labels
from avalanche.benchmarks.scenarios.supervised import class_incremental_benchmark, with_classes_timeline
from avalanche.benchmarks.utils import (
    AvalancheDataset,
    DataAttribute,
    TransformGroups,
    make_avalanche_dataset,
)
from avalanche.benchmarks.utils.data_attribute import ConstantSequence, TaskLabels
from avalanche.benchmarks.utils.data_loader import ReplayDataLoader, TaskBalancedDataLoader
from avalanche.checkpointing.checkpoint import maybe_load_checkpoint, save_checkpoint
from avalanche.core import SupervisedPlugin
from avalanche.models import MultiTaskModule
from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin
from avalanche.training.supervised import Naive
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.transforms import RandomCrop

from avalanche_gradproj.errors import ConfigurationError, DataError
from avalanche_gradproj.plugins import tensors as tensors_module
from avalanche_gradproj.plugins.in_memory import InMemoryDataPlugin, TensorLoader

DIGITS = load_digits()
X = torch.tensor(DIGITS.data, dtype=torch.float32) / 16
Y = torch.tensor(DIGITS.target)
TRAIN, TEST = torch.arange(0, 400), torch.arange(1400, 1600)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The networks are tiny: threads only wait for each other, for long where other tests run beside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Samples(Dataset):
    """A dataset that only knows single samples, and counts how often it is asked."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows
        self.targets = Y[rows].tolist()
        self.reads = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        self.reads += 1
        return X[self.rows[index]], self.targets[index]


class Lazy(Dataset):
    """A dataset that makes its samples when asked, one by one or all at once, and counts."""

    def __init__(self, rows: torch.Tensor, shift: float = 0.0) -> None:
        self.rows = rows
        self.targets = Y[rows].tolist()
        self.shift = shift
        self.reads = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        self.reads += 1
        return X[self.rows[index]].flip(0), self.targets[index]

    def as_tensors(self) -> tuple[torch.Tensor, ...]:
        return X[self.rows].flip(1) + self.shift, Y[self.rows]


def dataset(source: Any, transform: Any = None, task: int | None = None) -> AvalancheDataset:
    targets = source.tensors[1].tolist() if isinstance(source, TensorDataset) else source.targets
    attributes = [DataAttribute(targets, "targets")]
    if task is not None:
        attributes.append(TaskLabels(ConstantSequence(task, len(targets))))
    groups = None if transform is None else TransformGroups({"train": (transform, None), "eval": (transform, None)})
    return make_avalanche_dataset(source, data_attributes=attributes, transform_groups=groups)


def tensor_data(rows: torch.Tensor) -> TensorDataset:
    return TensorDataset(X[rows], Y[rows])


def task_aware(benchmark: Any) -> Any:
    return with_classes_timeline(with_task_labels(benchmark))


def class_incremental(make: Any = tensor_data) -> Any:
    return class_incremental_benchmark(
        {"train": dataset(make(TRAIN)), "test": dataset(make(TEST))},
        num_experiences=2,
        class_order=list(range(10)),
    )


def task_incremental(make: Any = tensor_data) -> Any:
    return with_classes_timeline(task_incremental_benchmark(class_incremental(make)))


def multi_task(make: Any = tensor_data) -> Any:
    """Joint data of three tasks of 30, 100 and 7 samples, interleaved: groups have to be oversampled."""
    labels = [5] * 30 + [2] * 100 + [7] * 7
    order = torch.randperm(137, generator=torch.Generator().manual_seed(1)).tolist()
    attributes = [DataAttribute(Y[:137].tolist(), "targets"), TaskLabels(labels)]
    joint = make_avalanche_dataset(make(torch.arange(137)), data_attributes=attributes).subset(order)
    return task_aware(benchmark_from_datasets(train=[joint], test=[joint.subset(range(50))]))


def concatenated(make: Any = tensor_data) -> Any:
    """One task whose data come from two leaves, in an order that mixes them."""
    parts = [dataset(make(TRAIN[:60]), task=0), dataset(make(TRAIN[100:190]), task=0)]
    joint = parts[0].concat(parts[1])
    order = torch.randperm(150, generator=torch.Generator().manual_seed(2)).tolist()
    return task_aware(benchmark_from_datasets(train=[joint.subset(order)], test=[joint.subset(order[::-1])]))


class Head(MultiTaskModule):
    """A small network with dropout, so that the global random state matters in each step; a head per task."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.3))
        self.heads = nn.Parameter(torch.randn(10, 10, 16) / 4)

    def forward(self, x: torch.Tensor, task_labels: torch.Tensor) -> torch.Tensor:
        return torch.einsum("nof,nf->no", self.heads[task_labels], self.body(x))


class Recorder(SupervisedPlugin):
    """Keeps every batch as it comes, before the step can change it."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[torch.Tensor]] = []
        self.loaders: list[Any] = []
        self.lengths: list[int] = []

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        self.batches.append([part.clone() for part in strategy.mbatch])

    before_eval_iteration = before_training_iteration

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        self.loaders.append(strategy.dataloader)
        self.lengths.append(len(strategy.dataloader))

    def before_eval_forward(self, strategy: Any, **kwargs: Any) -> None:
        if not self.loaders or self.loaders[-1] is not strategy.dataloader:
            self.loaders.append(strategy.dataloader)
            self.lengths.append(len(strategy.dataloader))


def strategy(plugins: list[Any], *, multi_head: bool = True, mb_size: int = 32, **options: Any) -> Naive:
    torch.manual_seed(3)
    model = Head() if multi_head else nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Dropout(0.3), nn.Linear(16, 10))
    return Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        train_mb_size=mb_size,
        eval_mb_size=64,
        plugins=plugins,
        evaluator=EvaluationPlugin(),
        **options,
    )


def run(benchmark: Any, plugins: list[Any], options: dict[str, Any], **loading: Any) -> tuple[Any, ...]:
    """Train and evaluate; return what was recorded, the final weights and the random state."""
    recorder = Recorder()
    tasks = hasattr(next(iter(benchmark.train_stream)), "task_labels")
    learner = strategy([*plugins, recorder], multi_head=tasks, **options)
    torch.manual_seed(4)
    for experience in benchmark.train_stream:
        learner.train(experience, eval_streams=[benchmark.test_stream], **loading)
    return recorder, learner.model.state_dict(), torch.get_rng_state()


def assert_runs_equal(one: tuple[Any, ...], two: tuple[Any, ...]) -> None:
    (left, left_weights, left_state), (right, right_weights, right_state) = one, two
    assert len(left.batches) == len(right.batches) > 0
    assert left.lengths == right.lengths
    for mine, theirs in zip(left.batches, right.batches, strict=True):
        assert [(part.dtype, part.shape) for part in mine] == [(part.dtype, part.shape) for part in theirs]
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert torch.equal(left_state, right_state)
    assert left_weights.keys() == right_weights.keys()
    assert all(torch.equal(left_weights[name], right_weights[name]) for name in left_weights)


@pytest.fixture
def materialised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the datasets that were read sample by sample."""
    sizes: list[int] = []
    read = tensors_module._read

    def counting(data: Any, *args: Any) -> Any:
        sizes.append(len(data))
        return read(data, *args)

    monkeypatch.setattr(tensors_module, "_read", counting)
    return sizes


def replaced(plugin: InMemoryDataPlugin, data: Any, loader: Any = None, *, training: bool = True) -> Any:
    """Return what the plugin makes of a strategy's loader."""
    loader = DataLoader(data, batch_size=16, collate_fn=data.collate_fn) if loader is None else loader
    fake = SimpleNamespace(adapted_dataset=data, dataloader=loader, device=torch.device("cpu"))
    (plugin.before_training_exp if training else plugin.before_eval_exp)(fake)
    return fake.dataloader


def random_states() -> list[Any]:
    return [torch.get_rng_state(), torch.tensor(np.random.get_state()[1].astype(np.int64)), random.getstate()]  # noqa: NPY002


def assert_states_equal(one: list[Any], two: list[Any]) -> None:
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert one[2] == two[2]


# Equality with Avalanche's loader.


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
