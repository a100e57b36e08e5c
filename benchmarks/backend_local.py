"""Runs in processes of this machine: joblib's own pool, renewed when one of its processes dies."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from joblib import Parallel, delayed
from joblib.parallel import LokyBackend

from benchmarks.backend_worker import died, make_shell, pack, read_file

_LOG_TAIL = 4000


class _Pool(LokyBackend):
    """joblib's pool of processes, which remembers who died and leaves no process behind.

    When one process dies, loky breaks the whole pool: it fails everything that is pending and then kills the
    other processes. In between, the dead are told from the killed.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        super().__init__(inner_max_num_threads=threads)
        self._folder = folder
        self.dead: set[int] = set()

    def retrieve_result_callback(self, future: Future[Any]) -> Any:
        try:
            return super().retrieve_result_callback(future)
        except BrokenProcessPool:
            self.dead |= {index for index, pid in running(self._folder) if not _alive(pid)}
            raise

    def terminate(self) -> None:
        workers = self._workers
        super().terminate()
        if workers is not None:
            workers.shutdown(wait=True, kill_workers=True)


def run(
    work: Callable[[Any], Any],
    items: Sequence[Any],
    jobs: int,
    threads: int,
    scratch: Path | None,
) -> Generator[tuple[int, Any], None, None]:
    """Run items in processes of this machine.

    Args:
        work: does one.
        items: what to do.
        jobs: how many at the same time.
        threads: for the computations of each.
        scratch: where a folder for this call is made, and removed; None: where temporary files go.

    Yields:
        Index and outcome, in order of completion.
    """
    # loky's word for a worker that it replaces because its memory grew, which a training run does.
    warnings.filterwarnings("ignore", message="A worker stopped while some jobs were given to the executor")
    if scratch is not None:
        scratch.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="workers-", dir=scratch))
    try:
        deaths: Counter[int] = Counter()
        pending = dict(enumerate(items))
        while pending:
            pool = _Pool(folder, threads)
            sent: set[int] = set()
            try:
                for index, outcome in _round(work, pending, sent, pool, jobs, threads):
                    del pending[index]
                    yield index, outcome
            except BrokenProcessPool as error:
                finished = [index for index in pending if (folder / f"done-{index}").exists()]
                for index in finished:
                    del pending[index]
                    yield read_file(folder / f"done-{index}")
                last_words = {index: _tail(folder / f"{pid}.log") for index, pid in running(folder)}
                blamed = pool.dead & set(pending)
                if not blamed and not finished:
                    # Without a marker the processes died before they began: then everything sent is suspect.
                    blamed = set(last_words) & set(pending) or sent & set(pending)
                deaths.update(blamed)
                for index in [index for index in blamed if deaths[index] > 1]:
                    del pending[index]
                    yield index, died(f"its process died twice{_exit_codes(error)}", last_words.get(index, ""))
                for marker in folder.glob("running-*"):
                    marker.unlink()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _round(
    work: Callable[[Any], Any], pending: dict[int, Any], sent: set[int], pool: _Pool, jobs: int, threads: int
) -> Generator[tuple[int, Any], None, None]:
    """Go through the pending items with one pool."""
    shell = make_shell()

    def tasks() -> Iterator[Any]:
        for index, item in list(pending.items()):
            sent.add(index)
            yield delayed(shell)(index, pack(work, item), threads, str(pool._folder))

    # For one worker joblib would run in this process, and a death would be its own.
    workers = max(2, min(jobs, len(pending)))
    parallel = Parallel(
        n_jobs=workers, backend=pool, return_as="generator_unordered", pre_dispatch=workers, batch_size=1
    )
    reports = parallel(tasks())
    try:
        for index, _, _ in reports:
            yield read_file(pool._folder / f"done-{index}")
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # joblib's on results that nobody fetched
            reports.close()


def running(folder: Path) -> list[tuple[int, int]]:
    """Tell what was begun and not finished.

    Args:
        folder: where the workers leave their markers.

    Returns:
        Pairs of an item's index and the process that ran it.
    """
    return [(int(index), int(pid)) for _, index, pid in (path.name.split("-") for path in folder.glob("running-*"))]


def _alive(pid: int) -> bool:
    """Tell whether a process is there; where one cannot ask without harm, it is."""
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _exit_codes(error: BaseException) -> str:
    """Cut what loky knows about the exit out of its message."""
    for line in str(error).splitlines():
        if line.startswith("The exit codes of the workers are "):
            return f" (the last time: {line.partition('{')[2].rstrip('}')})"
    return ""


def _tail(path: Path) -> str:
    """Read the end of a log."""
    return path.read_text(errors="replace")[-_LOG_TAIL:] if path.exists() else ""
