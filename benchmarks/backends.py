"""How many runs are spread: over this process, processes of this machine, or a Ray or Dask cluster.

`check` finds what is wrong with the options before anything runs; `execute` does the runs and hands over what
became of each as soon as it is known. joblib does the spreading.

On one machine with a GPU, several jobs share it: each process takes its own context and memory there, and
whether they fit is for the user to say with the number of jobs. No job is bound to one of several GPUs here:
the device is part of the run. On a cluster, the cluster gives each run its share of a GPU (see `gpu_share`).

Runs on a cluster need the same code on its machines. Runs set the state of their process (seeds, threads), so
no two may share one: Ray gives each a process of its own, Dask workers must have one thread. Dask itself tries
a run whose worker died on several workers before it says so (`distributed.scheduler.allowed-failures`), and a
cluster that has lost all its workers keeps the runs until it has some again.
"""

from __future__ import annotations

import importlib.util
import socket
import threading
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from benchmarks.backend_worker import Failure
from benchmarks.settings import InputError

__all__ = ["Failure", "Options", "check", "execute"]

Item = TypeVar("Item")
Finished = TypeVar("Finished")

#: Seconds to wait for a cluster.
PATIENCE = 10.0


@dataclass(frozen=True)
class Options:
    """How to spread runs.

    Attributes:
        backend: `local` for processes of this machine, or the kind of the cluster.
        jobs: runs at the same time; 1 with `local` stays in this process.
        threads: threads for the computations of a run; None: the cores divided by the jobs, at least 1 (in this
            process: as many as it has).
        address: of an existing cluster; None: the one that Ray finds, or of Dask's configuration.
        gpu_share: fraction of a GPU that a run takes on a cluster, if it takes one.
        cuda: whether runs take a GPU.
    """

    backend: Literal["local", "ray", "dask"] = "local"
    jobs: int = 1
    threads: int | None = None
    address: str | None = None
    gpu_share: float = 1.0
    cuda: bool = False

    @property
    def gpus(self) -> float:
        """The share of a GPU to ask a cluster for."""
        return self.gpu_share if self.cuda else 0.0


def check(options: Options) -> None:
    """Find what is wrong with the options; a cluster is asked, and waited for ten seconds at most.

    Args:
        options: how to spread runs.

    Raises:
        InputError: if they cannot be carried out.
    """
    if options.jobs < 1:
        raise InputError(f"--jobs {options.jobs}: expected at least 1")
    if options.threads is not None and options.threads < 1:
        raise InputError(f"--threads {options.threads}: expected at least 1")
    if not 0 < options.gpu_share <= 1:
        raise InputError(f"a GPU share of {options.gpu_share:g}: expected more than 0 and at most 1")
    if options.backend not in ("local", "ray", "dask"):
        raise InputError(f"unknown backend {options.backend!r}: expected local, ray or dask")
    if options.backend == "local" and options.address is not None:
        raise InputError(f"the address {options.address!r} is of a cluster: expected the backend ray or dask with it")
    package = {"local": "joblib", "ray": "ray", "dask": "distributed"}[options.backend]
    in_process = options.backend == "local" and options.jobs == 1
    for needed in () if in_process else ("joblib", package):
        if importlib.util.find_spec(needed) is None:
            extra = "benchmarks" if needed == "joblib" else options.backend
            raise InputError(f"{needed} is not installed: pip install 'avalanche-gradproj[{extra}]'")
    if options.backend == "ray":
        _check_ray(options)
    elif options.backend == "dask":
        _check_dask(options)


def execute(
    work: Callable[[Item], Finished], items: Sequence[Item], options: Options, scratch: Path | None = None
) -> Generator[tuple[int, Finished | Failure], None, None]:
    """Do all runs; none that fails or kills its worker takes another one with it.

    A run whose worker died is done once more, and is given up when its worker died again. Close the iterator
    when it is left early (`contextlib.closing`): that stops the workers.

    Args:
        work: does one; it and the items are pickled, and so is its result, unless they stay in this process.
        items: what to do.
        options: how to spread, as `check` accepted them.
        scratch: a folder on this machine for the files of local workers; None: where temporary files go.

    Yields:
        The index of an item and its result or its failure, in order of completion.

    Raises:
        InputError: if the cluster is no longer what `check` found.
    """
    if options.backend == "local" and options.jobs == 1:
        outcomes = _in_process(work, items, options.threads)
    elif options.backend == "local":
        from benchmarks import backend_local

        outcomes = backend_local.run(work, items, options.jobs, _local_threads(options), scratch)
    elif options.backend == "ray":
        outcomes = _on_ray(work, items, options)
    else:
        outcomes = _on_dask(work, items, options)
    with closing(outcomes):
        yield from outcomes


def _in_process(
    work: Callable[[Any], Any], items: Sequence[Any], threads: int | None
) -> Generator[tuple[int, Any], None, None]:
    """Do the runs here, one after the other; an interruption passes through."""
    before = None
    if threads is not None:
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(threads)
    try:
        for index, item in enumerate(items):
            try:
                outcome = work(item)
            except Exception as error:
                message = f"{type(error).__name__}: {' '.join(str(error).split())}"
                outcome = Failure("raised", message, traceback.format_exc())
            yield index, outcome
    finally:
        if before is not None:
            torch.set_num_threads(before)


