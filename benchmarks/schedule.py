"""The learning-rate schedule of the GPM family: driven by the validation loss, best weights kept.

After every epoch the validation loss decides: a new best is remembered with its weights; after `patience`
epochs without one the learning rate is divided by `lr_factor`; below `lr_min` the experience ends. At the end
of the experience the best weights come back. The plugin has to stand before the method's own, so that the
method consolidates what is kept.
"""

from __future__ import annotations

import math
from typing import Any

from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor

from benchmarks.evaluate import mean_loss
from benchmarks.streams import Stream


class ValidationSchedule(SupervisedPlugin[Any]):
    """Falls in learning rate when validation stops improving and restores the best weights.

    Args:
        stream: holds the validation experiences; with several heads, experience i uses head i.
        lr: learning rate at the start of each experience.
        patience: epochs without a better loss before the rate falls.
        lr_factor: what the rate is divided by.
        lr_min: the experience ends when the rate would fall below.
        batch_size: samples of a validation batch.
        joint: validate on all experiences together, for joint training.

    Raises:
        ValueError: if the stream has no validation experiences.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        lr: float,
        patience: int,
        lr_factor: float,
        lr_min: float,
        batch_size: int,
        joint: bool = False,
    ) -> None:
        super().__init__()
        if not stream.valid:
            raise ValueError("the schedule needs validation experiences, the stream has none")
        self._stream = stream
        self._initial_lr = lr
        self._patience = patience
        self._lr_factor = lr_factor
        self._lr_min = lr_min
        self._batch_size = batch_size
        self._joint = joint
        self._lr = lr
        self._best_loss = math.inf
        self._left = patience
        self._best: dict[str, Tensor] = {}

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Start over: initial rate, no best loss, the current weights as the best so far."""
        self._lr = self._initial_lr
        self._best_loss = math.inf
        self._left = self._patience
        self._remember(strategy)
        self._set_rate(strategy)

    def after_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Validate, then remember the weights, go on, lower the rate or end the experience."""
        loss = self._validate(strategy)
        if loss < self._best_loss:
            self._best_loss = loss
            self._left = self._patience
            self._remember(strategy)
            return
        self._left -= 1
        if self._left > 0:
            return
        self._lr /= self._lr_factor
        if self._lr < self._lr_min:
            # Avalanche looks at the request before an epoch begins: one made after the last epoch would end
            # the next experience instead.
            if strategy.clock.train_exp_epochs + 1 < strategy.train_epochs:
                strategy.stop_training()
            return
        self._left = self._patience
        self._set_rate(strategy)

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Bring the best weights back."""
        strategy.model.load_state_dict(self._best)
        self._best = {}

    def _validate(self, strategy: Any) -> float:
        """Mean loss over the samples of the current experience, or of all for joint training."""
        chosen = range(len(self._stream.valid)) if self._joint else [strategy.experience.current_experience]
        total, count = 0.0, 0
        for position in chosen:
            dataset = self._stream.valid[position]
            task = position if self._stream.n_heads else 0
            loss = mean_loss(strategy.model, dataset, task, self._batch_size, strategy.device)
            total, count = total + loss * len(dataset), count + len(dataset)
        return total / count

    def _remember(self, strategy: Any) -> None:
        """Copy the weights, on the device where they are."""
        self._best = {key: value.detach().clone() for key, value in strategy.model.state_dict().items()}

    def _set_rate(self, strategy: Any) -> None:
        """Give the current rate to the optimizer."""
        for group in strategy.optimizer.param_groups:
            group["lr"] = self._lr
