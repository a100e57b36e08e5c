"""Protocols times methods times seeds, in one process: a file for each run and a table for each protocol.

What can be wrong in the request is found before the first run. A run that fails is reported and leaves the
others alone; an interruption leaves the finished runs on disk.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.build import build_stream
from benchmarks.files import write_json, write_text
from benchmarks.jobs import Job, change_tag, combined_tag, load_data, make_job, unsuited
from benchmarks.methods import find_method
from benchmarks.models import build_model
from benchmarks.progress import Bars
from benchmarks.protocols import PROTOCOLS, check_assignments, find_protocol
from benchmarks.report import terminal as report
from benchmarks.resources import reproducible
from benchmarks.run import run
from benchmarks.settings import InputError
from benchmarks.sources import ImageData
from benchmarks.streams import Stream

Runner = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Request:
    """What to compare.

    Attributes:
        protocols: their names.
        methods: their names.
        every: the methods are all there are, not a choice: those that do not suit a protocol are left out.
        seeds: one run each.
        data: protocol name to the user's file; the key "" stands for every protocol that needs one.
        device: where to train.
        assignments: what came with `--set`.
        out: the folder of the results.
        command: the command line, written into the tables.
    """

    protocols: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    data: Mapping[str, Path]
    device: torch.device
    assignments: Mapping[str, str]
    out: Path
    command: str
    every: bool = False

    def left_out(self, protocol: str) -> dict[str, str]:
        """Methods that are not run on a protocol, and why."""
        return unsuited(protocol, self.methods, self.assignments) if self.every else {}


@dataclass
class Outcome:
    """What became of the runs.

    Attributes:
        results: protocol name to the results of its finished runs.
        failures: file name of each failed run and what went wrong.
        tables: protocol name to its rows, for those protocols with a finished run.
    """

    results: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    failures: list[tuple[str, str]] = field(default_factory=list)
    tables: dict[str, list[report.Row]] = field(default_factory=dict)


def parse_data(texts: Sequence[str]) -> dict[str, Path]:
    """Read `--data [PROTOCOL=]FILE`.

    Args:
        texts: what came with the option.

    Returns:
        Protocol name, or "" for all, to file.

    Raises:
        InputError: if the same protocol gets two files.
    """
    files: dict[str, Path] = {}
    for text in texts:
        name, equals, rest = text.partition("=")
        key, path = (name, rest) if equals and name in PROTOCOLS else ("", text)
        if key in files:
            raise InputError(f"--data gives two files for {key or 'all protocols'}: {str(files[key])!r} and {path!r}")
        files[key] = Path(path)
    return files


def plan(request: Request) -> list[Job]:
    """Resolve and check every run of a request.

    Args:
        request: what to compare.

    Returns:
        The jobs, protocol by protocol, seed by seed.

    Raises:
        InputError: if anything is unknown, repeated or does not fit.
    """
    for what, names in (
        ("protocol", request.protocols),
        ("method", request.methods),
        ("seed", request.seeds),
    ):
        if not names:
            raise InputError(f"no {what} was given")
        if len(set(names)) != len(names):
            raise InputError(f"a {what} was given twice: {', '.join(str(name) for name in names)}")
    check_assignments(request.protocols, request.methods, request.assignments)
    for name in request.data:
        if name and name not in request.protocols:
            raise InputError(f"--data names {name!r}, which is not among the protocols to run")
    takers = [name for name in request.protocols if find_protocol(name).source != "digits"]
    if "" in request.data and not takers:
        raise InputError(f"{', '.join(request.protocols)}: brings its own images and takes no --data")
    return [
        make_job(protocol, method, seed, request.device, request.assignments)
        for protocol in request.protocols
        for seed in request.seeds
        for method in request.methods
        if method not in request.left_out(protocol)
    ]


def data_for(request: Request, name: str) -> ImageData:
    """Read the images of one protocol of a request.

    Args:
        request: what to compare.
        name: the protocol.

    Returns:
        The data.

    Raises:
        InputError: if there is none or it does not fit.
    """
    protocol = find_protocol(name)
    shared = request.data.get("") if protocol.source != "digits" else None
    return _load(name, request.data.get(name, shared))


@lru_cache(maxsize=1)
def _load(name: str, path: Path | None) -> ImageData:
    """Read images; those of the last protocol are kept, so that a single one is read once."""
    return load_data(find_protocol(name), path)


def check_output(folder: Path) -> None:
    """Make the output folder and see that it can be written.

    Args:
        folder: the folder.

    Raises:
        InputError: if it is something else, or cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"--out {str(folder)!r} cannot be written: {error.strerror or error}") from error


