"""Loss and accuracy of the training batches, epoch by epoch: summed where the network is, read once an epoch."""

from __future__ import annotations

from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor


class EpochCurves(SupervisedPlugin[Any]):
    """Records the mean loss and the accuracy of the training batches, as they were before each step.

    The loss is what the strategy minimises, a penalty included.

    Attributes:
        epochs: of the current experience, (loss, percent correct) for each epoch that has ended.
    """

    def __init__(self) -> None:
        super().__init__()
        self.epochs: list[tuple[float, float]] = []
        self._loss: Tensor | None = None
        self._correct: Tensor | None = None
        self._count = 0

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Begin a new experience."""
        self.epochs = []

    def before_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Begin a new epoch."""
        self._loss = torch.zeros((), dtype=torch.float64, device=strategy.device)
        self._correct = torch.zeros((), dtype=torch.int64, device=strategy.device)
        self._count = 0

    def after_update(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Add the batch of the step that was taken."""
        labels = strategy.mb_y
        if self._loss is None or self._correct is None:
            return
        with torch.no_grad():
            self._loss.add_(strategy.loss.reshape(()), alpha=len(labels))
            self._correct.add_((strategy.mb_output.argmax(1) == labels).sum())
        self._count += len(labels)

    def after_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Read the sums."""
        if self._loss is not None and self._correct is not None and self._count:
            self.epochs.append((float(self._loss) / self._count, 100.0 * int(self._correct) / self._count))
        self._loss = self._correct = None
