"""From a request to its runs: every one resolved and checked, and none there twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from benchmarks import assignments
from benchmarks.build import build_stream
from benchmarks.check import check_method, check_stream
from benchmarks.folders import RunFolder, claim, data_digest, run_folder, run_key
from benchmarks.jobs import Job, load_data, make_job, unsuited
from benchmarks.protocols import find_protocol
from benchmarks.request import Request
from benchmarks.settings import InputError, SettingError
from benchmarks.sources import ImageData


@dataclass(frozen=True)
class Planned:
    """One run of a comparison.

    Attributes:
        label: the method, and what of it the grid varies.
        job: what to run.
        folder: where its files are.
    """

    label: str
    job: Job
    folder: RunFolder

    def __str__(self) -> str:
        return f"{self.job.protocol.name} {self.label} seed {self.job.seed}"


@dataclass(frozen=True)
class Plan:
    """All runs of a comparison.

    Attributes:
        runs: protocol by protocol, seed by seed.
        left_out: protocol to label to the reason why it is not run.
        threads: of each run.
    """

    runs: tuple[Planned, ...]
    left_out: Mapping[str, Mapping[str, str]]
    threads: int


def prepare(request: Request) -> Plan:
    """Find everything that can be wrong with a request; nothing is trained.

    Args:
        request: what to compare.

    Returns:
        The runs.

    Raises:
        InputError: if the request cannot be carried out.
    """
    _check_lists(request)
    jobs, left_out = _jobs(request)
    digests = {}
    for name in request.protocols:
        data = data_for(request, name)
        digests[name] = data_digest(data)
        for job in _one_of_each(jobs, name):
            stream = build_stream(job.protocol, data, job.seed)
            check_stream(job, stream)
            check_method(job, stream)
    runs: dict[str, Planned] = {}
    for label, job in jobs:
        key = run_key(job, digests[job.protocol.name])
        if key in runs and runs[key].label != label:
            raise InputError(f"--grid: {runs[key].label!r} and {label!r} are the same runs: give every value once")
        # Two points of a grid that differ in what a method does not know are one run.
        runs.setdefault(key, Planned(label, job, run_folder(request.out, job, key)))
    claim(request.out, request.name or request.folder.name, request.protocols)
    return Plan(tuple(runs.values()), left_out, _threads(request))


def _check_lists(request: Request) -> None:
    """Refuse what is missing, repeated or unknown."""
    for what, names in (("protocol", request.protocols), ("method", request.methods), ("seed", request.seeds)):
        if not names:
            raise InputError(f"no {what} was given")
        if len(set(names)) != len(names):
            raise InputError(f"a {what} was given twice: {', '.join(str(name) for name in names)}")
    assignments.check_names(request.protocols, request.methods)
    assignments.check(request.protocols, request.methods, request.assignments)
    assignments.check(request.protocols, request.methods, request.grid)
    for protocol in request.protocols:
        for method in request.methods:
            assignments.check_hidden(protocol, method, request.assignments, request.grid)
    for name in request.data:
        if name and name not in request.protocols:
            raise InputError(f"--data names {name!r}, which is not among the protocols to run")
    takers = [name for name in request.protocols if find_protocol(name).source != "digits"]
    if "" in request.data and not takers:
        raise InputError(f"{', '.join(request.protocols)}: brings its own images and takes no --data")


def _jobs(request: Request) -> tuple[list[tuple[str, Job]], dict[str, dict[str, str]]]:
    """Resolve every run with its label, and say what is left out; a wrong value is told by where it was given."""
    jobs = []
    left_out: dict[str, dict[str, str]] = {}
    for protocol in request.protocols:
        for seed in request.seeds:
            for method in request.methods:
                for point in assignments.points(request.grid):
                    given = {**request.assignments, **point}
                    changes = assignments.for_run(protocol, method, given)
                    label = assignments.label(protocol, method, point)
                    try:
                        reasons = unsuited(protocol, [method], changes) if request.every else {}
                        if reasons:
                            left_out.setdefault(protocol, {})[label] = reasons[method]
                        else:
                            jobs.append((label, make_job(protocol, method, seed, request.device, changes)))
                    except SettingError as error:
                        key = assignments.given_as(protocol, method, given, error.key)
                        option = "--grid" if key in point else "--set"
                        raise InputError(f"{option} {key}={error.text}: {error.problem}") from error
    return jobs, left_out


def _one_of_each(jobs: list[tuple[str, Job]], protocol: str) -> Iterator[Job]:
    """The first seed of each label on a protocol."""
    seen = set()
    for label, job in jobs:
        if job.protocol.name == protocol and label not in seen:
            seen.add(label)
            yield job


def _threads(request: Request) -> int:
    """Threads of each run: this machine's divided among the jobs; one on a cluster, whose machines may differ."""
    import torch

    if request.threads is not None:
        return request.threads
    return max(1, torch.get_num_threads() // max(1, request.jobs)) if request.backend == "local" else 1


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
    return load(name, data_file(request, name))


def data_file(request: Request, name: str) -> Path | None:
    """Return the file with the images of a protocol; None where it needs none or downloads them."""
    shared = request.data.get("") if find_protocol(name).source != "digits" else None
    path = request.data.get(name, shared)
    return None if path is None else path.resolve()


@lru_cache(maxsize=1)
def load(name: str, path: Path | None) -> ImageData:
    """Read images; those of the last protocol are kept, so that a single one is read once."""
    return load_data(find_protocol(name), path)
