"""Gradients of old experiences at the current weights, by one pass each or by one pass over all of them.

One pass an experience is right for every model. BatchNorm then normalises by the statistics of the experience's own
samples, as it does in training, and its running statistics are left as they are.

Where every parameter is part of a matrix layer and no BatchNorm is in training mode, samples do not meet, and one pass
over all samples does: the backward pass stops at the layers' outputs, and a weight's gradient for experience k is
`D_k^T A_k`, with D_k the rows of the gradient at the layer's output that belong to k and A_k those of its input
(`methods/split_pass.py`). Whether that holds is tried out once an experience, before training begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from avalanche_gradproj.errors import ModelError
from avalanche_gradproj.layers.norm import tracked_norms
from avalanche_gradproj.layers.record import undisturbed
from avalanche_gradproj.methods.base import Forward
from avalanche_gradproj.methods.episodic import EpisodicMemory
from avalanche_gradproj.methods.gradient_blocks import GradientBlocks
from avalanche_gradproj.methods.split_pass import SplitPass, covered_units

#: Loss of a model's output against targets.
Criterion = Callable[[Any, Tensor], Tensor]

#: Samples an experience in the trial of the single pass, and how far the two ways may differ, relative to the gradient.
TRIAL_SAMPLES, TRIAL_ERROR = 4, 1e-3


@contextmanager
def untouched_statistics(model: nn.Module, modes: Mapping[nn.Module, bool] | None = None) -> Iterator[None]:
    """Normalise as in training, by the statistics of the batch, and leave running ones as they are.

    Args:
        model: the model.
        modes: module -> whether it will be in training mode; default: as it is now.
    """
    norms = [
        module
        for module in tracked_norms(model).values()
        if module.track_running_stats and (module.training if modes is None else modes[module])
    ]
    try:
        for module in norms:
            module.track_running_stats = False  # type: ignore[assignment]
        yield
    finally:
        for module in norms:
            module.track_running_stats = True  # type: ignore[assignment]


class OldGradients:
    """Computes the gradients of all old experiences into the first rows of `GradientBlocks`.

    Args:
        model: the model in training; its modes, statistics and gradients stay as they are.
        memory: samples of old experiences.
        blocks: where the gradients go.
        forward: runs the model on (inputs, targets[, task labels]).
        criterion: loss of its output against the targets, of one experience.

    Raises:
        ModelError: if the model cannot run on the memory as it is (it needs task labels and there are none).
    """

    def __init__(
        self, model: nn.Module, memory: EpisodicMemory, blocks: GradientBlocks, forward: Forward, criterion: Criterion
    ) -> None:
        self._model, self._memory, self._blocks = model, memory, blocks
        self._forward, self._criterion = forward, criterion
        self._device = blocks.rows.device
        self._batch_norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self._split: SplitPass | None = None
        #: What the model is lent in place of the memory: it may write into its input.
        self._lent: dict[int, tuple[tuple[Tensor, ...], list[int]]] = {}
        #: Why every experience takes a pass of its own, empty where one pass does.
        self.reason = ""
        self._run_once()
        self._try_single_pass()

    @property
    def note(self) -> str:
        """How the gradients are computed, for the report."""
        if self.reason:
            return f"gradients of old experiences: one pass each ({self.reason})"
        return "gradients of old experiences: one pass over all of them, split by experience"

    @property
    def single_pass(self) -> bool:
        """Whether one pass does now: no BatchNorm has been put into training mode since."""
        return self._split is not None and not any(module.training for module in self._batch_norms)

    def compute(self) -> None:
        """Fill all rows but the last with the gradients at the current weights."""
        if self._split is not None and self.single_pass:
            self._split.compute(self._blocks, *self._joined())
        else:
            for experience in range(len(self._memory)):
                self._one_pass(experience, self._batch(experience))

    def _one_pass(self, experience: int, batch: tuple[Tensor, ...]) -> None:
        names = list(self._blocks.parameters)
        with torch.enable_grad(), untouched_statistics(self._model):
            loss = self._criterion(self._forward(self._model, batch), batch[1])
            gradients: tuple[Tensor | None, ...] = (None,) * len(names)
            if loss.requires_grad:
                gradients = torch.autograd.grad(loss, list(self._blocks.parameters.values()), allow_unused=True)
        with torch.no_grad():
            self._blocks.put(experience, dict(zip(names, gradients, strict=True)))

    @property
    def bytes_lent(self) -> int:
        """Bytes of copies of the samples, which the model is run on."""
        return sum(part.numel() * part.element_size() for parts, _ in self._lent.values() for part in parts)

    def _batch(self, experience: int) -> tuple[Tensor, ...]:
        return self._lend(experience, self._memory[experience])

    def _few(self, experience: int) -> tuple[Tensor, ...]:
        parts = (part for part in self._memory[experience] if part is not None)
        return tuple(part[:TRIAL_SAMPLES].clone().to(self._device) for part in parts)

    def _joined(self) -> tuple[tuple[Tensor, ...], int]:
        return self._lend(-1, self._memory.joined or ()), len(self._memory)

    def _lend(self, key: int, sample: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """Return a sample on the model's device, as it was however the model has treated what it was lent."""
        own = tuple(part for part in sample if part is not None)
        if own and own[0].device != self._device:
            return tuple(part.to(self._device, non_blocking=True) for part in own)
        if key not in self._lent:
            parts = tuple(part.clone() for part in own)
            self._lent[key] = parts, [part._version for part in parts]
        parts, versions = self._lent[key]
        for index, (part, original) in enumerate(zip(parts, own, strict=True)):
            if part._version != versions[index]:  # known on the host: written into since
                part.copy_(original)
                versions[index] = part._version
        return parts

    def _run_once(self) -> None:
        """Try the model on a few samples of each experience, so that what cannot work fails before training.

        In training mode, in which the passes run; random states and statistics stay as they are.
        """
        modes = {module: module.training for module in self._model.modules()}
        with undisturbed(self._model), untouched_statistics(self._model, modes):
            for module, training in modes.items():
                module.training = training
            for experience in range(len(self._memory)):
                batch = self._few(experience)
                try:
                    self._criterion(self._forward(self._model, batch), batch[1])
                except (TypeError, ValueError) as error:
                    labels = "no task labels" if len(batch) == 2 else "task labels as the last of a batch"
                    raise ModelError(
                        f"the model cannot be trained on the memory of experience {experience}, which holds {labels} "
                        f"({error}): if it needs task labels, give batches (inputs, targets, task labels) and a "
                        "forward that hands them on"
                    ) from error

    def _try_single_pass(self) -> None:
        if self._memory.joined is None:
            self.reason = "their inputs differ in shape"
        elif any(module.training for module in self._batch_norms):
            self.reason = "BatchNorm in training mode"
        else:
            units, self.reason = covered_units(self._model, list(self._blocks.parameters))
            if not self.reason:
                self._split = SplitPass(self._model, units, self._forward, self._criterion)
                self.reason = self._trial(self._split)
        if self.reason:
            self._split = None

    def _trial(self, split: SplitPass) -> str:
        """Compare both ways on a few samples of each experience, in evaluation mode; the rows are overwritten."""
        count, rows = len(self._memory), self._blocks.rows
        batches = [self._few(experience) for experience in range(count)]
        joined = tuple(torch.cat(column) for column in zip(*batches, strict=True))
        with undisturbed(self._model):
            try:
                split.compute(self._blocks, tuple(part.clone() for part in joined), count)
            except (ModelError, RuntimeError) as error:
                return str(error)
            found = rows[:-1].clone()
            for experience, batch in enumerate(batches):
                self._one_pass(experience, batch)
        apart, size = (found - rows[:-1]).norm(dim=1), rows[:-1].norm(dim=1)
        agree = bool((apart <= TRIAL_ERROR * size).all())
        return "" if agree else "samples influence each other, or a weight is used outside of its layer"
