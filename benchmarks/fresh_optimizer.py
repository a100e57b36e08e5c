"""An optimizer that remembers nothing of earlier experiences."""

from __future__ import annotations

from typing import Any

from avalanche.training.plugins import SupervisedPlugin


class FreshOptimizer(SupervisedPlugin[Any]):
    """Lets each experience begin without moments and counts of steps, which Avalanche keeps."""

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Forget them."""
        strategy.optimizer.state.clear()
