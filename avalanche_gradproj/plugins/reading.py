"""Mini-batches of chosen samples, for the passes over the data between training epochs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from avalanche_gradproj.plugins.in_memory import InMemoryDataPlugin


def mini_batches(strategy: Any, dataset: Any, groups: Iterable[Sequence[int]]) -> Iterator[list[Any]]:
    """Yield mini-batches on the strategy's device.

    Args:
        strategy: where one of its plugins is `InMemoryDataPlugin` and holds these data, they are not read again.
        dataset: an `AvalancheDataset`.
        groups: the samples of each mini-batch.
    """
    held = None
    for plugin in strategy.plugins:
        if held is None and isinstance(plugin, InMemoryDataPlugin):
            held = plugin.held(dataset, dataset.collate_fn, strategy.device)
    for chosen in groups:
        if held is None:
            batch = dataset.collate_fn([dataset[i] for i in chosen])
        else:
            rows = torch.tensor(chosen, dtype=torch.int64, device=held.tensors[0].device)
            batch = [tensor.index_select(0, rows) for tensor in held.tensors]
        yield [part.to(strategy.device) if isinstance(part, torch.Tensor) else part for part in batch]
