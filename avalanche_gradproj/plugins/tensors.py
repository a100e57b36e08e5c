"""From an Avalanche dataset to tensors in memory: every sample is read, transformed and collated once.

The global random states are left as found, and data that draw from them are refused: read once, every epoch
would repeat the same draws. Where nothing is transformed and the data lie in tensors already, the samples are
gathered from those. That relies on Avalanche's private layout; anything unexpected there, or a difference
on the samples that are compared, falls back to reading sample by sample.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from avalanche.benchmarks.utils.data import AvalancheDataset
from avalanche.benchmarks.utils.data_attribute import ConstantSequence
from avalanche.benchmarks.utils.flat_data import FlatData
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate

from avalanche_gradproj.errors import DataError

Collate = Callable[[list[Any]], Any]
States = dict[str, tuple[Any, Callable[[Any], object]]]  # by name: a random state and what restores it
CHUNK = 256
_REMEDY = (
    "Read once, every epoch would repeat the same draws: train without InMemoryDataPlugin, make the "
    "transform deterministic, or apply it to the batch in training (`before_forward` of a plugin)"
)
_EQUAL_SHAPES = "let every sample hold tensors or numbers of equal shapes, or leave InMemoryDataPlugin out"


class LayoutError(Exception):
    """A dataset is not laid out as the direct way knows it; never leaves the package."""


@dataclass(frozen=True)
class Fields:
    """The fields of all samples of a dataset.

    Attributes:
        tensors: one tensor a field (inputs, targets, task labels), each [samples, ...].
        as_tuple: whether the collate function makes tuples; it makes lists otherwise.
    """

    tensors: tuple[Tensor, ...]
    as_tuple: bool

    @property
    def nbytes(self) -> int:
        """Memory of the tensors, in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors)


