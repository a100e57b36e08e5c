"""One run: a protocol, a method and a seed give one result.

The same job twice gives the same result but for times and memory; so does one that was stopped and goes on.
"""

from __future__ import annotations

import gc
import math
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import checkpoint, evaluate, external, progress, readings, resources, sources
from benchmarks.build import build_strategy, build_stream
from benchmarks.curves import EpochCurves
from benchmarks.digest import code_digest
from benchmarks.folders import data_digest
from benchmarks.jobs import Job
from benchmarks.methods import find_method
from benchmarks.models import build_model
from benchmarks.trace import FORMAT, Session, Trace


def run(
    job: Job, data: sources.ImageData, report: progress.Report = progress.silent, session: Session | None = None
) -> dict[str, Any]:
    """Train and test.

    Args:
        job: what to run.
        data: the protocol's images.
        report: told where the training is.
        session: writes logs and a checkpoint after each experience, and goes on from a checkpoint that is there; None
            keeps nothing.

    Returns:
        The result, ready for JSON.

    Raises:
        OSError: if the folder of the session cannot be written.
    """
    gc.collect()  # strategies and plugins refer to each other: what the last run held would count as this one's
    memory = resources.PeakMemory(job.device)
    memory.start()
    trace = Trace()
    try:
        with resources.reproducible(job.seed), resources.noting_nondeterminism(trace.nondeterministic):
            plugins = _train(job, data, report, trace, session, memory)
    finally:
        evaluate.forget()
    _, kind = memory.stop()
    return {**_result(job, trace, plugins, kind), "data": data_digest(data)}


def _train(
    job: Job,
    data: sources.ImageData,
    report: progress.Report,
    trace: Trace,
    session: Session | None,
    memory: resources.PeakMemory,
) -> list[Any]:
    """Go through the stream, write down what is found, and return the method's plugins as they are at the end."""
    began = time.perf_counter()
    stream = build_stream(job.protocol, data, job.seed)
    method = find_method(job.method)
    parts = [stream.benchmark.train_stream] if method.joint else list(stream.benchmark.train_stream)
    # Drawn on the CPU, so that a seed means the same weights on every device.
    model = build_model(job.protocol.model, stream, job.protocol.hidden).to(job.device)
    size = readings.parameters(model)
    watching = Watching(EpochCurves(), progress.ProgressPlugin(report, len(parts)))
    strategy, plugins = build_strategy(job, stream, model, [watching.curves, watching.progress])
    known = checkpoint.known_objects(stream, progress=watching.progress) if session else {}
    found = _resume(session, known, job.device)
    if found is None:
        trace.initial, _ = evaluate.scores(model, stream, job.protocol.test_batch, job.device)
    else:
        strategy, plugins, watching.curves, before = found
        noted = trace.nondeterministic
        noted.extend(before.nondeterministic)
        trace.__dict__.update(before.__dict__)
        trace.nondeterministic = noted  # warnings to come are still noted there
    trace.sessions += 1
    earlier = trace.wall_seconds
    with _logs(session, job, trace) as logs:
        for position in range(len(trace.matrix), len(parts)):
            start = time.perf_counter()
            strategy.train_epochs = job.protocol.epochs - (method.own_epochs(job.settings) if position else 0)
            strategy.train(parts[position])
            _synchronise(job.device)
            seconds = time.perf_counter() - start
            accuracies, losses = evaluate.scores(strategy.model, stream, job.protocol.test_batch, job.device)
            trace.matrix.append(accuracies)
            trace.losses.append(losses)
            trace.added = readings.added(strategy.model, size, plugins)
            trace.experiences.append(
                {
                    "train_seconds": seconds,
                    "epochs": [list(pair) for pair in watching.curves.epochs],
                    "bytes_held": readings.bytes_held(plugins),
                    "free_share": readings.free_shares(plugins),
                }
            )
            trace.wall_seconds = earlier + time.perf_counter() - began
            peak, _ = memory.stop()
            trace.peak = peak if trace.peak is None or peak is None else max(peak, trace.peak)
            if logs is not None:
                logs.add(position)
            if session is not None and position + 1 < len(parts):
                content = {"strategy": strategy, "plugins": plugins, "curves": watching.curves, "trace": trace}
                _store(session, content, known)
    return plugins


@dataclass
class Watching:
    """The plugins that only look."""

    curves: EpochCurves
    progress: progress.ProgressPlugin


def _resume(session: Session | None, known: Mapping[str, Any], device: torch.device) -> Any:
    """Read strategy, plugins, curves and trace from a checkpoint; None where there is none that fits."""
    if session is None or not session.checkpoint.exists():
        return None
    try:
        content = checkpoint.load(session.checkpoint, session.key, known, device)
    except checkpoint.CheckpointError as error:
        warnings.warn(f"starting over: {error}", stacklevel=2)
        return None
    return content["strategy"], content["plugins"], content["curves"], content["trace"]


def _store(session: Session, content: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Write a checkpoint; a plugin of foreign origin that cannot be stored costs the checkpoint, not the run."""
    try:
        checkpoint.save(session.checkpoint, session.key, content, known)
    except checkpoint.CheckpointError as error:
        warnings.warn(f"if this run is stopped, it starts over: {error}", stacklevel=2)


@contextmanager
def _logs(session: Session | None, job: Job, trace: Trace) -> Iterator[Any]:
    """Open the run's logs with what is known so far."""
    if session is None:
        yield None
        return
    from benchmarks.logs import RunLogs

    logs = RunLogs(session.folder, trace, task_labels=job.protocol.task_labels, wandb=session.wandb)
    try:
        for position in range(len(trace.matrix)):
            logs.add(position)
        yield logs
    finally:
        logs.close()


def _result(job: Job, trace: Trace, plugins: list[Any], kind: str) -> dict[str, Any]:
    """Put the result together."""
    matrix = trace.matrix
    return {
        "format": FORMAT,
        "protocol": job.protocol.name,
        "method": job.method,
        "seed": job.seed,
        "hyper_parameters": job.hyper_parameters,
        "changed": job.differing,
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
        "diverged": not all(math.isfinite(loss) for row in trace.losses for loss in row),
        "added_parameters": trace.added,
        "bytes_held": readings.bytes_held(plugins),
        "experiences": trace.experiences,
        "train_seconds": sum(each["train_seconds"] for each in trace.experiences),
        "wall_seconds": trace.wall_seconds,
        "peak_memory_mb": trace.peak,
        "peak_memory_kind": kind,
        "sessions": trace.sessions,
        "method_report": readings.report(plugins),
        "device": _device_name(job.device),
        "nondeterministic": sorted(set(trace.nondeterministic)),
        "threads": torch.get_num_threads(),
        "versions": resources.versions(),
        "libraries": resources.libraries(),
        "origin": external.origin(job.method),
        "code": code_digest(),
    }


def _device_name(device: torch.device) -> str:
    """The device with the name of the hardware where PyTorch knows it."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _synchronise(device: torch.device) -> None:
    """Wait for the device, so that a clock read now counts its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
