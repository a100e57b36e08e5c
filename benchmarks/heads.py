"""What turns features or logits into those of a task: a head a task, or one output layer with units masked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from avalanche.models import MultiHeadClassifier, MultiTaskModule
from torch import Tensor, nn

#: The logit of a class of another task.
MASKED = -1e11


class TaskHeads(MultiHeadClassifier):
    """Avalanche's multi-head classifier with all heads there from the start.

    Args:
        in_features: width of the trunk's output.
        n_outputs: units of each head; no experience may have more classes.
        n_heads: number of heads, for the task labels 0 .. n_heads - 1.
        bias: whether the heads have biases.
    """

    def __init__(self, in_features: int, n_outputs: int, n_heads: int, *, bias: bool = False) -> None:
        # Masking would hide units of classes not seen yet; here every unit belongs to its task from the
        # start.
        super().__init__(in_features, initial_out_features=n_outputs, masking=False)
        head_type = type(self.classifiers["0"])
        for task in range(1, n_heads):
            self.classifiers[str(task)] = head_type(in_features, n_outputs, masking=False, auto_adapt=False)
            self.register_buffer(f"active_units_T{task}", torch.zeros(n_outputs, dtype=torch.int8))
        if not bias:
            for head in self.classifiers.values():
                head.classifier.bias = None

    def adaptation(self, experience: Any) -> None:
        """Check that the experience fits the heads that exist; nothing grows.

        Args:
            experience: the experience about to be trained or evaluated.

        Raises:
            ValueError: if the experience has a task or a class without a unit.
        """
        tasks, top = set(experience.task_labels), max(experience.classes_in_this_experience)
        missing = sorted(task for task in tasks if str(task) not in self.classifiers)
        if missing or top >= self.starting_out_features:
            raise ValueError(
                f"experience with tasks {sorted(tasks)} and labels up to {top} does not fit "
                f"{len(self.classifiers)} heads of {self.starting_out_features} units"
            )
        super().adaptation(experience)


class MultiHead(MultiTaskModule):
    """A trunk shared by all tasks and a head for each.

    Args:
        trunk: maps images to features.
        heads: maps features and task labels to logits.
    """

    def __init__(self, trunk: nn.Module, heads: TaskHeads) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = heads

    def forward(self, x: Tensor, task_labels: Tensor | int | None = None) -> Any:
        """Logits of each sample's own task, [batch, units].

        The features are computed for the whole batch at once: with batch statistics (the AlexNet) it matters
        which samples are normalised together.

        Args:
            x: images.
            task_labels: one label a sample, or one for all; None asks for every task's logits.

        Returns:
            The logits, or a dict of them for None.
        """
        features = self.trunk(x)
        if isinstance(task_labels, int):
            return self.heads.forward_single_task(features, task_labels)
        return self.heads(features, task_labels)

    def forward_single_task(self, x: Tensor, task_label: int) -> Tensor:
        """Logits of one task for all samples, [batch, units]."""
        return self.heads.forward_single_task(self.trunk(x), task_label)


class MaskedOutputs(MultiTaskModule):
    """A network with one output layer in which only the units of the sample's own task count.

    Args:
        network: maps images to logits of all classes.
        classes: units of each task.
        n_outputs: units of the output layer.
    """

    def __init__(self, network: nn.Module, classes: Sequence[Sequence[int]], n_outputs: int) -> None:
        super().__init__()
        self.network = network
        others = torch.ones(len(classes), n_outputs, dtype=torch.bool)
        for task, own in enumerate(classes):
            others[task, list(own)] = False
        self.register_buffer("others", others)

    def forward(self, x: Tensor, task_labels: Tensor | int | None = None) -> Any:
        """Logits of all classes, [batch, n_outputs], those of other tasks at `MASKED`.

        The whole batch passes at once: BatchNorm normalises what comes together.

        Args:
            x: images.
            task_labels: one label a sample, or one for all; None asks for every task's logits.

        Returns:
            The logits, or a dict of them for None.
        """
        logits = self.network(x)
        if task_labels is None:
            return {task: _masked(logits, own) for task, own in enumerate(self.others)}
        return _masked(logits, self.others[task_labels])

    def forward_single_task(self, x: Tensor, task_label: int) -> Tensor:
        """Logits with those of all tasks but one masked, [batch, n_outputs]."""
        return _masked(self.network(x), self.others[task_label])


def _masked(logits: Tensor, others: Tensor) -> Tensor:
    return logits.masked_fill(others, max(MASKED, torch.finfo(logits.dtype).min))