def prepare(request: Request) -> list[Job]:
    """Find everything that can be wrong with a request; nothing is trained, and no file is written.

    Args:
        request: what to compare.

    Returns:
        The jobs.

    Raises:
        InputError: if the request cannot be carried out.
    """
    jobs = plan(request)
    for name in request.protocols:
        chosen = [job for job in jobs if job.protocol.name == name]
        data = data_for(request, name)
        for job in {job.method: job for job in chosen}.values():
            stream = build_stream(job.protocol, data, job.seed)
            if find_method(job.method).joint and job.protocol.train_batch < stream.n_heads:
                raise InputError(
                    f"train_batch={job.protocol.train_batch}: joint training on {name} takes samples of all "
                    f"{stream.n_heads} tasks into each batch; expected at least {stream.n_heads}"
                )
            check_method(job, stream)
    check_output(request.out)
    return jobs


def check_method(job: Job, stream: Stream) -> None:
    """Try a job's method on its network and the sizes of its training sets; nothing is trained.

    Args:
        job: the run.
        stream: its stream.

    Raises:
        InputError: if the method refuses the network, its settings or the data.
    """
    from avalanche_gradproj import GradProjError, HALRPPlugin
    from avalanche_gradproj.plugins.base import GradientTransformPlugin, task_heads
    from avalanche_gradproj.plugins.task_model import head_names

    smallest = min(len(dataset) for dataset in stream.train)
    refused = find_method(job.method).refuse(job.settings, smallest, len(stream.train))
    if refused is not None:
        raise InputError(f"{job.method} on {job.protocol.name}: {refused}")
    try:
        with reproducible(job.seed):
            model = build_model(job.protocol.model, stream, job.protocol.hidden)
        for plugin in find_method(job.method).plugins(job.settings, job.seed):
            if isinstance(plugin, HALRPPlugin):
                plugin.wrap(model)
                plugin.method.start(model, heads=head_names(model), remaining=len(stream.train))
            if not isinstance(plugin, GradientTransformPlugin):
                continue
            plugin.method.start(model, None, heads=task_heads(model))
            needed = plugin.method.required_samples()
            if needed is not None and needed > smallest:
                argument = plugin.method.samples_argument
                name = f"{job.method} on {job.protocol.name}"
                raise InputError(f"{name}: {argument}={needed}: there are experiences of {smallest} samples")
    except GradProjError as error:
        raise InputError(f"{job.method} on {job.protocol.name}: {' '.join(str(error).split())}") from error


def compare(request: Request, jobs: Sequence[Job], bars: Bars, outcome: Outcome, runner: Runner = run) -> None:
    """Run everything.

    Args:
        request: what to compare.
        jobs: its runs, as `prepare` returned them.
        bars: told about the progress.
        outcome: filled while the runs go on, so that an interruption leaves what is known.
        runner: does one run.
    """
    for name in request.protocols:
        data = data_for(request, name)
        for job in jobs:
            if job.protocol.name == name:
                one(job, data, request.out, bars, outcome, runner=runner)
        if outcome.results.get(name):
            _write_table(request, name, outcome)


def one(job: Job, data: ImageData, out: Path, bars: Bars, outcome: Outcome, *, runner: Runner = run) -> None:
    """Do one run; whatever goes wrong in it stays with it."""
    label = f"{job.protocol.name} {job.method} seed {job.seed}"
    path = out / job.file_name
    trace = path.with_suffix(".error.txt")
    bars.begin(label)
    try:
        result = runner(job, data, bars.report)
        write_json(path, result)
    except Exception as error:  # a method of any origin may raise anything
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        outcome.failures.append((str(job.file_name), message))
        write_text(trace, traceback.format_exc())
        bars.end(f"{label}: failed: {message} (traceback in {trace})", style="red")
        return
    trace.unlink(missing_ok=True)
    outcome.results.setdefault(job.protocol.name, []).append(result)
    bars.end(f"{label}: {report.one_line(result)}")


def _write_table(request: Request, name: str, outcome: Outcome) -> None:
    """Write a protocol's table; changed settings get a table of their own."""
    without = request.left_out(name)
    methods = [method for method in request.methods if method not in without]
    rows = report.rows(outcome.results[name], methods)
    outcome.tables[name] = rows
    tags = {change_tag(find_protocol(name), method, request.assignments) for method in methods}
    tag = combined_tag(tags)
    failed = [f"{file}: {message}" for file, message in outcome.failures if file.startswith(f"{name}/")]
    path = request.out / name / f"table{tag}.md"
    write_text(path, report.markdown(find_protocol(name), rows, request, failed, without))
