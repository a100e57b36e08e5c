"""Avalanche's data loading, replaced by indexing into tensors in memory: the same batches, without the cost.

Avalanche reads, transforms and collates every sample again in every epoch, which costs more than a training
step of a small network. `InMemoryDataPlugin` does it once. Batches, their order and what is drawn from
torch's global random state stay as they were: a training run with the plugin gives bit for bit the weights
of one without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from avalanche.benchmarks.utils.data_loader import (
    MultiDatasetSampler,
    SingleDatasetDataLoader,
    TaskBalancedDataLoader,
)
from avalanche.benchmarks.utils.flat_data import ConstantSequence, FlatData
from avalanche.core import SupervisedPlugin
from avalanche.distributed.distributed_helper import DistributedHelper
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset

from avalanche_gradproj.errors import ConfigurationError
from avalanche_gradproj.plugins.tensors import Fields, LayoutError, materialise, transforms_of, walk

_OTHER_DATA = "the loader is not over the strategy's adapted dataset"


class TensorLoader:
    """A loader that cuts its batches out of tensors, in the order of the loader that it stands for.

    Args:
        loader: the loader that Avalanche's template built.
        dataset: the strategy's adapted dataset.
        order: [samples], where `loader` regroups the samples: the dataset's position of each; None otherwise.
        fields: called at the start of every epoch; returns the dataset's fields.
    """

    def __init__(self, loader: Any, dataset: Any, order: Tensor | None, fields: Callable[[], Fields]) -> None:
        self.dataset = dataset
        self._length = len(loader)
        self._order = order
        self._fields = fields
        if isinstance(loader, DataLoader):
            self._batches: Any = loader.batch_sampler
            self._generator = loader.generator
        else:
            samplers = loader._create_samplers(
                loader.datasets, loader.batch_sizes, loader.distributed_sampling, loader.loader_kwargs
            )
            self._batches = MultiDatasetSampler(
                loader.datasets,
                samplers,
                termination_dataset_idx=loader.termination_dataset,
                oversample_small_datasets=loader.oversample_small_datasets,
                never_ending=loader.never_ending,
            )
            self._generator = loader.loader_kwargs.get("generator")

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[list[Tensor] | tuple[Tensor, ...]]:
        fields = self._fields()
        # The seed that torch's loader draws for its workers, whether it has any or not.
        torch.empty((), dtype=torch.int64).random_(generator=self._generator)
        for rows in self._rows(fields.tensors[0].device):
            # index_select copies, so that a step may write into its batch.
            batch = [tensor.index_select(0, rows) for tensor in fields.tensors]
            yield tuple(batch) if fields.as_tuple else batch

    def _rows(self, device: torch.device) -> Iterator[Tensor]:
        """Yield the positions in the dataset of each batch's samples, on the device of the tensors."""
        batches = self._batches
        if isinstance(batches, MultiDatasetSampler) and len(batches.samplers) == 1:
            batches = batches.samplers[0]
            if len(batches) == 0:
                return  # Avalanche's sampler ends here, before the permutation's seed is drawn
        if type(batches) is BatchSampler and type(batches.sampler) in (RandomSampler, SequentialSampler):
            # torch's own sampler draws the permutation, all at once as for its first batch.
            permutation = torch.tensor(list(batches.sampler), dtype=torch.int64).to(device)
            for start in range(0, len(batches) * batches.batch_size, batches.batch_size):
                yield permutation[start : start + batches.batch_size]
            return
        # Several tasks: oversampling draws while the epoch runs, so batch by batch as Avalanche does.
        for batch in batches:
            rows = torch.tensor(batch, dtype=torch.int64)
            yield (rows if self._order is None else self._order[rows]).to(device, non_blocking=True)


