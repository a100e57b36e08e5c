"""When a penalty acts: its value joins the loss before the backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from avalanche.models import MultiHeadClassifier
from avalanche.models.cosine_layer import CosineIncrementalClassifier
from avalanche.training.templates.base_sgd import BaseSGDTemplate
from torch import nn

from avalanche_gradproj.methods.base import Penalty
from avalanche_gradproj.plugins.base import MethodPlugin, acts, acts_before, wraps_epoch
from avalanche_gradproj.plugins.reading import mini_batches

#: Heads that belong to one task: data of other tasks gives them no gradient. (Those of cosine layers, which grow by
#: changing the names of their parameters, count among them.)
OWN_HEADS = (MultiHeadClassifier, CosineIncrementalClassifier)


def own_heads(model: nn.Module) -> list[str]:
    """Return the names of a model's heads that belong to one task each.

    An `IncrementalClassifier` of its own is shared by all experiences, and is not among them.
    """
    return [name for name, module in model.named_modules() if name and isinstance(module, OWN_HEADS)]


def alone_with_gradients(plugin: Any, strategy: Any) -> bool:
    """Whether a gradient that `plugin` adds after the backward pass counts as if its term had been part of the loss.

    Not where the strategy has a training loop or a backward pass of its own (it may scale the loss) or keeps the graph
    (for others who differentiate the loss), and not beside plugins that act on the loss before the backward pass (they
    may scale it too), or on gradients before this one does.
    """
    kind, own = type(strategy), vars(strategy)
    if kind.backward is not BaseSGDTemplate.backward or "backward" in own or getattr(strategy, "retain_graph", False):
        return False
    loop = own.get("training_epoch")
    if not kind.training_epoch.__module__.startswith("avalanche.") or not (loop is None or wraps_epoch(loop)):
        return False
    changes_loss = any(acts(other, "before_backward") for other in strategy.plugins if other is not plugin)
    return not changes_loss and not acts_before(plugin, strategy.plugins, "after_backward")


class PenaltyPlugin(MethodPlugin):
    """Runs a `Penalty`: added to `strategy.loss` before each backward pass, so that the loss that is logged holds it.

    Args:
        method: the core.
        record_batch_size: samples in a mini-batch of the pass over the data after an experience.

    Raises:
        ConfigurationError: if `record_batch_size` is no positive integer.
    """

    method: Penalty

    def __init__(self, method: Penalty, *, record_batch_size: int = 128) -> None:
        super().__init__(method, record_batch_size=record_batch_size)

    def _start(self, strategy: Any, size: int) -> None:
        self.method.start(strategy.model, strategy.optimizer, heads=own_heads(strategy.model), samples=size)

    def before_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Add the penalty to the loss, where there is one."""
        if self.method.penalising:
            strategy.loss = self.method.objective(strategy.loss)

    def _batches(self, dataset: Any, strategy: Any) -> Iterator[list[Any]]:
        """Yield the samples that the method draws; the last mini-batch of a few is not one sample alone."""
        return mini_batches(strategy, dataset, self._groups(self.method.draw(len(dataset)).tolist()))

    def _groups(self, chosen: Sequence[int]) -> Iterator[Sequence[int]]:
        begin = 0
        while begin < len(chosen):
            # A layer that normalises by the mini-batch cannot take one sample.
            lone = len(chosen) - begin == self.record_batch_size + 1
            end = begin + self.record_batch_size + lone
            yield chosen[begin:end]
            begin = end
