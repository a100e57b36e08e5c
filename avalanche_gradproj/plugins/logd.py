"""LOGD as an Avalanche plugin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from avalanche.benchmarks.utils.data_loader import ReplayDataLoader
from avalanche.models import avalanche_forward
from avalanche.models.utils import is_multi_task_module
from torch import Tensor, nn

from avalanche_gradproj.errors import ConfigurationError, DataError
from avalanche_gradproj.methods.logd_core import LayerwiseGradientDecomposition
from avalanche_gradproj.plugins.base import GradientTransformPlugin, _is_piece


def _forward(model: nn.Module, batch: Sequence[Tensor]) -> Any:
    """Run a model on a batch of the memory as the strategy does on a mini-batch."""
    return avalanche_forward(model, batch[0], batch[-1]) if len(batch) > 2 else model(batch[0])


class LOGDPlugin(GradientTransformPlugin):
    """Layerwise Optimization by Gradient Decomposition (arXiv 2105.07561) for any strategy, model and optimizer.

    After each experience `patterns_per_exp` of its training samples are kept, with task labels; those drawn at random
    with evaluation transforms. At every later step the gradients of all old experiences are computed on them, with the
    strategy's criterion, and in each block of parameters the mini-batch's gradient g becomes the closest vector that is
    orthogonal to what is specific to one old experience and does not oppose what they share
    (`methods.logd.logd_update`).

    All parameters that take a gradient are decomposed, task heads too; a head that the mini-batch does not use stays as
    it is. `include` and `exclude` choose others; `report()` lists every parameter with its block, and how the old
    gradients are computed: one pass an experience, or a single one (see `methods.old_gradients`).

    In passes over the memory BatchNorm normalises by the batch, as in training, and its running statistics stay.
    Dropout draws from the global random state, as in training.

    Memory: the samples (`method.bytes_held`), and during training (K + 2) p numbers for K old experiences and p
    decomposed parameters.

    Args:
        patterns_per_exp: samples kept of each experience; 0: training is bit for bit that of the strategy alone.
        n_components: leading principal components of the specific gradients that are removed (3 in the official
            scripts), None for all directions.
        variant: `"paper"`, or `"official"`: as the authors' code, with a margin.
        margin: of the official variant.
        blocks: `"layer"`: all parameters of one module; `"network"`; or a number of consecutive parameter tensors (5
            in the official scripts).
        include: shell-style patterns of parameters or modules to decompose; default all.
        exclude: patterns of those to leave alone.
        selection: samples that are kept: `"random"`, or `"last"`: those seen last in training, as they were seen, with
            training transforms (as the official code); not beside replay, whose mini-batches hold other samples too.
        memory_device: where samples lie; None for the strategy's device.
        seed: of the generator that draws samples; the global random state is not touched by it.

    Raises:
        ConfigurationError: for a value out of range or an unknown option.

    Errors while training begins (before any step): `ModelError`, `ConfigurationError`, `DataError`, each naming the
    argument or parameter. `NonFiniteError` after an experience in which a gradient on the memory was not finite.
    """

    method: LayerwiseGradientDecomposition

    def __init__(
        self,
        patterns_per_exp: int = 256,
        n_components: int | None = None,
        *,
        variant: str = "paper",
        margin: float = 0.5,
        blocks: str | int = "layer",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        selection: str = "random",
        memory_device: torch.device | str | None = None,
        seed: int = 0,
    ) -> None:
        method = LayerwiseGradientDecomposition(
            patterns_per_exp,
            n_components,
            forward=_forward,
            variant=variant,
            margin=margin,
            blocks=blocks,
            include=include,
            exclude=exclude,
            selection=selection,
            memory_device=memory_device,
            seed=seed,
        )
        super().__init__(method)

    def before_train_dataset_adaptation(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Check for task labels, before Avalanche adapts the model by them."""
        if is_multi_task_module(strategy.model) and not hasattr(strategy.experience, "task_labels"):
            raise DataError(
                f"the forward of {type(strategy.model).__name__} needs task labels and experience "
                f"{strategy.experience.current_experience} has none: give a benchmark with task labels "
                "(with_task_labels), or a model without task heads"
            )

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Take the strategy's criterion, and start the method."""
        self.method.criterion = strategy._criterion
        if not _is_piece(strategy.experience) or strategy.experience.is_first_subexp:
            self.method.memory.forget()
        super().before_training_exp(strategy, *args, **kwargs)

    def before_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Refuse mini-batches of which one cannot say whose samples they hold."""
        if self.method.memory.selection == "last" and isinstance(strategy.dataloader, ReplayDataLoader):
            raise ConfigurationError(
                "selection='last': another plugin mixes samples of old experiences into the mini-batches, so that "
                "those seen last are not the experience's own: give selection='random'"
            )
        super().before_training_epoch(strategy, *args, **kwargs)

    def before_forward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Take note of the mini-batch."""
        self.method.observe(strategy.mbatch)
        super().before_forward(strategy, *args, **kwargs)
