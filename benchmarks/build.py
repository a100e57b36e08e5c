"""What a run is made of: the protocol's stream, and Avalanche's strategy with the method's plugins."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from avalanche.training.plugins import EvaluationPlugin, LRSchedulerPlugin
from avalanche.training.supervised import JointTraining
from avalanche.training.templates import SupervisedTemplate
from torch import nn

from benchmarks import orders, sources, streams
from benchmarks.fresh_optimizer import FreshOptimizer
from benchmarks.jobs import Job
from benchmarks.methods import find_method
from benchmarks.record import Protocol
from benchmarks.sampling import Sampling
from benchmarks.schedule import ValidationSchedule
from benchmarks.settings import InputError


def build_stream(protocol: Protocol, data: sources.ImageData, seed: int) -> streams.Stream:
    """Make a protocol's stream.

    Args:
        protocol: the protocol.
        data: its images.
        seed: the run's seed.

    Returns:
        The stream.

    Raises:
        InputError: if the data has too few classes for the experiences asked for.
    """
    share, limit = protocol.valid_share or 0.0, protocol.train_limit
    sampling = Sampling(share, protocol.valid_rule, limit, protocol.draw_rule, seed)
    count, shape = protocol.n_experiences, data.x_train.shape[1:]
    if protocol.split in ("permutations", "rotations"):
        if protocol.split == "rotations":
            pixels = orders.rotations(count, (shape[0], shape[1], shape[2]), protocol.max_angle or 0.0, seed)
        else:
            draw = orders.permutations if protocol.permutation_rule == "gpm" else orders.gem_permutations
            pixels = draw(count, shape.numel(), seed)
        kind: Literal["task", "class"] = "task" if protocol.task_labels else "class"
        return streams.permute(data, pixels, protocol.normalisation, sampling, kind)
    groups = _class_groups(protocol, data)
    if len(groups) < count:
        raise InputError(f"n_experiences={count}: {data.n_classes} classes make only {len(groups)} experiences")
    order = protocol.group_order
    if order is not None:
        known = len(protocol.task_orders[protocol.task_order or ""])
        if len(groups) != known:
            raise InputError(
                f"task_order={protocol.task_order}: it orders {known} groups of classes, and classes_per_experience="
                f"{protocol.classes_per_experience} makes {len(groups)}; expected {known}"
            )
        groups = [groups[group] for group in order]
    labels: streams.Labels = "masked" if protocol.outputs == "masked" else "task"
    return streams.split_by_class(data, groups[:count], protocol.normalisation, sampling, labels)


def _class_groups(protocol: Protocol, data: sources.ImageData) -> list[list[int]]:
    """The classes of each experience that the data allows."""
    if protocol.split == "superclasses":
        coarse = data.coarse or ()
        return [[c for c, parent in enumerate(coarse) if parent == group] for group in sorted(set(coarse))]
    size = protocol.classes_per_experience or data.n_classes // protocol.n_experiences
    if size == 0:
        return []
    return [list(range(first, first + size)) for first in range(0, data.n_classes - size + 1, size)]


def build_strategy(
    job: Job, stream: streams.Stream, model: nn.Module, watching: Sequence[Any] = ()
) -> tuple[Any, list[Any]]:
    """Make Avalanche's strategy for a job.

    Args:
        job: what to run.
        stream: its stream.
        model: the network, on the job's device.
        watching: plugins that only look, called after all others.

    Returns:
        The strategy, and those of its plugins that are the method's own.
    """
    from avalanche_gradproj import InMemoryDataPlugin

    protocol, method = job.protocol, find_method(job.method)
    own = method.plugins(job.settings, job.seed)
    before: list[Any] = []
    if protocol.patience is not None and protocol.lr_factor is not None and protocol.lr_min is not None:
        before.append(
            ValidationSchedule(
                stream,
                lr=protocol.lr,
                patience=protocol.patience,
                lr_factor=protocol.lr_factor,
                lr_min=protocol.lr_min,
                batch_size=protocol.test_batch,
                joint=method.joint,
            )
        )
    template = JointTraining if method.joint else SupervisedTemplate
    kind: Any = torch.optim.Adam if protocol.optimizer == "adam" else torch.optim.SGD
    optimizer = kind(model.parameters(), lr=protocol.lr)
    if protocol.reset_optimizer:
        before.append(FreshOptimizer())
    if protocol.lr_decay is not None:
        before.append(_decay(optimizer, protocol.lr_decay, _iterations(stream, protocol.train_batch, method.joint)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are no loggers: the run writes its own
        evaluator = EvaluationPlugin()
    strategy = template(
        model=model,
        optimizer=optimizer,
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=protocol.train_batch,
        train_epochs=protocol.epochs,
        eval_mb_size=protocol.test_batch,
        device=job.device,
        plugins=[*before, *own, InMemoryDataPlugin(), *watching],
        evaluator=evaluator,
        eval_every=-1,
    )
    return strategy, own


def _iterations(stream: streams.Stream, batch: int, joint: bool) -> int:
    """Mini-batches of an epoch, by the size of the first experience or of all together."""
    sizes = [len(dataset) for dataset in stream.train]
    if not joint:
        return math.ceil(sizes[0] / batch)
    if not stream.n_heads:
        return math.ceil(sum(sizes) / batch)
    return math.ceil(max(sizes) / max(1, batch // stream.n_heads))  # Avalanche divides each batch among the tasks


def _decay(optimizer: torch.optim.Optimizer, lr_decay: float, iterations: int) -> Any:
    """Avalanche's plugin for a rate that falls in each iteration and starts anew in every experience."""
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=lr_decay ** (1 / iterations))
    return LRSchedulerPlugin(scheduler, reset_scheduler=True, reset_lr=True, step_granularity="iteration")
