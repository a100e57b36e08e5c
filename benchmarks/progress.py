"""Progress on the terminal: how many runs are done, and where the current one is.

Everything goes to standard error, so that a table on standard output can be piped. Without a terminal there
are no bars, only a line for each run that ended.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

from avalanche.training.plugins import SupervisedPlugin
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Report = Callable[[int, int, int, int], None]


def silent(experience: int, experiences: int, epoch: int, epochs: int) -> None:
    """Report nothing."""
    del experience, experiences, epoch, epochs


class ProgressPlugin(SupervisedPlugin[Any]):
    """Tells where a training is.

    Args:
        report: called with experience, number of experiences, epochs done and epochs planned.
        experiences: number of training experiences (1 for joint training).
    """

    def __init__(self, report: Report, experiences: int) -> None:
        super().__init__()
        self._report = report
        self._experiences = experiences

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Announce the experience."""
        self._report(strategy.clock.train_exp_counter, self._experiences, 0, strategy.train_epochs)

    def after_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Announce the epoch that ended; Avalanche's clock counts it only after all other plugins."""
        done = strategy.clock.train_exp_epochs + 1
        self._report(strategy.clock.train_exp_counter, self._experiences, done, strategy.train_epochs)


class Bars:
    """Two bars, one for all runs and one for the epochs of the current run.

    Args:
        runs: how many runs there will be.
        console: where to draw; standard error by default.
    """

    def __init__(self, runs: int, console: Console | None = None) -> None:
        console = console or Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[position]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._console = console
        self._all = self._progress.add_task("runs", total=runs, position="")
        self._current = self._progress.add_task("", total=None, position="", visible=False)

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def begin(self, label: str) -> None:
        """Show the bar of a new run."""
        self._progress.reset(self._current, description=label, visible=True, position="")

    def report(self, experience: int, experiences: int, epoch: int, epochs: int) -> None:
        """Move the bar of the current run; see `Report`."""
        self._progress.update(
            self._current,
            total=experiences * epochs,
            completed=experience * epochs + epoch,
            position=f"experience {experience + 1}/{experiences} epoch {epoch}/{epochs}",
        )

    def end(self, line: str, *, style: str | None = None) -> None:
        """Count a run and leave a line about it.

        Args:
            line: what to print.
            style: rich style of the line.
        """
        self._progress.advance(self._all)
        self._console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)
