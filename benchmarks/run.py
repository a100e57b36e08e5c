"""One run: a protocol, a method and a seed give one JSON file.

The same job twice gives the same file but for times and memory. A file appears whole or not at all.
"""

from __future__ import annotations

import gc
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from avalanche.training.plugins import EvaluationPlugin, LRSchedulerPlugin
from avalanche.training.supervised import JointTraining
from avalanche.training.templates import SupervisedTemplate
from torch import nn

from benchmarks import evaluate, orders, progress, resources, sources, streams
from benchmarks.jobs import Job
from benchmarks.methods import find_method
from benchmarks.models import build_model
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


def run(job: Job, data: sources.ImageData, report: progress.Report = progress.silent) -> dict[str, Any]:
    """Train and test.

    Args:
        job: what to run.
        data: the protocol's images.
        report: told where the training is.

    Returns:
        The result, ready for JSON.
    """
    gc.collect()  # strategies and plugins refer to each other: what the last run held would count as this one's
    memory = resources.PeakMemory(job.device)
    memory.start()
    began = time.perf_counter()
    try:
        with resources.reproducible(job.seed):
            stream = build_stream(job.protocol, data, job.seed)
            # Drawn on the CPU, so that a seed means the same weights on every device.
            model = build_model(job.protocol.model, stream, job.protocol.hidden).to(job.device)
            strategy, plugins = _strategy(job, stream, model, report)
            matrix: list[list[float]] = []
            train_seconds = 0.0
            method = find_method(job.method)
            parts = [stream.benchmark.train_stream] if method.joint else stream.benchmark.train_stream
            for position, part in enumerate(parts):
                start = time.perf_counter()
                strategy.train_epochs = job.protocol.epochs - (method.own_epochs(job.settings) if position else 0)
                strategy.train(part)
                _synchronise(job.device)
                train_seconds += time.perf_counter() - start
                matrix.append(evaluate.accuracies(strategy.model, stream, job.protocol.test_batch, job.device))
    finally:
        evaluate.forget()
    peak, kind = memory.stop()
    reports = [plugin.report() for plugin in plugins if hasattr(plugin, "report")]
    return {
        "protocol": job.protocol.name,
        "method": job.method,
        "seed": job.seed,
        "hyper_parameters": job.hyper_parameters,
        "changed": dict(job.changes),
        "task_order": job.protocol.task_order,
        "experience_groups": None if job.protocol.group_order is None else list(job.protocol.group_order),
        "accuracy_matrix": matrix,
        "acc": evaluate.average_accuracy(matrix),
        "bwt": evaluate.backward_transfer(matrix),
        "forgetting": evaluate.forgetting(matrix),
        "growth": _growth(plugins),
        "train_seconds": train_seconds,
        "wall_seconds": time.perf_counter() - began,
        "peak_memory_mb": peak,
        "peak_memory_kind": kind,
        "method_report": "\n".join(str(text) for text in reports) or None,
        "device": _device_name(job.device),
        "threads": torch.get_num_threads(),
        "versions": resources.versions(),
    }


def _strategy(job: Job, stream: streams.Stream, model: nn.Module, report: progress.Report) -> tuple[Any, list[Any]]:
    """Avalanche's strategy for a job, and the method's own plugins."""
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
    n_parts = 1 if method.joint else len(stream.train)
    template = JointTraining if method.joint else SupervisedTemplate
    kind: Any = torch.optim.Adam if protocol.optimizer == "adam" else torch.optim.SGD
    optimizer = kind(model.parameters(), lr=protocol.lr)
    if protocol.lr_decay is not None:
        before.append(_decay(optimizer, protocol.lr_decay, _iterations(stream, protocol.train_batch, method.joint)))
    strategy = template(
        model=model,
        optimizer=optimizer,
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=protocol.train_batch,
        train_epochs=protocol.epochs,
        eval_mb_size=protocol.test_batch,
        device=job.device,
        plugins=[*before, *own, InMemoryDataPlugin(), progress.ProgressPlugin(report, n_parts)],
        evaluator=EvaluationPlugin(),
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


def _growth(plugins: list[Any]) -> float | None:
    """What a method added to the network, as a share of its numbers; None for methods that add nothing."""
    found = [plugin.growth for plugin in plugins if getattr(plugin, "growth", None) is not None]
    return float(found[0]) if found else None


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result so that the file is never there in part.

    Args:
        path: the file; its folder is made.
        result: what goes into it.
    """
    write_text(path, json.dumps(result, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it is never there in part.

    Args:
        path: the file; its folder is made.
        text: what goes into it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _device_name(device: torch.device) -> str:
    """The device with the name of the hardware where PyTorch knows it."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _synchronise(device: torch.device) -> None:
    """Wait for the device, so that a clock read now counts its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