@torch.no_grad()
def materialise(dataset: Any, collate: Collate, device: torch.device) -> Fields:
    """Read a dataset once, in order.

    Args:
        dataset: an `AvalancheDataset`, or any map-style dataset, with at least one sample.
        collate: what the loader joins samples with.
        device: where the tensors should lie.

    Returns:
        The fields, row i equal to what `collate` makes of `dataset[i]`. The global random states of torch,
        numpy and Python are as before.

    Raises:
        DataError: if reading draws random numbers or differs from one time to the next, if samples differ in
            shape or hold something else than tensors and numbers, or if a sample's row depends on its batch.
    """
    size = len(dataset)
    probes = sorted({0, size // 4, size // 2, 3 * size // 4, size - 1})
    with _random_refused(dataset) as check:
        # What either way is compared with; random transforms mostly show here already.
        expected, as_tuple = _collated(dataset, probes, collate)
        check()
        try:
            tensors = _gathered(dataset, collate, device)
            matches = _same([tensor[probes] for tensor in tensors], expected)
        except LayoutError:
            matches = False
        if not matches:
            tensors = _read(dataset, collate, device, check)
            if not _same([tensor[probes] for tensor in tensors], expected):
                # A transform with a generator of its own, which no global state shows.
                raise DataError(f"random data: two readings of a sample differ ({_active(dataset)}). {_REMEDY}")
    return Fields(tuple(tensors), as_tuple)


def _read(dataset: Any, collate: Collate, device: torch.device, check: Callable[[], None]) -> list[Tensor]:
    """Read all samples through `dataset[i]`, into tensors that are allocated once."""
    size = len(dataset)
    fields: list[Tensor] = []
    for start in range(0, size, CHUNK):
        stop = min(start + CHUNK, size)
        chunk, _ = _collated(dataset, range(start, stop), collate)
        fields = fields or [part.new_empty((size, *part.shape[1:]), device=device) for part in chunk]
        if _kinds(chunk) != _kinds(fields):
            came = f"samples {start} to {stop - 1} have fields {_kinds(chunk)}"
            raise DataError(f"{came}, those before have {_kinds(fields)}: {_EQUAL_SHAPES}")
        for field, part in zip(fields, chunk, strict=True):
            field[start:stop].copy_(part)
        check()
    return fields


def _collated(dataset: Any, positions: Sequence[int], collate: Collate) -> tuple[list[Tensor], bool]:
    """Read and collate some samples; tell also whether `collate` makes tuples."""
    samples = [dataset[position] for position in positions]
    span = isinstance(positions, range)
    where = f"samples {positions[0]} to {positions[-1]}" if span else f"samples {str(positions)[1:-1]}"
    fields, as_tuple = _joined(samples, collate, where)
    if collate is not default_collate:
        # Another function may pad to the batch's longest sample or mix samples; rows cannot be reused then.
        alone = [_joined([sample], collate, where)[0] for sample in samples]
        uniform = all(_kinds(row) == _kinds(fields) for row in alone)
        if not uniform or not _same([torch.cat(column) for column in zip(*alone, strict=True)], fields):
            why = "makes of a sample something that depends on the rest of its batch"
            raise DataError(f"{where}: the collate function {collate!r} {why}: {_EQUAL_SHAPES}")
    return fields, as_tuple


def _joined(samples: list[Any], collate: Collate, where: str) -> tuple[list[Tensor], bool]:
    try:
        batch = collate(samples)
    except (RuntimeError, TypeError, ValueError) as error:
        came = f"{where} cannot be joined to a batch ({error}); the first holds {_description(samples[0])}"
        raise DataError(f"{came}: {_EQUAL_SHAPES}") from error
    parts = list(batch) if isinstance(batch, (list, tuple)) else []
    if not parts or not all(isinstance(one, Tensor) and one.shape[:1] == (len(samples),) for one in parts):
        wanted = f"expected a tuple or list of tensors with {len(samples)} rows each"
        raise DataError(f"{where} make a batch of {_description(batch)}, {wanted}: {_EQUAL_SHAPES}")
    return [part.detach() for part in parts], isinstance(batch, tuple)


def _description(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        parts = [_description(part) for part in value[:5]] + ["..."] * (len(value) > 5)
        return f"{type(value).__name__}({', '.join(parts)})"
    return f"Tensor{list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _kinds(tensors: Sequence[Tensor]) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    return [(tensor.dtype, tuple(tensor.shape[1:])) for tensor in tensors]


def _same(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """Compare values (NaN equals NaN), shapes and dtypes; the devices may differ."""
    if _kinds(left) != _kinds(right):
        return False
    pairs = [(one.cpu(), two.cpu()) for one, two in zip(left, right, strict=True)]
    alike = [torch.allclose(one, two, 0, 0, equal_nan=True) for one, two in pairs if one.is_floating_point()]
    return all(alike) and all(torch.equal(one, two) for one, two in pairs if not one.is_floating_point())


def walk(dataset: Any) -> list[tuple[Any, tuple[Any, ...], Tensor, Tensor]]:
    """Find where each sample of an `AvalancheDataset` comes from.

    Args:
        dataset: the dataset.

    Returns:
        Parts (leaf, transforms, slots, rows): the dataset's samples `slots` are the leaf's samples `rows`,
        passed through the `transforms` of the active group, innermost first.

    Raises:
        LayoutError: if the dataset is not laid out as in Avalanche 0.6.
    """
    root = getattr(dataset, "_flat_data", None)
    if not isinstance(root, FlatData) or type(dataset).__getitem__ is not AvalancheDataset.__getitem__:
        raise LayoutError
    parts: list[tuple[Any, tuple[Any, ...], Tensor, Tensor]] = []

    def visit(node: Any, outer: tuple[Any, ...], slots: Tensor, rows: Tensor) -> None:
        if not isinstance(node, FlatData):
            parts.append((node, outer, slots, rows))
            return
        if type(node) not in (FlatData, type(root)):
            raise LayoutError
        if node._indices is not None:
            # Lazy sequences of indices are no lists, and not all of them can be iterated.
            rows = torch.tensor([node._indices[row] for row in rows.tolist()], dtype=torch.int64)
        child_of_row = torch.bucketize(rows, torch.tensor(node._cumulative_sizes), right=True)
        for number, (child, end) in enumerate(zip(node._datasets, node._cumulative_sizes, strict=True)):
            chosen = (child_of_row == number).nonzero().flatten()
            if len(chosen):
                transforms = transforms_of(node, root) + outer
                visit(child, transforms, slots[chosen], rows[chosen] - (end - len(child)))

    try:
        everything = torch.arange(len(dataset))
        visit(root, (), everything, everything)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise LayoutError from error
    return parts


def transforms_of(node: Any, root: Any) -> tuple[Any, ...]:
    """Return what one level of a dataset transforms with; the root's group rules on every level."""
    group = root._transform_groups.current_group
    both = (getattr(node, name, None) for name in ("_frozen_transform_groups", "_transform_groups"))
    active = [groups[group] for groups in both if groups is not None]
    # None, (None, None) and empty compositions are Avalanche's ways to say "no transform".
    return tuple(one for one in active if any(step is not None for step in getattr(one, "transforms", [one])))


def _gathered(dataset: Any, collate: Collate, device: torch.device) -> list[Tensor]:
    """Gather all samples from the tensors that the dataset's leaves hold, if it is that simple."""
    parts = walk(dataset)
    if collate is not default_collate or any(transforms for _, transforms, _, _ in parts):
        raise LayoutError
    held = {id(leaf): _tensors_of(leaf) for leaf, _, _, _ in parts}
    first = held[id(parts[0][0])]
    if any(_kinds(tensors) != _kinds(first) for tensors in held.values()):
        raise LayoutError
    order = torch.argsort(torch.cat([slots for _, _, slots, _ in parts]))
    columns = []
    for number in range(len(first)):
        sources = [(held[id(leaf)][number].detach(), rows) for leaf, _, _, rows in parts]
        gathered = [source.index_select(0, rows.to(source.device)).to(device) for source, rows in sources]
        # A single part, the ordinary case, is in order already.
        columns.append(gathered[0] if len(parts) == 1 else torch.cat(gathered)[order.to(device)])
    for attribute in dataset._data_attributes.values():
        if attribute.use_in_getitem:
            constant = isinstance(attribute.data, ConstantSequence)
            numbers = [attribute.data[position] for position in range(1 if constant else len(dataset))]
            if any(type(number) is not int for number in numbers):
                raise LayoutError
            columns.append(torch.tensor(numbers, device=device).repeat(len(dataset) if constant else 1))
    return columns


def _tensors_of(leaf: Any) -> tuple[Tensor, ...]:
    # By the exact type: a subclass may change the samples; Avalanche's returns the targets as Python numbers.
    if type(leaf) is TensorDataset or type(leaf).__name__ == "_TensorClassificationDataset":
        tensors = tuple(leaf.tensors)
    else:
        tensors = tuple(leaf.as_tensors()) if callable(getattr(leaf, "as_tensors", None)) else ()
    if not tensors or not all(isinstance(one, Tensor) and one.shape[:1] == (len(leaf),) for one in tensors):
        raise LayoutError
    return tensors


@contextmanager
def _random_refused(dataset: Any) -> Iterator[Callable[[], None]]:
    """Yield a check that raises if random numbers were drawn; put the random states back in every case."""
    before = _random_states()

    def drawn() -> list[str]:
        now = _random_states()
        return [name for name, (state, _) in before.items() if not _equal(state, now[name][0])]

    def check() -> None:
        if names := drawn():
            raise DataError(f"random data: reading draws from {', '.join(names)} ({_active(dataset)}). {_REMEDY}")

    try:
        yield check
        check()
    finally:
        for name in drawn():
            state, restore = before[name]
            restore(state)


def _random_states() -> States:
    states: States = {
        "torch": (torch.get_rng_state(), torch.set_rng_state),
        "numpy": (np.random.get_state(), np.random.set_state),  # noqa: NPY002 - the global one is what counts
        "random": (random.getstate(), random.setstate),
    }
    cuda: Any = torch.cuda
    if cuda.is_initialized():  # asking would start it; nothing can have drawn there before
        states["torch.cuda"] = (cuda.get_rng_state_all(), cuda.set_rng_state_all)
    return states


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, two)
    if isinstance(one, (tuple, list)) and any(isinstance(part, (Tensor, np.ndarray)) for part in one):
        return all(map(_equal, one, two))
    return bool(np.all(one == two))


def _active(dataset: Any) -> str:
    """Name the transforms that are active, in the dataset's groups and in its leaves."""
    try:
        parts = walk(dataset)
    except LayoutError:
        return f"in {type(dataset).__name__}"
    named = [one for leaf, transforms, _, _ in parts for one in (getattr(leaf, "transform", None), *transforms)]
    leaves = [f"none, so {type(leaf).__name__} itself" for leaf, _, _, _ in parts]
    return "active transforms: " + ", ".join(dict.fromkeys([repr(one) for one in named if one] or leaves))
