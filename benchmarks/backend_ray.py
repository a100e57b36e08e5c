"""Runs on a Ray cluster that somebody started."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from benchmarks.backend_worker import Report, Shell


class RayCluster:
    """How runs are started on Ray.

    Args:
        threads: processors that a run takes.
        gpus: share of a GPU that a run takes.
    """

    exact = True

    def __init__(self, threads: int, gpus: float) -> None:
        self.threads = threads
        self._options = {"num_cpus": threads, "num_gpus": gpus, "max_retries": 0}
        self._task: Any = None

    def start(self, shell: Shell, arguments: Sequence[Any]) -> Any:
        """Send a task."""
        import ray

        if self._task is None:
            self._task = ray.remote(**self._options)(shell)
        return self._task.remote(*arguments)

    def wait(self, handle: Any) -> Report:
        """Wait for a task."""
        import ray

        return ray.get(handle)

    def stop(self, handles: Sequence[Any]) -> None:
        """Kill the processes of tasks."""
        import ray

        for handle in handles:
            ray.cancel(handle, force=True)

    def deaths(self, error: BaseException) -> int:
        """Count a death of the worker or of its machine, for whatever reason."""
        from ray import exceptions

        kinds = ("WorkerCrashedError", "OutOfMemoryError", "NodeDiedError", "ObjectLostError", "RayActorError")
        return int(isinstance(error, tuple(getattr(exceptions, kind) for kind in kinds)))


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Be connected to a cluster; a connection that is there is used and stays.

    Args:
        address: where it is; None: the one that Ray finds.

    Yields:
        Nothing.

    Raises:
        Exception: whatever Ray says where there is none.
    """
    import ray
    from ray._private import worker

    if ray.is_initialized():
        yield
        return
    # The notices of dead workers are printed whatever `log_to_driver` says; this is how Ray's debugger does it.
    worker._worker_logs_enabled = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(address=address or "auto", log_to_driver=False, logging_level=logging.ERROR)
        yield
    finally:
        ray.shutdown()  # ends the connection; the cluster was not started here and goes on
        worker._worker_logs_enabled = True


def nodes() -> list[dict[str, float]]:
    """List what the machines of the cluster have.

    Returns:
        The resources of each machine that is alive.
    """
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
