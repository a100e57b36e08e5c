"""What Ray and Dask have in common: a joblib backend that starts each run as a task of the cluster.

joblib's own backend for Dask waits for ever for a task that Dask gave up, and takes no limit of jobs; Ray's for
joblib gives the next run to the next worker in turn, busy or not. Here, a thread follows each run, starts it
once more when its worker died, and reports in any case, so that no failure reaches the others.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

from joblib import Parallel, delayed
from joblib.parallel import ParallelBackendBase

from benchmarks.backend_worker import Failure, Shell, died, make_shell, pack, read

#: Seconds to wait for runs that were stopped.
_PATIENCE = 10.0


class Cluster(Protocol):
    """What has to be known about a kind of cluster."""

    threads: int
    #: Whether the death of a worker is reported for the run that it did, and not for those in its queue too.
    exact: bool

    def start(self, shell: Shell, arguments: Sequence[Any]) -> Any:
        """Send a task and return a handle of it."""

    def wait(self, handle: Any) -> Any:
        """Wait for a task's result; raises what the cluster says about a task that it lost."""

    def stop(self, handles: Sequence[Any]) -> None:
        """Stop tasks, so that those who wait for them go on."""

    def deaths(self, error: BaseException) -> int:
        """How many deaths of workers an error of `wait` stands for; 0 for another kind of error."""


class _Backend(ParallelBackendBase):
    """Lets joblib send its tasks to a cluster."""

    supports_retrieve_callback = True

    def __init__(self, cluster: Cluster, jobs: int) -> None:
        super().__init__(nesting_level=0)
        self._cluster = cluster
        self._jobs = jobs
        self._followers = ThreadPoolExecutor(jobs, thread_name_prefix="follow run")
        self._following: list[Future[Any]] = []
        self._lock = threading.Lock()
        self._suspects = threading.Lock()
        self._handles: dict[int, Any] = {}
        self._stopped = False

    def effective_n_jobs(self, n_jobs: int) -> int:
        return max(2, self._jobs)  # for 1, joblib would run in this process

    def submit(self, func: Any, callback: Callable[[Future[Any]], None] | None = None) -> Future[Any]:
        # A batch of one; unpacked, the worker needs no joblib.
        ((shell, arguments, _),) = func.items
        future = self._followers.submit(self._follow, shell, arguments)
        self._following.append(future)
        if callback is not None:
            future.add_done_callback(callback)
        return future

    def retrieve_result_callback(self, future: Future[Any]) -> Any:
        return future.result()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        with self._lock:
            self._stopped = True
            handles = list(self._handles.values())
        if handles:
            self._cluster.stop(handles)

    def terminate(self) -> None:
        self._followers.shutdown(wait=False, cancel_futures=True)
        wait(self._following, timeout=_PATIENCE)  # before the connection is closed that they use

    def _follow(self, shell: Shell, arguments: Sequence[Any]) -> list[Any]:
        """Start one run, again if its worker dies, and report; it is given up after two deaths of its own."""
        index = arguments[0]
        outcome, deaths = self._attempt(shell, arguments)
        counted = deaths if self._cluster.exact else 0
        while deaths and counted < 2:
            # Suspects that are not known to be guilty go one at a time: what dies then dies of itself.
            with contextlib.nullcontext() if self._cluster.exact else self._suspects:
                outcome, deaths = self._attempt(shell, arguments)
            counted += deaths
        if deaths:
            outcome = died(f"its worker died {counted} times ({outcome.message})")
        return [(index, outcome)]

    def _attempt(self, shell: Shell, arguments: Sequence[Any]) -> tuple[Any, int]:
        """Start a run and wait for it: its outcome, and how many workers died of it in vain."""
        index = arguments[0]
        try:
            with self._lock:
                if self._stopped:
                    return Failure("cluster", "it was stopped"), 0
                handle = self._handles[index] = self._cluster.start(shell, arguments)
            return read(self._cluster.wait(handle))[1], 0
        except BaseException as error:  # a cancelled task of Dask is no Exception
            message = f"{type(error).__name__}: {' '.join(str(error).split())}"
            return Failure("cluster", message), self._cluster.deaths(error)
        finally:
            self._handles.pop(index, None)


def run(
    work: Callable[[Any], Any], items: Sequence[Any], jobs: int, cluster: Cluster
) -> Generator[tuple[int, Any], None, None]:
    """Run items on a cluster.

    Args:
        work: does one.
        items: what to do.
        jobs: how many are with the cluster at the same time.
        cluster: where.

    Yields:
        Index and outcome, in order of completion.
    """
    shell = make_shell()
    tasks = (delayed(shell)(index, pack(work, item), cluster.threads, None) for index, item in enumerate(items))
    backend = _Backend(cluster, jobs)
    outcomes = Parallel(n_jobs=jobs, backend=backend, return_as="generator_unordered", pre_dispatch=jobs, batch_size=1)(
        tasks
    )
    try:
        yield from outcomes
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # joblib's on results that nobody fetched
            outcomes.close()
