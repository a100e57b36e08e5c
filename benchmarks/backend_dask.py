"""Runs on a Dask cluster that somebody started."""

from __future__ import annotations

import contextlib
import logging
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from benchmarks.backend_worker import Report, Shell

#: Seconds to wait until the workers were told to stop.
_PATIENCE = 10.0


class DaskCluster:
    """How runs are started on Dask.

    Args:
        client: connected to the scheduler.
        threads: for the computations of a run.
        gpus: share of a GPU that a run takes.
    """

    exact = False

    def __init__(self, client: Any, threads: int, gpus: float) -> None:
        self.threads = threads
        self._client = client
        self._resources = {"GPU": gpus} if gpus else None

    def start(self, shell: Shell, arguments: Sequence[Any]) -> Any:
        """Send a task."""
        key = f"run-{arguments[0]}-{uuid.uuid4().hex}"
        return self._client.submit(shell, *arguments, key=key, pure=False, retries=0, resources=self._resources)

    def wait(self, handle: Any) -> Report:
        """Wait for a task."""
        return handle.result()

    def stop(self, handles: Sequence[Any]) -> None:
        """Take tasks back and interrupt those that have begun, which Dask itself lets run to their end."""

        def stop() -> None:
            with contextlib.suppress(Exception):  # a cluster that is gone runs nothing
                self._client.cancel(list(handles), force=True)
                self._client.run(_interrupter(), {handle.key for handle in handles}, on_error="ignore")

        stopping = threading.Thread(target=stop, daemon=True)
        stopping.start()
        stopping.join(_PATIENCE)

    def deaths(self, error: BaseException) -> int:
        """Count the deaths after which the scheduler gave up: it tries some times by itself."""
        from distributed import KilledWorker

        return error.allowed_failures + 1 if isinstance(error, KilledWorker) else 0


def _interrupter() -> Callable[..., None]:
    """Make the function that the workers call; sent as code, like the shell."""

    def interrupt(keys: set[str], dask_worker: Any = None) -> None:
        import ctypes

        class Stopped(BaseException):  # a run that catches every Exception lets it pass
            pass

        for thread, key in list(dask_worker.active_threads.items()):
            if key in keys:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(Stopped))

    return interrupt


def default_address() -> str | None:
    """Tell the scheduler's address of Dask's own configuration, DASK_SCHEDULER_ADDRESS for one.

    Returns:
        The address, or None.
    """
    import dask
    import distributed  # noqa: F401  its defaults are part of the configuration

    return dask.config.get("scheduler-address", None)


@contextmanager
def connected(address: str, timeout: float) -> Iterator[Any]:
    """Be connected to a scheduler.

    Args:
        address: where it is.
        timeout: seconds to wait for it.

    Yields:
        The client.

    Raises:
        OSError: if it does not answer.
    """
    from distributed import Client

    loggers = [logging.getLogger(name) for name in ("distributed", "distributed.client")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)  # what matters comes back as the failure of a run
    try:
        with Client(address, timeout=timeout, set_as_default=False) as client:
            yield client
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def workers(client: Any, timeout: float) -> dict[str, dict[str, Any]]:
    """List the workers of a cluster, after waiting for the first one.

    Args:
        client: connected to the scheduler.
        timeout: seconds to wait.

    Returns:
        Address to what the scheduler knows of it: `nthreads`, `resources`, ...
    """
    with contextlib.suppress(TimeoutError):
        client.wait_for_workers(1, timeout=timeout)
    return dict(client.scheduler_info(n_workers=-1)["workers"])
