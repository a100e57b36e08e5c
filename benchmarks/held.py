"""What Avalanche's own methods keep of earlier experiences: their plugins do not say it themselves.

Counted as for the methods of this package: what has to be kept from one experience to the next, not what a training
step makes of it (GEM's gradients of old samples are made anew in every iteration).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch


def bytes_held(plugin: Any) -> int | None:
    """Count what one of Avalanche's plugins keeps.

    Args:
        plugin: any plugin.

    Returns:
        Bytes; None for a plugin that is not known here, a subclass among them: it may keep more.
    """
    from avalanche.training.plugins import AGEMPlugin, EWCPlugin, GEMPlugin, ReplayPlugin

    counts: Mapping[type, Callable[[Any], int]] = {
        EWCPlugin: _penalties,
        ReplayPlugin: lambda own: _samples(own.storage_policy.buffer),
        GEMPlugin: _memories,
        AGEMPlugin: lambda own: sum(map(_samples, own.buffers)),
    }
    count = counts.get(type(plugin))
    return None if count is None else count(plugin)


def _penalties(plugin: Any) -> int:
    """EWC: parameters and their importances, of every experience."""
    kept = (plugin.saved_params, plugin.importances)
    return sum(own.data.nbytes for each in kept for parameters in each.values() for own in parameters.values())


def _memories(plugin: Any) -> int:
    """GEM: copies of samples, labels and task labels."""
    kept = (plugin.memory_x, plugin.memory_y, plugin.memory_tid)
    return sum(tensor.nbytes for each in kept for tensor in each.values())


def _samples(dataset: Any) -> int:
    """What the samples of a dataset take as the tensors that a batch is made of, labels and task labels included.

    That is what GEM and LOGD keep of theirs. Avalanche itself holds references into the dataset that the samples come
    from, which stays in memory as a whole; nothing would tell the methods apart by that. The samples of a buffer have
    one shape, as batches are made of them, and reading one draws no random number: streams here have no random
    transform.
    """
    if not len(dataset):
        return 0
    return len(dataset) * sum(torch.as_tensor(part).nbytes for part in dataset[0])