def _on_ray(
    work: Callable[[Any], Any], items: Sequence[Any], options: Options
) -> Generator[tuple[int, Any], None, None]:
    """Do the runs on Ray."""
    from benchmarks import backend_cluster, backend_ray

    with backend_ray.connected(options.address):
        cluster = backend_ray.RayCluster(_ray_threads(options, backend_ray.nodes()), options.gpus)
        with closing(backend_cluster.run(work, items, options.jobs, cluster)) as outcomes:
            yield from outcomes


def _on_dask(
    work: Callable[[Any], Any], items: Sequence[Any], options: Options
) -> Generator[tuple[int, Any], None, None]:
    """Do the runs on Dask."""
    from benchmarks import backend_cluster, backend_dask

    with backend_dask.connected(_dask_address(options), PATIENCE) as client:
        cluster = backend_dask.DaskCluster(client, options.threads or 1, options.gpus)
        with closing(backend_cluster.run(work, items, options.jobs, cluster)) as outcomes:
            yield from outcomes


def _local_threads(options: Options) -> int:
    """Share the cores that this process may use."""
    from joblib import cpu_count

    return options.threads or max(1, cpu_count() // options.jobs)


def _ray_threads(options: Options, nodes: Sequence[dict[str, float]]) -> int:
    """Share the processors of the cluster; what is asked for has to be free on one machine."""
    cores = [int(node.get("CPU", 0)) for node in nodes]
    fair = sum(cores) // options.jobs
    return options.threads or max(1, min(fair, max(cores, default=1)))


def _check_ray(options: Options) -> None:
    """Look for the cluster, and for a machine that a run fits on: Ray itself would wait for one for ever."""
    from benchmarks import backend_ray

    name = f"the Ray cluster at {options.address!r}" if options.address else "the Ray cluster"
    if options.address is not None:
        _check_port(options.address, name)

    def ask() -> list[dict[str, float]]:
        with backend_ray.connected(options.address):
            return backend_ray.nodes()

    try:
        nodes = _ask(ask, name)
    except InputError as error:
        if options.address is not None or not isinstance(error.__cause__, ConnectionError):
            raise
        hint = "start one with `ray start --head`, or give its address"
        raise InputError(f"no running Ray cluster was found: {hint}") from error
    threads = _ray_threads(options, nodes)
    if not any(node.get("CPU", 0) >= threads and node.get("GPU", 0) >= options.gpus for node in nodes):
        share = f" and {options.gpus:g} of a GPU" if options.gpus else ""
        raise InputError(f"{name} has no machine with {threads} CPUs{share}, which a run takes")


def _check_dask(options: Options) -> None:
    """Look for the scheduler, and for workers that can take a run: Dask itself would wait for one for ever."""
    from benchmarks import backend_dask

    address = _dask_address(options)
    name = f"the Dask scheduler at {address!r}"

    def ask() -> dict[str, dict[str, Any]]:
        with backend_dask.connected(address, PATIENCE / 2) as client:
            return backend_dask.workers(client, PATIENCE / 2)

    workers = _ask(ask, name)
    if not workers:
        raise InputError(f"{name} has no workers: start some with `dask worker {address} --nthreads 1`")
    crowded = [worker for worker, facts in workers.items() if facts["nthreads"] > 1]
    if crowded:
        raise InputError(
            f"{name} has workers with several threads ({crowded[0]}): runs need a process of their own, "
            "start the workers with --nthreads 1 and --nworkers for their number"
        )
    if not any(facts.get("resources", {}).get("GPU", 0) >= options.gpus for facts in workers.values()):
        raise InputError(f"{name} has no worker with {options.gpus:g} of a GPU: start them with --resources GPU=1")


def _dask_address(options: Options) -> str:
    """Name the scheduler."""
    from benchmarks import backend_dask

    address = options.address or backend_dask.default_address()
    if address is None:
        raise InputError("the backend dask needs the address of a running scheduler (tcp://HOST:8786)")
    return address


def _ask(ask: Callable[[], Any], name: str) -> Any:
    """Ask a cluster; neither library gives up on something that takes the connection and does not answer."""
    answers: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            answers.append(ask())
        except BaseException as error:
            errors.append(error)

    asking = threading.Thread(target=run, daemon=True)
    asking.start()
    asking.join(PATIENCE + 1)  # so that the library's own limit, which says more, is first
    if answers:
        return answers[0]
    if errors:
        raise InputError(f"{name} does not answer: {' '.join(str(errors[0]).split())}") from errors[0]
    raise InputError(f"{name} does not answer within {PATIENCE:g} s")


def _check_port(address: str, name: str) -> None:
    """See that something listens at HOST:PORT; other forms of an address are left to the library."""
    host, _, port = address.partition("://")[2].partition("/")[0].rpartition(":")
    if "://" not in address:
        host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()
    except OSError as error:
        raise InputError(f"{name} cannot be reached: {error}") from error
