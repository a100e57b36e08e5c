"""Where a run's training is, told by a plugin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from avalanche.training.plugins import SupervisedPlugin

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
