"""Progress of a comparison on the terminal: runs done, running, failed, and the time that is left.

Everything goes to standard error, so that a table on standard output can be piped. Without a terminal there are no
bars, only a line for each run that ended. Where the runs are is read from their folders: it is the same for one
process, many, and a cluster.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from benchmarks.plan import Planned

_PAUSE = 0.5


class Board:
    """A bar for all runs and one for each that is running.

    Args:
        runs: all runs that have to be done.
        jobs: how many run at a time.
        kept: how many had finished before.
        console: where to draw; standard error by default.
    """

    def __init__(self, runs: Sequence[Planned], jobs: int, kept: int = 0, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._runs = list(runs)
        self._jobs = jobs
        self._left = {planned.folder.path: planned for planned in runs}
        self._failed = 0
        self._seconds: dict[tuple[str, str], list[float]] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[position]}"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._all = self._progress.add_task("runs", total=kept + len(runs), completed=kept, position="")
        self._bars: dict[Any, TaskID] = {}
        self._lock = threading.RLock()  # the watcher and the one who tells of ended runs draw the same bars
        for planned in runs:
            with contextlib.suppress(OSError):
                planned.folder.status.unlink()  # left by a process that was killed
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Board:
        self._progress.start()
        if self._console.is_terminal:
            self._watcher.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._watcher.is_alive():
            self._watcher.join()
        self._progress.stop()

    def say(self, line: str, *, style: str | None = None) -> None:
        """Leave a line above the bars."""
        self._console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)

    def ended(self, planned: Planned, line: str, *, seconds: float | None = None) -> None:
        """Count a run and leave a line about it.

        Args:
            planned: the run.
            line: what to print.
            seconds: what it took; None if it failed.
        """
        with self._lock:
            self._left.pop(planned.folder.path, None)
            if seconds is None:
                self._failed += 1
            else:
                self._seconds.setdefault((planned.job.protocol.name, planned.job.method), []).append(seconds)
            self._progress.advance(self._all)
            self.say(line, style="red" if seconds is None else None)
            if self._console.is_terminal:
                self.refresh()

    def refresh(self) -> None:
        """Read where the runs are, and draw it."""
        with self._lock:
            self._refresh()

    def _refresh(self) -> None:
        running: dict[Any, float] = {}
        for path, planned in list(self._left.items()):
            try:
                status = json.loads(planned.folder.status.read_text(encoding="utf-8"))
                experience, experiences = int(status["experience"]), int(status["experiences"])
                epoch, epochs = int(status["epoch"]), int(status["epochs"])
            except (OSError, ValueError, KeyError, TypeError):
                continue
            total, done = experiences * epochs, experience * epochs + epoch
            position = f"experience {experience + 1}/{experiences} epoch {epoch}/{epochs}"
            if path not in self._bars:
                self._bars[path] = self._progress.add_task(str(planned), total=total, position="")
            self._progress.update(self._bars[path], total=total, completed=done, position=position)
            running[path] = done / total if total else 0.0
        for path in [path for path in self._bars if path not in running]:
            self._progress.remove_task(self._bars.pop(path))
        parts = [f"{len(running)} running"] + ([f"{self._failed} failed"] if self._failed else [])
        left = self.seconds_left(running)
        parts += [f"about {_duration(left)} left"] if left is not None else []
        self._progress.update(self._all, position=", ".join(parts))
        self._progress.refresh()

    def seconds_left(self, running: dict[Any, float]) -> float | None:
        """Estimate the time until all runs are done, from those that are.

        Args:
            running: folder of each running one to the share that is done.

        Returns:
            Seconds; None before the first has ended.
        """
        if not self._seconds:
            return None
        means = {key: statistics.fmean(values) for key, values in self._seconds.items()}
        overall = statistics.fmean(means.values())
        total = 0.0
        for path, planned in list(self._left.items()):
            of_protocol = [mean for (protocol, _), mean in means.items() if protocol == planned.job.protocol.name]
            guess = means.get(
                (planned.job.protocol.name, planned.job.method),
                statistics.fmean(of_protocol) if of_protocol else overall,
            )
            total += guess * (1 - running.get(path, 0.0))
        return total / max(1, min(self._jobs, len(self._left)))

    def _watch(self) -> None:
        while not self._stop.wait(_PAUSE):
            self.refresh()


def _duration(seconds: float) -> str:
    """Write seconds as people say them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
