"""One run: a protocol, a method and a seed give one result.

The same job twice gives the same result but for times and memory.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks import evaluate, progress, readings, resources, sources
from benchmarks.build import build_strategy, build_stream
from benchmarks.curves import EpochCurves
from benchmarks.digest import code_digest
from benchmarks.jobs import Job
from benchmarks.methods import find_method
from benchmarks.models import build_model

#: Version of the results' format; older ones are never mixed with newer ones.
FORMAT = 2


@dataclass
class Trace:
    """What a run has found so far.

    Attributes:
        initial: accuracies before any training, percent.
        matrix: a row of accuracies after each training, percent.
        losses: likewise the mean cross-entropy.
        experiences: what else is known of each training.
        added: parameters that the network has gained.
        wall_seconds: of all sessions.
        sessions: how often the run was started.
        nondeterministic: operations that PyTorch has no deterministic version of on this device.
    """

    initial: list[float] = field(default_factory=list)
    matrix: list[list[float]] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)
    experiences: list[dict[str, Any]] = field(default_factory=list)
    added: int = 0
    wall_seconds: float = 0.0
    sessions: int = 0
    nondeterministic: list[str] = field(default_factory=list)


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
    trace = Trace()
    try:
        with resources.reproducible(job.seed), _exceptions_to_determinism(trace.nondeterministic):
            plugins = _train(job, data, report, trace)
    finally:
        evaluate.forget()
    peak, kind = memory.stop()
    return _result(job, trace, plugins, peak, kind)


def _train(job: Job, data: sources.ImageData, report: progress.Report, trace: Trace) -> list[Any]:
    """Go through the stream, and return the method's plugins as they are at the end."""
    began = time.perf_counter()
    stream = build_stream(job.protocol, data, job.seed)
    # Drawn on the CPU, so that a seed means the same weights on every device.
    model = build_model(job.protocol.model, stream, job.protocol.hidden).to(job.device)
    size = readings.parameters(model)
    curves = EpochCurves()
    strategy, plugins = build_strategy(
        job, stream, model, [curves, progress.ProgressPlugin(report, _n_parts(job, stream))]
    )
    trace.sessions += 1
    trace.initial, _ = evaluate.scores(model, stream, job.protocol.test_batch, job.device)
    method = find_method(job.method)
    parts = [stream.benchmark.train_stream] if method.joint else list(stream.benchmark.train_stream)
    for position, part in enumerate(parts):
        start = time.perf_counter()
        strategy.train_epochs = job.protocol.epochs - (method.own_epochs(job.settings) if position else 0)
        strategy.train(part)
        _synchronise(job.device)
        seconds = time.perf_counter() - start
        accuracies, losses = evaluate.scores(strategy.model, stream, job.protocol.test_batch, job.device)
        trace.matrix.append(accuracies)
        trace.losses.append(losses)
        trace.added = readings.added(strategy.model, size, plugins)
        trace.experiences.append(
            {
                "train_seconds": seconds,
                "epochs": [list(pair) for pair in curves.epochs],
                "bytes_held": readings.bytes_held(plugins),
                "free_share": readings.free_shares(plugins),
            }
        )
    trace.wall_seconds += time.perf_counter() - began
    return plugins


def _result(job: Job, trace: Trace, plugins: list[Any], peak: float | None, kind: str) -> dict[str, Any]:
    """Put the result together."""
    matrix = trace.matrix
    return {
        "format": FORMAT,
        "protocol": job.protocol.name,
        "method": job.method,
        "seed": job.seed,
        "hyper_parameters": job.hyper_parameters,
        "changed": dict(job.changes),
        "task_order": job.protocol.task_order,
        "experience_groups": None if job.protocol.group_order is None else list(job.protocol.group_order),
        "initial_accuracies": trace.initial,
        "accuracy_matrix": matrix,
        "loss_matrix": trace.losses,
        "acc": evaluate.average_accuracy(matrix),
        "bwt": evaluate.backward_transfer(matrix),
        "forgetting": evaluate.forgetting(matrix),
        "forward_transfer": evaluate.forward_transfer(matrix, trace.initial),
        "growth": readings.growth(plugins),
        "added_parameters": trace.added,
        "bytes_held": readings.bytes_held(plugins),
        "experiences": trace.experiences,
        "train_seconds": sum(each["train_seconds"] for each in trace.experiences),
        "wall_seconds": trace.wall_seconds,
        "peak_memory_mb": peak,
        "peak_memory_kind": kind,
        "sessions": trace.sessions,
        "method_report": readings.report(plugins),
        "device": _device_name(job.device),
        "nondeterministic": sorted(trace.nondeterministic),
        "threads": torch.get_num_threads(),
        "versions": resources.versions(),
        "code": code_digest(),
    }


def _n_parts(job: Job, stream: Any) -> int:
    """Trainings of a run."""
    return 1 if find_method(job.method).joint else len(stream.train)


@contextmanager
def _exceptions_to_determinism(found: list[str]) -> Iterator[None]:
    """Note which operations warn that they have no deterministic version; other warnings go where they went."""
    with warnings.catch_warnings():
        shown = warnings.showwarning

        def show(message: Any, category: Any, file: str, line: int, *rest: Any) -> None:
            text = str(message)
            if "deterministic" in text and "does not have" in text:
                name = text.split(maxsplit=1)[0]
                if name not in found:
                    found.append(name)
                return
            shown(message, category, file, line, *rest)

        warnings.showwarning = show
        yield


def _device_name(device: torch.device) -> str:
    """The device with the name of the hardware where PyTorch knows it."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _synchronise(device: torch.device) -> None:
    """Wait for the device, so that a clock read now counts its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