class Signature:
    """What identifies a dataset's content: the objects that it consists of, compared by identity.

    `dataset.train()` and `dataset.eval()` return a new dataset every time, so that the dataset itself cannot
    serve. The objects are referenced, and not their ids noted, which would be reused.
    """

    def __init__(self, dataset: Any, collate: Any, device: torch.device) -> None:
        self.objects: list[Any] = [type(dataset)]
        self.values: list[Any] = [collate, device, len(dataset)]
        root = getattr(dataset, "_flat_data", None)
        if isinstance(root, FlatData) and hasattr(root, "_transform_groups"):
            self._visit(root, root)
            for name, attribute in getattr(dataset, "_data_attributes", {}).items():
                if attribute.use_in_getitem:
                    self.values.append(name)
                    self._visit(attribute.data, root)
        else:
            self.objects.append(dataset)

    def _visit(self, node: Any, root: Any) -> None:
        if isinstance(node, FlatData):
            # Equal lists of indices are rebuilt by whatever takes a subset before each evaluation.
            (self.values if isinstance(node._indices, list) else self.objects).append(node._indices)
            self.objects += transforms_of(node, root)
            self.values.append(len(node._datasets))
            for child in node._datasets:
                self._visit(child, root)
            return
        if isinstance(node, ConstantSequence):  # task labels; rebuilt like the lists
            self.objects.append(node._constant_value)
            return
        self.objects += [node, getattr(node, "transform", None), getattr(node, "target_transform", None)]
        if isinstance(node, TensorDataset):  # written into since it was read?
            self.values += [None if one.is_inference() else one._version for one in node.tensors]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Signature)
            and len(self.objects) == len(other.objects)
            and all(mine is theirs for mine, theirs in zip(self.objects, other.objects, strict=True))
            and self.values == other.values
        )

    __hash__ = None  # type: ignore[assignment]


class InMemoryDataPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Trains and evaluates from tensors in memory, with the batches that Avalanche's loader would give.

    It stands in for the loaders that Avalanche's templates build (`TaskBalancedDataLoader`,
    `SingleDatasetDataLoader`, torch's `DataLoader`; exactly these types) over the strategy's adapted
    dataset, and takes batch sizes, shuffling and `drop_last` from them. `num_workers` has no effect; random
    numbers are drawn as with `num_workers=0`. Other loaders are left alone, whatever the order of the
    plugins: one that another plugin built (replay), one over other data, FFCV's, in distributed training,
    over an empty dataset; `left_alone` says why.

    The data are read at the first batch, each sample once: deterministic transforms are applied once, and
    random ones, which would be frozen, are refused with `DataError`. Transforms that draw from a generator
    of their own are found out by reading a few samples twice. Where nothing is transformed, data that are a
    `TensorDataset` or have a method `as_tensors() -> tuple[Tensor, ...]` (row i of each is a field of
    sample i) are taken at once; this package's passes after an experience then take them too.

    Memory: the training set of the current experience until the next begins, and every evaluation set that
    has been used (a set that is both is held once), each with all fields at their final size. `max_bytes`
    bounds the evaluation sets. The datasets themselves are referenced as long as their tensors are held;
    writing into their arrays goes unseen, except for a `TensorDataset`. Nothing of it goes into a
    checkpoint.

    With several tasks in one experience, Avalanche's sampler chooses the batches; on CUDA each batch's
    positions are sent to the device then, otherwise one permutation an epoch.

    Args:
        device: where the tensors are held; None: on the strategy's device. `"cpu"` saves the device's
            memory, and Avalanche moves every batch.
        max_bytes: bound on the memory of the evaluation sets; what was unused for longest is dropped first,
            and a set larger than that is read again for every evaluation. None: no bound.

    Raises:
        ConfigurationError: if `device` is unknown to torch or `max_bytes` is no number from 0 on.
    """

    def __init__(self, device: torch.device | str | None = None, *, max_bytes: int | None = None) -> None:
        super().__init__()
        try:
            self.device = None if device is None else torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise ConfigurationError(f"device={device!r} is no torch device ({error}): use 'cpu' or 'cuda'") from error
        if max_bytes is not None and (type(max_bytes) is not int or max_bytes < 0):
            raise ConfigurationError(f"max_bytes={max_bytes!r}: expected None or an integer from 0 on")
        self.max_bytes = max_bytes
        self.left_alone: str | None = None
        """Why the last loader was left as it was; None if it was replaced."""
        self._training: tuple[Signature, Fields | None] | None = None
        self._evaluation: list[tuple[Signature, Fields]] = []  # least recently used first

    @property
    def bytes_held(self) -> int:
        """Memory of the tensors held now, in bytes."""
        return sum(fields.nbytes for fields in {id(fields): fields for _, fields in self._held()}.values())

    def clear(self) -> None:
        """Drop all tensors; they are read again when needed."""
        self._training = None
        self._evaluation.clear()

    def held(self, dataset: Any, collate: Any, device: torch.device | str) -> Fields | None:
        """Return the fields of a dataset if they are held already, to be joined by `collate`; nothing is read.

        Args:
            dataset: one with the same samples and transforms counts as the same.
            collate: what its samples would be joined with.
            device: the strategy's, where the plugin was given none.
        """
        return self._find(Signature(dataset, collate, self.device or torch.device(device)))

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Replace the loader of the training set; drop the previous experience's tensors."""
        self._replace(strategy, training=True)

    def before_eval_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Replace the loader of the evaluation set."""
        self._replace(strategy, training=False)

    def _replace(self, strategy: Any, *, training: bool) -> None:
        loader, dataset = strategy.dataloader, getattr(strategy, "adapted_dataset", None)
        self.left_alone, order = _order_of(loader, dataset)
        if self.left_alone is not None:
            self._training = None if training else self._training
            return
        collate = loader.collate_fn if isinstance(loader, DataLoader) else loader.loader_kwargs["collate_fn"]
        device = self.device or torch.device(strategy.device)
        signature = Signature(dataset, collate, device)
        if training and (self._training is None or self._training[0] != signature):
            self._training = (signature, None)
        # Read when the first batch is asked for: a plugin that comes later may replace the loader once more.
        read = partial(self._fields, signature, dataset, collate, device, training)
        strategy.dataloader = TensorLoader(loader, dataset, order, read)

    def _fields(self, signature: Signature, dataset: Any, collate: Any, device: torch.device, training: bool) -> Fields:
        fields = self._find(signature) or materialise(dataset, collate, device)
        if training:
            self._training = (signature, fields)
        elif self._training is None or self._training[1] is not fields:
            self._evaluation = [entry for entry in self._evaluation if entry[1] is not fields]
            self._evaluation.append((signature, fields))
            while self.max_bytes is not None and sum(one.nbytes for _, one in self._evaluation) > self.max_bytes:
                self._evaluation.pop(0)
        return fields

    def _find(self, signature: Signature) -> Fields | None:
        return next((fields for held, fields in self._held() if held == signature), None)

    def _held(self) -> list[tuple[Signature, Fields]]:
        signature, fields = self._training or (None, None)
        training = [] if signature is None or fields is None else [(signature, fields)]
        return training + self._evaluation

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_training": None, "_evaluation": []}


def _order_of(loader: Any, dataset: Any) -> tuple[str | None, Tensor | None]:
    """Say why a loader has to be left alone, if so; else how it regroups the dataset, if it does."""
    if DistributedHelper.is_distributed:
        return "training is distributed", None
    if type(loader) not in (TaskBalancedDataLoader, SingleDatasetDataLoader, DataLoader):
        return f"a {type(loader).__name__} is none of the loaders that Avalanche's templates build", None
    if dataset is None or len(dataset) == 0:
        return "the dataset is empty", None
    if isinstance(loader, DataLoader):
        same = loader.dataset is dataset and loader.batch_sampler is not None
        return None if same else _OTHER_DATA, None
    if _prepared_for_ffcv(dataset):
        return "FFCV loads the data", None
    if type(loader) is SingleDatasetDataLoader:
        return None if loader.datasets[0] is dataset else _OTHER_DATA, None
    labels = getattr(dataset, "targets_task_labels", None)
    positions = [] if labels is None else [torch.tensor(labels.val_to_idx[label]) for label in labels.uniques]
    if not positions or [len(one) for one in positions] != [len(one) for one in loader.datasets]:
        return _OTHER_DATA, None
    order = torch.cat(positions)
    try:
        numbers: dict[tuple[int, ...], int] = {}
        whole = _origins(dataset, numbers)[order]
        same = torch.equal(whole, torch.cat([_origins(group, numbers) for group in loader.datasets]))
    except LayoutError:
        return "the dataset's layout is unknown, so that its tasks cannot be told apart", None
    return (None, None if len(positions) == 1 else order) if same else (_OTHER_DATA, None)


def _prepared_for_ffcv(dataset: Any) -> bool:
    """Tell whether Avalanche's `enable_ffcv` marked the data; its own test flattens all indices each time."""
    nodes = [getattr(dataset, "_flat_data", dataset)]
    for node in nodes:
        nodes += node._datasets if isinstance(node, FlatData) else []
    return any(hasattr(node, "ffcv_info") for node in nodes)


def _origins(dataset: Any, numbers: dict[tuple[int, ...], int]) -> Tensor:
    """Return [samples, 2]: a number for each sample's leaf and transforms, and its row in the leaf."""
    origins = torch.empty(len(dataset), 2, dtype=torch.int64)
    for leaf, transforms, slots, rows in walk(dataset):
        number = numbers.setdefault((id(leaf), *map(id, transforms)), len(numbers))
        origins[slots] = torch.stack([torch.full_like(rows, number), rows], dim=1)
    return origins
